"""Supervised worker processes that fill a folder with episodes.

Each worker has a pipe of its own, through which it reports its episodes. A killed worker costs the
episode in hand and is replaced. Chunks appear whole or not at all.
"""

import multiprocessing as mp
import os
import re
import secrets
import signal
import socket
import threading
import time
import zlib
from multiprocessing.connection import wait

import numpy as np

from buffer import HELD_OUT_MOD, index, write_chunk
from car import ENV_ID, PREPROCESS_VERSION
from car.env import make_env
from car.episode import run_episode
from car.telemetry import TELEMETRY
from support.cli import Number, Stop, cores, fail, fraction, nonnegative_int, parser
from support.files import git_commit, lock_file, versions, writable
from support.progress import progress

HOST = socket.gethostname()
FIRST_SEED = 10_000_000  # tracks below are for choosing and for evaluation, never collected
EPISODES_PER_WORKER = 300  # then it is replaced: Box2D leaks on create and destroy
RETRIES = 20  # deaths of workers without one finished episode between them, then it gives up


def collect(args, source, make_policy):
    """Fills ROOT/<source> up to args.frames -> exit code.

    `make_policy(number)` returns the policy of an episode and {its name and options}.
    """
    folder = writable(args.root / source)
    busy = f"{folder}: another collector of machine {args.machine_id} runs; choose a --machine_id"
    lock_file(folder / f".machine-{args.machine_id}.lock", busy)  # so its .tmp files are stale
    remove_stale_tmp(folder, f"{source}-{HOST}-s*m{args.machine_id}r")
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

    # drive until the target is reached or a stop is requested
    pool, stop, done = WorkerPool(make_job(args, source, folder, make_policy)), Stop(), []
    start = time.monotonic()
    bar = progress(total=args.frames, initial=have, unit="frame", unit_scale=True, desc=source)
    try:
        while have < args.frames and not stop:
            for meta in pool.finished():
                done.append(meta)
                have += meta["frames"]
                bar.update(meta["frames"])
    finally:
        bar.close()
        pool.terminate()
        print(summary(done, time.monotonic() - start))
    return 130 if stop else 0


def remove_stale_tmp(folder, stem):
    """Removes what killed workers, whose names begin so, left half written."""
    for tmp in folder.glob(f".{stem}*.npz.*.tmp"):
        tmp.unlink(missing_ok=True)


def other_flags(chunks, args):
    """Lines that count the episodes driven with other values of --pace, --max_offset or --steps."""
    for flag in ("pace", "max_offset", "steps"):
        then = [c.meta["policy"].get(flag) for c in chunks] if hasattr(args, flag) else []
        others = [x for x in then if x is not None and x not in np.ravel(getattr(args, flag))]
        if others:
            yield f"{len(others)} episodes of --{flag} {' '.join(map(str, sorted(set(others))))}"


def chunk_provenance(source, env_kind):
    """The part of a chunk's meta that says where it comes from."""
    return dict(
        source=source,
        host=HOST,
        env=f"{ENV_ID} {env_kind}",
        preprocess=PREPROCESS_VERSION,
        telemetry=list(TELEMETRY),
        versions=versions(),
        commit=git_commit(),
    )


def make_job(args, source, folder, make_policy):
    """All that a worker needs to know: the flags, and what follows from them."""
    runs = [re.search(r"r(\d+)-\w+-w\d+-e\d+$", p.stem) for p in folder.glob("*.npz")]
    run = 1 + max((int(r[1]) for r in runs if r), default=-1)
    run_name = f"s{args.seed}m{args.machine_id}r{run:03d}-{secrets.token_hex(3)}"
    return vars(args) | dict(
        source=source,
        folder=folder,
        make_policy=make_policy,
        run=run,
        stem=f"{source}-{HOST}-{run_name}",
        meta=chunk_provenance(source, "fast") | {"run": run},
    )


