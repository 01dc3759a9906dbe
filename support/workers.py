"""Supervised worker processes that fill a folder with episodes.

Each worker has a pipe of its own, from which it takes episode numbers. A killed worker costs the
episode in hand and is replaced. Chunks appear whole or not at all.
"""

import multiprocessing as mp
import os
import re
import secrets
import shutil
import signal
import socket
import threading
import time
import zlib
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from buffer import HELD_OUT_MOD, index, write_chunk
from car import ENV_ID, PREPROCESS_VERSION
from car.env import make_env
from car.episode import run_episode
from car.telemetry import TELEMETRY
from support.cli import Number, Stop, cores, fail, fraction, nonnegative_int, parser
from support.files import git_commit, lock_file, versions, writable
from support.progress import progress

FIRST_SEED = 10_000_000  # tracks below are for choosing and for evaluation, never collected
EPISODES_PER_WORKER = 300  # then it is replaced: Box2D leaks on create and destroy
STALE = 5  # s after which a half-written file whose process is gone is removed
MIN_FREE = 512  # MiB of disk to be left over; where there will be less, nothing is started
BYTES_A_FRAME = 1600  # on disk, about
RETRIES = 20  # deaths of workers without one finished episode between them, then it gives up
OFF_ROAD = list(TELEMETRY).index("wheels_off_road")


def collect(args, source, make_policy):
    """Fills ROOT/<source> up to args.frames -> exit code. `make_policy(job, number)` returns the
    policy of an episode and {its name and options}; a job is the dict of `make_job`."""
    folder = writable(args.root / source)
    busy = f"{folder}: another collector of machine {args.machine_id} runs; choose a --machine_id"
    lock_file(folder / f".machine-{args.machine_id}.lock", busy)
    remove_stale_tmp(folder, f"{source}-{socket.gethostname()}-s")
    chunks, damaged, duplicates = index(folder)
    have = sum(c.frames for c in chunks)
    for line in damaged + duplicates:
        print(f"not counted: {line}")
    print(f"{folder}: {have:,} frames in {len(chunks)} episodes, target {args.frames:,}")
    for line in other_flags(chunks, args):
        print(f"{folder}: keeps {line}")
    if have >= args.frames:
        print("nothing to do: the target is reached")
        return 0
    need_room(folder, args.frames - have)

    pool, stop, done = WorkerPool(make_job(args, source, folder, make_policy)), Stop(), []
    start = time.monotonic()
    bar = progress(total=args.frames, initial=have, unit="frame", unit_scale=True, desc=source)
    try:
        while have < args.frames and not stop:
            for summary in pool.finished():
                done.append(summary)
                have += summary["frames"]
                bar.update(summary["frames"])
            if pool.deaths > RETRIES:
                fail(f"{folder}: workers die at once (exit code {pool.exitcode})")
    finally:
        bar.close()
        pool.terminate()
        report(done, time.monotonic() - start)
    return 130 if stop else 0


def remove_stale_tmp(folder, stem):
    """Removes what killed processes of this machine, whose names begin so, left half written."""
    for tmp in folder.glob(f".{stem}*.npz.*.tmp"):
        pid = tmp.name.split(".")[-2]
        age = abs(time.time() - tmp.stat().st_mtime)  # abs: the clock may have been set back
        if not Path(f"/proc/{pid}").exists() and age > STALE:
            tmp.unlink(missing_ok=True)


def other_flags(chunks, args):
    """How many of the episodes other values of --pace and --max_offset drove, in words."""
    for flag in ("pace", "max_offset"):
        then = [c.meta["policy"].get(flag) for c in chunks] if hasattr(args, flag) else []
        others = [x for x in then if x is not None and x not in np.ravel(getattr(args, flag))]
        if others:
            yield f"{len(others)} episodes of --{flag} {' '.join(map(str, sorted(set(others))))}"


