"""The fast renderer: `preprocess(official frame)` without drawing the window."""

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as cr

from car import OBS_SIZE, SCENE_H
from car.physics import PhysicsCarRacing
from car.sprites import (
    ANGLE_STEP,
    CAR_COLS,
    CAR_ROWS,
    PHASE_STEPS,
    PHASES_A_RAD,
    ZOOMING_STEPS,
    Hud,
    hull_sprite,
    wheel_sprite,
)
from car.window import CAR_X, CAR_Y, HUD_Y, shown, smoothscale_lut

# ---- the picture ---------------------------------------------------------------------------------

HUD_TOP = 84  # first HUD row of the 96-pixel frame
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
        colors = np.pad(smoothscale_lut()[colors], ((0, 0), (0, 1))).tolist()  # as `shown`
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


# ---- the fast env --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def grid(zoom, h, w):
    """How (h, w) pixels of the window above the HUD sample the world: the level of its textures,
    texels a unit, units a pixel in x and y, units from the car to the first pixel, (w, h)."""
    level = next(i for i, (_, least, _) in enumerate(LEVELS) if zoom >= least)
    kx, ky = cr.WINDOW_W / w / zoom, HUD_Y / h / zoom
    bx, by = 0.5 * kx - CAR_X / zoom, (cr.WINDOW_H - CAR_Y) / zoom - 0.5 * ky
    return level, LEVELS[level][0], kx, ky, bx, by, (w, h)


class RenderState(NamedTuple):
    """What a frame shows, in numbers: all of an env's state that its picture depends on."""

    zoom: float  # window px a unit
    x: float  # units
    y: float
    angle: float  # rad
    speed: float  # units/s
    yaw_rate: float  # rad/s
    wheels: list  # of (spin in rad/s, turn in rad, steering in rad)
    fresh: list  # tiles first touched since the last sight


def render_state(env):
    """The Sight of an env's present state."""
    hull, t = env.car.hull, env.t
    zoom = 0.1 * cr.SCALE * max(1 - t, 0) + cr.ZOOM * cr.SCALE * min(t, 1)
    at, v = hull.position, hull.linearVelocity
    wheels = [(w.omega, w.phase, w.joint.angle) for w in env.car.wheels]
    speed = math.sqrt(v.x * v.x + v.y * v.y)
    return RenderState(zoom, at.x, at.y, hull.angle, speed, hull.angularVelocity, wheels, env.fresh)


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
        sight, self.fresh = render_state(self), []
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
    sight = render_state(env)
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
