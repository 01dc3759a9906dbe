"""The only door to CarRacing: the official env, a fast twin of it, and the one way to look at it.

    env = make_env("fast")  # physics, rewards and seeds of the official env, obs (64, 64, 3) uint8
    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(np.array((steer, gas, brake), np.float32))
    state = telemetry(env)  # (K,) float32, named and explained in TELEMETRY

steer -1..1, + to the right; gas and brake 0..1. The fast env shows `preprocess(official frame)`
without drawing the 1000x800 window: the world is rasterised once per track into a texture; a frame
is one warp of it onto the 96x84 grid of the official frame, the car laid over as cached sprites,
then the same area average to 64x56; the HUD's bars are axis-aligned: their areas are arithmetic.
`python benchmark.py env fidelity` measures what that gains and what it loses.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import gymnasium as gym
import numpy as np
import pygame
from gymnasium.envs.box2d import car_dynamics as cd
from gymnasium.envs.box2d import car_racing as cr
from gymnasium.error import InvalidAction
from gymnasium.wrappers import OrderEnforcing, TimeLimit

ENV_ID = "CarRacing-v3"
OBS_SIZE = 64  # px
PREPROCESS_VERSION = 2  # goes up whenever the same world would look different
MAX_STEPS = 1000  # per episode, as registered for ENV_ID
FPS = 50  # steps a second
ZOOM_STEPS = 50  # the camera zooms in over the first second: what drives and judges leaves it out
PLAYFIELD = cr.PLAYFIELD  # units from the centre to the edge: crossing it ends the episode

SCENE_H = 56  # rows of the 64-pixel frame above the HUD
DIGIT_COLS = 8  # the score covers 12 of 96 columns: 8 of 64

cv2.setNumThreads(0)  # pictures this small gain nothing from threads, which spin while they wait


def make_env(kind="fast", **kw):
    """CarRacing, 1000 steps an episode; `kw` goes to the env (render_mode, domain_randomize...).

    kind: "official" (obs (96, 96, 3)), "fast" (obs (64, 64, 3), same physics, rewards, seeds) or
    "physics" (nothing drawn, obs zeros (64, 64, 3)). ValueError for another kind.
    """
    if kind == "official":
        return gym.make(ENV_ID, disable_env_checker=True, **kw)
    kinds = {"fast": FastCarRacing, "physics": PhysicsCarRacing}
    if kind not in kinds:
        raise ValueError(f"kind of env: expected official, fast or physics, found {kind!r}")
    return TimeLimit(OrderEnforcing(kinds[kind](**kw)), MAX_STEPS)


def preprocess(frame):
    """Official frame (96, 96, 3) uint8 -> (64, 64, 3) uint8: area average, score blacked out.

    ValueError for another shape or type. Area keeps the level of thin HUD bars; nearest loses them.
    """
    shape, dtype = getattr(frame, "shape", None), getattr(frame, "dtype", type(frame).__name__)
    if shape != (cr.STATE_H, cr.STATE_W, 3) or dtype != np.uint8:
        raise ValueError(f"preprocess: expected (96, 96, 3) uint8, found {shape} {dtype}")
    obs = cv2.resize(frame, (OBS_SIZE, OBS_SIZE), interpolation=cv2.INTER_AREA)
    obs[SCENE_H:, :DIGIT_COLS] = 0  # the score is a leak of the return
    return obs


def observe(env, obs):
    """What a driver of `env` sees: (64, 64, 3) uint8 whichever kind of env the obs came from."""
    return obs if obs.shape == (OBS_SIZE, OBS_SIZE, 3) else preprocess(obs)


# ---- physics: the official step in plain floats, bit for bit -------------------------------------

ENGINE = cd.ENGINE_POWER
INERTIA = cd.WHEEL_MOMENT_OF_INERTIA
GRIP = 205000 * cd.SIZE * cd.SIZE  # force per unit/s of slip, before the friction limit
RIGHT = cr.Box2D.b2Vec2(1, 0)
# (steer to the left, gas, brake) of the env's discrete actions: none, right, left, gas, brake
DISCRETE = ((0, 0, 0), (-0.6, 0, 0), (0.6, 0, 0), (0, 0.2, 0), (0, 0, 0.8))


def sign(x):
    return (x > 0) - (x < 0)


def step_car(car, dt):
    """`Car.step` on Python floats: the same operations in the same order, half the time."""
    for w in car.wheels:
        turn = w.steer - w.joint.angle
        w.joint.motorSpeed = sign(turn) * min(50.0 * abs(turn), 3.0)
        grass = not w.tiles
        limit = cd.FRICTION_LIMIT * 0.6 if grass else cd.FRICTION_LIMIT
        side = w.GetWorldVector(RIGHT)
        sx, sy = side.x, side.y  # the wheel's forward vector is (-sy, sx), exactly
        v = w.linearVelocity
        vx, vy = v.x, v.y
        vf = -sy * vx + sx * vy
        vs = sx * vx + sy * vy
        omega = w.omega
        omega += dt * ENGINE * w.gas / INERTIA / (abs(omega) + 5.0)
        car.fuel_spent += dt * ENGINE * w.gas
        if w.brake >= 0.9:
            omega = 0.0
        elif w.brake > 0:
            omega -= sign(omega) * min(15 * w.brake, abs(omega))
        w.phase += omega * dt
        f_force = (-vf + omega * w.wheel_rad) * GRIP
        p_force = -vs * GRIP
        force = math.sqrt(f_force * f_force + p_force * p_force)
        leave_skid(car, w, force > 2.0 * limit, grass)
        if force > limit:
            f_force = f_force / force * limit
            p_force = p_force / force * limit
        w.omega = omega - dt * f_force * w.wheel_rad / INERTIA
        fx, fy = p_force * sx + f_force * -sy, p_force * sy + f_force * sx
        w.ApplyForceToCenter((fx, fy), True)


def leave_skid(car, w, skids, grass):
    """The skid marks of `Car.step`, which only `render()` shows."""
    if not skids:
        w.skid_start = w.skid_particle = None
    elif w.skid_particle and w.skid_particle.grass == grass and len(w.skid_particle.poly) < 30:
        w.skid_particle.poly.append((w.position[0], w.position[1]))
    elif w.skid_start is None:
        w.skid_start = w.position
    else:
        w.skid_particle = car._create_particle(w.skid_start, w.position, grass)
        w.skid_start = None


class Contacts(cr.FrictionDetector):
    """FrictionDetector that gives a tile its new colour, and notes it, at the first touch only."""

    def _contact(self, contact, begin):
        tile, other = contact.fixtureA.body.userData, contact.fixtureB.body.userData
        if not is_tile(tile):
            tile, other = other, tile
            if not is_tile(tile):
                return
        env = self.env
        if tile.idx not in env.touched:
            env.touched.add(tile.idx)
            env.fresh.append(tile.idx)
            tile.color[:] = env.road_color
        if other is None or "tiles" not in other.__dict__:
            return  # the hull
        if not begin:
            other.tiles.remove(tile)
            return
        other.tiles.add(tile)
        if not tile.road_visited:
            tile.road_visited = True
            env.reward += 1000.0 / len(env.track)
            env.tile_visited_count += 1
            lap = env.tile_visited_count / len(env.track) > self.lap_complete_percent
            env.new_lap = env.new_lap or (tile.idx == 0 and lap)


def is_tile(data):
    """Whether the user data of a body are those of a tile of the road."""
    return data is not None and "road_friction" in data.__dict__


class PhysicsCarRacing(cr.CarRacing):
    """CarRacing that draws no observation (zeros): for tuning drivers that read `telemetry`."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.touched, self.fresh = set(), []  # tiles touched so far, and since the last picture
        self.observation_space = gym.spaces.Box(0, 255, (OBS_SIZE, OBS_SIZE, 3), np.uint8)

    def step(self, action):
        """`CarRacing.step` bit for bit, in plain floats: see there."""
        if action is not None:
            self._act(action)
        step_car(self.car, 1.0 / FPS)
        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)
        self.t += 1.0 / FPS
        self.state = self._render("state_pixels")
        reward, terminated, info = 0, False, {}
        if action is not None:  # reset() steps once without
            reward, terminated, info = self._judge()
        if self.render_mode == "human":
            self.render()
        return self.state, reward, terminated, False, info

    def _create_track(self):
        if not super()._create_track():
            return False
        self.touched, self.fresh = set(), []
        listener = Contacts(self, self.lap_complete_percent)
        self.world.contactListener_bug_workaround = self.world.contactListener = listener
        return True

    def _act(self, action):
        if not self.continuous:
            if not self.action_space.contains(action):
                raise InvalidAction(f"expected a member of {self.action_space}, found {action!r}")
            steer, gas, brake = DISCRETE[action]
        else:
            steer, gas, brake = action.astype(np.float64).tolist()
            steer, gas = -steer, min(max(gas, 0.0), 1.0)
        wheels = self.car.wheels
        wheels[0].steer = wheels[1].steer = steer
        for w in wheels[2:]:
            w.gas += min(gas - w.gas, 0.1)
        for w in wheels:
            w.brake = brake

    def _judge(self):
        """-> (reward of this step, terminated, info)"""
        self.reward -= 0.1
        self.car.fuel_spent = 0.0
        reward = self.reward - self.prev_reward
        self.prev_reward = self.reward
        terminated, info = False, {}
        if self.tile_visited_count == len(self.track) or self.new_lap:
            terminated, info["lap_finished"] = True, True
        x, y = self.car.hull.position
        if abs(x) > cr.PLAYFIELD or abs(y) > cr.PLAYFIELD:
            terminated, info["lap_finished"], reward = True, False, -100
        return reward, terminated, info

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        return np.zeros((OBS_SIZE, OBS_SIZE, 3), np.uint8)


