"""Augmentations of windows: light, mirror, warp. They change uint8 frames in place."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from car import SCENE_H
from car.sprites import hflip
from support.distributed import RANK
from vicreg import gather

JITTER, TINT = 0.3, 0.1  # scales of brightness and contrast, and of each channel: 1 ± this
MEAN_EVERY = 8  # contrast keeps the mean of every eighth row of pixels
CAR = slice(43, 53), slice(29, 35)  # rows and columns of the car, which a warp does not move
CAR_ROW, AHEAD_ROWS = 47.5, 48  # its middle, and the rows of the world ahead of it
SCENE_AHEAD = CAR[0].start  # rows of the scene above the car
SHIFT, SLOPE, CURVE = 3, 7, 24  # columns that a warp of 1 moves the scene, or its far end
STRETCHES = 3  # of the way ahead, each with a curvature of its own
WARPS = 2 + STRETCHES  # numbers of a warp: shift, slope, curvatures, nearest first
MAX_SHIFT = 38  # columns that all of them together can move a row, rounded up
CHUNK = 32  # frames that a CPU changes at once: more leave its caches
UNIT_BITS = 6  # int16 arithmetic in steps of 1 / UNIT: three times as fast as float on a CPU
UNIT = 2**UNIT_BITS


def pieces(x):
    """Slices of frames (N, ...): CHUNK rows on a CPU, all of them on a GPU."""
    size = CHUNK if x.device.type == "cpu" else max(1, len(x))
    return [slice(i, i + size) for i in range(0, len(x), size)]


# ------------------------------------------------------------------ light


def jitter_(x, generator):
    """Changes brightness, contrast and tint of the scene, one draw a row; the HUD stays.

    x (N, 3 * T, 64, 64) uint8, channels_last.
    """
    N, C, H, W = x.shape
    draw = lambda *shape: 2 * torch.rand(*shape, generator=generator, device=x.device) - 1
    tint = (1 + TINT * draw(N, 1, 3)).repeat(1, 1, W * C // 3)  # (N, 1, W * C)
    b, c = 1 + JITTER * draw(2, N, 1, 1)
    x = x.permute(0, 2, 3, 1).view(N, H, W * C)  # as it lies in memory: long rows
    mean = x[:, :SCENE_H:MEAN_EVERY].float().mean(dim=(1, 2), keepdim=True)
    light = b * tint * UNIT  # ((scene - mean) c + mean) b, tinted: never out of int16's range
    gain, more = (c * light).round().short(), ((1 - c) * mean * light + UNIT / 2).short()
    for part in pieces(x):
        scene = x[part, :SCENE_H].short().mul_(gain[part]).add_(more[part])
        x[part, :SCENE_H] = scene.bitwise_right_shift_(UNIT_BITS).clamp_(0, 255)


def flip_batches(batches, share, seed, start):
    """The batches from step `start` on, with left and right exchanged in a share of the windows."""
    for step, (obs, act) in enumerate(batches, start):
        rows = np.random.default_rng([seed, step, RANK, 1]).random(len(obs)) < share
        if rows.any():
            frames = obs.permute(0, 1, 3, 4, 2).numpy()  # as they lie in memory
            frames[rows] = hflip(frames[rows])
            act[rows, :, 0] *= -1
        yield obs, act


# ------------------------------------------------------------------ warps


def warp_rows(device=None):
    """(WARPS, SCENE_H): columns by which a warp of 1 moves each row of the scene to the right."""
    u = (CAR_ROW - torch.arange(SCENE_H, device=device)) / AHEAD_ROWS  # 0 at the car, 1 far ahead
    rows = [torch.full_like(u, SHIFT), SLOPE * u]
    for k in range(STRETCHES):
        inside = (u - k / STRETCHES).clamp(0, 1 / STRETCHES)
        beyond = (u - (k + 1) / STRETCHES).clamp_min(0)
        rows.append(CURVE * (inside**2 / 2 + beyond / STRETCHES))
    return torch.stack(rows)


def row_shifts(warp):
    """Columns (N, SCENE_H) by which warps (N, WARPS) move each row to the right."""
    rows = warp_rows(warp.device)
    return (warp[:, :, None] * rows).sum(dim=1)  # autocast would round a product of matrices


def warp_(x, generator):
    """Moves the rows of the scene sideways, as if road and car lay otherwise.

    The car and the HUD stay. x (N, C, 64, 64) uint8, channels_last -> warp (N, WARPS), variance 1.
    Equivariance as a task: Dangovski et al. 2022, arXiv:2111.00899.
    """
    N, C, _, W = x.shape
    x = x.permute(0, 2, 3, 1)  # as it lies in memory
    warp = torch.rand(N, WARPS, generator=generator, device=x.device)
    warp = math.sqrt(3) * (2 * warp - 1)
    source = MAX_SHIFT - row_shifts(warp)  # (N, SCENE_H): the column of `wider` that comes to 0
    left = source.floor()
    right = ((source - left) * UNIT).round().short()[..., None]  # its neighbour's share
    tall, wide = CAR
    share = torch.linspace(0, 1, wide.stop - wide.start + 2, device=x.device)[1:-1, None]

    for part in pieces(x):
        # the scene without the car, wider by repeated edges
        scene = x[part, :SCENE_H]
        edge = lambda column, n: scene[:, :, column, None].expand(-1, -1, n, -1)
        wider = torch.cat([edge(0, MAX_SHIFT), scene, edge(-1, MAX_SHIFT + 1)], dim=2)
        beside = scene[:, tall, wide.start - 1 : wide.stop + 1 : wide.stop - wide.start + 1].float()
        under = torch.lerp(beside[:, :, :1], beside[:, :, 1:], share).short()
        wider[:, tall, MAX_SHIFT + wide.start : MAX_SHIFT + wide.stop] = under

        # each row from its own start, linear between two columns
        starts = wider.view(-1, wider.shape[2] * C).unfold(1, (W + 1) * C, C)
        first = left[part].long().view(-1)
        taken = starts[torch.arange(len(first), device=x.device), first].short()
        taken = taken.view(-1, SCENE_H, (W + 1) * C)
        warped, step = taken[..., :-C], taken[..., C:] - taken[..., :-C]
        step.mul_(right[part]).add_(UNIT // 2).bitwise_right_shift_(UNIT_BITS)
        warped = step.add_(warped).view(-1, SCENE_H, W, C)
        warped[:, tall, wide] += scene[:, tall, wide] - under
        x[part, :SCENE_H] = warped.clamp_(0, 255)
    return warp


def unwarp(scenes, warp):
    """Undoes warps (N, WARPS) of scenes (N, 3, H, 64). Differentiable in `warp`.

    -> scenes of the same shape, bilinear, 0 beyond the frame; the share of each pixel inside,
    (N, 1, H, 64).
    """
    H, W = scenes.shape[2:]
    column = torch.arange(W, device=warp.device) + row_shifts(warp)[:, :H, None]
    row = torch.arange(H, device=warp.device)[:, None].expand_as(column)
    at = (torch.stack([column, row], dim=-1) + 0.5) / (column.new_tensor([W, H]) / 2) - 1
    seen = scenes.float()
    seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    seen = F.grid_sample(seen, at, align_corners=False)
    return seen[:, :3], seen[:, 3:]


def congealing_loss(scenes, warp):
    """Variance of the scenes over the batch after each is unwarped by its warp, over that before.

    It falls as their roads come to lie on one another. A pixel from beyond the frame counts as the
    larger of its own and its row's variance. So leaving the frame does not pay.
    scenes (N, 3, SCENE_AHEAD, 64) uint8, warp (N, WARPS) -> scalar.
    Congealing: Learned-Miller 2006, Data Driven Image Models through Continuous Joint Alignment.
    """
    scenes, warp = gather(scenes), gather(warp)  # those of all ranks
    straight, inside = unwarp(scenes, warp)
    variance = scenes.float().var(dim=0, unbiased=False).mean(dim=0)  # (SCENE_AHEAD, 64)
    mean = straight.sum(dim=0) / inside.sum(dim=0).clamp_min(1e-3)
    apart = (straight - inside * mean).pow(2).mean(dim=1, keepdim=True) / inside.clamp_min(1e-3)
    beyond = variance.mean(dim=1, keepdim=True).maximum(variance)
    return (apart + (1 - inside) * beyond).mean() / variance.mean().clamp_min(1e-3)