def need_room(folder, frames):
    """Refuses to start where so many frames would leave less than MIN_FREE of the disk."""
    free = shutil.disk_usage(folder).free >> 20
    need = MIN_FREE + (frames * BYTES_A_FRAME >> 20)
    if free < need:
        fail(f"{folder}: expected {need:,} MiB free, found {free:,}; make room or lower --frames")


def chunk_provenance(source, env_kind):
    """The part of a chunk's meta that says where it comes from."""
    return dict(
        source=source,
        host=socket.gethostname(),
        env=f"{ENV_ID} {env_kind}",
        preprocess=PREPROCESS_VERSION,
        telemetry=list(TELEMETRY),
        versions=versions(),
        commit=git_commit(),
    )


def make_job(args, source, folder, make_policy):
    """All that a worker needs to know."""
    runs = [re.search(r"r(\d+)-\w+-w\d+-e\d+$", p.stem) for p in folder.glob("*.npz")]
    run = 1 + max((int(r[1]) for r in runs if r), default=-1)
    machine = f"{socket.gethostname()}-s{args.seed}m{args.machine_id}"
    return dict(
        source=source,
        folder=folder,
        make_policy=make_policy,
        seed=args.seed,
        run=run,
        env=args.env,
        machine_id=args.machine_id,
        workers=args.workers,
        paces=getattr(args, "pace", None),
        max_offset=getattr(args, "max_offset", None),
        stem=f"{source}-{machine}r{run:03d}-{secrets.token_hex(3)}",
        meta=chunk_provenance(source, args.env) | {"run": run},
    )


class WorkerPool:
    """The workers of a job: each has a number, a pipe, and episodes numbered from 0 on."""

    def __init__(self, job):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of each: they are as many as cores
        os.environ["PYTHONSAFEPATH"] = "1"  # workers import this code, not the working folder's
        self.context = mp.get_context("spawn")  # a fork server would look there first
        self.job, self.workers, self.pids = job, {}, set()  # workers: pipe -> (process, number)
        self.next_episode = [0] * job["workers"]
        self.deaths, self.exitcode = 0, None  # deaths since an episode was finished

    def finished(self, timeout=0.5):
        """Replaces workers that are gone; yields the summaries of the episodes that have ended.
        Raises the OSError of a worker that could not write."""
        for worker in set(range(self.job["workers"])) - {w for _, w in self.workers.values()}:
            self._spawn(worker)
        for pipe in wait(list(self.workers), timeout):
            try:
                summary, retires = pipe.recv()
            except (EOFError, OSError):  # retired, or killed
                process, _ = self.workers.pop(pipe)
                process.join(1)
                self.deaths += process.exitcode != 0
                self.exitcode = process.exitcode
                continue
            if isinstance(summary, OSError):
                raise summary
            self.deaths = 0
            if not retires:
                self._assign(pipe)
            yield summary

    def _spawn(self, worker):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.job, worker), daemon=True)
        signals = {signal.SIGINT, signal.SIGHUP}  # a terminal's: the parent decides
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # while the worker imports, too
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        theirs.close()
        self.pids.add(process.pid)
        self.workers[ours] = process, worker
        self._assign(ours)

    def _assign(self, pipe):
        worker = self.workers[pipe][1]
        try:
            pipe.send(self.next_episode[worker])
            self.next_episode[worker] += 1
        except OSError:
            pass  # died meanwhile; `wait` will say so

    def terminate(self):
        """Ends all at once: chunks are whole or not there, only the episodes in hand are lost."""
        for process, _ in self.workers.values():
            process.kill()
        for process, _ in self.workers.values():
            process.join(5)
        for pid in self.pids:
            for tmp in self.job["folder"].glob(f".{self.job['stem']}-*.{pid}.tmp"):
                tmp.unlink(missing_ok=True)


