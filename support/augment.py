"""Augmentations of windows: light, mirror, warp."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from car import SCENE_H
from car.sprites import hflip
from support.distributed import RANK
from vicreg import gather

JITTER, TINT = 0.3, 0.1  # brightness and contrast, and each channel, are scaled by 1 ± this
CAR = slice(43, 53), slice(29, 35)  # rows and columns of the car, which a bend does not move
CAR_ROW, AHEAD_ROWS = 47.5, 48  # its middle, and how many rows of the world are ahead of it
AHEAD = CAR[0].start  # rows of the scene in which the car is not
SHIFT, SLOPE, CURVE = 3, 7, 24  # columns that bends of 1 move the scene, or its far end
STRETCHES = 3  # of the way ahead, each with a curvature of its own
MOST = 38  # columns that bends together can move a row, rounded up
AT_ONCE = 32  # pictures that a CPU changes in one go
UNIT_BITS = 6  # pictures are changed in int16, much faster than in float, in steps of 1 / UNIT
UNIT = 2**UNIT_BITS
MEAN_OF = 8  # the mean that contrast keeps is of every eighth row of pixels


def pieces(x):
    """Slices of pictures (N, ...): on a CPU so few at once that what is made of them stays in its
    caches, on a GPU all of them."""
    size = AT_ONCE if x.device.type == "cpu" else max(1, len(x))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def jitter_(x, generator):
    """Changes brightness, contrast and tint of the scene, one draw a row, in place; the instruments
    stay. x (N, 3 * T, 64, 64) uint8, channels_last.
    """
    N, C, H, W = x.shape
    draw = lambda *shape: 2 * torch.rand(*shape, generator=generator, device=x.device) - 1
    tint = (1 + TINT * draw(N, 1, 3)).repeat(1, 1, W * C // 3)  # (N, 1, W * C)
    b, c = 1 + JITTER * draw(2, N, 1, 1)
    x = x.permute(0, 2, 3, 1).view(N, H, W * C)  # as it lies in memory: long rows
    mean = x[:, :SCENE_H:MEAN_OF].float().mean(dim=(1, 2), keepdim=True)
    light = b * tint * UNIT  # ((scene - mean) c + mean) b, tinted: never out of int16's range
    gain, more = (c * light).round().short(), ((1 - c) * mean * light + UNIT / 2).short()
    for part in pieces(x):
        scene = x[part, :SCENE_H].short().mul_(gain[part]).add_(more[part])
        x[part, :SCENE_H] = scene.bitwise_right_shift_(UNIT_BITS).clamp_(0, 255)


def warp_rows(device=None):
    """(2 + STRETCHES, SCENE_H): columns by which bends of 1 move a row of the scene to the right: a
    shift, a slope, and a curvature of each stretch of the way ahead, nearest first.
    """
    u = (CAR_ROW - torch.arange(SCENE_H, device=device)) / AHEAD_ROWS  # 0 at the car, 1 far ahead
    rows = [torch.full_like(u, SHIFT), SLOPE * u]
    for k in range(STRETCHES):
        inside = (u - k / STRETCHES).clamp(0, 1 / STRETCHES)
        beyond = (u - (k + 1) / STRETCHES).clamp_min(0)
        rows.append(CURVE * (inside**2 / 2 + beyond / STRETCHES))
    return torch.stack(rows)


def moved(how):
    """Columns (N, SCENE_H) by which bends `how` (N, 2 + STRETCHES) move each row to the right."""
    rows = warp_rows(how.device)
    return (how[:, :, None] * rows).sum(dim=1)  # not a product of matrices, which autocast rounds


def warp_(x, generator):
    """Moves the rows of the scene sideways, in place, as if road and car lay otherwise; car and
    instruments stay. x (N, C, 64, 64) uint8, channels_last -> how, (N, 2 + STRETCHES), variance 1.

    Equivariance as a task: Dangovski et al. 2022, arXiv:2111.00899.
    """
    N, C, _, W = x.shape
    x = x.permute(0, 2, 3, 1)  # as it lies in memory
    how = torch.rand(N, 2 + STRETCHES, generator=generator, device=x.device)
    how = math.sqrt(3) * (2 * how - 1)
    source = MOST - moved(how)  # (N, SCENE_H): which column of `wider` comes to column 0
    left = source.floor()
    right = ((source - left) * UNIT).round().short()[..., None]  # its neighbour's share
    tall, wide = CAR
    share = torch.linspace(0, 1, wide.stop - wide.start + 2, device=x.device)[1:-1, None]
    for part in pieces(x):
        scene = x[part, :SCENE_H]
        edge = lambda column, n: scene[:, :, column, None].expand(-1, -1, n, -1)
        wider = torch.cat([edge(0, MOST), scene, edge(-1, MOST + 1)], dim=2)
        beside = scene[:, tall, wide.start - 1 : wide.stop + 1 : wide.stop - wide.start + 1].float()
        under = torch.lerp(beside[:, :, :1], beside[:, :, 1:], share).short()  # the car
        wider[:, tall, MOST + wide.start : MOST + wide.stop] = under
        starts = wider.view(-1, wider.shape[2] * C).unfold(1, (W + 1) * C, C)  # of every row
        first = left[part].long().view(-1)
        taken = starts[torch.arange(len(first), device=x.device), first].short()
        taken = taken.view(-1, SCENE_H, (W + 1) * C)
        bent, step = taken[..., :-C], taken[..., C:] - taken[..., :-C]
        step.mul_(right[part]).add_(UNIT // 2).bitwise_right_shift_(UNIT_BITS)
        bent = step.add_(bent).view(-1, SCENE_H, W, C)
        bent[:, tall, wide] += scene[:, tall, wide] - under
        x[part, :SCENE_H] = bent.clamp_(0, 255)
    return how


def unwarp(scenes, how):
    """Scenes as if bends `how` (N, 2 + STRETCHES) had been undone: (N, 3, AHEAD, 64) -> the same,
    0 beyond the frame, and the share of each pixel that was in it, (N, 1, AHEAD, 64). Bilinear,
    differentiable in `how`.
    """
    H, W = scenes.shape[2:]
    column = torch.arange(W, device=how.device) + moved(how)[:, :H, None]
    row = torch.arange(H, device=how.device)[:, None].expand_as(column)
    at = (torch.stack([column, row], dim=-1) + 0.5) / (column.new_tensor([W, H]) / 2) - 1
    seen = scenes.float()
    seen = F.grid_sample(
        torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1), at, align_corners=False
    )
    return seen[:, :3], seen[:, 3:]


def congealing_loss(scenes, how):
    """Share of the scenes' variance over the batch that is left when each is straightened by its
    own `how`: it falls as their roads come to lie on one another. A pixel from beyond the frame
    counts as its own usual variance or its row's, whichever is more, so that leaving the frame does
    not pay. scenes (N, 3, AHEAD, 64) uint8 -> scalar.

    Congealing: Learned-Miller 2006, Data Driven Image Models through Continuous Joint Alignment.
    """
    scenes, how = gather(scenes), gather(how)  # those of all ranks
    straight, inside = unwarp(scenes, how)
    usual = scenes.float().var(dim=0, unbiased=False).mean(dim=0)  # (AHEAD, 64)
    mean = straight.sum(dim=0) / inside.sum(dim=0).clamp_min(1e-3)
    apart = (straight - inside * mean).pow(2).mean(dim=1, keepdim=True) / inside.clamp_min(1e-3)
    beyond = usual.mean(dim=1, keepdim=True).maximum(usual)
    return (apart + (1 - inside) * beyond).mean() / usual.mean().clamp_min(1e-3)


def flip_batches(batches, share, seed, start):
    """The batches from step `start` on, in a share of their windows left and right exchanged."""
    for step, (obs, act) in enumerate(batches, start):
        rows = np.random.default_rng([seed, step, RANK, 1]).random(len(obs)) < share
        if rows.any():
            frames = obs.permute(0, 1, 3, 4, 2).numpy()  # as they lie in memory
            frames[rows] = hflip(frames[rows])
            act[rows, :, 0] *= -1
        yield obs, act