# ---- telemetry and teleports ---------------------------------------------------------------------

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
LOST = 12.0  # units off the centre line beyond which another part of the track may be nearer
LOOK_AHEAD = (3, 6, 10)  # tiles of 3.5 units: about 10, 20 and 35 units


class Nearest:
    """Finds the point of a closed path (N, 2) nearest to (x, y), given that the car moves on.

    Called with x, y: the index, downhill from the last one, from all where that ends more than
    `lost` units off. `last` = None makes the next call look at all.
    """

    def __init__(self, path, lost):
        self.path, self.limit, self.last = path, lost**2, None
        self.x, self.y = path.T.tolist()

    def __call__(self, x, y):
        if self.last is not None:
            best, i = self._descend(x, y, self.last)
            if best < self.limit:
                self.last = i
                return i
        self.last = int(((self.path - (x, y)) ** 2).sum(1).argmin())
        return self.last

    def _descend(self, x, y, i):
        xs, ys, n = self.x, self.y, len(self.x)
        best = (xs[i] - x) ** 2 + (ys[i] - y) ** 2
        for way in (1, -1):
            while True:
                j = (i + way) % n
                distance = (xs[j] - x) ** 2 + (ys[j] - y) ** 2
                if distance >= best:
                    break
                i, best = j, distance
        return best, i


