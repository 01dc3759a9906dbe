"""The driver as it drives: from observations alone, disturbed, and keeping what it saw."""

import json
import multiprocessing as mp
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import script

from car.env import make_env, observe
from drive_mpc import drive, load_driver, planning, to_action
from support.checkpoints import fingerprint
from support.cli import parser
from support.disturbance import Disturbance
from support.dreams import load_decoder
from support.lap_view import LapView
from support.pictures import pyplot
from support.window import PAPER, VIEW, NoWindow

TRACK = 200_010
STEPS = 160


def simulate(pipe):
    """The environment alone, in a process of its own: observations out, actions in."""
    env = make_env("official")
    obs, _ = env.reset(seed=TRACK)
    returned = 0.0
    for _ in range(STEPS):
        pipe.send(observe(env, obs))
        obs, reward, *_ = env.step(pipe.recv())
        returned += float(reward)
    pipe.send(returned)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    p = parser("")
    planning(p)
    args = p.parse_args(
        ["--root", str(tmp_path_factory.mktemp("none")), "--samples", "32", "--horizon", "5"]
    )
    return load_driver(args, args)[0]


def test_the_driver_needs_nothing_but_observations(driver):
    """With the environment in another process it drives as it does beside it."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=simulate, args=(theirs,))
    process.start()
    driver.reset(TRACK)
    acts = []
    for _ in range(STEPS):
        acts.append(driver.act(ours.recv()))
        ours.send(acts[-1])
    apart = ours.recv()
    process.join()

    env, seen, total = make_env("official"), [], []

    def watch(env, frame, driver, returned):
        seen.append(driver.action)
        total.append(float(returned))
        return len(seen) < STEPS

    assert drive(env, driver, TRACK, watch) is None  # broken off by watch
    assert np.array_equal(seen, acts) and total[-1] == pytest.approx(apart, abs=1e-9)
    assert np.std(acts, axis=0)[0] > 0.01  # it steered


def test_disturbances_do_what_they_say():
    frames = np.random.default_rng(0).integers(60, 200, (6, 64, 64, 3), np.uint8)
    late, noise, none = (Disturbance(kind) for kind in ("late", "noise", "none"))
    for d in (late, noise, none):
        d.reset(TRACK)
    for t, frame in enumerate(frames):
        assert np.array_equal(late(frame), frames[max(0, t - 2)])
        assert np.array_equal(none(frame), frame)
        gap = noise(frame).astype(float) - frame
        assert abs(gap.mean()) < 1 and 9 < gap.std() < 11
    noise.reset(TRACK)
    again = Disturbance("noise")
    again.reset(TRACK)
    assert np.array_equal(noise(frames[0]), again(frames[0]))  # the same on the same track


def test_the_film_shows_zoom_rollout_plan_and_end(driver):
    class Film:
        def __init__(self):
            self.frames, self.last = [], None

        def add(self, frame):
            self.frames.append(frame.astype(int))

        def hold(self, frame, seconds):
            self.last = frame.astype(int), seconds

    film = Film()
    decoder = load_decoder(Path(driver.models), fingerprint(driver.encoder), driver.device)
    view = LapView(NoWindow(), film, "mpc", decoder)
    view.reset(TRACK)
    drive(make_env("fast"), driver, TRACK, lambda *seen: view(*seen) and view.step < 70)
    row = {"lap_finished": True, "return": 900.0, "steps": 70, "tiles_missed": 0}
    view.finish(row)
    zoom, after, (end, seconds) = film.frames[10], film.frames[-1], film.last
    assert len(film.frames) == 35 and seconds == 2.0
    dark = lambda frame: frame[230:250, :60].mean()  # of the band behind the words
    assert dark(zoom) < 0.5 * dark(after) and dark(end) < 0.5 * dark(after)
    w, h = VIEW
    drawn = lambda frame, box: (frame[box] != PAPER).any()
    curve, numbers = np.s_[h + 60 : h + 180, 70:w], np.s_[h + 60 : h + 180, :50]
    plans, rollout = np.s_[h + 60 : h + 180, w + 80 : w + 300], np.s_[280:430, w + 14 : w + 350]
    for box in (curve, numbers, plans, rollout):
        assert drawn(after, box) and not drawn(zoom, box)
    assert drawn(zoom, np.s_[60:200, w + 14 : w + 170])  # what the driver sees


def test_its_own_episodes_are_data_to_learn_from(tmp_path):
    small = ["--samples", "2", "--horizon", "1", "--env", "fast", "--no_video"]
    refused = script("drive_mpc.py", *small, "--save_data", "--track_seed", "200000", root=tmp_path)
    assert refused.returncode == 2 and "never learned from" in refused.stderr
    done = script(
        "drive_mpc.py",
        *small,
        "--save_data",
        "--track_seed",
        "10000019",
        "--episodes",
        "2",
        "--json",
        tmp_path / "s.json",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    from buffer import index, read_chunk

    chunks, damaged, _ = index(tmp_path / "data_mpc")
    assert not damaged and sorted(c.held_out for c in chunks) == [False, True]
    assert sorted(c.meta["track_seed"] for c in chunks) == [10_000_019, 10_000_020]
    for row, c in zip(report["episodes"], sorted(chunks, key=lambda c: c.meta["track_seed"])):
        assert c.frames == row["steps"] and abs(c.meta["return_"] - row["return"]) < 0.01
        arrays = read_chunk(c.path, "obs", "act", "telemetry")
        assert arrays["obs"].std() > 20 and arrays["act"].std() > 0
    from buffer import load_sources
    from train_encoder import arguments

    sources = load_sources(arguments(["--root", str(tmp_path), "--data", "data_mpc"]))
    assert [len(part) for part in sources["data_mpc"]] == [1, 1]  # to train, held out


def test_trials_judge_every_driver_by_the_same_starts(tmp_path):
    done = script(
        "report.trials",
        "--starts",
        "4",
        "--tracks",
        "2",
        "--samples",
        "8",
        "--horizon",
        "4",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "visuals" / "trials.json").read_text())
    assert [r["all"]["n"] for r in found["recovery"].values()] == [4, 4, 4]
    assert found["recovery"]["expert"]["all"]["share"] >= 0.75  # it sees all, and comes back
    for r in found["recovery"].values():
        assert 0 <= r["all"]["low"] <= r["all"]["share"] <= r["all"]["high"] <= 1
    energies = found["behaviours"]
    for name in ("creeping", "standing on the road", "circling on the grass"):
        for kind in ("density", "classifier"):
            assert energies[name][kind][1] > energies["lapping"][kind][1], (name, kind)
    straight, *_, fast = found["landscape"].values()
    assert abs(straight["steer"]) < 0.15 and straight["gas"] > 0  # as a driver would
    assert fast["brake"] > 0
    image = cv2.imread(str(tmp_path / "visuals" / "energy_landscape.png"))
    assert image is not None and image.std() > 5


def test_a_landscape_has_the_units_that_it_prints_and_no_gas_that_is_forbidden(tmp_path):
    done = script(
        "report.trials",
        "--parts",
        "landscape",
        "--max_gas",
        "0.35",
        "--samples",
        "8",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "visuals" / "trials.json").read_text())["landscape"]
    assert max(best["gas"] for best in found.values()) == 0.35  # the straight wants more
    for name, best in found.items():
        line = next(x for x in done.stdout.splitlines() if x.startswith(name))
        assert f"steer {best['steer']:+.2f} rad" in line and f"gas {best['gas']:.2f}" in line
        assert abs(best["steer"]) <= 0.5 and 0 <= best["brake"] <= 0.4
    image = cv2.imread(str(tmp_path / "visuals" / "energy_landscape.png"))
    assert image is not None and image.std() > 5


@pytest.mark.parametrize("gas", [1.0, 0.5])
def test_the_lowest_place_is_drawn_where_it_is_printed(gas):
    from report.trials import draw_landscape

    steer, throttle = torch.linspace(-1, 1, 31), torch.linspace(-1, gas, 31)
    act = to_action(torch.stack(torch.meshgrid(steer, throttle, indexing="ij"), -1)).numpy()
    energy = 1 + 10 * (act[..., 0] - 0.2) ** 2 + (act[..., 1] - 0.9) ** 2 + act[..., 2]
    ax = pyplot().subplots()[1]
    best = draw_landscape(ax, act, energy)
    marker = next(line for line in ax.lines if line.get_label() == "lowest energy")
    assert marker.get_xdata()[0] == pytest.approx(best["steer"]) == pytest.approx(0.2, abs=0.02)
    assert (
        marker.get_ydata()[0]
        == pytest.approx(best["gas"])
        == pytest.approx(min(gas, 0.9), abs=0.05)
    )
    assert "rad" in ax.get_xlabel() and ax.get_xlim() == (-0.5, 0.5) and ax.get_ylim() == (-0.4, 1)
    drawn = ax.collections[0].get_datalim(ax.transData)
    assert drawn.ymax == pytest.approx(gas) and drawn.ymin == pytest.approx(-0.4)
    labels = ax.get_legend_handles_labels()[1]
    assert ("gas above 0.5: not allowed" in labels) == (gas < 1)
    pyplot().close(ax.figure)


def test_the_interval_of_a_share_is_wilsons():
    from report.trials import wilson

    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)