def work(conn, job, worker):
    """A worker: episode numbers come in, (summary or OSError, whether it retires) go out."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    env = make_env(job["env"])
    for left in reversed(range(EPISODES_PER_WORKER)):
        try:
            episode = conn.recv()
        except EOFError:
            break
        try:
            summary = record(env, job, worker, episode)
        except OSError as e:
            summary = e
        conn.send((summary, left == 0))
    conn.close()


def exit_with_parent():
    """Ends a worker whose parent is gone."""
    mp.parent_process().join()
    os._exit(1)


def record(env, job, worker, episode):
    """Drives one episode, writes its chunk and returns its summary."""
    track_seed, rng = seeds_of(job, worker, episode)
    policy, options = job["make_policy"](job, episode_number(job, worker, episode))
    arrays, end = run_episode(env, policy, track_seed, rng)
    shared = {**end, "mistakes": getattr(policy, "mistakes", {})}
    meta = {
        **job["meta"],
        **shared,
        "track_seed": track_seed,
        "policy": options,
        "uid": f"{job['stem']}-w{worker:02d}-e{episode:06d}",
        "worker": worker,
    }
    write_chunk(job["folder"], meta, **arrays)
    grass = int((arrays["telemetry"][1:, OFF_ROAD] > 0).sum())
    total = float(arrays["reward"].sum())
    return {**shared, "frames": len(arrays["act"]), "return": total, "grass": grass}


def seeds_of(job, worker, episode):
    """(track seed, rng) of a worker's episode: no two alike over machines, runs, sources, workers.

    Every HELD_OUT_MOD-th episode of all drives a held-out track: see `buffer.held_out`.
    """
    source = zlib.crc32(job["source"].encode())
    entropy = [job["seed"], job["machine_id"], source, job["run"], worker, episode]
    track, noise = np.random.SeedSequence(entropy).spawn(2)
    seed = int(track.generate_state(1, np.uint64)[0] >> np.uint64(1))  # 63 bits
    seed += (episode_number(job, worker, episode) - seed) % HELD_OUT_MOD
    if seed < FIRST_SEED:
        seed += FIRST_SEED
    return seed, np.random.default_rng(noise)


def episode_number(job, worker, episode):
    """The number of a worker's episode among those of all workers."""
    return episode * job["workers"] + worker


def report(done, seconds):
    """Prints what a run collected, from the summaries of its episodes."""
    if not done:
        print("no episode was added")
        return
    frames, laps = sum(d["frames"] for d in done), sum(d["lap_finished"] for d in done)
    returns = np.array([d["return"] for d in done])
    grass = sum(d["grass"] for d in done) / frames
    print(
        f"{len(done)} episodes, {frames:,} frames, {frames / seconds:,.0f} frames/s, return "
        f"{returns.mean():.1f} ± {returns.std():.1f}, laps {laps}, frames on grass {grass:.1%}"
    )
    made, recovered = Counter(), Counter()
    for d in done:
        made.update({kind: count for kind, (count, _) in d["mistakes"].items()})
        recovered.update({kind: count for kind, (_, count) in d["mistakes"].items()})
    if made:
        n, r = made.total(), recovered.total()
        kinds = ", ".join(f"{kind} {recovered[kind]}/{made[kind]}" for kind in sorted(made))
        print(f"mistakes {n}, recovered {r} ({r / max(1, n):.0%}): {kinds}")


def collector_parser(doc, frames, paces=None):
    """The flags that all collectors share; with `paces`, the default of --pace, that flag too."""
    p = parser(doc, device=False)
    add, count = p.add_argument, Number(int, 1, 10**15)
    add("--frames", type=count, default=frames, help="frames in the folder at the end")
    add("--env", default="fast", choices=["fast", "official"], help="official: 25 times slower")
    add(
        "--workers",
        type=Number(int, 1, 1024),
        default=cores(),
        help="processes; default: a core each",
    )
    add("--machine_id", type=nonnegative_int, default=0, help="another one on each machine")
    if paces:
        text = "0 calm (58 units/s) to 1 full; several take turns"
        add("--pace", type=fraction, nargs="+", default=paces, help=text)
    return p