class CentreLine:
    """The track as flat lists; `nearest(x, y)` is the index of the nearest tile.

    Between tiles, 3.5 units apart, position and direction go over smoothly: by the nearest tile
    alone a heading error in a hairpin would jump by 0.3 rad from one frame to the next.
    """

    def __init__(self, track):
        self.track = track
        _, beta, x, y = np.array(track).T
        turn = np.roll(beta, -1) - np.roll(beta, 1)
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        self.nearest = Nearest(np.stack((x, y), 1), LOST)
        self.x, self.y, self.beta = self.nearest.x, self.nearest.y, beta.tolist()
        self.curvature = (turn / (2 * cr.TRACK_DETAIL_STEP)).tolist()
        self.cos, self.sin = np.cos(beta).tolist(), np.sin(beta).tolist()

    def ahead_of(self, i, x, y):
        """How far (x, y) is, in units, in front of tile i, along its direction."""
        return self.cos[i] * (y - self.y[i]) - self.sin[i] * (x - self.x[i])

    def place(self, x, y):
        """(x, y) seen from the line -> (nearest tile i, t in -1..1 tiles in front of it, direction
        of the line in rad, offset in units to its right).

        t is where the normal of the line, turning evenly from tile to tile, goes through (x, y).
        """
        i = self.nearest(x, y)
        gap = self.ahead_of(i, x, y)
        way = 1 if gap > 0 else -1
        j = (i + way) % len(self.x)
        between = abs(gap) + abs(self.ahead_of(j, x, y))
        t = abs(gap) / between if between > 0 else 0.0
        turn = (self.beta[j] - self.beta[i] + math.pi) % (2 * math.pi) - math.pi
        beta = self.beta[i] + t * turn
        dx = x - self.x[i] - t * (self.x[j] - self.x[i])
        dy = y - self.y[i] - t * (self.y[j] - self.y[i])
        return i, way * t, beta, dx * math.cos(beta) + dy * math.sin(beta)

    def along(self, x, y):
        """How far along the line (x, y) is, in tiles."""
        i, t, *_ = self.place(x, y)
        return i + t

    def curvature_at(self, s):
        """1/units, + to the left, at tile s, a float: between two tiles a mean of theirs."""
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
            (beta - angle + math.pi) % (2 * math.pi) - math.pi,
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
    return place_car(
        env, x + offset * math.cos(beta), y + offset * math.sin(beta), beta + askew, speed, yaw_rate
    )


# ---- the picture ---------------------------------------------------------------------------------

HUD_TOP = 84  # first HUD row of the 96-pixel frame
CAR_X, CAR_Y = cr.WINDOW_W / 2, cr.WINDOW_H / 4  # where the car sits in the window, y up
GROWTH = 0.52  # window px by which gfxdraw's outline enlarges each side of a polygon
AA_GROWTH = 0.657  # texels by which cv2's LINE_AA does
MARGIN = 2.0  # units of black kept around the playfield
HALF = cr.PLAYFIELD + MARGIN  # units from the texture's centre to its sides
# (texels a unit, least zoom in px a unit drawn from it, zoom whose polygon growth it shows)
LEVELS = ((3.5, 8.0, 16.2), (2.0, 4.0, 6.0), (1.0, 2.0, 3.0), (0.5, 0.0, 1.3))
FULL_ZOOM = cr.ZOOM * cr.SCALE  # px a unit, once the camera has arrived
BATCH = 16  # frames painted together
FRAC = 8  # fractional bits of polygon vertices
INVERSE = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


