"""Episode files (chunks): write, verify, index, split; the training loader.

A chunk is one whole episode of T steps in one .npz file. Frames, actions, latents line up like this
(`repeat` R = 2 environment steps between two latents, `history` = 3 frames in each):

    obs     o0   o1   o2   o3   o4   o5   o6  ...  oT        T + 1 frames, T actions
    act        a0   a1   a2   a3   a4   a5   ...             a[t] moves o[t] to o[t+1]
    z       z0        z1        z2        z3                 z[k] sees o[kR], o[kR-R], o[kR-2R]
    act/z      mean(a0,a1) mean(a2,a3) ...                   act[k] moves z[k] to z[k+1]

Frames before the first one repeat the first one. Nothing ever crosses the end of an episode.

    python buffer.py data data_race data_recovery      what is there, what is damaged and why
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import hashlib
import itertools
import json
import os
import shlex
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import Parser, Refusal, command, fail, run_main
from support.files import replace_atomically
from support.mixing import Stream, shares_of
from support.npz import (
    CHUNK_SCHEMA,
    FRAME,
    array_specs,
    check_finite,
    check_meta,
    open_chunk,
    write_npz,
)
from support.progress import progress

HELD_OUT_MOD = 10  # tracks whose seed is divisible by this are held out of training
MAX_DAMAGED = 0.01  # share of unreadable chunks above which training refuses to start
OPEN_EPISODES = 84  # open at a time, of all sources together: 1 GB where all are whole
PREFETCH = 8  # batches planned before they are due: threads read their files meanwhile
DEFAULT_FOLDERS = "data_race", "data_recovery", "data"  # what the training stages learn from
MADE_BY = {
    "data": "collect_data.py",
    "data_race": "collect_race_data.py",
    "data_recovery": "collect_recovery_data.py",
    "data_mpc": "drive_mpc.py --save_data --track_seed 10000000",
}
HINT = "copy it again, or delete it and collect more; move files of another project away"


# ------------------------------------------------------------------ one chunk


def write_chunk(folder, meta, **arrays):
    """Writes one episode as `folder/<uid>.npz`, whole or not at all, and returns the path.

    arrays: obs (T+1,64,64,3) uint8, act (T,3) float32, reward (T,) float32, terminated and
    truncated (T,) bool, telemetry (T+1,K) float32. meta: a dict with at least source, track_seed,
    uid, policy, preprocess. Raises ValueError for arrays that do not fit, and for a file there.
    """
    total = round(float(arrays["reward"].sum()), 3)
    meta = {"schema": CHUNK_SCHEMA, **meta, "frames": len(arrays["act"]), "return_": total}
    check_meta(meta)
    check_finite(arrays)
    specs = array_specs(meta["frames"], arrays["telemetry"].shape[-1])
    for name, spec in specs.items():
        found = arrays[name].dtype, arrays[name].shape
        if found != spec:
            raise ValueError(f"{meta['uid']}: {name} is {found}, expected {spec}")
    path = Path(folder) / f"{meta['uid']}.npz"
    if path.exists():
        raise ValueError(f"{path}: exists already; an episode is written once")

    members = {"meta": np.array(json.dumps(meta)), **arrays}
    replace_atomically(path, lambda f: write_npz(f, members))
    return path


def read_meta(path):
    """The meta of a chunk, the CRC of its pixels as `crc`, telemetry's columns as `columns`.

    Refusal for a damaged or foreign file; OSError for one that the system does not let us read.
    """
    with open_chunk(path) as (npz, meta, specs):
        return meta | {"crc": npz.info("obs").CRC, "columns": specs["telemetry"][1][1]}


def read_chunk(path, *names):
    """{name: array} of the named arrays (default: all), CRC checked. Errors as in `read_meta`."""
    with open_chunk(path) as (npz, _, specs):
        arrays = {name: npz.array(name, *specs[name]) for name in names or specs}
        check_finite(arrays)
        return arrays


def read_or_skip(chunk, *names):
    """The arrays of a Chunk as `read_chunk` reads them; None for a damaged one, which counts."""
    try:
        return read_chunk(chunk.path, *names)
    except Refusal as e:
        skip_damaged(chunk.path.parent, e)


damaged_files = {}  # folder: {reason: None} of the damaged files that this process met


def skip_damaged(folder, *reasons):
    """Counts damaged files of a folder, names each once; Refusal above MAX_DAMAGED of its files."""
    known, total = damaged_files.setdefault(folder, {}), len(chunk_files(folder))
    new = [line for line in map(str, reasons) if line not in known]
    known |= dict.fromkeys(new)
    if len(known) > MAX_DAMAGED * total:
        check = command("buffer.py", flags=shlex.quote(str(folder)))
        fail(
            f"{folder}: {len(known)} of {total} chunks are unreadable, over {MAX_DAMAGED:.0%}, "
            f"first {next(iter(known))}; {check} names each: {HINT}; {made_by(folder)}"
        )
    for line in new:
        tqdm.write(f"skipped {line}; damaged so far: {len(known)} of {total}")


# ------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Chunk:
    """An episode as the index knows it: enough to plan batches without opening it again."""

    path: Path
    meta: dict = field(hash=False, compare=False)

    @property
    def frames(self):
        """T: transitions, so T + 1 observations."""
        return self.meta["frames"]

    @property
    def held_out(self):
        """Whether training never sees its track. The seed alone decides, in every folder."""
        return self.meta["track_seed"] % HELD_OUT_MOD == 0


def episode_key(meta):
    """What tells episodes apart, whatever their file's name: track, length, return and pixels."""
    return meta["track_seed"], meta["frames"], meta["return_"], meta["crc"]


