"""One small chain, run once by the README's commands, that the tests look at from outside."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and all scripts: two run at a time
REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

SMALL = "--channels 8 --dim 32 --batch_size 12 --precision fp32 --threads 1".split()
CHAIN = {  # stage: the README's command, small
    "collect_race_data.py": [
        "--frames",
        "2500",
        "--workers",
        "2",
        "--pace",
        "0.1",
        "0.2",
        "--max_offset",
        "3",
    ],
    "collect_recovery_data.py": ["--frames", "2500", "--workers", "2"],
    "collect_data.py": ["--frames", "3200", "--workers", "2"],
    "train_encoder.py": [*SMALL, "--epochs", "2", "--steps_per_epoch", "20"],
    "train_decoder.py": ["--once", "--steps", "20", "--batch_size", "16", "--channels", "16"],
    "train_predictor.py": [
        "--epochs",
        "2",
        "--steps_per_epoch",
        "20",
        "--batch_size",
        "32",
        "--hidden",
        "64",
    ],
    "train_cost_model.py": ["--epochs", "1", "--steps_per_epoch", "20", "--batch_size", "64"],
}


def script(name, *args, root=None, **kw):
    """Runs a script as a user would; returns the finished process with its output as text."""
    where = [str(REPO / name)] if name.endswith(".py") else ["-m", name]
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
    """(root, {script: its output}) after every stage ran small, in the order of the README."""
    root, said = tmp_path_factory.mktemp("chain"), {}
    for name, args in CHAIN.items():
        done = script(name, *args, root=root)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        said[name] = done.stdout
    return root, said
