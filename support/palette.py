"""Other colours of grass and road, found in a frame and replaced by those of the training data.

No net and no label. The car starts on the road, so the pixels ahead of it are road, and the most
frequent colour beside it is grass. Frames in the usual colours stay as they are, to the bit.
"""

import numpy as np

from car import SCENE_H

ROAD = np.array([102.0, 102.0, 102.0])  # usual levels in a frame, 0..255
GRASS = np.array([[100.0, 202.0, 100.0], [100.0, 228.0, 100.0]])  # lawn, and its brighter patches
USUAL = 8  # levels from those that still count as the usual colours
AHEAD = np.s_[30:42, 30:34]  # rows and columns of road ahead of the car
NEAR = 12.0  # levels from mixtures of road and grass; farther pixels (car, kerbs) keep their colour
BIN = 4  # levels in a bin, when the most frequent colours are counted
PATCH = 40  # levels between lawn and patches at most, all channels together


class Palette:
    """Shows frames (64, 64, 3) uint8 in the usual colours."""

    def __init__(self):
        self.colors = None  # road (3,) and grass (2, 3) as seen; None: the usual ones

    def learn(self, frame):
        """Finds the colours of road and grass in a frame of the car on the road."""
        scene = frame[:SCENE_H].astype(float)
        road = np.median(scene[AHEAD].reshape(-1, 3), axis=0)

        # the two most frequent other colours that are alike
        rest = scene[np.abs(scene - road).max(axis=2) > NEAR]
        bins, count = np.unique(rest // BIN, axis=0, return_counts=True)
        lawn = bins[count.argmax()] if len(bins) else road // BIN
        apart = BIN * np.abs(bins - lawn).sum(axis=1)
        alike = np.where((apart > 2 * BIN) & (apart < PATCH), count, 0)
        patch = bins[alike.argmax()] if alike.any() else lawn
        level = lambda b: np.median(rest[np.abs(rest // BIN - b).max(axis=1) <= 1], axis=0)
        grass = np.array([level(b) for b in sorted((lawn, patch), key=sum)])

        off = np.abs(grass[:, None] - GRASS).max(axis=2).min(axis=1)  # from the nearer of both
        usual = max(np.abs(road - ROAD).max(), *off) <= USUAL
        self.colors = None if usual or not len(rest) else (road, grass)

    def __call__(self, frame):
        """The frame in the usual colours."""
        if self.colors is None:
            return frame
        scene, (road, grass) = frame[:SCENE_H].astype(float), self.colors
        of_road, of_patch, near = mixture(scene, road, grass)
        lawn = (GRASS[0] - grass[0]) * (1 - of_patch) + (GRASS[1] - grass[1]) * of_patch
        shift = (ROAD - road) * of_road + lawn * (1 - of_road)
        out = frame.copy()
        out[:SCENE_H] = (scene + near * shift).round().clip(0, 255)
        return out


def mixture(scene, road, grass):
    """What mixes to the pixels (h, w, 3): the share of road, that of patches in the grass, and how
    well road and grass explain them at all, each (h, w, 1) in 0..1."""
    of_patch = between(scene, *grass)
    lawn = grass[0] + of_patch * (grass[1] - grass[0])
    of_road = between(scene, lawn, road)
    apart = scene - lawn - of_road * (road - lawn)
    near = np.exp(-np.square(apart).sum(axis=-1, keepdims=True) / (2 * NEAR**2))
    return of_road, of_patch, near


def between(x, a, b):
    """How far x (..., 3) is on the way from a to b: (..., 1) in 0..1."""
    way = b - a
    length = np.square(way).sum(axis=-1, keepdims=True)
    return (((x - a) * way).sum(axis=-1, keepdims=True) / np.maximum(length, 1e-6)).clip(0, 1)
