"""Part 1: what ridge probes read from the latents.

Physical quantities are scored by R² where the road is in view: |offset| < 7 units, |heading error|
< 1 rad. A wheel off the road is scored by AUC in all frames. Half of the variance of side speed
lies in slides, a hundredth of the frames: its R² rests on these, as its interval shows.

Looks are read from the true pixels, in all frames: whether a kerb is in view on the left, and on
the right (AUC; frames with fewer than KERB_PIXELS of one are left out); how far ahead the next kerb
is, in rows of the picture, where there is one (R²); whether a point of the lawn, ahead on the left,
lies on a light square (AUC).

Three nulls and bounds stand beside this encoder: an untrained one, principal components of the
pixels, and the same net trained with the labels. Probes of predicted latents follow.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import nn

from car.telemetry import IN_VIEW
from networks import stack_frames
from report.episodes import UNTRAINED, blocks, choose_samples
from report.statistics import auc, bootstrap_intervals, r2
from support.augment import CAR, jitter_
from support.cli import fail
from support.device import autocast
from support.latents import ridge
from support.progress import progress
from support.reconstruction import channels_last, regions
from support.run import cosine, optimise

PROBED = ("speed", "yaw_rate", "lateral_offset", "heading_error", "curvature_20", "side_speed")
OFF_ROAD = "off road (AUC)"
LOOKS = ("kerb left (AUC)", "kerb right (AUC)", "kerb distance", "lawn phase (AUC)")
KERB_PIXELS = 4  # about one tile's kerb
LAWN_POINT, LIGHT_GREEN = (28, 12), 217  # row and column; between the greens of the squares
SUPERVISED = "supervised bound, saw the labels"
AHEAD = (1, 5, 15)  # latents ahead at which rollouts are probed and futures are scored
MIN_FRAMES = 30  # training frames with the road in view that a probe needs
PCA_FRAMES = 1500  # that the principal components are fitted to
PEAK_LR = 2e-3  # of the supervised bound


class Labels(NamedTuple):
    """The simulator's values at n samples."""

    y: np.ndarray  # (n, len(PROBED))
    in_view: np.ndarray  # (n,) bool: the road is in view
    off_road: np.ndarray  # (n,) bool: a wheel is off the road
    looks: np.ndarray  # (n, len(LOOKS)) 0 or 1, or a distance; nan where there is none
    track: np.ndarray  # (n,)


def true_frames(samples, ahead=0):
    """(n, 64, 64, 3) uint8: the newest frame, `ahead` latents later."""
    return channels_last(samples.frames(np.array([ahead]))[:, 0])


def looks_of(frames):
    """Labels.looks of frames (n, 64, 64, 3) uint8."""
    masks = regions(frames)
    kerbs, (row, column) = masks["kerbs"], LAWN_POINT
    counts = kerbs[:, :, :32].sum((1, 2)), kerbs[:, :, 32:].sum((1, 2))
    in_view = [np.where((0 < n) & (n < KERB_PIXELS), np.nan, n > 0) for n in counts]
    ahead = kerbs[:, : CAR[0].start].any(axis=2)[:, ::-1]  # rows from the car on
    distance = np.where(ahead.any(axis=1), ahead.argmax(axis=1), np.nan)
    light = frames[:, row, column, 1] > LIGHT_GREEN
    lawn = np.where(masks["lawn"][:, row, column], light, np.nan)
    return np.stack([*in_view, distance, lawn], axis=1)


def labels_of(samples, ahead=0):
    """The Labels, `ahead` latents later."""
    return Labels(
        np.stack([samples.state(name, ahead) for name in PROBED], axis=1),
        samples.within(IN_VIEW, ahead),
        samples.state("wheels_off_road", ahead) > 0,
        looks_of(true_frames(samples, ahead)),
        samples.track,
    )


def fit_probe(z, labels):
    """Probes of latents z (n, D) -> predict(z): quantities (m, 6), off-road score (m,), looks."""
    if (n := labels.in_view.sum()) < MIN_FRAMES:
        fail(f"only {n} training frames have the road in view; raise --train_frames")
    quantities = ridge(z[labels.in_view], labels.y[labels.in_view])
    off_road = ridge(z, labels.off_road.astype(np.float32))
    there = [np.isfinite(y) for y in labels.looks.T]
    looks = [ridge(z[m], y[m]) if m.any() else None for m, y in zip(there, labels.looks.T)]
    nothing = lambda z: np.full(len(z), np.nan)
    of_looks = lambda z: [probe.predict(z) if probe else nothing(z) for probe in looks]
    return lambda z: (quantities.predict(z), off_road.predict(z), of_looks(z))


def score_probe(predict, z, labels, cfg):
    """{quantity: estimate} of a fitted probe on evaluation latents z (n, D)."""
    y_pred, score, looks = predict(z)
    arrays = labels.y, y_pred, labels.in_view
    found = bootstrap_intervals(r2, labels.track, arrays, cfg, labels.in_view.sum())
    ranking = lambda off, score: auc(score[off], score[~off])
    found += bootstrap_intervals(ranking, labels.track, (labels.off_road, score), cfg)
    for name, y, score in zip(LOOKS, labels.looks.T, looks):
        there = np.isfinite(y) & np.isfinite(score)
        two = lambda y, score: auc(score[y > 0.5], score[y < 0.5])
        distance = lambda y, score: r2(y[:, None], score[:, None], np.ones(len(y), bool))
        statistic = two if "AUC" in name else distance
        arrays = y[there], score[there]
        found += bootstrap_intervals(statistic, labels.track[there], arrays, cfg)
    return dict(zip((*PROBED, OFF_ROAD, *LOOKS), found))