@lru_cache(maxsize=1)
def level_table():
    """(256,) uint8: what pygame's smoothscale makes of flat greys, 0 to 2 less by build and CPU."""
    window = pygame.Surface((cr.WINDOW_W, cr.WINDOW_H))
    for v in range(256):  # 16 x 16 flat blocks, read in their middles
        window.fill((v, v, v), (v % 16 * 62.5, v // 16 * 50, 63, 50))
    frame = pygame.transform.smoothscale(window, (cr.STATE_W, cr.STATE_H))
    return pygame.surfarray.array3d(frame)[3::6, 3::6, 0].T.ravel()


def shown(color):
    """RGB 0..255 (truncated to int as the env does) -> RGBA as the shrunk frame shows it."""
    return tuple(int(level_table()[int(c)]) for c in color) + (0,)


def area_weights(n_out, n_in):
    """(n_out, n_in) float32: row i averages the i-th of n_out equal parts of n_in pixels."""
    edges = np.linspace(0, n_in, n_out + 1)
    k = np.arange(n_in)
    cover = np.minimum(edges[1:, None], k + 1) - np.maximum(edges[:-1, None], k)
    return (np.clip(cover, 0, None) * n_out / n_in).astype(np.float32)


def texels(points, scale):
    """World units (..., 2) -> fixed-point texture coordinates for `cv2.fillConvexPoly`."""
    return np.rint(((points + HALF) * scale - 0.5) * (1 << FRAC)).astype(np.int32)


def widen(quads, side, ahead, behind):
    """Quads (n, 4, 2), each (left, right, right behind, left behind), enlarged to both sides, ahead
    and behind by so many units, numbers or (n, 1)."""
    l1, r1, r2, l2 = quads.transpose(1, 0, 2)
    front, back, along = unit(r1 - l1) * side, unit(r2 - l2) * side, unit(l1 + r1 - l2 - r2)
    ahead, behind = along * ahead, along * behind
    return np.stack(
        (l1 - front + ahead, r1 + front + ahead, r2 + back - behind, l2 - back - behind), 1
    )


def boxes_of(polys, side, run=8):
    """Slices of a texture of `side` texels, each around `run` of the polygons (n, 4, 2)."""
    firsts = np.arange(0, len(polys), run)
    low = np.maximum((np.minimum.reduceat(polys.min(1), firsts) >> FRAC) - 3, 0).tolist()
    high = np.minimum((np.maximum.reduceat(polys.max(1), firsts) >> FRAC) + 4, side).tolist()
    return [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low, high)]


def unit(v):
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


def square(x, y, side):
    return np.array(((x, y), (x + side, y), (x + side, y + side), (x, y + side)))


class World:
    """One track as antialiased textures, one for each range of zoom, indexed by world position.

    Reused from track to track: 32 MB of textures, and as much for the same without the road, from
    which the last road is wiped out box by box.
    """

    def __init__(self):
        sides = [math.ceil(2 * HALF * scale) for scale, _, _ in LEVELS]
        self.textures = [np.zeros((n, n, 4), np.uint8) for n in sides]
        self.lawns = [np.zeros((n, n, 4), np.uint8) for n in sides]  # the world without its road
        self.lawn_colors, self.boxes = None, [[] for _ in LEVELS]

    def draw(self, env):
        """Rasterise the track that `env` has just created."""
        lawn_colors = shown(env.bg_color), shown(env.grass_color)
        if lawn_colors != self.lawn_colors:
            self.lawn_colors = lawn_colors
            self._draw_lawns(*lawn_colors)
            self.boxes = [[(slice(None), slice(None))] for _ in LEVELS]
        quads = np.array([quad for quad, _ in env.road_poly])
        colors = np.array([color for _, color in env.road_poly]).astype(int)
        colors = np.pad(level_table()[colors], ((0, 0), (0, 1))).tolist()  # as `shown`
        kerb = np.array([isinstance(color, tuple) for _, color in env.road_poly])
        last = kerb & ~np.roll(kerb, -2)  # of its row of kerbs: they alternate with tiles
        self.flat = [texels(widen(quads[~kerb], -1 / n, 0, 0), n) for n, _, _ in LEVELS]
        for k, (scale, _, zoom) in enumerate(LEVELS):
            texture, lawn = self.textures[k], self.lawns[k]
            for box in self.boxes[k]:
                texture[box] = lawn[box]
            grow = GROWTH / zoom - AA_GROWTH / scale
            # The next quad is drawn over the end of this: without 1 texel more, grass would show
            # through two half-covered edges.
            ahead = np.where(last, grow, 1 / scale)[:, None]
            polys = texels(widen(quads, grow, ahead, grow), scale)
            self.boxes[k] = boxes_of(polys, len(texture))
            for poly, color in zip(polys, colors):
                cv2.fillConvexPoly(texture, poly, color, cv2.LINE_AA, FRAC)

    def _draw_lawns(self, bg, grass):
        d, field = cr.GRASS_DIM, 2 * cr.PLAYFIELD
        patches = [square(d * i, d * j, d) for i in range(-20, 20, 2) for j in range(-20, 20, 2)]
        squares = np.array([square(-cr.PLAYFIELD, -cr.PLAYFIELD, field)] + patches)
        for lawn, (scale, _, zoom) in zip(self.lawns, LEVELS):
            lawn[:] = 0
            grow = GROWTH / zoom - AA_GROWTH / scale
            outward = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1))) * grow
            for i, poly in enumerate(texels(squares + outward, scale)):
                cv2.fillConvexPoly(lawn, poly, grass if i else bg, cv2.LINE_AA, FRAC)

    def repaint(self, tile, color):
        """Give a tile another colour, but for its soft edges: the change is 5 levels at most."""
        for texture, flat in zip(self.textures, self.flat):
            cv2.fillConvexPoly(texture, flat[tile], color, cv2.LINE_8, FRAC)


