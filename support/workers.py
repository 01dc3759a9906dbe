"""Worker processes that fill a folder with episodes."""

import errno
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
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from buffer import HELD_OUT_MOD, index, write_chunk
from car import ENV_ID, PREPROCESS_VERSION
from car.env import make_env
from car.episode import run_episode
from car.telemetry import TELEMETRY
from support.cli import Number, Stop, cores, fail, nonnegative_int, parser
from support.files import git_commit, lock_file, versions, writable
from support.progress import progress

FIRST_SEED = 10_000_000  # tracks below are for choosing and for evaluation, never collected
EPISODES_PER_WORKER = 300  # then it is replaced: Box2D leaks on create and destroy
STALE = 5  # s after which a half-written file whose process is gone is removed
MIN_FREE = 512  # MiB of disk to be left over; where there will be less, nothing is started
BYTES_A_FRAME = 1600  # on disk, about
RETRIES = 20  # deaths of workers without one finished episode between them, then it gives up
OFF_ROAD = list(TELEMETRY).index("wheels_off_road")


# ------------------------------------------------------------------ workers


def seeds_of(job, worker, episode):
    """(track seed, rng) of a worker's episode: no two alike over machines, runs, sources, workers.

    Every HELD_OUT_MOD-th episode of all drives a held-out track: see `buffer.held_out`.
    """
    entropy = [
        job["seed"],
        job["machine_id"],
        zlib.crc32(job["source"].encode()),
        job["run"],
        worker,
        episode,
    ]
    track, noise = np.random.SeedSequence(entropy).spawn(2)
    seed = int(track.generate_state(1, np.uint64)[0] >> np.uint64(1))  # 63 bits
    seed += (number_of(job, worker, episode) - seed) % HELD_OUT_MOD
    if seed < FIRST_SEED:
        seed += FIRST_SEED
    return seed, np.random.default_rng(noise)


def number_of(job, worker, episode):
    """The number of a worker's episode among those of all workers."""
    return episode * job["workers"] + worker


def work(conn, job, worker):
    """A worker: episode numbers come in, finished episodes' summaries go out."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    env = make_env(job["env"])
    for left in reversed(range(EPISODES_PER_WORKER)):
        try:
            episode = conn.recv()
        except EOFError:
            break
        conn.send(record(env, job, worker, episode) | {"retires": left == 0})
    conn.close()


def exit_with_parent():
    """An orphan has nobody to collect for."""
    mp.parent_process().join()
    os._exit(1)


def record(env, job, worker, episode):
    """Drives one episode, writes its chunk and returns its summary, or {"error": line}."""
    track_seed, rng = seeds_of(job, worker, episode)
    policy, options = job["make_policy"](job, number_of(job, worker, episode))
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
    try:
        write_chunk(job["folder"], meta, **arrays)
    except OSError as e:
        mend = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        return {
            "error": f"{job['folder']}: {e.strerror or e}; {mend} and run the same command again",
            "retires": True,
        }
    grass = int((arrays["telemetry"][1:, OFF_ROAD] > 0).sum())
    return {
        "frames": len(arrays["act"]),
        "return": float(arrays["reward"].sum()),
        **end,
        "grass": grass,
        "mistakes": meta["mistakes"],
    }


def collect(args, source, make_policy):
    """Fills ROOT/<source> up to args.frames with episodes of make_policy(job, number).

    Worker processes get episode numbers through pipes of their own, so one that is killed takes
    nothing with it but its episode; it is replaced. Returns the exit code.
    """
    folder = writable(args.root / source)
    lock_file(
        folder / f".machine-{args.machine_id}.lock",
        f"{folder}: another collector of machine {args.machine_id} is at work there; wait for "
        "it, or give this one another --machine_id",
    )
    remove_stale_tmp(folder, f"{source}-{socket.gethostname()}-s")
    chunks, damaged, duplicates = index(folder)
    for line in damaged + duplicates:
        print(f"not counted: {line}")
    have = sum(c.frames for c in chunks)
    print(f"{folder}: {have:,} frames in {len(chunks)} episodes, target {args.frames:,}")
    for line in other_flags(chunks, args):
        print(f"{folder}: keeps {line}")
    if have >= args.frames:
        print("nothing to do: the target is reached")
        return 0
    need_room(folder, args.frames - have)
    crew, stop, done, error = (
        WorkerPool(make_job(args, source, folder, make_policy)),
        Stop(),
        [],
        None,
    )
    start = time.monotonic()
    bar = progress(total=args.frames, initial=have, unit="frame", unit_scale=True, desc=source)
    try:
        while have < args.frames and not stop and not error:
            for summary in crew.finished():
                if "error" in summary:
                    error = summary["error"]
                    break
                done.append(summary)
                have += summary["frames"]
                bar.update(summary["frames"])
            if crew.deaths > RETRIES:
                error = f"{folder}: workers die at once (exit code {crew.exitcode})"
    finally:
        bar.close()
        crew.terminate()
    report(done, time.monotonic() - start)
    if error:
        fail(error)
    return 130 if stop else 0


def other_flags(chunks, args):
    """Of the episodes that are there, those that flags unlike this command's drove, in words."""
    for flag in ("pace", "max_offset"):
        then = [c.meta["policy"].get(flag) for c in chunks] if hasattr(args, flag) else []
        others = [x for x in then if x is not None and x not in np.ravel(getattr(args, flag))]
        if others:
            yield f"{len(others)} episodes of --{flag} {' '.join(map(str, sorted(set(others))))}"


