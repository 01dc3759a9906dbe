"""A night of training: killed, stopped, resumed, watched, out of disk, fed with garbage."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, script

import networks
from buffer import write_chunk
from car_env import TELEMETRY
from networks import TinyEncoder, hold, rotate, save
from runtime import Refusal

FOLDERS = ("data_race", "data_recovery", "data")
ONE = ["--precision", "fp32", "--threads", "1", "--log_every", "0"]
STEPS = 40  # of an epoch
STAGES = {
    "encoder": [*ONE, "--width", "0.125", "--dim", "16", "--batch_size", "6", "--epochs", "3",
                "--steps_per_epoch", STEPS],
    "decoder": [*ONE, "--once", "--width", "8", "--batch_size", "8", "--steps", STEPS],
    "predictor": [*ONE, "--hidden", "32", "--horizon", "4", "--dropout", "0.1", "--batch_size",
                  "48", "--epochs", "3", "--steps_per_epoch", STEPS],
    "cost_model": [*ONE, "--hidden", "32", "--batch_size", "48", "--epochs", "3",
                   "--steps_per_epoch", STEPS],
}
WRITTEN = {"encoder": "encoder_mixed_ep3", "decoder": "decoder_ep3", "predictor": "predictor_ep3",
           "cost_model": "cost_model_final"}


def episode(folder, number, held_out, steps=100):
    """An episode of cloudy pictures, all unlike each other."""
    rng = np.random.default_rng([number, len(folder.name)])
    obs = rng.integers(0, 256, (steps + 1, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    ends = np.zeros(steps, bool)
    write_chunk(folder, {
        "source": folder.name, "track_seed": 10_000_000 + 10 * number + (not held_out),
        "uid": f"{folder.name}-{number}", "policy": {}, "preprocess": 1}, obs=obs,
        act=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        reward=rng.random(steps, np.float32), terminated=ends, truncated=ends,
        telemetry=rng.random((steps + 1, len(TELEMETRY)), np.float32))


def command(stage, root, *more):
    return [sys.executable, str(REPO / f"train_{stage}.py"), "--root", str(root),
            *map(str, STAGES[stage]), *map(str, more)]


def train(stage, root, *more):
    return script(f"train_{stage}.py", *STAGES[stage], *more, root=root)


def refused(done, *words):
    """It ended with one line that holds these words."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in said[0], said[0]


def losses(root, stage):
    """[(step, loss)] of the log as it was written, a torn line passed over."""
    rows, path = [], root / "models" / f"{stage}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [(r["step"], r["loss"]) for r in rows if "loss" in r]


@pytest.fixture(scope="session")
def night(tmp_path_factory):
    """ROOT in which every stage ran without interruption."""
    root = tmp_path_factory.mktemp("night")
    for name in FOLDERS:
        (root / name).mkdir()
        for number in range(5):
            episode(root / name, number, held_out=number == 0)
    for stage in STAGES:
        done = train(stage, root)
        assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture
def root(night, tmp_path):
    """A ROOT of its own with the data and what the stages read, but no run."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(night / name)
    (tmp_path / "models").mkdir()
    return tmp_path


def give(night, root, *names):
    for name in names:
        shutil.copy2(night / "models" / f"{name}.pth", root / "models")


def until_logged(process, root, stage, count):
    """Waits until the running stage has logged `count` steps more."""
    before, deadline = len(losses(root, stage)), time.time() + 60
    while process.poll() is None and len(losses(root, stage)) < before + count:
        assert time.time() < deadline
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_stopped_anywhere_it_goes_on_to_the_bit(night, root, stage):
    needs = {"encoder": (), "decoder": ("encoder_mixed_ep2", "encoder_mixed_ep3"),
             "predictor": ("encoder_mixed_ep3", "decoder_ep3"),
             "cost_model": ("encoder_mixed_ep3", "predictor_ep3")}[stage]
    if stage == "decoder":
        needs += ("decoder_ep1",)  # from which it starts
    give(night, root, *needs)
    for how in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command(stage, root, "--save_every", "0.0005"), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until_logged(process, root, stage, random.randint(1, 30))
        began = time.time()
        process.send_signal(how)
        process.communicate(timeout=30)
        assert process.returncode == (130 if how == signal.SIGTERM else -how)
        print(f"{how.name}: gone after {time.time() - began:.2f} s")
    before = len(losses(root, stage))
    done = train(stage, root)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, mine = dict(losses(night, stage)), losses(root, stage)
    assert all(whole[step] == loss for step, loss in mine)
    assert set(dict(mine)) >= set(list(whole)[-50:]) and before > 0
    a, b = (torch.load(r / "models" / f"{WRITTEN[stage]}.pth", weights_only=True)["nets"]
            for r in (night, root))
    assert all(torch.equal(a[n]["weights"][k], b[n]["weights"][k])
               for n in a for k in a[n]["weights"])
