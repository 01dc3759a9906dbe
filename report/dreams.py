"""Part 2: how long rollouts hold.

The figure is the squared error of each predicted latent over that of copy-last, the present latent
itself, over the planned part. Beside it stand the true predictor with another episode's actions,
and an untrained one.
"""

import numpy as np

from car import FPS
from report.episodes import other_episode, rows_by_source, sources_of
from report.futures import MOVING
from report.probes import AHEAD
from report.statistics import bootstrap_intervals
from support.dreams import draw_dream, dream
from support.pictures import ornament
from support.progress import progress

FAR = 30  # latents ahead to which rollouts are followed


def evaluate_rollouts(models, samples, cfg, sheet):
    """Part 2: {"all" or source: {row: [estimate of each step]}}. Draws some to the file `sheet`."""
    z, act, planned = samples.z(0, FAR), samples.act(FAR), models.encoder.planned
    other = act[other_episode(samples, cfg.seed)]
    z_hat = {
        "this predictor": models.rollout(models.predictor, z[:, 0], act),
        "copy-last": z[:, :1].expand_as(z[:, 1:]),
        "swapped actions": models.rollout(models.predictor, z[:, 0], other),
        "untrained predictor": models.rollout(models.untrained_predictor, z[:, 0], act),
    }
    squares = lambda x: (x - z[:, 1:])[..., :planned].pow(2)
    error = {name: squares(x).mean(dim=2).numpy() for name, x in z_hat.items()}
    ratio = lambda x, copy: x.mean(axis=0) / copy.mean(axis=0)
    out = {}
    for source, rows in progress(rows_by_source(samples).items(), desc="rollouts", leave=False):
        track, copy = samples.track[rows], error["copy-last"][rows]
        out[source] = {
            name: bootstrap_intervals(ratio, track, (x[rows], copy), cfg)
            for name, x in error.items()
        }
    draw_rollouts(models, samples, error["this predictor"], sheet)
    return out


def telling_rows(samples, error, H):
    """A row of each source to draw: the sharpest bend among windows of about median error.

    `error` (n,) is that after H latents. Windows of a moving car come first. The rows compared lie
    in the middle fifth of the errors.
    """
    rows, moving = [], samples.state("speed") > MOVING
    bend = np.abs([samples.state("curvature_20", k) for k in (0, H // 2, H)]).mean(axis=0)
    for source in sources_of(samples):
        own = np.flatnonzero(samples.source == source)
        own = own[moving[own]] if moving[own].any() else own
        own = own[np.argsort(error[own])]
        middle = own[len(own) * 2 // 5 : len(own) * 3 // 5 + 1]
        rows.append(middle[np.argmax(bend[middle])])
    return np.array(rows)


def draw_rollouts(models, samples, error, path):
    """Draws a window of each source: real frames above decoded ones. `error` is (n, FAR).

    Without a decoder of this encoder nothing is drawn.
    """
    H, encoder = max(AHEAD), models.encoder
    if models.decoder is None:
        return
    some = samples[telling_rows(samples, error[:, H - 1], H)]
    obs = some.frames(np.arange(1 - encoder.history, H + 1))
    pair = dream(encoder, models.predictor, models.decoder, obs, some.act(H), models.device)
    with ornament(path):
        draw_dream(*pair, list(some.source), path, encoder.repeat / FPS)
        print(f"drawn: {path}")
