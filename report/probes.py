"""Part 1: what the latents know."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor
from torch import nn

from networks import stack_frames
from report.episodes import TWIN, blocks, choose_samples
from report.statistics import auc, cells, r2
from support.augment import jitter_
from support.cli import fail
from support.device import autocast
from support.progress import progress
from support.run import cosine, optimise

PROBED = ("speed", "yaw_rate", "lateral_offset", "heading_error", "curvature_20", "side_speed")
OFF_ROAD = "off road (AUC)"
AHEAD = (1, 5, 15)  # latents ahead at which imagination is probed and futures are judged
IN_VIEW = 7.0, 1.0  # units off the centre line, rad off its direction: the road is in view


# ------------------------------------------------------------------ 1. what the latent knows


class Labels(NamedTuple):
    """What the simulator says at some spots."""

    y: np.ndarray  # (n, len(PROBED))
    seen: np.ndarray  # (n,) the road is in view
    off: np.ndarray  # (n,) a wheel is off the road
    track: np.ndarray  # (n,)


def labels_of(spots, ahead=0):
    return Labels(
        np.stack([spots.state(name, ahead) for name in PROBED], axis=1),
        spots.within(IN_VIEW, ahead),
        spots.state("wheels_off_road", ahead) > 0,
        spots.track,
    )


def regressor(kind, seed, hidden=(64,)):
    """A fresh probe: linear, or with hidden layers."""
    if kind == "ridge":
        return Ridge(alpha=1.0)
    return MLPRegressor(
        hidden_layer_sizes=hidden,
        batch_size=128,
        alpha=1e-3,
        max_iter=40,
        learning_rate_init=2e-3,
        early_stopping=True,
        n_iter_no_change=5,
        random_state=seed,
    )


def fit_standardised(net, x, y):
    """A regressor fitted to standardised x (n, D) and y -> told(x)."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its passes are what it gets
        net.fit((x - mean) / scale, y)
    return lambda x: net.predict((x - mean) / scale)


def probe(kind, train, labels, seed):
    """Fits to latents (n, D) and their labels -> told(z) = (quantities (m, 6), off road (m,))."""
    y, seen = labels.y, labels.seen
    if seen.sum() < 30:
        fail(
            f"only {seen.sum()} training frames have the road in view, too few for a probe; "
            "raise --train_frames, or collect more"
        )
    center, size = y[seen].mean(axis=0), y[seen].std(axis=0) + 1e-6
    state = fit_standardised(regressor(kind, seed), train[seen], (y[seen] - center) / size)
    off = fit_standardised(regressor(kind, seed), train, labels.off.astype(np.float32))
    return lambda z: (state(z) * size + center, off(z))


def score_probe(told, z, labels, args):
    """{quantity: cell} of a fitted probe on evaluation latents."""
    y, off = told(z)
    found = cells(r2, labels.track, (labels.y, y, labels.seen), args, labels.seen.sum())
    found += cells(
        lambda truth, score: auc(score[truth], score[~truth]), labels.track, (labels.off, off), args
    )
    return dict(zip((*PROBED, OFF_ROAD), found))


def pixels(spots, offsets):
    """(n, pixels) float32 of the stacked frames."""
    return spots.frames(offsets).permute(0, 1, 3, 4, 2).reshape(len(spots), -1).float().numpy()


def pca_baseline(train, test, subject, seed, fit_on=1500):
    """Principal components of the pixels, as many as a latent has numbers: z of both Spots."""
    rows = np.random.default_rng([seed, 5]).permutation(len(train))[:fit_on]
    offsets, dim = subject.newest(), min(subject.encoder.dim, len(rows))
    pca = PCA(dim, svd_solver="randomized", iterated_power=2, random_state=seed)
    pca.fit(pixels(train[np.sort(rows)], offsets))
    return [
        np.concatenate([pca.transform(pixels(s[rows], offsets)) for rows in blocks(len(s))])
        for s in (train, test)
    ]