# ---- the car -------------------------------------------------------------------------------------

CAR_ROWS, CAR_COLS = slice(66, 78), slice(45, 51)  # of the 96-pixel frame: all that the car covers
CROP_X, CROP_Y, CROP_W, CROP_H = 460, 140, 80, 120  # the same in window px, y up, with a margin
ANGLE_STEP = 0.05  # rad of steering per cached sprite
PHASE_STEPS = 32  # cached sprites per turn of a wheel
ZOOMING_STEPS = 2, 4  # of both are one while the camera zooms: a small car, in 50 sizes
PHASES_A_RAD = PHASE_STEPS / (2 * math.pi)
ROWS_96 = area_weights(96, 800)[CAR_ROWS, 800 - CROP_Y - CROP_H : 800 - CROP_Y]
COLS_96 = area_weights(96, 1000)[CAR_COLS, CROP_X : CROP_X + CROP_W]
RGBA_MASKS = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)  # bytes in the order R, G, B, A


def boxed(points):
    """Car pixels -> the polygon in units, in Box2D's order, on which pygame's fill depends."""
    shape = cr.Box2D.b2PolygonShape(vertices=[(x * cd.SIZE, y * cd.SIZE) for x, y in points])
    return [tuple(v) for v in shape.vertices]


W, R = cd.WHEEL_W * cd.SIZE, cd.WHEEL_R * cd.SIZE  # units, half of a wheel's sides
HULL = [boxed(p) for p in (cd.HULL_POLY1, cd.HULL_POLY2, cd.HULL_POLY3, cd.HULL_POLY4)]
WHEEL = boxed([(x * cd.WHEEL_W, y * cd.WHEEL_R) for x, y in ((-1, 1), (1, 1), (1, -1), (-1, -1))])
STRIPE = 1.2  # rad of a wheel's turn that its white stripe covers


def paint(surface, points, zoom, color, angle=0.0, at=(0, 0)):
    """Polygon in the car's frame, turned and then moved by `at` (units), as the env draws it."""
    c, s = math.cos(angle), math.sin(angle)
    moved = [(at[0] + c * x - s * y, at[1] + s * x + c * y) for x, y in points]
    x0, y0 = CAR_X - CROP_X, CAR_Y - CROP_Y
    pygame.draw.polygon(surface, color, [(x * zoom + x0, y * zoom + y0) for x, y in moved])


def blank():
    """The window around the car, transparent."""
    return pygame.Surface((CROP_W, CROP_H), pygame.SRCALPHA, 32, RGBA_MASKS)


def sprite(surface):
    """(12, 6, 4) float32: premultiplied RGB 0..255 and coverage -1..0 on the 96-pixel grid."""
    rgba = np.frombuffer(surface.get_buffer(), np.uint8).reshape(CROP_H, CROP_W * 4)[::-1]  # y down
    rows = (ROWS_96 @ rgba.astype(np.float32)).reshape(-1, CROP_W, 4)  # (12, 80, 4)
    return COLS_96 @ rows * np.float32((1, 1, 1, -1 / 255))  # (12, 6, 4)


@lru_cache(maxsize=64)
def hull_sprite(zoom):
    """Sprite of the hull, to which those of the wheels are added: channel 3 of the sum is what is
    left of the ground. One array for all callers: copy it first."""
    surface = blank()
    for poly in HULL:
        paint(surface, poly, zoom, shown((204, 0, 0))[:3] + (255,))
    hull = sprite(surface)
    return hull + np.float32((0.5, 0.5, 0.5, 1))  # half a level: the cast to uint8 then rounds


