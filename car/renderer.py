"""The fast renderer: `preprocess(official frame)` without drawing the 1000x800 window.

`TrackTextures` rasterises the track once per episode. For a frame, `Renderer` warps the texture
onto the 96x84 grid of the official frame, adds the sprites of the car, and averages to 64x56. The
bars of the HUD are axis-aligned, so their areas are arithmetic. `FastCarRacing` is the env.
"""

import math
from collections import namedtuple
from functools import lru_cache

import cv2
import gymnasium as gym
import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as cr

from car import OBS_SIZE, SCENE_H
from car.physics import PLAYFIELD, FloatCar, TouchListener
from car.sprites import CAR_COLS, CAR_ROWS, Hud, car_sprite
from car.window import CAR_X, CAR_Y, FULL_ZOOM, HUD_Y, displayed, smoothscale_lut

HUD_TOP = 84  # first HUD row of the 96-pixel frame
GROWTH = 0.52  # window px by which gfxdraw's outline enlarges each side of a polygon
AA_GROWTH = 0.657  # texels by which cv2's LINE_AA does
HALF = PLAYFIELD + 2.0  # units from the texture's centre to its sides: 2 units of black around
# (texels a unit, least zoom in px a unit drawn from it, zoom whose polygon growth it shows)
LEVELS = ((3.5, 8.0, 16.2), (2.0, 4.0, 6.0), (1.0, 2.0, 3.0), (0.5, 0.0, 1.3))
BATCH = 16  # frames drawn together
FRAC = 8  # fractional bits of polygon vertices


# All of an env's state that its frame depends on: zoom (window px a unit); the car's place (units),
# angle (rad), speed (units/s), yaw rate (rad/s); (spin in rad/s, turn in rad, steering in rad) of
# each wheel; tiles first touched since the last RenderState.
RenderState = namedtuple("RenderState", "zoom x y angle speed yaw_rate wheels fresh")


def render_state(env):
    """The RenderState of an env now."""
    hull, t = env.car.hull, env.t
    zoom = 0.1 * cr.SCALE * max(1 - t, 0) + cr.ZOOM * cr.SCALE * min(t, 1)
    at, v = hull.position, hull.linearVelocity
    wheels = [(w.omega, w.phase, w.joint.angle) for w in env.car.wheels]
    speed = math.sqrt(v.x * v.x + v.y * v.y)
    return RenderState(zoom, at.x, at.y, hull.angle, speed, hull.angularVelocity, wheels, env.fresh)


def texels(points, scale):
    """World units (..., 2) -> fixed-point texture coordinates for `cv2.fillConvexPoly`."""
    return np.rint(((points + HALF) * scale - 0.5) * (1 << FRAC)).astype(np.int32)


def unit(v):
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


def widen(quads, side, ahead, behind):
    """Quads (n, 4, 2), each (left, right, right behind, left behind), enlarged to both sides, ahead
    and behind by so many units, numbers or (n, 1)."""
    l1, r1, r2, l2 = quads.transpose(1, 0, 2)
    front, back, along = unit(r1 - l1) * side, unit(r2 - l2) * side, unit(l1 + r1 - l2 - r2)
    ahead, behind = along * ahead, along * behind
    return np.stack(
        (l1 - front + ahead, r1 + front + ahead, r2 + back - behind, l2 - back - behind), 1
    )


def square(x, y, side):
    return np.array(((x, y), (x + side, y), (x + side, y + side), (x, y + side)))


