"""The expert: a privileged driver that reads the track and the car, never the pixels.

It writes ROOT/data_race/*.npz, one episode a file. Started again, it goes on to the target.

Racing line: the path of least curvature inside the road (Heilmeier et al. 2019, "Minimum curvature
trajectory planning and control for an autonomous race car"). Speed: the tyres' lateral limit, then
a backward pass for braking. Steering: pure pursuit (Coulter 1992, CMU-RI-TR-92-01), whose arc is
measured from between the nose and the direction of travel, with yaw damping and counter-steer.
The constants come from CMA-ES on tracks 200000 to 299999, which no data set contains.

Units: the world's (a tile is 3.5 long, the road 13.3 wide), seconds, radians; left is positive.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import math
from functools import partial

import numpy as np

from buffer import HELD_OUT_MOD
from car.telemetry import Nearest, wrap_angle
from support.cli import Number, run_main
from support.workers import collect, collector_parser

SPACING = 1.0  # units between the points of the resampled racing line
LINE_SEARCH = 15.0  # units from the line: search all of it for the nearest point
AXLE = 1.62  # units from the car's centre to either axle
STEER_STOP = 0.4  # radians: the joint stops here, a larger action adds nothing
GRASS_GRIP = 0.6  # friction of grass over friction of road
FULL_GAS = 185.0  # rad/s: gas of (omega + 5) / FULL_GAS fills the rear tyres' friction circle
MIN_SPEED = 5.0  # units/s below which the direction of travel means nothing

RACE_PACES = [0.8]  # of --pace: the driver aims at what the expert does; full pace asks too much
MAX_OFFSET = 3.0  # of --max_offset: the driver strays up to 4 units from its teacher's line


def road_middle(track):
    """The road's middle and its rightward normals, two (N, 2) arrays, 3.5 units apart, closed."""
    beta, x, y = np.array(track)[:, 1:].T
    both = np.column_stack([x, y, np.cos(beta), np.sin(beta)])
    # The generator leaves a gap of two tiles between last and first: fill in its middle.
    both = np.vstack([both, (both[-1] + both[0]) / 2])
    middle, normal = both[:, :2], both[:, 2:]
    return middle, normal / np.linalg.norm(normal, axis=1, keepdims=True)


def curvature(path):
    """Signed curvature (1/units, left positive), point spacing (units) of a closed path (N, 2)."""
    back, ahead = path - np.roll(path, 1, 0), np.roll(path, -1, 0) - path
    step = (np.hypot(*back.T) + np.hypot(*ahead.T)) / 2
    return (back[:, 0] * ahead[:, 1] - back[:, 1] * ahead[:, 0]) / step**3, step


def racing_line(track, max_offset, sharp, rounds=4, iterations=60):
    """The closed path (N, 2) of least squared curvature at most `max_offset` units off the middle.

    Minimises |A e + b|^2 over the offsets e, |e| <= max_offset, by ADMM (Boyd et al. 2011). A and b
    are the curvature, linearised about the last round's path. A row is weighted by its curvature
    to the power `sharp`: time is lost where the car is slow.
    """
    middle, normal = road_middle(track)
    n = len(middle)
    i = np.arange(n)
    offset, dual, weight, rho = np.zeros(n), np.zeros(n), np.ones(n), 1e-3
    for _ in range(rounds):
        # curvature linearised about the path: A e + b
        path = middle + normal * offset[:, None]
        kappa, step = curvature(path)
        tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0)
        left = np.column_stack([-tangent[:, 1], tangent[:, 0]])
        left *= (weight / step**2 / np.hypot(*tangent.T))[:, None]
        a = np.zeros((n, n))
        for shift, k in ((1, 1), (0, -2), (-1, 1)):
            a[i, (i - shift) % n] = k * (left * np.roll(normal, shift, 0)).sum(1)
        b = (left * (np.roll(middle, 1, 0) + np.roll(middle, -1, 0) - 2 * middle)).sum(1)

        # ADMM
        solve = np.linalg.inv(a.T @ a + rho * np.eye(n))
        gradient = a.T @ b
        for _ in range(iterations):
            free = solve @ (rho * (offset - dual) - gradient)
            offset = np.clip(free + dual, -max_offset, max_offset)
            dual += free - offset
        weight = (np.abs(kappa) + 0.01) ** sharp
        weight = weight / weight.mean()
    return middle + normal * offset[:, None]


