"""Disturbances of what a driver sees, which no net was trained for (`--disturb`).

colours: the environment's own, of road and grass at random.
shift, shift3: their usual colours, each shifted by one random number, or by one a channel.
noise, late: of the frames.
"""

from collections import deque
from functools import partial

import numpy as np

from car.env import make_env

SHIFTS = {"shift": 1, "shift3": 3}  # random numbers a colour
DISTURBANCES = ["none", "colours", *SHIFTS, "noise", "late"]
MOST_SHIFT = 0.2 * 255  # levels, either way: as in Tang et al. 2020, arXiv:2003.08165
NOISE_STD = 10  # grey levels, standard deviation
DELAY_STEPS = 2  # age of late frames


def disturbed_env(kind, disturbance):
    """An env of this kind, as `make_env` makes it, in the colours of a disturbance."""
    env = make_env(kind, domain_randomize=disturbance == "colours" or disturbance in SHIFTS)
    if disturbance in SHIFTS:
        env.unwrapped._reinit_colors = partial(shift_colours, env.unwrapped, SHIFTS[disturbance])
    return env


def shift_colours(env, channels, randomize):
    """Shifts the colours of an env that is being reset; the track stays that of its seed."""
    rng = env.np_random.spawn(1)[0]
    road, grass = rng.uniform(-MOST_SHIFT, MOST_SHIFT, (2, channels))
    env.road_color = np.array([102, 102, 102]) + road
    env.bg_color, env.grass_color = (
        (np.array(usual) + grass).clip(0, 255) for usual in ((102, 204, 102), (102, 230, 102))
    )


class Disturbance:
    """Changes the frames between the camera and the driver: not at all, by noise, or by a delay."""

    def __init__(self, kind="none"):
        self.kind = kind

    def reset(self, track_seed):
        """Begins an episode: the same track has the same noise."""
        self.rng, self.past = np.random.default_rng(track_seed), deque(maxlen=DELAY_STEPS + 1)

    def __call__(self, frame):
        """frame (64, 64, 3) uint8 -> the one that the driver gets."""
        self.past.append(frame)
        if self.kind == "noise":
            noisy = frame + self.rng.normal(0, NOISE_STD, frame.shape)
            return noisy.clip(0, 255).astype(np.uint8)
        return self.past[0] if self.kind == "late" else frame