def chunk_files(folder):
    """Paths of the folder's .npz files, in no order. A name with a dot is still being written."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(folder) / n for n in names if n.endswith(".npz") and not n.startswith(".")]


def index(folder):
    """(chunks, damaged, duplicates) of a folder: lists of Chunk, str, str, in order of names.

    A duplicate has the uid of another chunk, or its track, length, return and pixels. The file
    that is named by its uid counts.
    """
    found, chunks, damaged, duplicates, seen = [], [], [], [], {}
    for path in chunk_files(folder):
        try:
            found.append((path, read_meta(path)))
        except Refusal as e:
            damaged.append(str(e))
    for path, meta in sorted(found, key=lambda f: (f[0].stem != f[1]["uid"], f[0].name)):
        keys = meta["uid"], episode_key(meta)
        first = next((seen[k] for k in keys if k in seen), None)
        if first is not None:
            duplicates.append(f"{path}: the same episode as {first.name}")
            continue
        seen |= dict.fromkeys(keys, path)
        chunks.append(Chunk(path, meta))
    return chunks, sorted(damaged), duplicates


def made_by(folder):
    """The command that fills such a folder, in words."""
    if folder.name not in MADE_BY:
        return f"the stages make {', '.join(MADE_BY)}"
    return f"{command(MADE_BY[folder.name], folder.parent)} makes it"


def require_chunks(folder):
    """Refuses a folder without chunks."""
    if not chunk_files(folder):
        fail(f"{folder}: expected a folder of chunks (.npz), found none; {made_by(folder)}")


def folders_there(root):
    """Those DEFAULT_FOLDERS under root that hold chunks (all where none does); names the others."""
    there = [name for name in DEFAULT_FOLDERS if chunk_files(root / name)]
    if not there:
        return DEFAULT_FOLDERS
    for name in DEFAULT_FOLDERS:
        if name not in there:
            print(f"goes on without {root / name}, where no episode is; {made_by(root / name)}")
    return there


def load_folder(folder, steps=1, columns=0):
    """(train chunks, held-out chunks) of one folder; see `load_sources`."""
    require_chunks(folder)
    chunks, damaged, duplicates = index(folder)
    for line in duplicates:
        print(f"not counted: {line}")
    skip_damaged(folder, *damaged)
    for c in chunks:
        found = c.meta["columns"]
        if columns and found != columns:
            fail(f"{c.path}: telemetry has {found} columns, expected {columns}; move it away")

    split = [c for c in chunks if not c.held_out], [c for c in chunks if c.held_out]
    for part, name in zip(split, ("training", "held-out")):
        longest = max((c.frames for c in part), default=0)
        if longest < steps:
            lacking = f"no episode of {steps} steps on a {name} track, the longest has {longest}"
            lower = "lower --repeat, --horizon or --targets if set, or " if part else ""
            more = f"collect more, 20,000 frames are enough to start: {made_by(folder)}"
            fail(f"{folder}: {lacking}; {lower}{more}")
    return split


def load_sources(root, data=None, steps=1, columns=0, shares=None, batch_size=0):
    """{folder name: (train chunks, held-out chunks)} of the folders `data` under root.

    data: names, or None for those of DEFAULT_FOLDERS that are there. steps: the length that one
    episode of each part needs. columns: of telemetry, where a stage reads it. With batch_size, each
    folder with a share needs a window in a batch. Refusal for data that cannot be learned from.
    """
    names = data or folders_there(root)
    out = {name: load_folder(root / name, steps, columns) for name in names}
    versions = {c.meta["preprocess"] for split in out.values() for part in split for c in part}
    if len(versions) > 1:
        fail(f"{root}: chunks of preprocessing versions {versions}; collect {' '.join(names)} anew")
    if batch_size:
        shares_of(out, batch_size, shares)
    return out


def provenance(sources):
    """{data_key, preprocessing} of load_sources' result; data_key changes with the episodes."""
    chunks = [c for split in sources.values() for part in split for c in part]
    uids = "\n".join(sorted(c.meta["uid"] for c in chunks))
    digits = hashlib.sha256(uids.encode()).hexdigest()[:16]
    return {"data_key": digits, "preprocessing": chunks[0].meta["preprocess"]}