class TrackTextures:
    """One track as antialiased textures, one for each range of zoom, indexed by world position.

    They are reused from track to track: 32 MB, and as much for the same without the road.
    """

    def __init__(self):
        sides = [math.ceil(2 * HALF * scale) for scale, _, _ in LEVELS]
        self.textures = [np.zeros((n, n, 4), np.uint8) for n in sides]
        self.backgrounds = [np.zeros((n, n, 4), np.uint8) for n in sides]
        self.background_colors = None

    def draw(self, env):
        """Rasterise the track that `env` has just created."""
        colors = displayed(env.bg_color), displayed(env.grass_color)
        if colors != self.background_colors:
            self.background_colors = colors
            self._draw_backgrounds(*colors)
            self.boxes = [...] * len(LEVELS)  # around the last road: all has to be copied
        self.touched = displayed(env.road_color)

        quads = np.array([quad for quad, _ in env.road_poly])
        colors = np.array([color for _, color in env.road_poly]).astype(int)
        colors = smoothscale_lut()[colors].tolist()
        kerb = np.array([isinstance(color, tuple) for _, color in env.road_poly])
        last = kerb & ~np.roll(kerb, -2)  # of its row of kerbs: they alternate with tiles
        self.tiles = [texels(widen(quads[~kerb], -1 / n, 0, 0), n) for n, _, _ in LEVELS]
        for k, (scale, _, zoom) in enumerate(LEVELS):
            texture, box = self.textures[k], self.boxes[k]
            texture[box] = self.backgrounds[k][box]
            grow = GROWTH / zoom - AA_GROWTH / scale
            # The next quad is drawn over the end of this: without 1 texel more, grass would show
            # through two half-covered edges.
            ahead = np.where(last, grow, 1 / scale)[:, None]
            polys = texels(widen(quads, grow, ahead, grow), scale)
            (x0, y0), (x1, y1) = polys.min((0, 1)) >> FRAC, polys.max((0, 1)) >> FRAC
            self.boxes[k] = slice(y0 - 3, y1 + 4), slice(x0 - 3, x1 + 4)
            for poly, color in zip(polys, colors):
                cv2.fillConvexPoly(texture, poly, color, cv2.LINE_AA, FRAC)

    def _draw_backgrounds(self, bg, grass):
        d = cr.GRASS_DIM
        patches = [square(d * i, d * j, d) for i in range(-20, 20, 2) for j in range(-20, 20, 2)]
        squares = np.array([square(-PLAYFIELD, -PLAYFIELD, 2 * PLAYFIELD)] + patches)
        for background, (scale, _, zoom) in zip(self.backgrounds, LEVELS):
            background[:] = 0
            grow = GROWTH / zoom - AA_GROWTH / scale
            outward = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1))) * grow
            for i, poly in enumerate(texels(squares + outward, scale)):
                cv2.fillConvexPoly(background, poly, grass if i else bg, cv2.LINE_AA, FRAC)

    def repaint(self, tile):
        """Give a tile the colour of touched ones, but for its soft edges: they are 5 levels off."""
        for texture, tiles in zip(self.textures, self.tiles):
            cv2.fillConvexPoly(texture, tiles[tile], self.touched, cv2.LINE_8, FRAC)


@lru_cache(maxsize=256)
def sampling_grid(zoom, h, w):
    """How (h, w) pixels of the window above the HUD sample the world.

    -> level of its textures; texels a unit; units a pixel in x and y; units from the car to the
    first pixel in x and y; (w, h).
    """
    level = next(i for i, (_, least, _) in enumerate(LEVELS) if zoom >= least)
    kx, ky = cr.WINDOW_W / w / zoom, HUD_Y / h / zoom
    bx, by = 0.5 * kx - CAR_X / zoom, (cr.WINDOW_H - CAR_Y) / zoom - 0.5 * ky
    return level, LEVELS[level][0], kx, ky, bx, by, (w, h)