def speed_profile(kappa, step, v_max, lateral, braking, circle):
    """Speeds (units/s) to enter each bend of a closed path at sqrt(lateral / |kappa|).

    lateral, braking: units/s^2; circle: the lateral acceleration that leaves no room for braking.
    """
    bend = np.abs(kappa)
    speed = np.minimum(v_max, np.sqrt(lateral / np.maximum(bend, 1e-6))).tolist()
    used, step = (bend / circle).tolist(), step.tolist()
    for j in range(2 * len(speed) - 1, 0, -1):  # twice round: the lap is closed
        i, j = (j - 1) % len(speed), j % len(speed)
        room = math.sqrt(max(0.0, 1 - (speed[j] ** 2 * used[j]) ** 2))
        speed[i] = min(speed[i], math.sqrt(speed[j] ** 2 + 2 * braking * step[i] * room))
    return np.array(speed)


def pursuit_arc(dx, dy, course):
    """Curvature (1/units, left positive) of the arc that leaves along `course` to (dx, dy)."""
    bearing = wrap_angle(math.atan2(-dx, dy) - course)
    # Behind the car the sine falls again: there the tightest arc is the way round.
    turn = math.sin(bearing) if abs(bearing) < math.pi / 2 else math.copysign(1.0, bearing)
    return 2 * turn / max(1.0, math.hypot(dx, dy))


