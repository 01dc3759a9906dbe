"""Speed of the collectors and of the training loader."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from buffer import DEFAULT_FOLDERS, MADE_BY, Loader, index
from car.env import make_env
from support import REPO
from support.cli import fail
from support.device import tune_malloc
from tools.bench_env import centre_line_actions


def official_rate(steps=600):
    """Frames per second of the official env alone: no telemetry, nothing written."""
    env, actions = make_env("official"), centre_line_actions(7, steps)
    env.reset(seed=7)
    start = time.monotonic()
    for action in actions:
        env.step(action)
    return len(actions) / (time.monotonic() - start)


def collect(root, folder, frames, workers):
    """The chunks that a collector writes, run as its user would."""
    flags = ["--root", root, "--frames", frames, "--workers", workers]
    command = [sys.executable, REPO / MADE_BY[folder], *flags]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        fail(f"{MADE_BY[folder]}: {done.stderr.strip()}")
    return index(Path(root) / folder)[0]


def steady_rate(chunks):
    """Frames per second while all workers drive: from each one's first file to its last."""
    files = defaultdict(list)
    for chunk in chunks:
        files[chunk.meta["worker"]].append((chunk.path.stat().st_mtime, chunk.frames))
    rate = 0
    for written in map(sorted, files.values()):
        if len(written) < 2:
            fail("a worker wrote one episode only; raise --frames")
        rate += sum(n for _, n in written[1:]) / (written[-1][0] - written[0][0])
    return rate


def bench_collect(frames):
    """Prints frames per second of each collector, with 1 and 2 workers that write `frames` each."""
    print(f"{'collector':16}{'workers':>8}{'frames/s':>10}{'x official a core':>19}{'B/frame':>9}")
    for folder in DEFAULT_FOLDERS:
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as root:
                chunks = collect(root, folder, frames * workers, workers)
                rate = steady_rate(chunks)
                size = sum(c.path.stat().st_size for c in chunks) / sum(c.frames for c in chunks)
            ratio = rate / workers / official_rate()
            print(f"{folder:16}{workers:8}{rate:10.0f}{ratio:19.1f}{size:9.0f}")


def bench_loader(frames):
    """Prints frames per second of mixed batches of three folders of `frames` frames each."""
    tune_malloc()  # as every stage does
    with tempfile.TemporaryDirectory() as root:
        sources = [collect(root, folder, frames, 2) for folder in DEFAULT_FOLDERS]
        print(f"{'windows':>8}{'latents':>9}{'frames/s':>12}   episodes in a batch: least, median")
        for latents, size, batches in ((1, 256, 1500), (16, 32, 500)):
            stream = Loader(sources, size, latents).batches(labels=True)
            next(stream)
            start = time.monotonic()
            origins = [next(stream)[2] for _ in range(batches)]
            rate = batches * size * latents / (time.monotonic() - start)
            stream.close()
            episodes = [len({chunk for _, chunk in batch}) for batch in origins]
            mixed = f"{min(episodes):3}, {statistics.median(episodes):.0f}"
            print(f"{size:8}{latents:9}{rate:12,.0f}   {mixed}")
