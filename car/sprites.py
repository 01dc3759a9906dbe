"""Cached tables for the renderer: sprites of the car, and the HUD.

Both are computed at the size of the official window and averaged down to the frame.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import pygame
from gymnasium.envs.box2d import car_dynamics as cd
from gymnasium.envs.box2d import car_racing as cr

from car import OBS_SIZE, SCENE_H
from car.window import CAR_X, CAR_Y, FULL_ZOOM, HUD_Y, area_weights, displayed

CAR_ROWS, CAR_COLS = slice(66, 78), slice(45, 51)  # of the 96-pixel frame: all that the car covers
CROP_X, CROP_Y, CROP_W, CROP_H = 460, 140, 80, 120  # the same in window px, y up, with a margin
ROWS_96 = area_weights(96, 800)[CAR_ROWS, 800 - CROP_Y - CROP_H : 800 - CROP_Y]
COLS_96 = area_weights(96, 1000)[CAR_COLS, CROP_X : CROP_X + CROP_W]
RGBA_MASKS = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)  # bytes in the order R, G, B, A
ANGLE_STEP = 0.05  # rad of steering per cached sprite
PHASE_STEPS = 32  # cached sprites per turn of a wheel
ZOOMING_STEPS = 2, 4  # of both are one while the camera zooms: a small car, in 50 sizes


def boxed(points):
    """Car pixels -> the polygon in units, in Box2D's order, on which pygame's fill depends."""
    shape = cr.Box2D.b2PolygonShape(vertices=[(x * cd.SIZE, y * cd.SIZE) for x, y in points])
    return [tuple(v) for v in shape.vertices]


W, R = cd.WHEEL_W * cd.SIZE, cd.WHEEL_R * cd.SIZE  # units, half of a wheel's sides
HULL = [boxed(p) for p in (cd.HULL_POLY1, cd.HULL_POLY2, cd.HULL_POLY3, cd.HULL_POLY4)]
WHEEL = boxed([(x * cd.WHEEL_W, y * cd.WHEEL_R) for x, y in ((-1, 1), (1, 1), (1, -1), (-1, -1))])
STRIPE = 1.2  # rad of a wheel's turn that its white stripe covers


def empty_crop():
    """The window around the car, transparent."""
    return pygame.Surface((CROP_W, CROP_H), pygame.SRCALPHA, 32, RGBA_MASKS)


def paint(surface, points, zoom, color, angle=0.0, at=(0, 0)):
    """Polygon in the car's frame, turned and then moved by `at` (units), as the env draws it."""
    c, s = math.cos(angle), math.sin(angle)
    moved = [(at[0] + c * x - s * y, at[1] + s * x + c * y) for x, y in points]
    x0, y0 = CAR_X - CROP_X, CAR_Y - CROP_Y
    pygame.draw.polygon(surface, color, [(x * zoom + x0, y * zoom + y0) for x, y in moved])


def sprite(surface):
    """(12, 6, 4) float32: premultiplied RGB 0..255 and coverage -1..0 on the 96-pixel grid."""
    rgba = np.frombuffer(surface.get_buffer(), np.uint8).reshape(CROP_H, CROP_W * 4)[::-1]  # y down
    rows = (ROWS_96 @ rgba.astype(np.float32)).reshape(-1, CROP_W, 4)  # (12, 80, 4)
    return COLS_96 @ rows * np.float32((1, 1, 1, -1 / 255))  # (12, 6, 4)


@lru_cache(maxsize=64)
def hull_sprite(zoom):
    """Sprite of the hull, to which those of the wheels are added. One array for all callers."""
    surface = empty_crop()
    for poly in HULL:
        paint(surface, poly, zoom, displayed((204, 0, 0)) + (255,))
    # half a level: the cast to uint8 then rounds; 1: coverage becomes what is left of the ground
    return sprite(surface) + np.float32((0.5, 0.5, 0.5, 1))


@lru_cache(maxsize=16384)
def wheel_sprite(wheel, angle_step, phase_step, zoom):
    """Sprite of the visible part of a wheel (0..3), at a steering angle and a turn."""
    surface = empty_crop()
    angle, at = angle_step * ANGLE_STEP, [p * cd.SIZE for p in cd.WHEELPOS[wheel]]
    paint(surface, WHEEL, zoom, (0, 0, 0, 255), angle, at)
    a1 = (phase_step + 0.5) * 2 * math.pi / PHASE_STEPS
    a2 = a1 + STRIPE
    s1, s2, c1, c2 = math.sin(a1), math.sin(a2), math.cos(a1), math.cos(a2)
    if s1 <= 0 or s2 <= 0:  # the white stripe, or what of it is on top of the wheel
        c1, c2 = (math.copysign(R, c) if s > 0 else R * c for s, c in ((s1, c1), (s2, c2)))
        white = displayed(cd.WHEEL_WHITE) + (255,)
        paint(surface, [(-W, c1), (W, c1), (W, c2), (-W, c2)], zoom, white, angle, at)
    for poly in HULL:  # the hull is drawn over the wheels
        paint(surface, poly, zoom, (0, 0, 0, 0))
    return sprite(surface)


