"""Which way the car should go, from the past of a drive: one frame does not tell it.

Yaw rate and speed are read off the bars of a frame's HUD, the road's direction off its edges near
the car, in the usual colours. The density of a latent tells when the car is surely along the road.
No labels.
"""

import math

import numpy as np
import torch

from car import FPS, SCENE_H
from car.telemetry import wrap_angle
from support.palette import ROAD

GYRO = np.s_[SCENE_H:, 32:64, 0]  # where the red bar of the yaw rate grows from the middle
GYRO_SIDE = np.repeat([1.0, -1.0], 16)  # to the left for left turns
GYRO_SCALE = 0.2415  # rad/s of yaw that a fully red pixel stands for
SPEED = np.s_[SCENE_H:, 8:10, 1]  # the white bar of the speed
SPEED_SCALE, SPEED_LEAST = 22.1, 1.7  # units/s of a white pixel, and without a bar
DARK = 30.0  # levels that do not count as the speed's bar, such as noise
AHEAD = 20.0  # units ahead on the road at which a car beside it aims
SURE = 0.05  # share of random driving's energy below which the car is surely along the road
STILL, SLOW = 0.5, 4.0  # s below so many units/s after which a car has stopped
EDGE = 40.0  # levels from the road's colour at which a pixel is surely not road
CLEAR = 5.0  # clearness of edges from which on the picture is trusted
GAIN = 0.1  # share of a clear picture's difference that corrects the memory, a step
ROWS, COLS = np.mgrid[:SCENE_H, :64]
NEAR = np.exp(-((ROWS - 46) ** 2 + (COLS - 31.5) ** 2) / (2 * 8.0**2))  # weights around the car


def yaw_rate(frame):
    """rad/s, + to the left, as a frame (64, 64, 3) uint8 shows it."""
    return GYRO_SCALE * float((frame[GYRO] / 255.0 @ GYRO_SIDE).sum())


def speed(frame):
    """units/s, as a frame (64, 64, 3) uint8 shows it, within 4."""
    bar = (frame[SPEED] - DARK).clip(0) / 255
    return SPEED_SCALE * float(bar.sum()) + SPEED_LEAST


def turn_readout(encoder):
    """(weights (planned,), bias): rad that the car turns from one latent to the next, read off the
    latter; None if the latents have no HUD.

    The HUD's pixels follow from its principal components, and the yaw rate from these pixels.
    """
    if not encoder.hud_pca:
        return None
    side = torch.zeros(64 - SCENE_H, 64, dtype=torch.float64)
    side[:, 32:] = torch.from_numpy(GYRO_SIDE)
    side = torch.cat([side.flatten(), side.new_zeros(2 * side.numel())])  # the red channel
    pixels = torch.linalg.pinv(encoder.pca_components.double().cpu())  # (n, V) of a component
    seconds = encoder.repeat / FPS
    of_component = seconds * GYRO_SCALE / 2 * pixels @ side  # pixels are -1..1
    hud = slice(encoder.planned - encoder.hud_pca, None)
    mean, std = (x[hud].double().cpu() for x in (encoder.mean, encoder.std))
    weights = torch.zeros(encoder.planned, dtype=torch.float64)
    weights[hud] = std * of_component
    bias = mean @ of_component + seconds * GYRO_SCALE / 2 * encoder.pca_mean.double().cpu() @ side
    return weights.float().to(encoder.mean.device), float(bias)


def look_around(frame):
    """(axis, clearness, share): what a frame (64, 64, 3) uint8 shows of the road near the car.

    axis: rad that the car is off the road, + to the left, up to half a turn. A picture does not
    show which of two ways is the lap's. The structure tensor of the road's edges tells it.
    clearness: 0 without edges, about 12 on a road. share: of road around the car, 0..1.
    """
    off_road = np.abs(frame[:SCENE_H].astype(np.float32) - ROAD[0]).max(axis=2)
    road = (1 - off_road / EDGE).clip(0)
    gy, gx = np.gradient(road)
    across, both, along = (float((NEAR * g).sum()) for g in (gx * gx, 2 * gx * gy, gy * gy))
    axis, clearness = math.atan2(both, across - along) / 2, math.hypot(across - along, both)
    return axis, clearness, float((NEAR * road).sum() / NEAR.sum())


class HeadingMemory:
    """Rad that the car is off its way along the road, + to the left.

    A drive begins within a quarter turn of the road's direction. Then yaw rate and speed add up to
    the car's heading and its place beside the road. The picture corrects them where it shows the
    road. The way of a car beside the road leads back to it.
    """

    def __init__(self):
        self.still = 0  # steps without motion, up to now
        self.forget()

    def forget(self):
        """Begins anew, within a quarter turn of the road's direction."""
        self.turned, self.beside = 0.0, 0.0  # rad and units, from the road; + to the left
        self.frames = 0  # seen since then

    def see(self, frame):
        """Adds one step, as its frame (64, 64, 3) uint8 in the usual colours shows it.

        A car that has stopped forgets: its memory may be what stops it.
        """
        v = speed(frame)
        self.still = self.still + 1 if v < SLOW else 0
        if self.still > STILL * FPS:
            self.forget()
        self.frames += 1
        turned = self.turned + yaw_rate(frame) / FPS
        beside = self.beside + v * math.sin(turned) / FPS
        axis, clearness, share = look_around(frame)
        gain = max(GAIN, 1 / self.frames) * min(1.0, clearness / CLEAR)
        self.turned = wrap_angle(turned + gain * math.remainder(axis - turned, math.pi))
        self.beside = (1 - gain * share) * beside

    def settle(self):
        """The car is surely along the road, either way: the picture of a sharp bend may err."""
        self.turned, self.beside = wrap_angle(math.pi * round(self.turned / math.pi)), 0.0

    def off_course(self):
        """Rad, + to the left, between the car and its way."""
        return wrap_angle(self.turned + math.atan(self.beside / AHEAD))
