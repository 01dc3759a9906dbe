"""Speed of collecting and of the loader."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from buffer import Loader, index, load_sources, read_chunk, write_chunk
from car.env import make_env
from support import REPO
from support.training import tune_malloc
from tools.bench_env import drive

MANY = 10**6  # more than any episode has steps


# ---- collect -------------------------------------------------------------------------------------

SOURCES = {
    "data_race": "collect_race_data.py",
    "data_recovery": "collect_recovery_data.py",
    "data": "collect_data.py",
}


def stock_rate(steps=600):
    """Frames per second of the official env as it is: no telemetry, nothing written."""
    env = make_env("official")
    actions = drive(7, steps)
    env.reset(seed=7)
    start = time.monotonic()
    for action in actions:
        env.step(action)
    return len(actions) / (time.monotonic() - start)


def collecting(root, script, frames, workers, watch=lambda pid: None):
    """Runs a collector; watch(its pid) is called twice a second."""
    command = [
        sys.executable,
        REPO / script,
        "--root",
        root,
        "--frames",
        frames,
        "--workers",
        workers,
    ]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=said)
        while process.poll() is None:
            watch(process.pid)
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read())


def steady_rate(folder):
    """Frames per second while all workers drive: from each one's first file to its last."""
    ends = defaultdict(list)
    for chunk in index(folder)[0]:
        ends[chunk.meta["worker"]].append((chunk.path.stat().st_mtime, chunk.frames))
    rate = 0
    for files in map(sorted, ends.values()):
        if len(files) < 2:
            sys.exit(f"{folder}: a worker wrote one episode only; raise --frames")
        rate += sum(n for _, n in files[1:]) / (files[-1][0] - files[0][0])
    return rate


def bench_collect(args):
    print(
        f"{'collector':20s}{'workers':>8s}{'frames/s':>10s}{'x stock a core':>16s}{'B/frame':>9s}"
    )
    for name, script in SOURCES.items():
        rates, stock = {1: [], 2: []}, [stock_rate()]
        for workers in (1, 2, 2, 1):  # the machine's own drift falls on both
            with tempfile.TemporaryDirectory() as root:
                collecting(root, script, args.frames * workers, workers)
                folder = Path(root) / name
                rates[workers].append(steady_rate(folder))
                size = sum(p.stat().st_size for p in folder.glob("*.npz"))
                frames = sum(c.frames for c in index(folder)[0])
            stock.append(stock_rate())
        for workers, both in rates.items():
            rate = statistics.mean(both)
            times = rate / workers / statistics.mean(stock)
            print(f"{name:20s}{workers:8d}{rate:10.0f}{times:16.1f}{size / frames:9.0f}")
        ratio = sum(rates[2]) / sum(rates[1])
        print(f"{'':20s}two workers are {ratio:.2f} times one")
    memory_of_a_worker(args.episodes)


def memory_of_a_worker(episodes):
    """Prints the private memory of a random driver's worker over its episodes."""
    rows = []

    def watch(pid):
        done = len(list(folder.glob("*.npz")))
        rows.extend((done, w, private_mib(w)) for w in workers_of(pid)[-1:])

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "data"
        collecting(root, SOURCES["data"], 300 * episodes, 1, watch)
    lives = defaultdict(list)
    for done, pid, mib in rows:
        lives[pid].append((done, mib))
    print(f"private MiB of the worker over {rows[-1][0]} episodes, a line a process")
    for life in lives.values():
        picked = sorted({int(i) for i in np.linspace(min(4, len(life) - 1), len(life) - 1, 6)})
        print("  " + ", ".join(f"{life[i][1]:.0f} after {life[i][0]}" for i in picked))


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