def car_sprite(state):
    """(12, 6, 4) float32 of the car in a RenderState, for CAR_ROWS and CAR_COLS of the frame:
    premultiplied RGB, and what is left of the ground, 0..1."""
    zoom, out = state.zoom, hull_sprite(state.zoom).copy()
    a, b = (1, 1) if zoom >= FULL_ZOOM else ZOOMING_STEPS
    for i, (_, phase, steer) in enumerate(state.wheels):
        turn = math.floor(phase * (PHASE_STEPS / (2 * math.pi))) % PHASE_STEPS // b * b + b // 2
        out += wheel_sprite(i, a * round(steer / (a * ANGLE_STEP)), turn, zoom)
    return out


BAR_X, BAR_Y = 25, 20  # window px of the HUD's grid
BASE_Y = 80  # row below the HUD's top of the last row of a vertical bar
MIN_VALUE = 1e-4  # smaller ones have no bar
NO_BAR = 100  # entry of `tall`, after its 100 rows
# Place on the grid, colour and width in window px of the vertical bars: speed, spin of 4 wheels.
# A bar is one px wider than its cell, unless the next bar covers it.
WHITE, BLUE, VIOLET = (255, 255, 255), (0, 0, 255), (51, 0, 255)
BARS = (5, WHITE, 26), (7, BLUE, 25), (8, BLUE, 25), (9, VIOLET, 25), (10, VIOLET, 26)
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

        # vertical bars (101, 8, columns, 3) by the row at which they end
        ends = [sorted((row, BASE_Y)) for row in range(NO_BAR)]  # backward spin hangs below
        tall = np.array([y_share[:, a : b + 1].sum(1) for a, b in ends] + [np.zeros(8)])
        bars = []
        for place, color, width in BARS:
            cover = x_share[:, place * BAR_X : place * BAR_X + width].sum(1)
            bars.append(np.einsum("er,x,c->erxc", tall, cover, displayed(color)))
        self.speed = (bars[0][:, :, SPEED_COLS] + 0.5).astype(np.uint8)  # half a level: it rounds
        spins = [bar[:, :, WHEEL_COLS] for bar in bars[1:]]
        self.wheels = lru_cache(maxsize=4096)(
            lambda *ends: (sum(bar[end] for bar, end in zip(spins, ends)) + 0.5).astype(np.uint8)
        )

        # level bars of steering and gyro (1001, 8, columns) by the column at which they end
        thick = y_share[:, BAR_Y : 3 * BAR_Y + 1].sum(1)
        across = np.concatenate((np.zeros((1, 64)), x_share.T.cumsum(0)))
        self.level = []
        for place in LEVEL_AT:
            ends = [sorted((place * BAR_X, end)) for end in range(cr.WINDOW_W)]
            cover = np.array([across[b + 1] - across[a] for a, b in ends] + [np.zeros(64)])
            bars = np.einsum("ex,r->erx", cover[:, LEVEL_COLS] * displayed(WHITE)[0], thick)
            self.level.append((bars + 0.5).astype(np.uint8))

    def draw(self, state, out):
        """Fill out (8, 64, 3) uint8, zeros so far. Speed, 4 wheels, steering, gyro."""
        wheels, (steer, gyro) = state.wheels, self.level
        out[:, SPEED_COLS] = self.speed[vertical_end(state.speed, 0.02)]
        out[:, WHEEL_COLS] = self.wheels(*[vertical_end(omega, 0.01) for omega, _, _ in wheels])
        out[:, LEVEL_COLS, 1] = steer[level_end(LEVEL_AT[0], wheels[0][2], -10.0)]
        out[:, LEVEL_COLS, 0] = gyro[level_end(LEVEL_AT[1], state.yaw_rate, -0.8)]


def vertical_end(value, height):
    """Row below the HUD's top where the bar of `value` ends, `height` grid cells a unit."""
    if abs(value) <= MIN_VALUE:
        return NO_BAR
    return min(max(int(cr.WINDOW_H - (BAR_Y + BAR_Y * height * value)) - HUD_Y, 0), NO_BAR - 1)


def level_end(place, value, length):
    """Window column where the bar of `value` from `place` ends, `length` grid cells a unit."""
    if abs(value) <= MIN_VALUE:
        return cr.WINDOW_W  # none
    return int(min(max((place + length * value) * BAR_X, 0), cr.WINDOW_W - 1))


def hflip(frames):
    """Frames (..., 64, 64, 3) uint8 with left and right exchanged: scene, steering and gyro bar.
    The wheels' bars stay, as if left and right wheels had the same spin."""
    out = cv2.flip(frames.reshape(-1, OBS_SIZE, 3), 1).reshape(frames.shape)
    hud = frames[..., SCENE_H:, :, :]
    out[..., SCENE_H:, :, :] = hud
    for place, channel in zip(LEVEL_AT, LEVEL_CHANNELS):
        middle = place * BAR_X * OBS_SIZE // cr.WINDOW_W
        bar = slice(middle - LEVEL_REACH, middle + LEVEL_REACH)
        out[..., SCENE_H:, bar, channel] = hud[..., bar, channel][..., ::-1]
    return out