class Renderer:
    """Draws the frames of one env, one or many at a time; holds its textures and buffers."""

    def __init__(self):
        self.track, self.hud = TrackTextures(), Hud()
        self.scenes = np.zeros((BATCH, HUD_TOP, cr.STATE_W, 4), np.uint8)
        self.wide = np.zeros((2 * HUD_TOP, 2 * cr.STATE_W, 4), np.uint8)
        self.matrix = np.zeros((2, 3))
        # bilinear at a third of a pixel is the area average of 96 to 64, at a quarter of its cost
        i = np.arange(BATCH * SCENE_H)
        thirds = (3 * (i // 2) + np.where(i % 2, 5 / 3, 1 / 3)).astype(np.float32)
        self.x, self.y = np.meshgrid(thirds[:OBS_SIZE], thirds)

    def draw(self, states):
        """Frames (n, 64, 64, 3) uint8 of n RenderStates, in the order in which they came."""
        out = np.zeros((len(states), OBS_SIZE, OBS_SIZE, 3), np.uint8)  # black where no bar is
        for i in range(0, len(states), BATCH):
            self._draw_scenes(states[i : i + BATCH], out[i : i + BATCH, :SCENE_H])
        for state, frame in zip(states, out):
            self.hud.draw(state, frame[SCENE_H:])
        return out

    def _draw_scenes(self, states, out):
        for state, scene in zip(states, self.scenes):
            for tile in state.fresh:
                if tile % 3:  # every third has the colour of a touched one from the start
                    self.track.repaint(tile)
            if state.zoom < FULL_ZOOM:  # texels are smaller than pixels by a factor that changes
                self.warp(state, self.wide)
                cv2.resize(self.wide, (cr.STATE_W, HUD_TOP), scene, interpolation=cv2.INTER_AREA)
            else:
                self.warp(state, scene)
            crop, car = scene[CAR_ROWS, CAR_COLS], car_sprite(state)
            crop[:] = crop * car[..., 3:] + car
        n, rows = len(states), len(states) * SCENE_H
        tall = self.scenes[:n].reshape(n * HUD_TOP, cr.STATE_W, 4)  # one below the other
        small = cv2.remap(tall, self.x[:rows], self.y[:rows], cv2.INTER_LINEAR)
        out[:] = cv2.cvtColor(small, cv2.COLOR_RGBA2RGB).reshape(out.shape)

    def warp(self, state, out):
        """Sample the world as seen from the car onto out (h, w, 4), the window above the HUD."""
        level, scale, kx, ky, bx, by, size = sampling_grid(state.zoom, *out.shape[:2])
        c, s = math.cos(state.angle) * scale, math.sin(state.angle) * scale
        x, y = (state.x + HALF) * scale - 0.5, (state.y + HALF) * scale - 0.5
        self.matrix[:] = (
            (c * kx, s * ky, x + c * bx - s * by),
            (s * kx, -c * ky, y + s * bx + c * by),
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(self.track.textures[level], self.matrix, size, out, flags)


class FastCarRacing(cr.CarRacing):
    """CarRacing whose obs (64, 64, 3) uint8 is `preprocess` of the official, off by 0.1 levels.

    A driver that reads no frames can call `defer()`: they are drawn later at half the cost. The
    obs are then None, and `deferred_frames()` returns them all.
    """

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.observation_space = gym.spaces.Box(0, 255, (OBS_SIZE, OBS_SIZE, 3), np.uint8)
        self.renderer = Renderer()
        self.deferred = None  # RenderStates to be drawn later

    def step(self, action):
        self.car.__class__ = FloatCar  # `reset` and `place_car` make official ones
        return super().step(action)

    def defer(self):
        """From now on nothing is drawn. The frames since an earlier call are forgotten."""
        self.deferred = []

    def deferred_frames(self):
        """The frames (n, 64, 64, 3) uint8 since `defer()`; to be called before the next reset."""
        states, self.deferred = self.deferred, None
        return self.renderer.draw(states)

    def _create_track(self):
        if not super()._create_track():
            return False
        self.touched, self.fresh = set(), []  # tiles touched so far, and since the last frame
        listener = TouchListener(self, self.lap_complete_percent)
        self.world.contactListener_bug_workaround = self.world.contactListener = listener
        self.renderer.track.draw(self)
        return True

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        state, self.fresh = render_state(self), []
        if self.deferred is None:
            return self.renderer.draw((state,))[0]
        self.deferred.append(state)


def picture(env, size):
    """The car from above as `render()` shows it, (h, w, 3) uint8 of size (w, h), from what the last
    step has drawn, in a sixth of `render()`'s time. Skid marks are missing; w : h should be 5 : 4,
    or all is squashed. Any kind of env.
    """
    env, (w, h) = env.unwrapped, size
    pixels = np.zeros((h, w, 4), np.uint8)
    surface = pygame.image.frombuffer(pixels, size, "RGBX")  # draws into them
    if not isinstance(env, FastCarRacing):
        surface.blit(pygame.transform.smoothscale(env.surf, size), (0, 0))
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)

    # ground, then the car on a surface of its own, since y points up in it, then the HUD
    state = render_state(env)
    env.renderer.warp(state, pixels[: h * HUD_Y // cr.WINDOW_H])
    zoom, side = state.zoom * w / cr.WINDOW_W, h // 4
    car = pygame.Surface((side, side))
    car.fill((0, 255, 255))
    car.set_colorkey((0, 255, 255))
    x, y = pygame.math.Vector2(-state.x * zoom, -state.y * zoom).rotate_rad(-state.angle)
    env.car.draw(car, zoom, (side / 2 + x, side / 2 + y), -state.angle, False)
    at = w / 2 - side / 2, h - h * CAR_Y / cr.WINDOW_H - side / 2
    surface.blit(pygame.transform.flip(car, False, True), at)
    env.surf = surface
    env._render_indicators(*size)
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
