"""The report card's scores: that they find what is there, and that they can be wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from report.episodes import (
    POLICY_MAKERS,
    TRAINED,
    UNTRAINED,
    Episode,
    Samples,
    choose_samples,
    other_episode,
    track_seeds,
)
from report.futures import FILMS, Scale, fit_scales
from report.page import as_text
from report.probes import AHEAD, LOOKS, OFF_ROAD, PROBED, Labels, fit_probe, score_probe
from report.statistics import auc, bootstrap_intervals, spearman


def empty_episode(track, K=60, **z):
    """An episode of K black frames without a car."""
    frames, act, state = np.zeros((K, 1, 1, 3), np.uint8), np.zeros((K - 1, 3)), np.zeros((K, 20))
    return Episode("data", track, frames, act, state, 25, z=z)


def test_auc_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200), rng.integers(2, 12, 300)
    labels = np.r_[np.zeros(200), np.ones(300)]
    assert abs(auc(b, a) - roc_auc_score(labels, np.r_[a, b])) < 1e-12


def test_a_future_swapped_with_itself_is_not_found():
    true = np.random.default_rng(0).random(500)
    assert auc(true, true) == 0.5 and auc(true + 2, true) == 1
    assert np.isnan(auc(true, true[:0]))


def test_films_show_what_their_names_say():
    j = np.array([-2, -1, 0, 1, 2])
    assert FILMS["frozen"](j).tolist() == [-2, -1, 0, 0, 0]
    assert FILMS["time reversed"](j).tolist() == [-2, -1, 0, -1, -2]
    assert FILMS["double speed"](j).tolist() == [-2, -1, 0, 2, 4]


def test_probes_find_what_is_there_and_nothing_else():
    rng, cfg = np.random.default_rng(0), SimpleNamespace(seed=0, bootstrap=20)
    z = [rng.normal(size=(n, 8)) for n in (800, 300)]
    looks = lambda x: np.c_[x[:, 5:7] > 0, x[:, 7], x[:, 7] > 1]
    labels = [
        Labels(
            x[:, :6] * 3 + 1,
            np.ones(len(x), bool),
            x[:, 6] > 0,
            np.where(np.arange(len(x))[:, None] % 5, looks(x), np.nan),
            np.arange(len(x)) % 7,
        )
        for x in z
    ]
    found = score_probe(fit_probe(z[0], labels[0]), z[1], labels[1], cfg)
    assert all(found[q]["value"] > 0.999 for q in PROBED) and found[OFF_ROAD]["value"] > 0.97
    assert all(found[q]["value"] > 0.9 for q in LOOKS)
    noise = [rng.normal(size=x.shape) for x in z]
    found = score_probe(fit_probe(noise[0], labels[0]), noise[1], labels[1], cfg)
    assert all(found[q]["value"] < 0.1 for q in PROBED)
    assert abs(found[OFF_ROAD]["value"] - 0.5) < 0.15
    assert all(found[q]["value"] < 0.7 for q in LOOKS)


def test_swapped_actions_are_of_another_episode():
    episodes = [empty_episode(track) for track in range(3)]
    samples = Samples(episodes, np.repeat([0, 1, 2], [20, 3, 2]), np.arange(25))
    assert (samples.e[other_episode(samples, 0)] != samples.e).all()


def test_rank_correlation_and_its_interval():
    made = np.random.default_rng(0).normal(size=64)
    assert spearman(made.copy(), made) == pytest.approx(1) and spearman(np.ones(64), made) == 0
    cfg = SimpleNamespace(seed=0, bootstrap=50)
    tracks = np.repeat(np.arange(8), 8)
    one, again = (bootstrap_intervals(np.mean, tracks, (made,), cfg)[0] for _ in range(2))
    assert one == again and one["low"] < one["value"] < one["high"]
    assert one["n"] == 64 and one["tracks"] == 8
    alone = bootstrap_intervals(np.mean, np.zeros(64), (made,), cfg)[0]
    assert alone["value"] == one["value"] and alone["low"] is None and alone["tracks"] == 1
    assert "?" in as_text(alone) and "?" not in as_text(one)


def test_tracks_of_the_kinds_never_meet():
    tracks = track_seeds(225, 4)
    assert set(tracks) == set(POLICY_MAKERS)
    assert [t for own in tracks.values() for t in own] == list(range(225, 237))


def test_scales_are_of_the_steps_and_nets_they_are_asked_for():
    """Of random walks, one three times as wide, and rollouts that stay where they are."""
    rng = np.random.default_rng(0)
    walk = lambda width: torch.from_numpy(width * rng.normal(size=(120, 4)).cumsum(axis=0)).float()
    episodes = [
        empty_episode(track, 120, **{TRAINED: walk(1), UNTRAINED: walk(3)}) for track in range(60)
    ]
    models = SimpleNamespace(
        pairs=lambda: dict.fromkeys((TRAINED, UNTRAINED), (SimpleNamespace(planned=4), None)),
        rollout=lambda _, z, act: z[:, None].expand(-1, act.shape[1], -1),
    )
    scales = fit_scales(models, episodes[:50], SimpleNamespace(train_frames=2000, seed=0))
    test = choose_samples(episodes[50:], 400, 0, ahead=15)
    z = {name: test.z(0, 15, name) for name in (TRAINED, UNTRAINED)}
    z["copy-last"] = z[TRAINED]

    def median(scorer, h, a, latents):
        future, now = z[latents][:, h], z[latents][:, 0]
        return np.median(scales[scorer](future, now, now, a))

    for scorer in scales:
        for a, h in enumerate(AHEAD):
            assert 0.7 < median(scorer, h, a, scorer) < 1.4
    assert median(TRAINED, 15, 0, TRAINED) > 8 and median(TRAINED, 5, 1, UNTRAINED) > 5


def test_surprise_is_in_units_of_the_expected_error():
    """About 1 for errors like those it was fitted to. A rare direction counts more than a usual
    one, and the same error more where errors are usually small."""
    rng = torch.Generator().manual_seed(0)
    size = torch.tensor([3.0, 1.0, 0.5, 0.5])
    now = torch.randn(4000, 4, generator=rng)
    size = size * torch.exp(now[:, :1, None])  # some presents have large errors
    future = size * torch.randn(4000, len(AHEAD), 4, generator=rng)
    scale = Scale(now, torch.zeros_like(future), future)
    surprise = lambda z, now: scale(z, now, torch.zeros_like(z), 1)
    for half in (now[:, 0] > 0.3, now[:, 0] < -0.3):
        assert 0.8 < np.median(surprise(future[half, 1], now[half])) < 1.25
    usual, rare, hard = torch.eye(4)[:1], torch.eye(4)[3:], torch.eye(4)[:1]
    assert surprise(rare, -hard) > 25 * surprise(usual, -hard)
    assert surprise(rare, -hard) > 40 * surprise(rare, hard)  # exp(4), shrunk a little
