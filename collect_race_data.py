"""The expert: a privileged driver that reads the track and the car, never the pixels.

Racing line: the path of least curvature inside the road (Heilmeier et al. 2019, "Minimum curvature
trajectory planning and control for an autonomous race car"). Speed: the tyres' lateral limit, then
a backward pass for braking. Steering: pure pursuit (Coulter 1992, CMU-RI-TR-92-01), whose arc is
measured from the direction of travel instead of the nose, with yaw damping and counter-steer.
The constants were tuned with CMA-ES on tracks 200000 to 200039, which no data set contains.

Units: the world's (a tile is 3.5 long, the road 13.3 wide), seconds, radians; left is positive.
"""

import math

import numpy as np

from buffer import HELD_OUT_MOD
from collect_data import collect, collector_parser
from runtime import run

SPACING = 1.0       # units between the points of the resampled racing line
WHEELBASE = 3.24    # units, front axle to rear axle
STEER_STOP = 0.4    # radians: the joint stops here, a larger action adds nothing
GRASS_GRIP = 0.6    # friction of grass over friction of road
REAR_AXLE = 1.64    # units from the hull's centre to the rear axle

#                 calm     full   each driver is one column; `pace` blends them
PARAMETERS = {
    "width":       (5,         6.6),   # units the line may leave the middle of the road (half width 6.67)
    "v_max":       (66,        100),   # units/s
    "lateral":     (100,       267),   # units/s^2 in corners
    "braking":     (69.8,     69.8),   # units/s^2 before corners
    "lead":        (0.0892, 0.0892),  # s the target speed is read ahead of the car
    "look":        (10.7,     10.7),   # units, the lookahead at rest
    "look_v":      (0.0822, 0.0822),  # s, the lookahead's growth with speed
    "slip_aim":    (0.844,   0.844),   # 0 the arc starts along the nose, 1 along the velocity
    "yaw":         (0.0393, 0.0393),   # s, steering against the error of the yaw rate
    "counter":     (0.621,   0.621),   # steering into a slide, over the slip angle
    "arc":         (1.28,     1.28),   # lateral limit on the pursuit's own arc, over `lateral`
    "gas":         (0.121,   0.121),   # gas per unit/s too slow
    "gas_cap":     (1.85,     1.85),   # fraction of the gas that fills the rear tyres' friction circle
    "gas_slip":    (7.04,     7.04),   # units/s of rear side slip that leaves no room for gas
    "brake":       (0.0329, 0.0329),  # brake per unit/s too fast
    "brake_cap":   (0.275,   0.275),  # 0.18 fills the friction circle
}


def centre_line(track):
    """The road's middle and its rightward normals, two (N, 2) arrays, 3.5 units apart, closed."""
    beta, x, y = np.array(track)[:, 1:].T
    normal = np.column_stack([np.cos(beta), np.sin(beta)])
    middle = np.column_stack([x, y])
    # The generator leaves a gap of two tiles between last and first: fill in its middle.
    middle = np.vstack([middle, (middle[-1] + middle[0]) / 2])
    normal = np.vstack([normal, (normal[-1] + normal[0]) / 2])
    return middle, normal / np.linalg.norm(normal, axis=1, keepdims=True)


def curvature(path):
    """Signed curvature (1/units, left positive) and point spacing (units) of a closed path (N, 2)."""
    back, ahead = path - np.roll(path, 1, 0), np.roll(path, -1, 0) - path
    step = (np.hypot(*back.T) + np.hypot(*ahead.T)) / 2
    return (back[:, 0] * ahead[:, 1] - back[:, 1] * ahead[:, 0]) / step**3, step


def racing_line(track, width, rounds=4, iterations=60):
    """The closed path (N, 2) of least squared curvature at most `width` units off the middle.

    Minimises |A e + b|^2 over the offsets e, |e| <= width, by ADMM (Boyd et al. 2011); A and b
    are the curvature linearised about the last round's path. Sharp bends weigh more each round.
    """
    middle, normal = centre_line(track)
    n = len(middle)
    i = np.arange(n)
    offset, dual, weight, rho = np.zeros(n), np.zeros(n), np.ones(n), 1e-3
    for _ in range(rounds):
        path = middle + normal * offset[:, None]
        kappa, step = curvature(path)
        tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0)
        left = np.column_stack([-tangent[:, 1], tangent[:, 0]])
        left *= (weight / step**2 / np.hypot(*tangent.T))[:, None]
        a = np.zeros((n, n))
        for shift, k in ((1, 1), (0, -2), (-1, 1)):
            a[i, (i - shift) % n] = k * (left * np.roll(normal, shift, 0)).sum(1)
        b = (left * (np.roll(middle, 1, 0) + np.roll(middle, -1, 0) - 2 * middle)).sum(1)
        solve = np.linalg.inv(a.T @ a + rho * np.eye(n))
        gradient = a.T @ b
        for _ in range(iterations):
            free = solve @ (rho * (offset - dual) - gradient)
            offset = np.clip(free + dual, -width, width)
            dual += free - offset
        weight = np.sqrt(np.abs(kappa) + 0.01)
        weight = weight / weight.mean()
    return middle + normal * offset[:, None]