@lru_cache(maxsize=16384)
def wheel_sprite(wheel, angle_step, phase_step, zoom):
    """Sprite of what the hull leaves to see of a wheel (0..3), at a steering angle and a turn."""
    surface = blank()
    angle, at = angle_step * ANGLE_STEP, [p * cd.SIZE for p in cd.WHEELPOS[wheel]]
    paint(surface, WHEEL, zoom, (0, 0, 0, 255), angle, at)
    a1 = (phase_step + 0.5) * 2 * math.pi / PHASE_STEPS
    a2 = a1 + STRIPE
    s1, s2, c1, c2 = math.sin(a1), math.sin(a2), math.cos(a1), math.cos(a2)
    if s1 <= 0 or s2 <= 0:  # the white stripe, or what of it is on top of the wheel
        c1, c2 = R * (sign(c1) if s1 > 0 else c1), R * (sign(c2) if s2 > 0 else c2)
        white = shown(cd.WHEEL_WHITE)[:3] + (255,)
        paint(surface, [(-W, c1), (W, c1), (W, c2), (-W, c2)], zoom, white, angle, at)
    for poly in HULL:  # the hull is drawn over the wheels
        paint(surface, poly, zoom, (0, 0, 0, 0))
    return sprite(surface)


# ---- the HUD -------------------------------------------------------------------------------------

BAR_X, BAR_Y = 25, 20  # window px of the HUD's grid
MIN_VALUE = 1e-4  # smaller ones have no bar
HUD_Y, BASE_Y = 700, 80  # window row of the HUD's top, and below it the last row of a vertical bar
NO_BAR = 100  # entry of `tall`, after its 100 rows
# Place on the grid, colour and width in window px of the vertical bars: speed, spin of 4 wheels.
# A bar is one px wider than its cell, unless the next bar covers it.
BARS = (
    (5, (255, 255, 255), 26),
    (7, (0, 0, 255), 25),
    (8, (0, 0, 255), 25),
    (9, (51, 0, 255), 25),
    (10, (51, 0, 255), 26),
)
LEVEL_AT = (20, 30)  # places of the level bars: steering, green, and gyro, red
LEVEL_CHANNELS, LEVEL_REACH = (1, 0), 16  # their colours; columns to either side at 12 rad/s
# Columns of the 64 that the bars reach; a gyro bar would reach the wheels' at 24 rad/s.
SPEED_COLS, WHEEL_COLS, LEVEL_COLS = slice(8, 10), slice(10, 18), slice(18, 64)


class Hud:
    """The last 8 rows of the frame: bars, tabulated by the window pixel at which they end."""

    def __init__(self):
        shrink = area_weights(64, 96)
        y_share = (shrink @ area_weights(96, 800))[SCENE_H:, HUD_Y:]  # (8, 100)
        x_share = shrink @ area_weights(96, 1000)  # (64, 1000)
        ends = [sorted((row, BASE_Y)) for row in range(NO_BAR)]  # backward spin hangs below
        tall = np.array([y_share[:, a : b + 1].sum(1) for a, b in ends] + [np.zeros(8)])
        bars = []
        for place, color, width in BARS:
            cover = x_share[:, place * BAR_X : place * BAR_X + width].sum(1)
            bars.append(np.einsum("er,x,c->erxc", tall, cover, shown(color)[:3]))
        # (101, 8, columns, 3); half a level: the cast to uint8 then rounds
        self.speed = (bars[0][:, :, SPEED_COLS] + 0.5).astype(np.uint8)
        spins = [bar[:, :, WHEEL_COLS] for bar in bars[1:]]
        self.wheels = lru_cache(maxsize=4096)(
            lambda *ends: (sum(bar[end] for bar, end in zip(spins, ends)) + 0.5).astype(np.uint8)
        )
        thick = y_share[:, BAR_Y : 3 * BAR_Y + 1].sum(1)
        across = np.concatenate((np.zeros((1, 64)), x_share.T.cumsum(0)))
        self.level = []  # of the steering and the gyro bar: (1001, 8, columns)
        for place, level in zip(LEVEL_AT, (shown((0, 255, 0))[1], shown((255, 0, 0))[0])):
            ends = [sorted((place * BAR_X, end)) for end in range(cr.WINDOW_W)]
            cover = np.array([across[b + 1] - across[a] for a, b in ends] + [np.zeros(64)])
            bars = np.einsum("ex,r->erx", cover[:, LEVEL_COLS] * level, thick)
            self.level.append((bars + 0.5).astype(np.uint8))

    def draw(self, sight, out):
        """Fill out (8, 64, 3) uint8, zeros so far. Speed, 4 wheels, steering, gyro."""
        wheels, (steer, gyro) = sight.wheels, self.level
        out[:, SPEED_COLS] = self.speed[vertical_end(sight.speed, 0.02)]
        out[:, WHEEL_COLS] = self.wheels(*[vertical_end(omega, 0.01) for omega, _, _ in wheels])
        out[:, LEVEL_COLS, 1] = steer[level_end(LEVEL_AT[0], wheels[0][2], -10.0)]
        out[:, LEVEL_COLS, 0] = gyro[level_end(LEVEL_AT[1], sight.yaw_rate, -0.8)]


