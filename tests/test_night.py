"""A night of training: killed, stopped, resumed, watched, out of disk, fed with garbage."""

import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from buffer import write_chunk
from car.telemetry import TELEMETRY
from networks import Predictor, TinyEncoder
from support.checkpoints import build, fingerprint, numbered, read, rotate, save
from support.cli import Refusal, run_main
from tools.checkpoint import describe

FOLDERS = ("data_race", "data_recovery", "data")
ONE = ["--precision", "fp32", "--threads", "1", "--log_every", "0"]
LOOP = ["--epochs", "2", "--steps_per_epoch", "60"]
STAGES = {
    "encoder": [
        *ONE,
        *LOOP,
        "--channels",
        "8",
        "--dim",
        "16",
        "--history",
        "2",
        "--strides",
        "4",
        "2",
        "1",
        "1",
        "--batch_size",
        "6",
    ],
    "decoder": [*ONE, "--once", "--channels", "8", "--batch_size", "8", "--steps", "60"],
    "predictor": [
        *ONE,
        *LOOP,
        "--hidden",
        "32",
        "--horizon",
        "4",
        "--dropout",
        "0.1",
        "--batch_size",
        "48",
    ],
    "dream": [
        *[*ONE, *LOOP, "--hidden", "16", "--width", "32"],
        *["--horizon", "4", "--batch_size", "12"],
    ],
    "cost_model": [*ONE, *LOOP, "--hidden", "32", "--batch_size", "48"],
}
WRITTEN = {
    "encoder": "encoder_mixed_ep2",
    "decoder": "decoder_ep2",
    "predictor": "predictor_ep2",
    "dream": "dream_ep2",
    "cost_model": "cost_model_final",
}
READ = {
    "encoder": (),
    "decoder": ("encoder_mixed_ep1", "encoder_mixed_ep2"),
    "predictor": ("encoder_mixed_ep2",),
    "dream": ("encoder_mixed_ep2", "predictor_ep2"),
    "cost_model": ("encoder_mixed_ep2", "predictor_ep2"),
}
QUICK = [
    stage if stage == "predictor" else pytest.param(stage, marks=pytest.mark.slow)
    for stage in STAGES
]  # one stage for every day
forkserver = multiprocessing.get_context("forkserver")  # the imports, 5 s, are made once
forkserver.set_forkserver_preload([f"train_{stage}" for stage in STAGES])