class Expert:
    """Follows the racing line; `pace` from 0 (calm) to 1 (as fast as it scores best).

    max_offset: units the line may leave the middle of the road, whose half width is 6.67.
    """

    sharp = 0.437  # exponent of a bend's weight in the line, over its curvature
    braking = 79.1  # units/s^2 the line asks for before its bends
    circle = 272  # units/s^2 of lateral acceleration that leave no braking
    lead = 0.0683  # s the target speed is read ahead of the car
    look = 11.8  # units, the lookahead at rest
    look_v = 0.0998  # s, the lookahead's growth with speed
    slip_aim = 0.809  # 0: the arc leaves along the nose; 1: along the travel
    yaw_gain = 0.0371  # s, steering against the error of the yaw rate
    counter = 0.79  # radians of steering into a slide, per radian of slip
    catch = 6.28  # units/s of rear slide at which the wheels turn into it
    catch_range = 5.52  # units/s from there to turned fully
    arc_limit = 1.59  # `lateral` the pursuit's own arc may ask for, over the line's
    gas_gain = 0.113  # gas per unit/s too slow
    gas_cap = 2.06  # gas on the straight, over what fills the rear friction circle
    gas_slide = 7.15  # units/s of rear slide that leave no room for gas
    brake_gain = 0.0274  # brake per unit/s too fast
    brake_cap = 0.275  # brake on the straight; 0.18 fills the friction circle
    brake_floor = 0.413  # share of `brake_cap` always left

    def __init__(self, pace=1.0, max_offset=None):
        blend = lambda calm, full: calm + pace * (full - calm)
        self.v_max = blend(64, 108)  # units/s; Box2D stops at 100
        self.lateral = blend(90, 253)  # units/s^2, the line's in its bends
        self.max_offset = blend(3.0, 4.75) if max_offset is None else max_offset

    def reset(self, env, rng=None):
        """Plans the line and its speeds for env's track; nothing here is random."""
        path = racing_line(env.unwrapped.track, self.max_offset, self.sharp)
        speed = speed_profile(*curvature(path), self.v_max, self.lateral, self.braking, self.circle)
        path, speed = np.vstack([path, path[:1]]), np.append(speed, speed[0])
        along = np.append(0.0, np.cumsum(np.hypot(*np.diff(path, axis=0).T)))
        s = np.arange(0.0, along[-1], SPACING)
        line = np.column_stack([np.interp(s, along, c) for c in path.T])
        self.nearest = Nearest(line, LINE_SEARCH)
        self.x, self.y = self.nearest.x, self.nearest.y
        self.speed = np.interp(s, along, speed).tolist()

    def act(self, env):
        """The action (3,) float32 for now: steer right in -0.4..0.4, gas and brake in 0..1."""
        return np.array(self.controls(env), np.float32)

    def controls(self, env):
        """The same as three floats."""
        car = env.unwrapped.car
        hull, n = car.hull, len(self.x)
        at, travel = hull.position, hull.linearVelocity
        x, y, vx, vy = at.x, at.y, travel.x, travel.y
        angle, yaw_rate = hull.angle, hull.angularVelocity
        sin, cos = math.sin(angle), math.cos(angle)
        forward, side, v = vy * cos - vx * sin, -vx * cos - vy * sin, math.hypot(vx, vy)
        slide = abs(side - AXLE * yaw_rate)  # units/s, the rear tyres' sideways

        # steering: the arc to a point ahead, yaw damping, and into a slide
        near = self.nearest(x, y)
        ahead = (near + int((self.look + self.look_v * v) / SPACING)) % n
        slip = math.atan2(side, forward) if v > MIN_SPEED else 0.0
        arc = pursuit_arc(self.x[ahead] - x, self.y[ahead] - y, angle + self.slip_aim * slip)
        steer = math.atan(2 * AXLE * arc)
        steer += self.yaw_gain * (v * arc - yaw_rate) + self.counter * slip
        if v > MIN_SPEED:  # in a slide the wheels follow the travel: the nose can swing back
            catch = max(0.0, min(1.0, (slide - self.catch) / self.catch_range))
            steer += catch * (math.atan2(side + AXLE * yaw_rate, forward) - steer)
        steer = max(-STEER_STOP, min(STEER_STOP, steer))

        # pedals: towards the line's speed and the arc's, with the grip that the arc leaves
        grip = GRASS_GRIP + (1 - GRASS_GRIP) * sum([1 for w in car.wheels if w.tiles]) / 4
        limit = self.arc_limit * self.lateral * grip
        target = self.speed[(near + int(self.lead * v / SPACING)) % n]
        target = min(target, math.sqrt(limit / (abs(arc) + 1e-6)))
        used = max(v * v * abs(arc) / limit, slide / self.gas_slide)
        room = math.sqrt(max(0.0, 1 - used * used))  # of the friction circle, along the car
        if target > v:
            most = self.gas_cap * grip * (abs(car.wheels[2].omega) + 5) / FULL_GAS
            return -steer, min(1.0, self.gas_gain * (target - v), most * room), 0.0
        most = self.brake_cap * grip * max(room, self.brake_floor)
        return -steer, 0.0, min(self.brake_gain * (v - target), most)

    def heading_error(self, env):
        """Radians from the line's direction to the car's, in -pi..pi, as of the last `act`."""
        i, j = self.nearest.last, (self.nearest.last + 1) % len(self.x)
        line = math.atan2(self.x[i] - self.x[j], self.y[j] - self.y[i])
        return wrap_angle(env.unwrapped.car.hull.angle - line)


def pace_of(paces, number):
    """The paces take turns; held-out tracks (every tenth episode) get all of them too."""
    return paces[(number + number // HELD_OUT_MOD) % len(paces)]


def make_expert(number, paces=RACE_PACES, max_offset=MAX_OFFSET):
    pace = pace_of(paces, number)
    policy = Expert(pace, max_offset=max_offset)
    return policy, {"name": "expert", "pace": pace, "max_offset": max_offset}


def main():
    p = collector_parser(__doc__, 1_900_000, RACE_PACES)
    width = Number(float, 0, 6.67, above=True)
    text = "units the line may leave the middle of the road, whose half is 6.67"
    p.add_argument("--max_offset", type=width, default=MAX_OFFSET, help=text)
    args = p.parse_args()
    make_policy = partial(make_expert, paces=args.pace, max_offset=args.max_offset)
    return collect(args, "data_race", make_policy)


if __name__ == "__main__":
    run_main(main)