def level_end(place, value, length):
    """Window column where the bar of `value` from `place` ends, `length` grid cells a unit."""
    if abs(value) <= MIN_VALUE:
        return cr.WINDOW_W  # none
    return int(min(max((place + length * value) * BAR_X, 0), cr.WINDOW_W - 1))


def vertical_end(value, height):
    """Row below the HUD's top where the bar of `value` ends, `height` grid cells a unit."""
    if abs(value) <= MIN_VALUE:
        return NO_BAR
    return min(max(int(cr.WINDOW_H - (BAR_Y + BAR_Y * height * value)) - HUD_Y, 0), NO_BAR - 1)


def mirrored(frames):
    """Frames (..., 64, 64, 3) uint8 -> how they look where left and right are exchanged: scene,
    steering and gyro bar. The spins of the wheels stay, as if left and right ones were the same."""
    out = cv2.flip(frames.reshape(-1, OBS_SIZE, 3), 1).reshape(frames.shape)
    hud = frames[..., SCENE_H:, :, :]
    out[..., SCENE_H:, :, :] = hud
    for place, channel in zip(LEVEL_AT, LEVEL_CHANNELS):
        middle = place * BAR_X * OBS_SIZE // cr.WINDOW_W
        bar = slice(middle - LEVEL_REACH, middle + LEVEL_REACH)
        out[..., SCENE_H:, bar, channel] = hud[..., bar, channel][..., ::-1]
    return out


# ---- the fast env --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def grid(zoom, h, w):
    """How (h, w) pixels of the window above the HUD sample the world: the level of its textures,
    texels a unit, units a pixel in x and y, units from the car to the first pixel, (w, h)."""
    level = next(i for i, (_, least, _) in enumerate(LEVELS) if zoom >= least)
    kx, ky = cr.WINDOW_W / w / zoom, HUD_Y / h / zoom
    bx, by = 0.5 * kx - CAR_X / zoom, (cr.WINDOW_H - CAR_Y) / zoom - 0.5 * ky
    return level, LEVELS[level][0], kx, ky, bx, by, (w, h)


class Sight(NamedTuple):
    """What a frame shows, in numbers: all of an env's state that its picture depends on."""

    zoom: float  # window px a unit
    x: float  # units
    y: float
    angle: float  # rad
    speed: float  # units/s
    yaw_rate: float  # rad/s
    wheels: list  # of (spin in rad/s, turn in rad, steering in rad)
    fresh: list  # tiles first touched since the last sight


def look(env):
    """The Sight of an env's present state."""
    hull, t = env.car.hull, env.t
    zoom = 0.1 * cr.SCALE * max(1 - t, 0) + cr.ZOOM * cr.SCALE * min(t, 1)
    at, v = hull.position, hull.linearVelocity
    wheels = [(w.omega, w.phase, w.joint.angle) for w in env.car.wheels]
    speed = math.sqrt(v.x * v.x + v.y * v.y)
    return Sight(zoom, at.x, at.y, hull.angle, speed, hull.angularVelocity, wheels, env.fresh)


