"""Which way the car should go, from the past of a drive: frames alone do not tell it.

The yaw rate is read off the red bar in a frame's HUD. Its sum is the heading. As long as latents
are those of an expert, the heading is that of the road, and is remembered.
"""

import math

import numpy as np
import torch

from car import FPS, SCENE_H
from car.telemetry import wrap_angle
from networks import OOD_THRESHOLD

GYRO = np.s_[SCENE_H:, 32:64, 0]  # where the red bar of the yaw rate grows from the middle
GYRO_SIDE = np.repeat([1.0, -1.0], 16)  # to the left for left turns
GYRO_SCALE = 0.2415  # rad/s of yaw that a fully red pixel stands for
SURE = 0.05  # share of random driving's energy below which the car is surely along the road
TURNED = math.pi / 2  # rad from the road's direction at which a car goes the wrong way
MEMORY = 8.0  # s for which the road's direction is remembered; the road bends on meanwhile


def yaw_rate(frame):
    """rad/s, + to the left, as a frame (64, 64, 3) uint8 shows it."""
    return GYRO_SCALE * float((frame[GYRO] / 255.0 @ GYRO_SIDE).sum())


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


class HeadingMemory:
    """The car's heading and that of the road, rad from where the drive began."""

    def __init__(self):
        self.heading, self.road, self.age = 0.0, None, 0.0

    def see(self, frame):
        """Adds the turn of one step, as its frame shows it."""
        self.heading += yaw_rate(frame) / FPS
        self.age += 1 / FPS

    def turned(self, energy):
        """Radians of the car from the road, if that counts now; else None.

        energy: of the present latent, over that of random driving. It counts while the car is out
        of distribution, or goes the wrong way. Until then the road leads where the car goes.
        """
        off = None if self.road is None else wrap_angle(self.heading - self.road)
        wrong = off is not None and abs(off) >= TURNED
        if energy < SURE and not wrong:
            self.road, self.age = self.heading, 0.0
        if self.age > MEMORY:
            self.road = None
        counts = self.road is not None and (wrong or energy > OOD_THRESHOLD)
        return off if counts else None
