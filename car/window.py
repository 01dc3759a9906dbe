"""Geometry and colours of the official 1000x800 window, from which frames are scaled down."""

from functools import lru_cache

import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as cr

CAR_X, CAR_Y = cr.WINDOW_W / 2, cr.WINDOW_H / 4  # where the car sits in the window, y up
HUD_Y = 700  # window row of the HUD's top
FULL_ZOOM = cr.ZOOM * cr.SCALE  # window px a unit, once the camera has arrived


def area_weights(n_out, n_in):
    """(n_out, n_in) float32: row i averages the i-th of n_out equal parts of n_in pixels."""
    edges = np.linspace(0, n_in, n_out + 1)
    k = np.arange(n_in)
    cover = np.minimum(edges[1:, None], k + 1) - np.maximum(edges[:-1, None], k)
    return (np.clip(cover, 0, None) * n_out / n_in).astype(np.float32)


@lru_cache(maxsize=1)
def smoothscale_lut():
    """(256,) uint8: pygame's smoothscale of flat greys, 0 to 2 less by build and CPU."""
    window = pygame.Surface((cr.WINDOW_W, cr.WINDOW_H))
    for v in range(256):  # 16 x 16 flat blocks, read in their middles
        window.fill((v, v, v), (v % 16 * 62.5, v // 16 * 50, 63, 50))
    frame = pygame.transform.smoothscale(window, (cr.STATE_W, cr.STATE_H))
    return pygame.surfarray.array3d(frame)[3::6, 3::6, 0].T.ravel()


def displayed(color):
    """RGB 0..255, truncated to int as the env does -> (r, g, b) after the window's smoothscale."""
    return tuple(int(smoothscale_lut()[int(c)]) for c in color)