def speed_profile(kappa, step, v_max, lateral, braking):
    """Speeds (units/s) the tyres allow on a closed path, with room to brake before each bend."""
    bend = np.abs(kappa)
    speed = np.minimum(v_max, np.sqrt(lateral / np.maximum(bend, 1e-6))).tolist()
    bend, step = (bend / lateral).tolist(), step.tolist()
    for j in range(2 * len(speed) - 1, 0, -1):  # twice round: the lap is closed
        i, after = (j - 1) % len(speed), j % len(speed)
        used = min(1.0, speed[after] ** 2 * bend[after])  # of the friction circle, by the bend
        reach = math.sqrt(speed[after] ** 2 + 2 * braking * step[i] * math.sqrt(1 - used * used))
        speed[i] = min(speed[i], reach)
    return np.array(speed)


class Expert:
    """Follows the racing line; `pace` from 0 (calm) to 1 (as fast as it scores best)."""

    def __init__(self, pace=1.0, **changes):
        blended = {k: calm + pace * (full - calm) for k, (calm, full) in PARAMETERS.items()}
        self.__dict__.update(blended | changes)

    def reset(self, env, rng=None):
        """Plans the line and its speeds for env's track."""
        path = racing_line(env.unwrapped.track, self.width)
        kappa, step = curvature(path)
        speed = speed_profile(kappa, step, self.v_max, self.lateral, self.braking)
        closed = np.vstack([path, path[:1]])
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
        s = np.arange(0.0, along[-1], SPACING)
        self.points = np.column_stack([np.interp(s, along, c) for c in closed.T])
        self.x, self.y = self.points.T.tolist()
        self.speed = np.interp(s, along, np.append(speed, speed[0])).tolist()
        self.near = 0

    def _nearest(self, x, y):
        """Index of the line's point nearest to the car: downhill from the last one."""
        n, i = len(self.x), self.near
        best = (self.x[i] - x) ** 2 + (self.y[i] - y) ** 2
        for way in (1, -1):
            while True:
                j = (i + way) % n
                d = (self.x[j] - x) ** 2 + (self.y[j] - y) ** 2
                if d >= best:
                    break
                i, best = j, d
        if best > 15.0**2:  # lost (placed elsewhere, or far off the road): look everywhere
            i = int(((self.points - (x, y)) ** 2).sum(1).argmin())
        self.near = i
        return i

    def heading_error(self, env):
        """Radians from the line's direction to the car's, in -pi..pi, as of the last `act`."""
        i, j = self.near, (self.near + 1) % len(self.x)
        line = math.atan2(self.x[i] - self.x[j], self.y[j] - self.y[i])
        return (env.unwrapped.car.hull.angle - line + math.pi) % (2 * math.pi) - math.pi

    def act(self, env):
        """The action (3,) float32 for now: steer right in -0.4..0.4, gas and brake in 0..1."""
        car = env.unwrapped.car
        hull, n = car.hull, len(self.x)
        (x, y), (vx, vy) = hull.position, hull.linearVelocity
        angle, yaw_rate = hull.angle, hull.angularVelocity
        sin, cos = math.sin(angle), math.cos(angle)
        forward, side = vy * cos - vx * sin, -vx * cos - vy * sin  # units/s, side: leftward
        v = math.hypot(vx, vy)
        slip = math.atan2(side, forward) if v > 5 else 0.0
        near = self._nearest(x, y)
        # The arc that leaves along the direction of travel and hits the line `look` ahead.
        ahead = (near + int((self.look + self.look_v * v) / SPACING)) % n
        dx, dy = self.x[ahead] - x, self.y[ahead] - y
        bearing = math.atan2(-dx, dy) - angle - self.slip_aim * slip
        bearing = (bearing + math.pi) % (2 * math.pi) - math.pi
        turn = math.sin(bearing) if abs(bearing) < math.pi / 2 else math.copysign(1.0, bearing)
        arc = 2 * turn / math.hypot(dx, dy)
        steer = math.atan(WHEELBASE * arc) + self.yaw * (v * arc - yaw_rate) + self.counter * slip
        steer = max(-STEER_STOP, min(STEER_STOP, steer))

        on_road = sum(1 for w in car.wheels if w.tiles) / 4
        grip = GRASS_GRIP + (1 - GRASS_GRIP) * on_road
        limit = math.sqrt(self.arc * self.lateral * grip / (abs(arc) + 1e-6))
        target = min(self.speed[(near + int(self.lead * v / SPACING)) % n], limit)
        used = max(v * v * abs(arc) / (self.arc * self.lateral * grip),
                   abs(side - REAR_AXLE * yaw_rate) / self.gas_slip)
        room = math.sqrt(max(0.0, 1 - used * used))  # of the friction circle, along the car
        gas = brake = 0.0
        if target > v:
            safe = self.gas_cap * grip * (abs(car.wheels[2].omega) + 5) / 185
            gas = min(1.0, self.gas * (target - v), safe * max(room, 0.1))
        else:
            brake = min(self.brake * (v - target), self.brake_cap * grip * max(room, 0.1))
        return np.array([-steer, gas, brake], dtype=np.float32)


def pace_of(job, episode):
    """The paces of --pace take turns; held-out tracks (every tenth episode) get all of them too."""
    return job["paces"][(episode + episode // HELD_OUT_MOD) % len(job["paces"])]


def make_expert(job, episode):
    pace = pace_of(job, episode)
    return Expert(pace), {"name": "expert", "pace": pace}


def pace_parser(doc, frames):
    """The collectors' flags and --pace."""
    p = collector_parser(doc, frames)
    p.add_argument("--pace", type=float, nargs="+", default=[0.0],
                   help="0 calm (about 59 units/s) to 1 full; several take turns. A model of full "
                        "pace alone drives worse: its data rarely shows leaving the limit")
    return p


if __name__ == "__main__":
    run(lambda: collect(pace_parser(__doc__, 1_900_000).parse_args(), "data_race", make_expert))