def private_mib(pid):
    """Memory of a process that it shares with none, in MiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


# ---- loader --------------------------------------------------------------------------------------


def bench_loader(args):
    tune_malloc()  # as every stage does
    with tempfile.TemporaryDirectory() as tmp:
        root, sources, first = Path(tmp), [], 0
        for name, script in SOURCES.items():
            collecting(root / "raw", script, args.frames, 2)
            first += len(stamp(root / "raw" / name, root / name, first))
            sources.append(index(root / name)[0])
        shutil.rmtree(root / "raw")
        print(f"{first} chunks, {sum(c.frames for s in sources for c in s):,} frames")
        for latents, size, n in ((1, 256, 1500), (16, 32, 500)):
            stream = Loader(sources, size, latents=latents).batches()
            next(stream)
            start = time.monotonic()
            for _ in range(n):
                next(stream)
            rate = n * size * latents / (time.monotonic() - start)
            stream.close()
            print(f"batches of {size} windows of {latents}: {rate:,.0f} frames/s")
        mixing(sources)
        memory_of_the_loader(sources, args.batches)
        opening(root, sources[0], args.chunks)


def stamp(source, folder, first):
    """Copies chunks with their number, from `first` on, and the step in each frame's first pixels;
    returns them."""
    folder.mkdir()
    chunks = index(source)[0]
    for number, chunk in enumerate(chunks, first):
        data = {k: np.array(v) for k, v in read_chunk(chunk.path).items()}
        for t, obs in enumerate(data["obs"]):
            obs[0, 0] = t // 256, t % 256, number // 256
            obs[0, 1] = number % 256
        write_chunk(folder, chunk.meta, **data)
    return chunks


def stamps(obs):
    """(chunk numbers, steps), two (B,) arrays, of obs (B, 1, 3, 64, 64)."""
    (t1, n0), (t0, _), (n1, _) = obs[:, 0, :, 0, :2].permute(1, 2, 0).int().numpy()
    return 256 * n1 + n0, 256 * t1 + t0


def mixing(sources, size=256):
    """Prints how batches of single frames are made up, over one pass of the smallest source."""
    loader = Loader(sources, size)
    stream, ends = loader.batches(), np.cumsum([len(s) for s in sources])
    episodes, nearest, seen = [], [], []
    for _ in range(min(s.total // s.size for s in loader.streams)):
        number, step = stamps(next(stream)[0])
        source = np.searchsorted(ends, number, "right")
        if np.bincount(source, minlength=len(sources)).tolist() != loader.counts:
            sys.exit(f"a batch holds {np.bincount(source)} of the sources, not {loader.counts}")
        episodes.append(len(set(number.tolist())))
        order = np.lexsort((step, number))
        gaps = np.diff(step[order])[np.diff(number[order]) == 0]
        nearest.append(gaps.min(initial=MANY))
        seen.extend((MANY * number + step).tolist())
    stream.close()
    print(
        f"{len(episodes):,} batches of {size}, each exactly {loader.counts}: episodes in a batch "
        f"{min(episodes)} at least, median {statistics.median(episodes):.0f}; frames of the same "
        f"episode in a batch {min(nearest)} steps apart at least; of {len(seen):,} frames "
        f"{len(seen) - len(set(seen))} came twice"
    )


def memory_of_the_loader(sources, batches):
    """Prints this process's private memory, torch included, while batches go by."""
    stream, rows, start = Loader(sources, 256).batches(), [], time.monotonic()
    for i in range(1, batches + 1):
        next(stream)
        if i * 8 % batches < 8:
            rows.append(f"{private_mib(os.getpid()):.0f} after {i:,}")
    stream.close()
    print(
        f"private MiB over batches of 256: {', '.join(rows)} "
        f"({batches * 256 / (time.monotonic() - start):,.0f} frames/s)"
    )


def opening(root, chunks, count, length=20):
    """Prints the seconds to the first batch of a folder of `count` small chunks."""
    folder = root / "many"
    folder.mkdir()
    data = read_chunk(chunks[0].path)
    part = {k: v[: length + (len(v) > chunks[0].frames)] for k, v in data.items()}
    for i in range(count):
        part["reward"] = np.full(length, i, np.float32)
        write_chunk(folder, {**chunks[0].meta, "uid": f"small-{i:06d}", "track_seed": i}, **part)
    start = time.monotonic()
    stream = Loader(
        [load_sources(argparse.Namespace(root=root, data=["many"]))["many"][0]], 256
    ).batches()
    next(stream)
    print(f"first batch of a folder of {count:,} chunks: {time.monotonic() - start:.1f} s")
    stream.close()
