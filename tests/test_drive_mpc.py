"""The driver as it drives: from observations alone, disturbed, and keeping what it saw."""

import json
import multiprocessing as mp
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script

from car import ZOOM_STEPS
from car.env import make_env, observe
from drive_mpc import drive, load_driver, planning
from support.checkpoints import fingerprint
from support.cli import parser
from support.disturbance import Disturbance
from support.dreams import load_decoder
from support.lap_view import LapView
from support.plan_config import to_action
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


def test_an_open_loop_plan_is_followed_to_its_end(driver, monkeypatch):
    monkeypatch.setattr(driver, "cfg", replace(driver.cfg, open_loop=1.0))
    H, R, plans, acts, zs = driver.cfg.horizon, driver.encoder.repeat, [], [], []

    def watch(env, frame, driver, returned):
        if driver.t > ZOOM_STEPS and (driver.t - 1 - ZOOM_STEPS) % R == 0:
            plans.append(driver.u.clone())
            acts.append(driver.action)
            zs.append(driver.z)
        return len(plans) < 2 * H

    assert drive(make_env("fast"), driver, TRACK, watch) is None
    for first in (0, H):
        wanted = to_action(plans[first]).numpy()
        assert np.array_equal(acts[first : first + H], wanted)
    assert not torch.equal(plans[0], plans[H])
    assert all(not torch.equal(a, b) for a, b in pairwise(zs))  # the film shows the present
    assert len(driver.ms) == 2  # of the plans that were made


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
    decoder = load_decoder(Path(driver.models), fingerprint(driver.nets["encoder"]), driver.device)
    view = LapView(NoWindow(), film, "mpc", decoder)
    view.reset(TRACK)
    drive(make_env("fast"), driver, TRACK, lambda *seen: view(*seen) and view.step < 70)
    row = {"lap_finished": True, "return": 900.0, "steps": 70, "tiles_missed": 0}
    assert not view.finish(row)
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
    for flags, word in (
        (("--track_seed", "200000"), "never learned from"),
        (("--track_seed", "10000019", "--disturb", "colours"), "disturbed frames are not kept"),
        (("--track_seed", "10000019", "--policy", "random", "--open_loop", "1"), "makes no plans"),
    ):
        refused = script("drive_mpc.py", *small, "--save_data", *flags, root=tmp_path)
        assert refused.returncode == 2 and word in refused.stderr
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

    sources = load_sources(tmp_path, ["data_mpc"])
    assert [len(part) for part in sources["data_mpc"]] == [1, 1]  # to train, held out

    # the same command again drives only what is not there
    of = ["--save_data", "--track_seed", "10000019", "--episodes", "3"]
    again = script("drive_mpc.py", *small, *of, root=tmp_path)
    assert again.returncode == 0 and "has 2 of these tracks" in again.stdout, again.stderr
    tracks = sorted(c.meta["track_seed"] for c in index(tmp_path / "data_mpc")[0])
    assert tracks == [10_000_019, 10_000_020, 10_000_021]

    # a file of scores lacks none of them, and no episode is kept twice
    more = "--json", tmp_path / "all.json", "--open_loop", "0.5"
    third = script("drive_mpc.py", *small, *of, *more, root=tmp_path)
    assert third.returncode == 0, third.stderr
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["finished"] and report["settings"]["open_loop"] == 0.5
    assert [row["track_seed"] for row in report["episodes"]] == tracks
    assert len(index(tmp_path / "data_mpc")[0]) == 3