def provenance_meta(source, kind):
    """What a chunk says of where it comes from; kind: of env."""
    return dict(
        source=source,
        host=socket.gethostname(),
        env=f"{ENV_ID} {kind}",
        preprocess=PREPROCESS_VERSION,
        telemetry=list(TELEMETRY),
        versions=versions(),
        commit=git_commit(),
    )


def make_job(args, source, folder, make_policy):
    """All that a worker needs to know."""
    host = socket.gethostname()
    runs = (re.search(r"r(\d+)-\w+-w\d+-e\d+$", p.stem) for p in folder.glob("*.npz"))
    run_no = 1 + max((int(r[1]) for r in runs if r), default=-1)
    stem = f"{source}-{host}-s{args.seed}m{args.machine_id}r{run_no:03d}-{secrets.token_hex(3)}"
    meta = provenance_meta(source, args.env) | {"run": run_no}
    return dict(
        source=source,
        folder=folder,
        make_policy=make_policy,
        seed=args.seed,
        run=run_no,
        env=args.env,
        machine_id=args.machine_id,
        workers=args.workers,
        paces=getattr(args, "pace", None),
        max_offset=getattr(args, "max_offset", None),
        stem=stem,
        meta=meta,
    )


def need_room(folder, frames):
    """Refuses to start where so many frames would leave less than MIN_FREE of the disk."""
    free = shutil.disk_usage(folder).free >> 20
    need = MIN_FREE + (frames * BYTES_A_FRAME >> 20)
    if free < need:
        fail(
            f"{folder}: expected {need:,} MiB free for {frames:,} frames and a margin of "
            f"{MIN_FREE}, found {free:,}; make room, ask for less with --frames, or choose "
            "another --root"
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
        """Replaces who is gone, and yields the summaries of the episodes that have ended."""
        for worker in set(range(self.job["workers"])) - {w for _, w in self.workers.values()}:
            self._spawn(worker)
        for pipe in wait(list(self.workers), timeout):
            try:
                summary = pipe.recv()
            except (EOFError, OSError):  # retired, or killed
                process, _ = self.workers.pop(pipe)
                process.join(1)
                self.deaths += process.exitcode != 0
                self.exitcode = process.exitcode
                continue
            self.deaths = 0
            if not summary.get("retires"):
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


def remove_stale_tmp(folder, stem):
    """Removes what killed processes of this machine, whose names begin so, left half written."""
    for tmp in folder.glob(f".{stem}*.npz.*.tmp"):
        pid = tmp.name.split(".")[-2]
        age = abs(time.time() - tmp.stat().st_mtime)  # abs: the clock may have been set back
        if not Path(f"/proc/{pid}").exists() and age > STALE:
            tmp.unlink(missing_ok=True)


def report(done, seconds):
    """Prints what a run collected."""
    if not done:
        print("no episode was added")
        return
    frames = sum(d["frames"] for d in done)
    returns = np.array([d["return"] for d in done])
    laps = sum(d["lap_finished"] for d in done)
    print(
        f"{len(done)} episodes, {frames:,} frames, {frames / seconds:,.0f} frames/s, return "
        f"{returns.mean():.1f} ± {returns.std():.1f}, laps {laps}, frames on grass "
        f"{sum(d['grass'] for d in done) / frames:.1%}"
    )
    kinds = {}
    for d in done:
        for kind, (count, recovered) in d["mistakes"].items():
            a, b = kinds.get(kind, (0, 0))
            kinds[kind] = a + count, b + recovered
    if kinds:
        n, r = np.sum(list(kinds.values()), axis=0)
        print(
            f"mistakes {n}, recovered {r} ({r / max(1, n):.0%}): "
            + ", ".join(f"{k} {b}/{a}" for k, (a, b) in sorted(kinds.items()))
        )


def collector_parser(doc, frames):
    """The flags that all collectors share."""
    p = parser(doc, device=False)
    p.add_argument(
        "--frames",
        type=Number(int, 1, 10**15),
        default=frames,
        help=f"frames in the folder at the end, those already there included (default {frames:,})",
    )
    p.add_argument(
        "--env",
        default="fast",
        choices=["fast", "official"],
        help="official: 25 times slower, to check that the fast env teaches the same",
    )
    p.add_argument(
        "--workers",
        type=Number(int, 1, 1024),
        default=cores(),
        help="processes, by default one a core that this process may use",
    )
    p.add_argument(
        "--machine_id",
        type=nonnegative_int,
        default=0,
        help="another number on each machine that collects, so that no track is twice",
    )
    return p