def supervised_bound(subject, spots, labels, args):
    """The same net trained with the labels, in --supervised_steps: what this size could know."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        net = subject.encoder.reinitialized()
        head = nn.Linear(net.dim, len(PROBED) + 1).to(subject.device)
    params = [*net.parameters(), *head.parameters()]
    optim = torch.optim.AdamW(params, 2e-3, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(subject.device.type, enabled=subject.dtype == torch.float16)
    y = (labels.y - labels.y[labels.seen].mean(0)) / (labels.y[labels.seen].std(0) + 1e-6)
    rng, offsets = np.random.default_rng([args.seed, 6]), subject.newest()
    light = torch.Generator(subject.device).manual_seed(args.seed)
    for step in progress(range(args.supervised_steps), desc="ceiling, with labels", leave=False):
        rows = rng.integers(len(spots), size=args.supervised_batch)
        x = stack_frames(spots[rows].frames(offsets).to(subject.device), net.history)
        jitter_(x, light)
        target, seen, off = (
            torch.from_numpy(a[rows]).to(subject.device).float()
            for a in (y, labels.seen, labels.off)
        )
        with autocast(subject.device, subject.dtype):
            out = head(net.features(x))
        error = F.smooth_l1_loss(out[:, :-1].float(), target, reduction="none").mean(dim=1)
        loss = (error * seen).sum() / seen.sum().clamp_min(1)
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(out[:, -1].float(), off)
        optimise(loss, [net, head], optim, scaler, cosine(step, args.supervised_steps, 2e-3))
    return net.eval().requires_grad_(False)


def knows(subject, train, test, args):
    """Part 1: {row: {saw_labels, probe, cells of each quantity}}."""
    sampled = (
        choose_samples(train, args.train_frames, args.seed),
        choose_samples(test, args.frames, args.seed),
    )
    labels = [labels_of(s) for s in sampled]
    rows = {}

    def add(name, latents, saw_labels=False, kinds=("ridge", "mlp")):
        for kind in progress(kinds, desc=f"probe: {name}", leave=False):
            told = probe(kind, latents[0], labels[0], args.seed)
            rows[f"{name}, {kind}"] = {
                "saw_labels": saw_labels,
                "probe": kind,
                "cells": score_probe(told, latents[1], labels[1], args),
            }

    add("this encoder", [s.z(0, 0)[:, 0].numpy() for s in sampled])
    add("untrained encoder", [s.z(0, 0, TWIN)[:, 0].numpy() for s in sampled])
    add("PCA of the pixels", pca_baseline(*sampled, subject, args.seed))
    if args.supervised_steps:
        net = supervised_bound(subject, sampled[0], labels[0], args)
        add(
            "ceiling, saw the labels",
            [subject.encode_now(net, s, "ceiling").numpy() for s in sampled],
            saw_labels=True,
        )
    if subject.predictor:
        rows |= imagined(subject, train, test, args)
    return rows


def imagined(subject, train, test, args):
    """Rows of part 1 for latents AHEAD: {row: ...} of ridge probes.

    Of what is imagined, read by the probe of real latents and by one fitted to imagined ones; and
    of the present latent, by a probe fitted to what comes: what is to be had without imagining.
    """
    H, rows = max(AHEAD), {}
    spots = [
        choose_samples(train, args.train_frames // 2, args.seed, ahead=H),
        choose_samples(test, args.frames // 2, args.seed, ahead=H),
    ]
    real = [s.z(0, H) for s in spots]
    z_hat = [subject.imagine(subject.predictor, z[:, 0], s.act(H)) for z, s in zip(real, spots)]
    for h in progress(AHEAD, desc="probe: imagined", leave=False):
        truth = [labels_of(s, h) for s in spots]
        came, now = real[0][:, h].numpy(), [z[:, 0].numpy() for z in real]
        dreamt = [z[:, h - 1].numpy() for z in z_hat]
        for name, fitted, asked in (
            (f"imagined +{h}, probe of real", came, dreamt[1]),
            (f"imagined +{h}, probe of imagined", *dreamt),
            (f"not imagined +{h}, from z now", *now),
        ):
            told = probe("ridge", fitted, truth[0], args.seed)
            rows[name] = {
                "saw_labels": False,
                "probe": "ridge",
                "cells": score_probe(told, asked, truth[1], args),
            }
    return rows