def episode(folder, number, held_out, steps=230):
    """An episode of cloudy pictures, all unlike each other."""
    rng = np.random.default_rng([number, len(folder.name)])
    obs = rng.integers(0, 256, (steps + 1, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    ends = np.zeros(steps, bool)
    write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": 10_000_000 + 10 * number + (not held_out),
            "uid": f"{folder.name}-{number}",
            "policy": {},
            "preprocess": 1,
        },
        obs=obs,
        act=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        reward=rng.random(steps, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=rng.random((steps + 1, len(TELEMETRY)), np.float32),
    )


def main_of(stage, args, said):
    """In a process of its own: the script as it runs from a shell, its output in a file."""
    with open(said, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = [f"train_{stage}.py", *args]
    run_main(importlib.import_module(f"train_{stage}").main)


class Run:
    """A stage that runs: `said` is its output, `code` its exit code once it has ended."""

    def __init__(self, stage, root, *more):
        self.log, self.stage, self.root = root / f"{stage}.txt", stage, root
        args = [*STAGES[stage], "--root", str(root), *map(str, more)]
        self.process = forkserver.Process(target=main_of, args=(stage, args, self.log))
        self.process.start()

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds=120):
        self.process.join(seconds)
        self.code = self.process.exitcode
        return self

    def until(self, happened):
        deadline = time.time() + 60
        while not happened():
            assert time.time() < deadline and self.process.is_alive(), self.said[-3000:]
            time.sleep(0.002)
        return self


def refused(run, *words):
    """It ended with one line that holds these words."""
    said = [line for line in run.wait().said.splitlines() if line.startswith("error: ")]
    assert run.code == 2 and len(said) == 1 and "Traceback" not in run.said, run.said
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
def given(tmp_path_factory):
    """ROOT with the data and untrained nets for the stages to read."""
    root = tmp_path_factory.mktemp("given")
    for name in FOLDERS:
        (root / name).mkdir()
        for number in range(5):
            episode(root / name, number, held_out=number == 0)
    (root / "models").mkdir()
    torch.manual_seed(0)
    for epoch in (1, 2):
        eye = TinyEncoder(8, 2, 2, 16, (4, 2, 1, 1))
        save(root / "models" / f"encoder_mixed_ep{epoch}.pth", {"encoder": eye}, done=epoch == 2)
    save(
        root / "models" / "predictor_ep2.pth",
        {"predictor": Predictor(16, 32)},
        encoder_key=fingerprint(eye),
        horizon=4,
    )
    return root


def prepare(root, given, stage):
    """Gives a ROOT the data and what the stage reads."""
    for name in FOLDERS:
        (root / name).symlink_to(given / name)
    (root / "models").mkdir()
    for name in READ[stage]:
        shutil.copy2(given / "models" / f"{name}.pth", root / "models")


@pytest.fixture(scope="session")
def whole(given, tmp_path_factory):
    """stage -> ROOT in which it ran without interruption; it runs when it is first asked for."""

    @functools.cache
    def run_whole(stage):
        root = tmp_path_factory.mktemp(stage)
        prepare(root, given, stage)
        done = Run(stage, root).wait()
        assert done.code == 0, done.said[-3000:]
        return root

    return run_whole


@pytest.mark.parametrize("stage", QUICK)
def test_killed_and_stopped_anywhere_it_goes_on_to_the_bit(given, whole, tmp_path, stage):
    root, night = tmp_path, whole(stage)
    prepare(root, given, stage)
    for how in (signal.SIGKILL, signal.SIGTERM):
        run, before = Run(stage, root, "--save_every", 0.001), len(losses(root, stage))
        run.until(lambda: len(losses(root, stage)) > before + random.randint(0, 25))
        began = time.time()
        os.kill(run.process.pid, how)
        assert run.wait(30).code == (130 if how == signal.SIGTERM else -how), run.said[-3000:]
        print(f"{stage} on {how.name}: gone after {time.time() - began:.2f} s")
    state = torch.load(root / "models" / f"{stage}_resume.pth", weights_only=True)
    assert state["step"] % 60 and state["frames_seen"]["data"] > 0  # it was inside of an epoch
    done = Run(stage, root).wait()
    assert done.code == 0, done.said[-3000:]
    wanted, mine = dict(losses(night, stage)), losses(root, stage)
    assert all(wanted[step] == loss for step, loss in mine) and len(mine) > 100
    assert {step for step, _ in mine} == set(wanted)
    a, b = (
        torch.load(r / "models" / f"{WRITTEN[stage]}.pth", weights_only=True)["nets"]
        for r in (night, root)
    )
    assert all(
        torch.equal(a[n]["weights"][k], b[n]["weights"][k]) for n in a for k in a[n]["weights"]
    )
    if stage != "decoder":  # which has nothing left to resume
        refused(
            Run(stage, root, "--lr", 0.5, "--weight_decay", 0.3),
            "--lr 0.00",
            "0.5",
            "--weight_decay",
            "0.3",
            "--fresh",
        )


@pytest.mark.slow
def test_a_decoder_in_the_middle_refuses_other_arguments(given, tmp_path):
    root = tmp_path
    prepare(root, given, "decoder")
    run = Run("decoder", root).until(lambda: losses(root, "decoder"))
    run.process.terminate()
    assert run.wait(30).code == 130
    refused(Run("decoder", root, "--lr", 0.5), "--lr 0.002", "0.5", "--fresh")
    other = Run("decoder", root, "--precision", "bf16").wait()  # may change, and is said
    assert other.code == 0 and "goes on with cpu, bf16, threads 1" in other.said
    assert Run("decoder", root, "--lr", 0.5, "--fresh").wait().code == 0


# ------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def eye():
    return TinyEncoder(8, 1, 2, 8, (8, 1, 1, 1))


@pytest.mark.parametrize("stage", QUICK)
def test_a_checkpoint_says_what_is_in_it(whole, capsys, stage):
    models = whole(stage) / "models"
    describe(models / f"{WRITTEN[stage]}.pth")
    said = capsys.readouterr().out
    for word in (
        "versions",
        "commit",
        "frames_seen",
        "data_key",
        "preprocessing",
        "epoch",
        f"python train_{stage}.py",
        "'torch'",
        "'data_race'",
    ):
        assert word in said, word
    if stage != "decoder":  # which leaves nothing to resume
        describe(models / f"{stage}_resume.pth")
        said = capsys.readouterr().out
        assert "optim" in said and "rng" in said and "numbers" in said and len(said) < 4000


def test_rotation_keeps_the_last_the_tens_the_young_and_the_used(tmp_path, eye):
    for epoch in range(1, 26):
        path = tmp_path / f"encoder_mixed_ep{epoch}.pth"
        save(path, {"encoder": eye})
        os.utime(path, (0, 0) if epoch != 7 else None)
    half = tmp_path / ".encoder_resume.pth.123.tmp"
    half.touch()
    os.utime(half, (0, 0))
    left = lambda: {n for n, _ in numbered(tmp_path, "encoder_mixed_ep*.pth")}
    rotate(tmp_path, "encoder_mixed", spared={5})
    assert left() == {5, 7, 10, 20, 23, 24, 25}
    rotate(tmp_path, "encoder_mixed")
    assert left() == {7, 10, 20, 23, 24, 25} and not half.exists()


def hostile(path, eye, kind):
    """Makes a file of this kind, from a good one."""
    save(path, {"encoder": eye})
    payload, raw = torch.load(path, weights_only=True), path.read_bytes()
    entry = payload["nets"]["encoder"]
    if kind == "pickled":
        payload["bait"] = print  # would run foreign code, were it unpickled
    elif kind == "other class":
        save(path, {"encoder": Predictor(8, 8)})
        return
    elif kind == "other channels":
        entry["args"]["channels"] = 16
    elif kind == "mad arguments":
        entry["args"]["dim"] = "x"
    elif kind == "newer":
        payload = {"schema": 99, "nets": "in a new way"}
    elif kind == "no nets":
        payload["nets"] = [1]
    elif kind == "not finite":
        entry["weights"]["head.bias"][0] = float("nan")
    if kind in ("empty", "half", "flipped"):
        path.write_bytes(
            {
                "empty": b"",
                "half": raw[: len(raw) // 2],
                "flipped": raw[: len(raw) // 2] + bytes(64) + raw[len(raw) // 2 + 64 :],
            }[kind]
        )
    else:
        torch.save(payload, path)


@pytest.mark.parametrize(
    "kind,word",
    [
        ("pickled", "UnpicklingError"),
        ("other class", "found a Predictor"),
        ("other channels", "fit"),
        ("mad arguments", "fit"),
        ("newer", "found 99"),
        ("no nets", "damaged"),
        ("not finite", "bias"),
        ("empty", "damaged"),
        ("half", "damaged"),
        ("flipped", "damaged"),
    ],
)
def test_hostile_checkpoints_are_refused_in_a_line(tmp_path, eye, kind, word):
    path = tmp_path / "encoder_mixed_ep1.pth"
    hostile(path, eye, kind)
    with pytest.raises(Refusal, match=word) as refusal:
        build(read(path), "encoder", path)
    assert path.name in str(refusal.value) and "\n" not in str(refusal.value)
    assert path.exists()


# ------------------------------------------------------------------ the watcher


def vandal(models, seed, count, made):
    """Damages, takes away and gives back checkpoints while they are written, each once at most;
    writes what it did to `made`: {epoch: deed}. Ends when all have been there."""
    rng, did = random.Random(seed), {}
    deeds = ("truncate", "leave", "away and back", "garbage", "again", "flip", "leave", "delete")
    while len(did) < count - 1:
        there = [
            n
            for n in range(1, count)
            if n not in did and (models / f"encoder_mixed_ep{n}.pth").exists()
        ]
        time.sleep(rng.random() * 1.5)
        if there:
            epoch = rng.choice(there)
            path = models / f"encoder_mixed_ep{epoch}.pth"
            did[epoch] = deed = deeds[len(did) % len(deeds)]
            raw, aside = path.read_bytes(), path.with_suffix(".aside")
            if deed == "truncate":
                os.truncate(path, len(raw) // 3)
            elif deed == "garbage":
                aside.write_bytes(os.urandom(999))
                aside.rename(path)
            elif deed == "flip":
                path.write_bytes(raw[:9000] + bytes(500) + raw[9500:])
            elif deed == "delete":
                path.unlink()
            elif deed == "away and back":
                path.rename(aside)
                time.sleep(rng.random() * 0.4)
                aside.rename(path)
            elif deed == "again":
                path.write_bytes(raw[:5000])
                time.sleep(rng.random() * 0.4)
                aside.write_bytes(raw)
                aside.rename(path)
    made.write_text(json.dumps(did))


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_the_watcher_under_torture(given, tmp_path, count):
    """It is killed and started again in between; the last checkpoint ends it."""
    root, models, deeds = tmp_path, tmp_path / "models", tmp_path / "deeds.json"
    prepare(root, given, "encoder")
    fast = ["--steps", 2, "--channels", 4, "--batch_size", 4]
    STAGES["decoder"].remove("--once")
    try:
        run = Run("decoder", root, *fast)
        bad = forkserver.Process(target=vandal, args=(models, 0, count, deeds))
        bad.start()
        for epoch in range(1, count):
            save(
                models / f"encoder_mixed_ep{epoch}.pth",
                {"encoder": TinyEncoder(8, 1, 2, 8, (8, 1, 1, 1))},
                done=False,
            )
            time.sleep(0.3)
            if epoch == count // 2:
                os.kill(run.process.pid, signal.SIGKILL)
                run.wait()
                run = Run("decoder", root, *fast)
        bad.join()
        save(
            models / f"encoder_mixed_ep{count}.pth",
            {"encoder": TinyEncoder(8, 1, 2, 8, (8, 1, 1, 1))},
            done=True,
        )
        assert run.wait(300).code == 0, run.said[-3000:]
    finally:
        STAGES["decoder"].insert(0, "--once")
    did = {int(k): v for k, v in json.loads(deeds.read_text()).items()}
    assert "Traceback" not in run.said
    drawn = [int(n) for n in re.findall(r"reconstruct_ep(\d+)\.png: [\d.]+ dB", run.said)]
    untouched = [n for n in drawn if did.get(n, "leave") == "leave"]
    assert untouched == sorted(set(untouched))
    for epoch in range(1, count + 1):
        deed, sheet = did.get(epoch, "leave"), root / "visuals" / f"reconstruct_ep{epoch}.png"
        if deed in ("leave", "away and back", "again"):
            assert stamp(sheet) == stamp(models / f"encoder_mixed_ep{epoch}.pth"), (epoch, deed)
        elif deed != "delete":
            assert f"encoder_mixed_ep{epoch}.pth: expected" in run.said, (epoch, deed)
        assert drawn.count(epoch) <= (2 if deed == "again" else 1), (epoch, deed)
    print(f"{len(drawn)} drawn of {count}, {did}")


def stamp(path):
    return path.stat().st_mtime_ns


def test_a_watcher_without_its_gpu_goes_on_on_the_cpu(given, tmp_path):
    root = tmp_path
    prepare(root, given, "predictor")  # one checkpoint
    done = Run("decoder", root, "--device", "cuda:99", "--steps", 2).wait()
    assert done.code == 0 and "no such GPU" in done.said and "on the CPU" in done.said, done.said
    assert (root / "visuals" / "reconstruct_ep2.png").exists()
    refused(Run("decoder", root, "--device", "tpu"), "tpu")


@pytest.fixture
def small_disk(given, tmp_path):
    """ROOT with models/ on a disk of 8 MiB."""
    root = tmp_path
    prepare(root, given, "encoder")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", root / "models"], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk takes root")
    yield root
    subprocess.run(["umount", "--lazy", root / "models"], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_a_line_and_it_goes_on(small_disk, eye):
    save(small_disk / "models" / "encoder_mixed_ep2.pth", {"encoder": eye})
    run = Run("decoder", small_disk, "--channels", 16).until(lambda: losses(small_disk, "decoder"))
    filler = small_disk / "models" / "filler"
    with open(filler, "wb", buffering=0) as f, pytest.raises(OSError):
        while f.write(bytes(4096)):
            pass
    refused(run, "decoder", "No space left on device; free some space")
    filler.unlink()
    again = Run("decoder", small_disk, "--channels", 16).wait()
    assert again.code == 0 and "Traceback" not in again.said, again.said[-3000:]
    build(read(small_disk / "models" / "decoder_ep2.pth"), "decoder")
    assert not list((small_disk / "models").glob(".*"))


# ------------------------------------------------------------------ what ends a run in a line


@pytest.mark.slow
def test_a_data_folder_swapped_under_a_running_trainer(given, tmp_path):
    for name in FOLDERS:
        shutil.copytree(given / name, tmp_path / name)
    (tmp_path / "other").mkdir()
    for number in range(5, 9):
        episode(tmp_path / "other", number, held_out=False)
    run = Run("encoder", tmp_path, "--batch_size", 30).until(lambda: losses(tmp_path, "encoder"))
    (tmp_path / "data_race").rename(tmp_path / "mine")
    (tmp_path / "other").rename(tmp_path / "data_race")
    refused(run, "data_race", "unreadable", "buffer.py")


@pytest.mark.parametrize("stage", QUICK)
def test_an_exploding_learning_rate_saves_nothing(given, tmp_path, stage):
    root = tmp_path
    prepare(root, given, stage)
    (root / "models" / f"{WRITTEN[stage]}.pth").touch()
    more = ["--steps", 3] if stage == "decoder" else ["--steps_per_epoch", 1]
    run = Run(stage, root, "--lr", 1e30, "--fresh", *more)
    refused(run, "step", "--lr")
    assert not (root / "models" / f"{WRITTEN[stage]}.pth").exists()
    assert len(list((root / "models").glob(f"replaced-*/{WRITTEN[stage]}.pth"))) == 1