# ------------------------------------------------------------------ batches


def prefetch(items, n):
    """The items of an iterator, n of them drawn before they are due."""
    line = deque()
    for item in items:
        line.append(item)
        if len(line) > n:
            yield line.popleft()
    yield from line


def history_rows(steps, history, repeat, latents=1):
    """Rows (n, history + latents - 1) of the frames in the latents from each of `steps` (n,) on.

    Oldest first. The first frame of an episode stands for earlier ones.
    """
    rows = np.asarray(steps)[:, None] + repeat * np.arange(1 - history, latents)
    return np.maximum(rows, 0)


@dataclass(eq=False, repr=False)
class Loader:
    """Mixed, shuffled batches with an exact share of each source; a function of seed and step.

    A batch holds windows of `latents` latents, `repeat` steps apart, with the `history` frames of
    the first one. `latents=2, history=1, repeat=1` serves triplets. Every file is inflated once per
    pass. The next episode is the fallback episode of a damaged one.
    """

    sources: list  # of lists of Chunk
    batch_size: int
    latents: int = 2
    history: int = 1
    repeat: int = 1
    shares: list = None
    seed: int = 0
    threads: int = 2  # that read ahead
    pinned: bool = False  # memory, which a GPU copies faster

    def __post_init__(self):
        self.span = (self.latents - 1) * self.repeat  # steps from the first latent to the last
        self.counts = shares_of(self.sources, self.batch_size, self.shares).tolist()
        width = -(-OPEN_EPISODES // sum(n > 0 for n in self.counts))
        self.streams = [
            Stream([self._windows(c) for c in chunks], n, width, (self.seed, s))
            for s, (chunks, n) in enumerate(zip(self.sources, self.counts))
        ]
        self.windows = sum(stream.total for stream in self.streams)
        for chunks, stream in zip(self.sources, self.streams):
            if stream.total == 0:
                folder, longest = chunks[0].path.parent, max(c.frames for c in chunks)
                fail(f"{folder}: no episode has {self.span} steps, the longest has {longest}")

    def _windows(self, chunk):
        return max(0, chunk.frames + 1 - self.span)

    def _read(self, s, number):
        """(Chunk, its arrays) of an episode, or of the next one that is whole."""
        chunks = self.sources[s]
        for chunk in chunks[number:] + chunks[:number]:
            if self._windows(chunk) and (data := read_or_skip(chunk, "obs", "act")):
                return chunk, data

    def _fill(self, data, starts, places, obs, act):
        """Copies the windows that begin at `starts` to `places` of obs (B,L,64,64,3) and act."""
        starts = starts % (len(data["act"]) + 1 - self.span)  # a fallback episode may be shorter
        rows = history_rows(starts, self.history, self.repeat, self.latents)
        for place, row in zip(places, np.maximum(rows, 0)):  # twice as fast as in one go
            np.take(data["obs"], row, axis=0, out=obs[place], mode="clip")
        if self.span:
            steps = starts[:, None] + np.arange(self.span)
            actions = data["act"][steps].reshape(-1, self.latents - 1, self.repeat, 3)
            act[places] = actions.mean(axis=2)

    def _planned(self, start, pool):
        """Endless (step, [(source, future of `_read`, windows)])."""
        plans = [(s, self.streams[s].batches(start)) for s, n in enumerate(self.counts) if n]
        for step in itertools.count(start):
            batch = []
            for s, plan in plans:
                for episode, windows in next(plan):
                    episode.file = episode.file or pool.submit(self._read, s, episode.number)
                    batch.append((s, episode.file, windows))
            yield step, batch

    def batches(self, start=0, labels=False):
        """Endless (obs (B, L, 3, 64, 64) uint8, act (B, latents - 1, 3)) from step `start` on.

        L = latents + history - 1. Windows lie in a random order. With `labels` a third value, a
        list of B (index of the source, Chunk), says the origin of each. Closing the generator ends
        its threads.
        """
        import torch  # here, so that a machine that only collects needs none

        L, K, B = self.latents + self.history - 1, self.latents, sum(self.counts)
        pool = ThreadPoolExecutor(self.threads)
        try:
            for step, batch in prefetch(self._planned(start, pool), PREFETCH):
                obs = torch.empty((B, L, *FRAME), dtype=torch.uint8, pin_memory=self.pinned)
                act = torch.empty((B, K - 1, 3), pin_memory=self.pinned)
                places = np.random.default_rng([self.seed, step]).permutation(B)
                origins = [None] * B
                # all windows of one file together, at random places of the batch
                for s, file, windows in batch:
                    (chunk, data), here = file.result(), places[: len(windows)]
                    self._fill(data, windows, here, obs.numpy(), act.numpy())
                    for i in here:
                        origins[i] = s, chunk
                    places = places[len(windows) :]
                yield (obs.permute(0, 1, 4, 2, 3), act, *([origins] if labels else ()))
        finally:
            pool.shutdown(cancel_futures=True)


def sample_frames(chunks, history, repeat, count, seed=0, skip=0):
    """A fixed sample for probes and pictures: obs (count, history, 3, 64, 64), states (count, K).

    Frames are spread evenly over the chunks, in their order, without those before `skip` (the
    zoom). Damaged chunks leave fewer than `count`.
    """
    import torch  # here, so that a machine that only collects needs none

    rng = np.random.default_rng([seed, 7])
    chunks = [c for c in chunks if c.frames > skip + 1]
    shares = np.diff(np.linspace(0, count, len(chunks) + 1).astype(int))
    obs, states = [], []
    for chunk, n in zip(chunks, shares):
        if n and (data := read_or_skip(chunk, "obs", "telemetry")):
            t = np.sort(rng.integers(skip, chunk.frames, size=n))
            obs.append(data["obs"][history_rows(t, history, repeat)])
            states.append(data["telemetry"][t])
    return torch.from_numpy(np.concatenate(obs)).permute(0, 1, 4, 2, 3), np.concatenate(states)


def read_ahead(chunks, *names, threads=4):
    """(chunk, its `read_chunk`, or None where it is damaged) of each, read by threads meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        files = ((chunk, pool.submit(read_or_skip, chunk, *names)) for chunk in chunks)
        for chunk, file in prefetch(files, 2 * threads):
            yield chunk, file.result()


# ------------------------------------------------------------------ inspection


def describe(folder):
    """Reads every byte of a folder, prints its counts and its bad files -> number of damaged."""
    require_chunks(folder)
    chunks, damaged, duplicates = index(folder)
    whole = []
    for chunk in progress(chunks, desc="verify", unit="chunk", leave=False):
        try:
            read_chunk(chunk.path)
            whole.append(chunk)
        except Refusal as e:
            damaged.append(str(e))

    held_out, frames = sum(c.held_out for c in whole), sum(c.frames for c in whole)
    laps = sum(bool(c.meta.get("lap_finished")) for c in whole)
    returns = [c.meta["return_"] for c in whole] or [0.0]
    print(
        f"{folder}: {len(whole)} episodes, {held_out} held out, {laps} laps, {frames:,} frames, "
        f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}; "
        f"twice: {len(duplicates)}, damaged: {len(damaged)}"
    )
    for line in duplicates + damaged:
        print(f"  {line}")
    return len(damaged)


def main():
    p = Parser(__doc__)
    p.add_argument("folders", nargs="+", type=Path, help="folders of chunks")
    damaged = sum([describe(folder) for folder in p.parse_args().folders])
    if damaged:
        print(f"{damaged} damaged: training skips them, refuses above {MAX_DAMAGED:.0%}; {HINT}")
    return 1 if damaged else 0


if __name__ == "__main__":
    run_main(main)
