"""Part 2: how long dreams hold."""

import numpy as np
import torch
from sklearn.linear_model import Ridge

from car import FPS
from networks import normalize_action
from report.episodes import choose_samples, other_episode
from report.futures import MOVING
from report.probes import AHEAD
from report.statistics import cells
from support.dreams import draw_dream, dream
from support.progress import progress

FAR = 30  # latents ahead to which dreams are followed


# ------------------------------------------------------------------ 2. how long dreams hold


def linear_dream(train, z0, act, far):
    """z_hat (n, far, D) of a ridge regression, one a step, from z and the actions up to there."""
    z, told = train.z(0, far).numpy(), train.act(far)
    told, act, out = normalize_action(told).numpy(), normalize_action(act).numpy(), []
    for k in range(1, far + 1):
        x = np.concatenate([z[:, 0], told[:, :k].reshape(len(z), -1)], axis=1)
        fit = Ridge(alpha=10.0).fit(x, z[:, k] - z[:, 0])
        x = np.concatenate([z0.numpy(), act[:, :k].reshape(len(act), -1)], axis=1)
        out.append(z0 + torch.from_numpy(fit.predict(x)).float())
    return torch.stack(out, dim=1)


def dreams(subject, train, spots, args):
    """Part 2: {"all" or source: {row: [cell of each step 1..FAR]}}, and errors (n, FAR) by row."""
    z, act = spots.z(0, FAR), spots.act(FAR)
    other = act[other_episode(spots, args.seed)]
    fitted = choose_samples(train, args.train_frames // 2, args.seed, ahead=FAR)
    z_hat = {
        "this predictor": subject.imagine(subject.predictor, z[:, 0], act),
        "copy-last": z[:, :1].expand_as(z[:, 1:]),
        "swapped actions": subject.imagine(subject.predictor, z[:, 0], other),
        "untrained predictor": subject.imagine(subject.blank, z[:, 0], act),
        "linear predictor": linear_dream(fitted, z[:, 0], act, FAR),
    }
    error = {k: (v - z[:, 1:]).pow(2).mean(dim=2).numpy() for k, v in z_hat.items()}
    ratio = lambda own, copy: own.mean(axis=0) / copy.mean(axis=0)
    out = {}
    for source in ("all", *dict.fromkeys(spots.source)):
        rows = np.flatnonzero((spots.source == source) | (source == "all"))
        out[source] = {
            name: cells(ratio, spots.track[rows], (own[rows], error["copy-last"][rows]), args)
            for name, own in progress(error.items(), desc=f"dreams: {source}", leave=False)
        }
    return out, error


def telling_rows(spots, error, H):
    """Of each source the window with the sharpest bend among moving ones (where it has some) whose
    `error` (n,) after H latents is about the median, in the middle fifth."""
    rows, moving = [], spots.state("speed") > MOVING
    bend = np.abs([spots.state("curvature_20", k) for k in (0, H // 2, H)]).mean(axis=0)
    for source in dict.fromkeys(spots.source):
        own = np.flatnonzero(spots.source == source)
        own = own[moving[own]] if moving[own].any() else own
        own = own[np.argsort(error[own])]
        near = own[len(own) * 2 // 5 : len(own) * 3 // 5 + 1]
        rows.append(near[np.argmax(bend[near])])
    return np.array(rows)


def draw_dreams(subject, spots, error, path):
    """The sheet: a window of each source."""
    H = max(AHEAD)
    some = spots[telling_rows(spots, error[:, H - 1], H)]
    obs = some.frames(np.arange(1 - subject.encoder.history, H + 1))
    real, dreamt = dream(
        subject.encoder, subject.predictor, subject.decoder, obs, some.act(H), subject.device
    )
    draw_dream(real, dreamt, list(some.source), path, subject.encoder.repeat / FPS)