class View:
    """Draws the frames of one env, many in one go if need be; holds its textures and buffers."""

    def __init__(self):
        self.world, self.hud = World(), Hud()
        self.scenes = np.zeros((BATCH, HUD_TOP, cr.STATE_W, 4), np.uint8)
        self.crops = self.scenes[:, CAR_ROWS, CAR_COLS]  # where the car is
        self.wide = np.zeros((2 * HUD_TOP, 2 * cr.STATE_W, 4), np.uint8)
        self.matrix = np.zeros((2, 3))
        # bilinear at a third of a pixel is the area average of 96 to 64, at a quarter of its cost
        i = np.arange(BATCH * SCENE_H)
        thirds = (3 * (i // 2) + np.where(i % 2, 5 / 3, 1 / 3)).astype(np.float32)
        self.at = np.meshgrid(thirds[:OBS_SIZE], thirds)
        self.stacks = lru_cache(self._stacks)

    def draw(self, sights, road):
        """Frames (n, 64, 64, 3) uint8 of n sights; tiles they touched turn to `road` (RGBA)."""
        out = np.zeros((len(sights), OBS_SIZE, OBS_SIZE, 3), np.uint8)  # black where no bar is
        for i in range(0, len(sights), BATCH):
            self._draw_scenes(sights[i : i + BATCH], road, out[i : i + BATCH, :SCENE_H])
        for sight, frame in zip(sights, out):
            self.hud.draw(sight, frame[SCENE_H:])
        return out

    def _draw_scenes(self, sights, road, out):
        """Stage by stage, not frame by frame: each finds its code and tables in the cache."""
        for sight, scene in zip(sights, self.scenes):
            for tile in sight.fresh:
                if tile % 3:  # every third has the colour of a touched one from the start
                    self.world.repaint(tile, road)
            self._draw_ground(sight, scene)
        for sight, crop in zip(sights, self.crops):
            self._draw_car(sight, crop)
        tall, at, small, rgb, frames = self.stacks(len(sights))
        cv2.remap(tall, *at, cv2.INTER_LINEAR, small)
        cv2.cvtColor(small, cv2.COLOR_RGBA2RGB, rgb)
        out[:] = frames

    def _stacks(self, n):
        """Of n frames one below the other: scenes, sampling points, results, the last as frames."""
        rows = n * SCENE_H
        tall = self.scenes[:n].reshape(n * HUD_TOP, cr.STATE_W, 4)
        rgb = np.zeros((rows, OBS_SIZE, 3), np.uint8)
        small = np.zeros((rows, OBS_SIZE, 4), np.uint8)
        at = [a[:rows] for a in self.at]
        return tall, at, small, rgb, rgb.reshape(n, SCENE_H, OBS_SIZE, 3)

    def _draw_ground(self, sight, scene):
        if sight.zoom < FULL_ZOOM:  # texels are smaller than pixels by a factor that changes
            self._warp(sight, self.wide)
            cv2.resize(self.wide, (cr.STATE_W, HUD_TOP), scene, interpolation=cv2.INTER_AREA)
        else:
            self._warp(sight, scene)

    def _warp(self, sight, out):
        """Sample the world as seen from the car onto out (h, w, 4), the window above the HUD."""
        level, scale, kx, ky, bx, by, size = grid(sight.zoom, *out.shape[:2])
        c, s = math.cos(sight.angle) * scale, math.sin(sight.angle) * scale
        x, y = (sight.x + HALF) * scale - 0.5, (sight.y + HALF) * scale - 0.5
        self.matrix[:] = (
            (c * kx, s * ky, x + c * bx - s * by),
            (s * kx, -c * ky, y + s * bx + c * by),
        )
        cv2.warpAffine(self.world.textures[level], self.matrix, size, out, INVERSE)

    def _draw_car(self, sight, crop):
        zoom, layer = sight.zoom, hull_sprite(sight.zoom).copy()
        a, b = (1, 1) if zoom >= FULL_ZOOM else ZOOMING_STEPS
        for i, (_, phase, steer) in enumerate(sight.wheels):
            turn = math.floor(phase * PHASES_A_RAD) % PHASE_STEPS // b * b + b // 2
            layer += wheel_sprite(i, a * round(steer / (a * ANGLE_STEP)), turn, zoom)
        crop[:] = crop * layer[..., 3:] + layer


class FastCarRacing(PhysicsCarRacing):
    """CarRacing whose obs (64, 64, 3) uint8 is `preprocess` of the official, off by 0.1 levels.

    A driver that does not look can have its frames painted later, in one go, at half the cost:
    after `defer()` the obs are None, and `painted()` returns them all.
    """

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.view = None  # its textures are drawn at the first reset
        self.deferred = None  # sights to be painted later

    def _create_track(self):
        if not super()._create_track():
            return False
        self.view = self.view or View()
        self.view.world.draw(self)
        self.road_shown = shown(self.road_color)
        return True

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        sight, self.fresh = look(self), []
        if self.deferred is None:
            return self.view.draw((sight,), self.road_shown)[0]
        self.deferred.append(sight)

    def defer(self):
        """From now on nothing is painted, until `painted()`."""
        self.deferred = []

    def painted(self):
        """The frames (n, 64, 64, 3) uint8 since `defer()`; to be called before the next reset."""
        sights, self.deferred = self.deferred, None
        return self.view.draw(sights, self.road_shown)


# ---- a picture for people ------------------------------------------------------------------------


def picture(env, size):
    """The car from above as `render()` shows it, (h, w, 3) uint8 of size (w, h), from what the last
    step has drawn, in a sixth of `render()`'s time. Skid marks are missing; w : h should be 5 : 4,
    or all is squashed. Any kind of env but "physics".
    """
    env, (w, h) = env.unwrapped, size
    pixels = np.zeros((h, w, 4), np.uint8)
    surface = pygame.image.frombuffer(pixels, size, "RGBX")  # draws into them
    if not isinstance(env, FastCarRacing):
        surface.blit(pygame.transform.smoothscale(env.surf, size), (0, 0))
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
    sight = look(env)
    env.view._warp(sight, pixels[: h * HUD_Y // cr.WINDOW_H])
    zoom, side = sight.zoom * w / cr.WINDOW_W, h // 4
    car = pygame.Surface((side, side))
    car.fill((0, 255, 255))
    car.set_colorkey((0, 255, 255))
    x, y = pygame.math.Vector2(-sight.x * zoom, -sight.y * zoom).rotate_rad(-sight.angle)
    env.car.draw(car, zoom, (side / 2 + x, side / 2 + y), -sight.angle, False)
    at = w / 2 - side / 2, h - h * CAR_Y / cr.WINDOW_H - side / 2
    surface.blit(pygame.transform.flip(car, False, True), at)  # y pointed up
    env.surf = surface
    env._render_indicators(*size)
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
