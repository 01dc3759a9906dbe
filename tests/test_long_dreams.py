"""Part 6 of the report card: dreams of 20 s, run small."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluate import SOURCES, TINY, sound

import evaluate
from car.renderer import FastCarRacing
from report import long_dreams
from report.episodes import choose_samples, drive_episodes
from report.long_dreams import (
    DRIVERS,
    NOTHING,
    OTHER,
    OWN,
    PREDICTOR,
    RANK,
    REAL,
    bounded,
    compare_drivers,
    make_driver,
)
from report.models import Models
from support.plan_config import PlanConfig

SMALL = {"STEPS": 16, "AT_ONCE": 2, "SHORT": 3, "MIDDLE": 5, "LONG": 12}


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(long_dreams, name, value)


def test_all_tables_stand_in_the_card(chain, small, monkeypatch, capsys):
    root, _ = chain
    words = [*TINY, "--parts", "long_dreams", "--dreams", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--root", str(root)])
    assert evaluate.main() == 0
    report = json.loads((root / "visuals" / "report_only_long_dreams.json").read_text())
    found, said = report["parts"]["long_dreams"], capsys.readouterr().out
    assert said.count("6. Long dreams") == 5
    assert all(sound(x, high=1) <= 1 for row in found["physics"].values() for x in row.values())
    for part in ("stable", "roads"):
        others = {OTHER} if part == "roads" else set()
        assert set(found[part]) == {OWN, PREDICTOR, REAL, NOTHING} | others
        assert all(0 <= sound(x) <= 1 for row in found[part].values() for x in row.values())
    assert all(x["value"] > 0 for x in found["samples"][OWN].values())
    assert (root / "visuals" / "dream_long.png").stat().st_size > 10_000
    roads = found["roads"]  # another drive is nearer to a drive than its first moment
    assert all(roads[REAL][c]["value"] < roads[NOTHING][c]["value"] for c in roads[REAL])
    assert set(found["drivers"]) == {*DRIVERS, RANK}
    assert all(-1 <= x["value"] <= 1 for x in found["drivers"][RANK].values())


@pytest.fixture(scope="module")
def driven(chain):
    """(Models, Samples of new episodes with their latents)."""
    models = Models(chain[0], None, torch.device("cpu"), torch.float32, 0)
    tracks = {name: range(200_000 + i, 200_001 + i) for i, name in enumerate(SOURCES)}
    episodes = list(drive_episodes(tracks, 0, models.encoder.repeat))
    models.encode_episodes(episodes)
    return models, choose_samples(episodes, 2, 0, models.encoder.history, 20)


def test_drives_begin_where_the_samples_are(driven):
    models, starts = driven
    driver = lambda: make_driver(models, PlanConfig(samples=4, max_gas=1.0), None)
    z = long_dreams.real_drives(models, starts, 3, driver)
    assert torch.allclose(z[:, 0], starts.z(0, 0)[:, 0], atol=1e-4)
    for kind in (long_dreams.Dream, long_dreams.PredictorDream):
        dreamt = long_dreams.driven_dream(models, kind, starts, 3, driver, 0)
        assert torch.equal(dreamt[:, 0], starts.z(0, 0)[:, 0]) and dreamt.isfinite().all()


def test_the_halves_of_the_starts_share_no_track(driven, small):
    models, starts = driven
    cfg = SimpleNamespace(seed=0)
    two = [replace(starts.episodes[0], track=i) for i in range(4)]
    halves = [
        long_dreams.choose_starts(models, two, two[0].source, 9, cfg, half) for half in (0, 1)
    ]
    assert [{*half.track} for half in halves] == [{0, 2}, {1, 3}]


def test_the_same_actions_make_the_same_drive(driven, monkeypatch):
    """A driver that repeats an episode's actions in the simulator gets its latents."""
    models, starts = driven

    class Replay:
        def __init__(self):
            self.row = -1

        def reset(self, track):
            self.row, self.t = self.row + 1, 0

        def action(self, z):
            x, k = starts.episodes[starts.e[self.row]], starts.k[self.row]
            self.t += 1
            return torch.from_numpy(x.act[k + self.t - 1])

    z = long_dreams.real_drives(models, starts, 4, Replay)
    true, still = starts.z(0, 3), starts.z(0, 0)
    assert (z - true)[:, 3].pow(2).mean() < 0.2 * (still - true)[:, 3].pow(2).mean()


def test_drivers_are_ranked_as_in_the_simulator_or_not():
    best_first = np.arange(3.0 * len(DRIVERS)).reshape(3, -1)
    values = {REAL: best_first, OWN: best_first**3, PREDICTOR: -best_first}
    reached = {("energy", where): x for where, x in values.items()}
    cfg = SimpleNamespace(seed=0, bootstrap=5)
    found = compare_drivers(reached, np.arange(3), cfg)
    assert found[RANK][f"energy, {OWN}"]["value"] == pytest.approx(1)
    assert found[RANK][f"energy, {PREDICTOR}"]["value"] == pytest.approx(-1)
    assert found["random"][f"energy, {REAL}"]["value"] == best_first[:, -1].mean()


def test_a_dream_that_exploded_is_far_from_all_that_is_real():
    z = bounded(torch.tensor([float("nan"), float("inf"), -1e9, 0.5]))
    assert z.tolist() == [long_dreams.BOUND, long_dreams.BOUND, -long_dreams.BOUND, 0.5]


class FullGas:
    def reset(self, track):
        pass

    def action(self, z):
        return torch.tensor([0.0, 1.0, 0.0])


@pytest.mark.parametrize("finished", [True, False])
def test_a_finished_lap_goes_on_and_a_car_that_left_the_field_stands(driven, monkeypatch, finished):
    models, starts = driven
    step = FastCarRacing.step

    def end(env, action):
        obs, reward, *_, info = step(env, action)
        return obs, reward, True, False, info | {"lap_finished": finished}

    monkeypatch.setattr(FastCarRacing, "step", end)
    z = long_dreams.real_drives(models, starts[:1], 12, FullGas)[0]
    assert torch.equal(z[-1], z[-2]) != finished