class WorkerPool:
    """The workers of a job. Each has a number, and drives episodes numbered from 0 on."""

    def __init__(self, job):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of each: they are as many as cores
        os.environ["PYTHONSAFEPATH"] = "1"  # workers import this code, not the working folder's
        self.context = mp.get_context("spawn")  # a fork server would look there first
        self.job, self.running = job, {}  # running: pipe -> (process, worker's number)
        self.next_episode = [0] * job["workers"]
        self.deaths = 0  # since an episode was finished

    def finished(self):
        """Replaces workers that are gone; yields the metas of the episodes that have ended.
        Raises the OSError of a worker that could not write."""
        for worker in set(range(self.job["workers"])) - {w for _, w in self.running.values()}:
            self._spawn(worker)
        for pipe in wait(list(self.running), timeout=0.5):
            process, worker = self.running[pipe]
            try:
                meta = pipe.recv()
            except (EOFError, OSError):  # retired, or killed
                del self.running[pipe]
                process.join(1)
                killed = process.exitcode != 0
                self.deaths += killed
                self.next_episode[worker] += killed  # the one in hand may be on disk
                if self.deaths > RETRIES:
                    fail(f"{self.job['folder']}: workers die at once (exit {process.exitcode})")
                continue
            if isinstance(meta, OSError):
                raise meta
            self.deaths = 0
            self.next_episode[worker] += 1
            yield meta

    def _spawn(self, worker):
        ours, theirs = self.context.Pipe(duplex=False)
        args = theirs, self.job, worker, self.next_episode[worker]
        process = self.context.Process(target=work, args=args, daemon=True)
        signals = {signal.SIGINT, signal.SIGHUP}  # a terminal's: the parent decides
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # while the worker imports, too
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        theirs.close()
        self.running[ours] = process, worker

    def terminate(self):
        """Ends all at once: chunks are whole or not there, only the episodes in hand are lost."""
        for process, _ in self.running.values():
            process.kill()
        for process, _ in self.running.values():
            process.join(5)
        remove_stale_tmp(self.job["folder"], self.job["stem"])


def work(conn, job, worker, first):
    """A worker: drives episodes from `first` on, and sends their metas, or an OSError."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    env = make_env("fast")
    for episode in range(first, first + EPISODES_PER_WORKER):
        try:
            conn.send(record(env, job, worker, episode))
        except OSError as e:
            conn.send(e)


def exit_with_parent():
    """Ends a worker whose parent is gone."""
    mp.parent_process().join()
    os._exit(1)


def record(env, job, worker, episode):
    """Drives one episode, writes its chunk -> its meta, with frames and return."""
    track_seed, rng = seeds_of(job, worker, episode)
    policy, options = job["make_policy"](episode_number(job, worker, episode))
    arrays, end = run_episode(env, policy, track_seed, rng)
    meta = {
        **job["meta"],
        **end,
        "track_seed": track_seed,
        "policy": options,
        "uid": f"{job['stem']}-w{worker:02d}-e{episode:06d}",
        "worker": worker,
        "mistakes": getattr(policy, "mistakes", {}),
    }
    write_chunk(job["folder"], meta, **arrays)
    return meta | {"frames": len(arrays["act"]), "return": float(arrays["reward"].sum())}


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


def summary(done, seconds):
    """One line about what a run collected, from the metas of its episodes."""
    returns = np.array([meta["return"] for meta in done] or [0.0])
    frames, laps = (sum(meta[key] for meta in done) for key in ("frames", "lap_finished"))
    line = f"{len(done)} episodes, {frames:,} frames, {frames / seconds:,.0f} frames/s, {laps} laps"
    line += f", return {returns.mean():.1f} ± {returns.std():.1f}"
    counts = [count for meta in done for count in meta["mistakes"].values()]
    if counts:
        made, recovered = np.sum(counts, axis=0)
        line += f", recovered from {recovered} of {made} mistakes ({recovered / max(1, made):.0%})"
    return line


def collector_parser(doc, frames, paces=None):
    """The flags that all collectors share; with `paces`, the default of --pace, that flag too."""
    p = parser(doc, device=False)
    add, count = p.add_argument, Number(int, 1, 10**15)
    add("--frames", type=count, default=frames, help="frames in the folder at the end")
    add("--workers", type=Number(int, 1, 1024), default=cores(), help="default: a core each")
    add("--machine_id", type=nonnegative_int, default=0, help="its own number on each machine")
    if paces:
        text = "0 calm (at most 64 units/s) to 1 full; several take turns"
        add("--pace", type=fraction, nargs="+", default=paces, help=text)
    return p
