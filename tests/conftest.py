"""One small chain, run once by the README's commands, that the tests look at from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and all scripts: two run at a time
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # under nohup, whose children would ignore it too
REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

from support.files import lock  # noqa: E402

SMALL = "--channels 8 --dim 32 --batch_size 12 --precision fp32 --threads 1".split()
CHAIN = {  # stage: the README's command, small
    "collect_race_data.py": "--frames 2500 --workers 2 --pace 0.1 0.2 --max_offset 3",
    "collect_recovery_data.py": "--frames 2500 --workers 2",
    "collect_data.py": "--frames 3200 --workers 2",
    "train_encoder.py": f"{' '.join(SMALL)} --epochs 2 --steps_per_epoch 20",
    "train_decoder.py": "--once --steps 20 --batch_size 16 --channels 16",
    "train_predictor.py": "--epochs 2 --steps_per_epoch 20 --batch_size 32 --hidden 64",
    "train_dream.py": "--epochs 2 --steps_per_epoch 10 --batch_size 16 --horizon 8 "
    "--hidden 32 --width 64",
    "train_cost_model.py": "--epochs 1 --steps_per_epoch 20 --batch_size 64",
}
CHAIN = {name: args.split() for name, args in CHAIN.items()}


def script(name, *args, root=None, **kw):
    """Runs a script as a user would; returns the finished process with its output as text."""
    module = str(name).startswith(("report.", "tools."))
    where = ["-m", name] if module else [str(REPO / name)]
    command = [sys.executable, *where, *map(str, args)]
    if root is not None:
        command += ["--root", str(root)]
    env = {**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=REPO, timeout=400, **kw
    )


def children(pid):
    """Pids of the processes that this one started, oldest first."""
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return sorted(int(p) for task in tasks for p in task.read_text().split())
    except OSError:
        return []


def workers_of(pid):
    """Pids of a collector's workers; its other child keeps track of what they share."""
    out = []
    for child in children(pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                out.append(child)
    return out


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """(root, {script: its output}) after every stage ran small, in the order of the README.

    One of the test processes runs the stages; each tests its own copy.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    built, outputs = shared / "chain", shared / "chain.json"
    with open(shared / "chain.lock", "w") as f:
        lock(f)
        if not outputs.is_file():
            outputs.write_text(json.dumps(run_chain(built)))
    root = shutil.copytree(built, tmp_path_factory.mktemp("chain") / "root")
    said = json.loads(outputs.read_text())
    return root, {name: text.replace(str(built), str(root)) for name, text in said.items()}


def run_chain(root):
    """{script: its output} of the stages."""
    root.mkdir(exist_ok=True)
    said = {}
    for name, args in CHAIN.items():
        done = script(name, *args, root=root)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        said[name] = done.stdout
    return said


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A root with three sources of noise, each of ten short episodes, every third held out."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for s, source in enumerate(("data_race", "data_recovery", "data")):
        for i in range(10):
            noise_episode(
                root / source, f"{source}{i}", 70 + i, rng, 10 * (10 * s + i) + (i % 3 > 0)
            )
    return root


def noise_episode(folder, uid, T, rng, track_seed):
    from buffer import write_chunk
    from car.telemetry import TELEMETRY

    folder.mkdir(exist_ok=True)
    ends = np.zeros(T, bool)
    return write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": track_seed,
            "uid": uid,
            "policy": {},
            "preprocess": 1,
        },
        obs=rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8),
        act=rng.uniform(-1, 1, (T, 3)).astype(np.float32),
        reward=np.ones(T, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=rng.uniform(-0.5, 0.5, (T + 1, len(TELEMETRY))).astype(np.float32),
    )


def copy_of(data, tmp_path):
    for source in data.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


class FakeEncoder:
    """`latents(newest frames (N, 3, 64, 64)) -> (N, dim)` in the place of an encoder."""

    def __init__(self, latents, dim, history=3, repeat=2):
        self.latents, self.dim, self.history, self.repeat = latents, dim, history, repeat

    def __call__(self, x):
        return self.latents(x[:, -3:])