def pixels(samples, offsets):
    """(n, pixels) float32 of the stacked frames."""
    return samples.frames(offsets).permute(0, 1, 3, 4, 2).reshape(len(samples), -1).float().numpy()


def pca_baseline(train, test, models, seed):
    """As many principal components of the pixels as a latent has numbers, of both Samples."""
    rows = np.random.default_rng([seed, 5]).permutation(len(train))[:PCA_FRAMES]
    offsets, dim = models.frame_offsets(), min(models.encoder.dim, len(rows))
    pca = PCA(dim, svd_solver="randomized", iterated_power=2, random_state=seed)
    pca.fit(pixels(train[np.sort(rows)], offsets))
    return [
        np.concatenate([pca.transform(pixels(s[rows], offsets)) for rows in blocks(len(s))])
        for s in (train, test)
    ]


def supervised_bound(models, samples, labels, cfg):
    """The same encoder trained with the labels for `cfg.supervised_steps`."""
    device = models.device
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        net = models.encoder.reinitialized()
        head = nn.Linear(net.planned, len(PROBED) + 1).to(device)
    optim = torch.optim.AdamW([*net.parameters(), *head.parameters()], PEAK_LR, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=models.dtype == torch.float16)
    seen = labels.y[labels.in_view]
    y = (labels.y - seen.mean(0)) / (seen.std(0) + 1e-6)
    rng, offsets = np.random.default_rng([cfg.seed, 6]), models.frame_offsets()
    generator = torch.Generator(device).manual_seed(cfg.seed)

    for step in progress(range(cfg.supervised_steps), desc="supervised bound", leave=False):
        # a batch of frames in random light
        rows = rng.integers(len(samples), size=cfg.supervised_batch)
        x = stack_frames(samples[rows].frames(offsets).to(device), net.history)
        jitter_(x, generator)
        target, in_view, off_road = (
            torch.from_numpy(a[rows]).to(device).float()
            for a in (y, labels.in_view, labels.off_road)
        )

        # regression where the road is in view, classification of the wheels everywhere
        with autocast(device, models.dtype):
            out = head(net.features(x)).float()
        error = F.smooth_l1_loss(out[:, :-1], target, reduction="none").mean(dim=1)
        loss = (error * in_view).sum() / in_view.sum().clamp_min(1)
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(out[:, -1], off_road)
        lr = cosine(step, cfg.supervised_steps, PEAK_LR)
        optimise(loss, [net, head], optim, scaler, lr)
    return net.eval().requires_grad_(False)


def evaluate_probes(models, train, test, cfg):
    """Part 1: {row: {quantity: estimate}}."""
    sampled = (
        choose_samples(train, cfg.train_frames, cfg.seed),
        choose_samples(test, cfg.frames, cfg.seed),
    )
    labels = [labels_of(s) for s in sampled]
    latents = {
        "this encoder": [s.z(0, 0)[:, 0].numpy() for s in sampled],
        "untrained encoder": [s.z(0, 0, UNTRAINED)[:, 0].numpy() for s in sampled],
        "PCA of the pixels": pca_baseline(*sampled, models, cfg.seed),
    }
    if cfg.supervised_steps:
        net = supervised_bound(models, sampled[0], labels[0], cfg)
        latents[SUPERVISED] = [models.encode_samples(net, s).numpy() for s in sampled]
    rows = {
        name: score_probe(fit_probe(z[0], labels[0]), z[1], labels[1], cfg)
        for name, z in progress(latents.items(), desc="probes", leave=False)
    }
    return rows | (probe_rollouts(models, train, test, cfg) if models.predictor else {})


def probe_rollouts(models, train, test, cfg):
    """Rows of part 1 for the latents AHEAD.

    Predicted latents are read by a probe of real latents and by one fitted to predicted latents.
    The third probe reads the future from the present latent: what is to be had without a rollout.
    """
    H, rows = max(AHEAD), {}
    samples = [
        choose_samples(train, cfg.train_frames // 2, cfg.seed, ahead=H),
        choose_samples(test, cfg.frames // 2, cfg.seed, ahead=H),
    ]
    real = [s.z(0, H) for s in samples]
    z_hat = [models.rollout(models.predictor, z[:, 0], s.act(H)) for z, s in zip(real, samples)]
    for h in progress(AHEAD, desc="probes of rollouts", leave=False):
        labels = [labels_of(s, h) for s in samples]
        now = [z[:, 0].numpy() for z in real]
        predicted = [z[:, h - 1].numpy() for z in z_hat]
        for name, fitted, asked in (
            (f"predicted +{h}, probe of real", real[0][:, h].numpy(), predicted[1]),
            (f"predicted +{h}, probe of predicted", *predicted),
            (f"not predicted +{h}, from z now", *now),
        ):
            rows[name] = score_probe(fit_probe(fitted, labels[0]), asked, labels[1], cfg)
    return rows
