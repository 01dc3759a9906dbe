"""The simulator's state of the car, whether a car is recovered, and placing a car anywhere."""

import math

import numpy as np
from gymnasium.envs.box2d import car_dynamics as cd
from gymnasium.envs.box2d import car_racing as cr

TELEMETRY = {  # name -> unit; right and left as the driver sees them
    "speed": "units/s",
    "forward_speed": "units/s along the car",
    "side_speed": "units/s across the car, + to its right",
    "yaw_rate": "rad/s, + to the left",
    "lateral_offset": "units from the centre line, + on its right; the road ends at 6.67",
    "heading_error": "rad, -pi..pi, the road's direction minus the car's, + to the left",
    "curvature_10": "1/units, of the track 10 units ahead, + to the left",
    "curvature_20": "1/units, 20 units ahead",
    "curvature_35": "1/units, 35 units ahead",
    "wheels_off_road": "wheels that touch no tile, 0..4",
    "tile_index": "index of the nearest tile of the track",
    "tiles_visited": "fraction of the track's tiles, 0..1",
    "steer_angle": "rad, of the front left wheel, + to the left",
    "wheel_spin_fl": "rad/s, + forward",
    "wheel_spin_fr": "rad/s",
    "wheel_spin_rl": "rad/s",
    "wheel_spin_rr": "rad/s",
    "x": "units",
    "y": "units",
    "hull_angle": "rad, 0 faces +y, not wrapped",
}
TRACK_SEARCH = 12.0  # units off the centre line beyond which another part may be nearer
LOOK_AHEAD = (3, 6, 10)  # tiles of 3.5 units: about 10, 20 and 35 units
IN_VIEW = 7.0, 1.0  # units off the centre line, rad off its direction: the road is in view
RECOVERY_HOLD = 0.2  # s for which `is_recovered` must stay true
RECOVERY_WHEELS, RECOVERY_HEADING, RECOVERY_SPEED = 3, 0.5, 15.0  # on the road, rad, units/s


def is_recovered(wheels_on_road, heading_error, speed):
    """Whether a car is on the road, along it and moving. It counts after RECOVERY_HOLD seconds.

    wheels_on_road: 0..4; heading_error: rad, from the road or the racing line; speed: units/s.
    """
    aligned = abs(heading_error) < RECOVERY_HEADING
    return wheels_on_road >= RECOVERY_WHEELS and aligned and speed > RECOVERY_SPEED


