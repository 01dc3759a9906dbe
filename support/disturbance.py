"""Disturbances of what a driver sees, which no net was trained for (`--disturb`)."""

from collections import deque

import numpy as np

DISTURBANCES = ["none", "colours", "noise", "late"]  # colours: the environment's own
NOISE_STD = 10  # grey levels, standard deviation
DELAY_STEPS = 2  # age of late frames


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