def wrap_angle(angle):
    """Radians in -pi..pi, of a number or an array."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class Nearest:
    """Finds the point of a closed path (N, 2) nearest to (x, y), given that the car moves on.

    A call with x, y returns its index. It searches downhill from the last one, and all points if
    that ends more than `radius` units off. `last` = None makes the next call search all.
    """

    def __init__(self, path, radius):
        self.path, self.limit, self.last = path, radius**2, None
        self.x, self.y = path.T.tolist()

    def __call__(self, x, y):
        distance = math.inf
        if self.last is not None:
            distance, self.last = self._descend(x, y, self.last)
        if distance >= self.limit:
            self.last = int(((self.path - (x, y)) ** 2).sum(1).argmin())
        return self.last

    def _descend(self, x, y, i):
        xs, ys, n = self.x, self.y, len(self.x)
        best = (xs[i] - x) ** 2 + (ys[i] - y) ** 2
        for step in (1, -1):
            while True:
                j = (i + step) % n
                distance = (xs[j] - x) ** 2 + (ys[j] - y) ** 2
                if distance >= best:
                    break
                i, best = j, distance
        return best, i


class CentreLine:
    """The track as flat lists; `nearest(x, y)` is the index of the nearest tile.

    Position and direction are interpolated between tiles, which are 3.5 units apart. With the
    nearest tile alone, the heading error in a hairpin would jump by 0.3 rad between two frames.
    """

    def __init__(self, track):
        self.track = track
        _, beta, x, y = np.array(track).T
        turn = wrap_angle(np.roll(beta, -1) - np.roll(beta, 1))
        self.nearest = Nearest(np.stack((x, y), 1), TRACK_SEARCH)
        self.x, self.y, self.beta = self.nearest.x, self.nearest.y, beta.tolist()
        self.curvature = (turn / (2 * cr.TRACK_DETAIL_STEP)).tolist()
        self.cos, self.sin = np.cos(beta).tolist(), np.sin(beta).tolist()

    def ahead_of(self, i, x, y):
        """How far (x, y) is, in units, in front of tile i, along its direction."""
        return self.cos[i] * (y - self.y[i]) - self.sin[i] * (x - self.x[i])

    def place(self, x, y):
        """(x, y) seen from the line -> (i, t, direction, offset).

        i: nearest tile. t: tiles in front of it, -1..1: there the line's normal, which turns evenly
        from tile to tile, goes through (x, y). direction: of the line, rad. offset: units to its
        right.
        """
        i = self.nearest(x, y)
        gap = self.ahead_of(i, x, y)
        sign = 1 if gap > 0 else -1
        j = (i + sign) % len(self.x)
        between = abs(gap) + abs(self.ahead_of(j, x, y))
        t = abs(gap) / between if between > 0 else 0.0
        beta = self.beta[i] + t * wrap_angle(self.beta[j] - self.beta[i])
        dx = x - self.x[i] - t * (self.x[j] - self.x[i])
        dy = y - self.y[i] - t * (self.y[j] - self.y[i])
        return i, sign * t, beta, dx * math.cos(beta) + dy * math.sin(beta)

    def curvature_at(self, s):
        """1/units, + to the left, at tile s, a float: interpolated between two tiles."""
        i, n = math.floor(s), len(self.x)
        t = s - i
        return (1 - t) * self.curvature[i % n] + t * self.curvature[(i + 1) % n]


def centre_line(env):
    """The CentreLine of the track that the (unwrapped) env is on."""
    line = env.__dict__.get("centre_line")
    if line is None or line.track is not env.track:
        line = env.centre_line = CentreLine(env.track)
    return line


def telemetry(env):
    """State of the car in any kind of env -> (K,) float32, names and units in TELEMETRY."""
    env = env.unwrapped
    hull, wheels, line = env.car.hull, env.car.wheels, centre_line(env)
    at, v, angle = hull.position, hull.linearVelocity, hull.angle
    x, y, vx, vy = at.x, at.y, v.x, v.y
    c, s = math.cos(angle), math.sin(angle)
    i, t, beta, offset = line.place(x, y)
    return np.array(
        (
            math.hypot(vx, vy),
            c * vy - s * vx,
            c * vx + s * vy,
            hull.angularVelocity,
            offset,
            wrap_angle(beta - angle),
            *[line.curvature_at(i + t + k) for k in LOOK_AHEAD],
            sum([not w.tiles for w in wheels]),
            i,
            env.tile_visited_count / len(line.x),
            wheels[0].joint.angle,
            *[w.omega for w in wheels],
            x,
            y,
            angle,
        ),
        np.float32,
    )


def telemetry_of(env):
    """{name: value} of the telemetry of env."""
    return dict(zip(TELEMETRY, telemetry(env).tolist()))


def place_car(env, x, y, angle, speed=0.0, yaw_rate=0.0):
    """Replace the car by one at (x, y) units, facing `angle` rad (0: +y), in any kind of env.

    speed: units/s along the car, its wheels rolling; yaw_rate: rad/s, + to the left. Pedals and
    steering start at rest; visited tiles, return and step count stay. Returns the new observation.
    """
    env = env.unwrapped
    env.car.destroy()  # or its bodies stay in the world
    env.car = car = cd.Car(env.world, angle, x, y)
    vx, vy = -math.sin(angle) * speed, math.cos(angle) * speed
    centre = car.hull.worldCenter
    for body in (car.hull, *car.wheels):
        body.angularVelocity = yaw_rate
    car.hull.linearVelocity = (vx, vy)
    for w, (wx, wy) in zip(car.wheels, cd.WHEELPOS):
        # Car puts wheels where they belong at angle 0 and leaves it to the joints to pull them over
        w.position = car.hull.GetWorldPoint((wx * cd.SIZE, wy * cd.SIZE))
        rx, ry = w.position - centre
        w.linearVelocity = (vx - yaw_rate * ry, vy + yaw_rate * rx)
        w.omega = speed / w.wheel_rad
    centre_line(env).nearest.last = None
    return env._render("state_pixels")


def place_beside(env, tile, offset=0.0, askew=0.0, speed=0.0, yaw_rate=0.0):
    """`place_car` beside a tile, any integer: offset units to the right of the middle of the road,
    askew rad to the left of its direction."""
    track = env.unwrapped.track
    _, beta, x, y = track[int(tile) % len(track)]
    x, y = x + offset * math.cos(beta), y + offset * math.sin(beta)
    return place_car(env, x, y, beta + askew, speed, yaw_rate)
