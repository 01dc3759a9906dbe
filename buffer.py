"""The only door to data on disk: chunks are written, checked, indexed, split, mixed and cached.

A chunk is one whole episode of T steps in one .npz. How frames, actions and latents line up
(`repeat` = R environment steps between two latents, `history` = 3 frames in each):

    obs     o0   o1   o2   o3   o4   o5   o6  ...  oT        T + 1 frames, T actions
    act        a0   a1   a2   a3   a4   a5   ...             a[t] moves o[t] to o[t+1]
    z       z0        z1        z2        z3                 z[k] sees o[kR], o[kR-R], o[kR-2R]
    act/z      mean(a0,a1) mean(a2,a3) ...                   act[k] moves z[k] to z[k+1]

Frames before the first are the first, repeated; nothing ever crosses an episode.

    python buffer.py data data_race data_recovery      what is there, what is damaged and why
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import errno
import hashlib
import io
import json
import math
import os
import shlex
import struct
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal import isal_zlib
from tqdm import tqdm

from support.cli import Help, Parser, Refusal, command, fail, run
from support.files import replace_atomically
from support.progress import progress

SCHEMA = 1  # of chunks; a newer one is skipped and named
DEFLATE_LEVEL = 1  # of isal: a fifth of the time of zlib's level 2, and a little smaller
MAX_STEPS = 2_000  # no episode is longer: a header that says so is damaged or a zip bomb
HELD_OUT_MOD = 10  # tracks whose seed is divisible by this are held out of training
MAX_DAMAGED = 0.01  # share of unreadable chunks above which training refuses to start
OPEN = 84  # episodes that are open at a time, of all sources together: 1 GB if all are whole
AHEAD = 8  # batches planned before they are due: their files are read meanwhile
GOLDEN = 5**0.5 / 2 - 0.5  # multiples of it fall evenly into 0..1
NPY_HEADER = 128  # bytes before the values, in all files that numpy writes of such arrays
FRAME = (64, 64, 3)
FIELDS = {
    "obs": (np.uint8, 1, FRAME),
    "act": (np.float32, 0, (3,)),
    "reward": (np.float32, 0, ()),
    "terminated": (np.bool_, 0, ()),
    "truncated": (np.bool_, 0, ()),
    "telemetry": (np.float32, 1, None),
}  # name: dtype, rows beyond T, shape of a row
META = {
    "schema": int,
    "source": str,
    "track_seed": int,
    "uid": str,
    "policy": dict,
    "preprocess": int,
    "frames": int,
    "return_": float,
}


# ------------------------------------------------------------------ one chunk


def write_chunk(folder, meta, **arrays):
    """Writes one episode as `folder/<uid>.npz`, whole or not at all, and returns the path.

    arrays: obs (T+1,64,64,3) uint8, act (T,3) float32, reward, terminated, truncated (T,),
    telemetry (T+1,K) float32. meta: dict with at least source, track_seed, uid, policy,
    preprocess. Raises ValueError when they do not fit each other; refuses to overwrite.
    """
    T = len(arrays["act"])
    meta = {
        "schema": SCHEMA,
        **meta,
        "frames": T,
        "return_": round(float(arrays["reward"].sum()), 3),
    }
    _check(meta, arrays)
    if not all(np.isfinite(arrays[k]).all() for k in ("act", "reward", "telemetry")):
        raise ValueError(f"episode {meta['uid']}: act, reward or telemetry is not finite")
    path = Path(folder) / f"{meta['uid']}.npz"
    if path.exists():
        raise ValueError(f"{path}: exists already; an episode is written once")

    def write(f):
        with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
            for name, array in {"meta": np.array(json.dumps(meta)), **arrays}.items():
                member = zipfile.ZipInfo(f"{name}.npy")  # of 1980: a clock before it stops nothing
                member.compress_type = zipfile.ZIP_DEFLATED
                with z.open(member, "w") as out:
                    # zipfile has no door for another deflate; without this line it is only slower
                    out._compressor = isal_zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -15)
                    head = io.BytesIO()
                    array = np.asarray(array, order="C")
                    np.lib.format.write_array_header_1_0(
                        head, np.lib.format.header_data_from_array_1_0(array)
                    )
                    out.write(head.getvalue())
                    out.write(memoryview(array).cast("B") if array.ndim else array.tobytes())

    replace_atomically(path, write)
    return path


def _check(meta, arrays):
    """ValueError unless meta and {name: array} describe one whole episode."""
    missing = [k for k in META if k not in meta] + [k for k in FIELDS if k not in arrays]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    T = len(arrays["act"])
    if not 0 < T <= MAX_STEPS:
        raise ValueError(f"{T} steps, expected 1 to {MAX_STEPS}")
    for name, (dtype, extra, row) in FIELDS.items():
        shape, found = arrays[name].shape, arrays[name].dtype
        row = shape[1:] if row is None else row
        if shape != (T + extra, *row) or found != dtype:
            raise ValueError(
                f"{name} is {found} {shape}, expected {np.dtype(dtype)} {(T + extra, *row)}"
            )


def _inflate(f, z, name):
    """The bytes of a member, not more than its header promises; the CRC is checked."""
    info = z.getinfo(f"{name}.npy")
    f.seek(info.header_offset)
    head = f.read(30)  # of the local header; its name and extra field follow
    f.seek(sum(struct.unpack("<26x2H", head)), 1)
    raw = f.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        raw = isal_zlib.decompressobj(-15).decompress(raw, info.file_size + 1)
    if len(raw) != info.file_size or isal_zlib.crc32(raw) != info.CRC:
        raise ValueError(f"{name}: its bytes are not those that were written")
    return raw


def _header(dtype, shape):
    """The NPY_HEADER bytes that numpy writes before an array of this kind."""
    out, dtype = io.BytesIO(), np.dtype(dtype)
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def _member(f, z, name, dtype, shape):
    """One array of an open chunk, read-only. Headers are compared, never parsed."""
    raw = _inflate(f, z, name)
    if raw[:NPY_HEADER] != _header(dtype, shape):
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, found another array")
    return np.frombuffer(raw, dtype, math.prod(shape), NPY_HEADER).reshape(shape)


READ_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OSError,
    EOFError,
    RuntimeError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    isal_zlib.error,
    struct.error,
)  # raised by zipfile and json on damaged or hostile files
OF_THE_FILE = (errno.EINVAL, errno.ENOENT)  # a seek to nowhere; gone: other errors are the system's


class Foreign(ValueError):
    """A whole file that holds something else than an episode of this project."""


@contextmanager
def _refusing(path, word):
    """Turns what a damaged or foreign file raises into a Refusal. Errors of permission and of the
    system pass: the file may be whole."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")  # a pipe or a device would never end
        yield
    except zipfile.BadZipFile as e:
        raise Refusal(f"{path}: cut off, or no chunk ({e})") from None
    except Foreign as e:
        raise Refusal(
            f"{path}: no episode of this project ({e}); move it away, or write it with "
            "`buffer.write_chunk`"
        ) from None
    except READ_ERRORS as e:
        if isinstance(e, OSError) and e.errno not in (None, *OF_THE_FILE):
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from None
        raise Refusal(f"{path}: {word} ({e or type(e).__name__})") from None


def _open_meta(f, z):
    """(meta, {name: shape}) of an open chunk; ValueError unless all members are as large as the
    meta says."""
    missing = [k for k in ("meta", *FIELDS) if f"{k}.npy" not in z.NameToInfo]
    if missing:
        raise Foreign(f"lacks {', '.join(missing)}")
    size = z.getinfo("meta.npy").file_size - NPY_HEADER
    if size > 1 << 20:
        raise Foreign("meta over 1 MiB")
    meta = json.loads(str(_member(f, z, "meta", f"<U{size // 4}", ())))
    if not isinstance(meta, dict):
        raise Foreign("meta is no dict")
    for k, kind in META.items():
        if type(meta.get(k)) is not kind:
            raise Foreign(f"meta: expected {k} to be {kind.__name__}, found {meta.get(k)!r:.40}")
    T = meta["frames"]
    if meta["schema"] != SCHEMA:
        raise ValueError(f"chunk schema {meta['schema']}, this code reads {SCHEMA}")
    if not 0 < T <= MAX_STEPS or not math.isfinite(meta["return_"]):
        raise Foreign(f"{T} steps with a return of {meta['return_']}, expected 1 to {MAX_STEPS}")
    shapes = {}
    for name, (dtype, extra, row) in FIELDS.items():
        size = z.getinfo(f"{name}.npy").file_size - NPY_HEADER
        one = (T + extra) * np.dtype(dtype).itemsize * math.prod(row or ())
        if size != one and (row is not None or size % one or size > 1000 * one):
            raise Foreign(f"{name} holds {size} bytes, expected {one} for {T} steps")
        shapes[name] = (T + extra, *((size // one,) if row is None else row))
    return meta, shapes


def read_meta(path):
    """The meta of a chunk, the CRC of its pixels as `crc` and the telemetry's columns as `columns`.

    Nothing is inflated but the meta; the sizes are checked. Refusal if bad; OSError where the
    system does not let it be read.
    """
    with _refusing(path, "damaged or foreign"), open(path, "rb") as f, zipfile.ZipFile(f) as z:
        meta, shapes = _open_meta(f, z)
        return meta | {"crc": z.getinfo("obs.npy").CRC, "columns": shapes["telemetry"][1]}


def read_chunk(path, *names):
    """{name: array} of the named fields (all if none is named), CRC checked. Refusal if bad;
    OSError where the system does not let it be read."""
    with _refusing(path, "damaged inside"), open(path, "rb") as f, zipfile.ZipFile(f) as z:
        _, shapes = _open_meta(f, z)
        out = {k: _member(f, z, k, FIELDS[k][0], shapes[k]) for k in names or FIELDS}
        for k, v in out.items():
            if v.dtype == np.float32 and not np.isfinite(v).all():
                raise ValueError(f"{k} is not finite")
        return out


MEND = "copy it again, or delete it and collect more; what is of another project move away"


class Damage:
    """Counts the damaged ones of a folder's `total` chunks, names each once, and refuses when they
    are more than MAX_DAMAGED of all. `Damage.of(chunks)` is their folder's, one a process."""

    folders = {}

    def __init__(self, total):
        self.total, self.lines = total, {}

    @classmethod
    def of(cls, chunks):
        return cls.folders.setdefault(chunks[0].path.parent, cls(len(chunks)))

    def add(self, refusal):
        line = str(refusal)
        if line not in self.lines:
            self.lines[line] = True
            tqdm.write(f"skipped {line}; damaged so far: {len(self.lines)} of {self.total}")
        if len(self.lines) > MAX_DAMAGED * self.total:
            fail(
                f"{len(self.lines)} of {self.total} chunks are unreadable, over "
                f"{MAX_DAMAGED:.0%}, first {next(iter(self.lines))}; `python buffer.py` with the "
                f"folder names each: {MEND}"
            )


# ------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Chunk:
    """What the index knows of an episode: enough to plan batches without opening it again."""

    path: Path
    meta: dict = field(hash=False, compare=False)

    @property
    def frames(self):
        """T: transitions, so T + 1 observations."""
        return self.meta["frames"]

    @property
    def held_out(self):
        """Whether its track is kept out of training: decided by the track's seed alone."""
        return held_out(self.meta["track_seed"])


def held_out(track_seed):
    """The split: a tenth of the tracks, the same ones in every folder and on every machine."""
    return track_seed % HELD_OUT_MOD == 0


def episode_key(meta):
    """What tells episodes apart, whatever they are called: track, length and return."""
    return meta["track_seed"], meta["frames"], meta["return_"]


def chunk_files(folder):
    """Paths of the folder's .npz files, in no order; none where it is not there. With a dot in
    front: a file being written."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(folder) / n for n in names if n.endswith(".npz") and not n.startswith(".")]


def index(folder):
    """(chunks, damaged, duplicates) of a folder: lists of Chunk, str, str, in order of names.

    Twice is an episode of the same uid, or of the same track, length and return; the file that is
    named by its uid counts.
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


def data_key(sources):
    """16 hex digits that change with the episodes of load_sources' result."""
    uids = sorted(c.meta["uid"] for split in sources.values() for part in split for c in part)
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()[:16]


def provenance(sources):
    """What a checkpoint says of the data, load_sources' result: {fingerprint, preprocessing}."""
    chunk = next(iter(sources.values()))[0][0]
    return {"data_key": data_key(sources), "preprocessing": chunk.meta["preprocess"]}


DEFAULT = "data_race", "data_recovery", "data"  # folders that stages learn from
MADE_BY = {
    "data": "collect_data.py",
    "data_race": "collect_race_data.py",
    "data_recovery": "collect_recovery_data.py",
    "data_mpc": "drive_mpc.py --save_data --track_seed 10000000",
}


def made_by(folder):
    """What makes, or fills, such a folder, in words."""
    if folder.name not in MADE_BY:
        return f"the stages make {', '.join(MADE_BY)}"
    return f"{command(MADE_BY[folder.name], folder.parent)} makes it"


def require_chunks(folder):
    """Refuses a folder without chunks: it is not there, or holds something else."""
    if not chunk_files(folder):
        fail(f"{folder}: expected a folder of chunks (.npz), found none; {made_by(folder)}")


def folders_there(root):
    """Those of DEFAULT under root that hold chunks, and says what makes the others; all of them
    where none does."""
    there = [name for name in DEFAULT if chunk_files(root / name)]
    for name in DEFAULT if there else ():
        if name not in there:
            print(f"goes on without {root / name}, where no episode is; {made_by(root / name)}")
    return there or list(DEFAULT)


def load_sources(args, steps=1, columns=0):
    """{folder name: (train chunks, held-out chunks)} for --data, which it sets to what is there
    where it was not given; refuses what cannot be learned.

    Both parts of each folder need an episode of `steps` steps; where a stage reads the telemetry,
    it has `columns` columns.
    """
    args.data = args.data or folders_there(args.root)
    if len(set(args.data)) < len(args.data):
        fail(
            f"--data {' '.join(args.data)}: a folder is named twice; --shares sets how much of a "
            "batch each gets"
        )
    out, versions = {}, set()
    for name in args.data:
        folder = args.root / name
        require_chunks(folder)
        chunks, damaged, duplicates = index(folder)
        Damage.folders[folder] = Damage(len(chunks) + len(damaged))
        Damage.folders[folder].lines = dict.fromkeys(damaged, True)
        for line in duplicates:
            print(f"not counted: {line}")
        if len(damaged) > MAX_DAMAGED * (len(chunks) + len(damaged)):
            fail(
                f"{folder}: {len(damaged)} of {len(chunks) + len(damaged)} chunks are unreadable, "
                f"first {damaged[0]}; {command('buffer.py', flags=shlex.quote(str(folder)))} "
                f"names each: {MEND}; {made_by(folder)}"
            )
        for line in damaged:
            print(f"skipped {line}")
        versions |= {c.meta["preprocess"] for c in chunks}
        if len(versions) > 1:
            fail(
                f"{folder}: chunks of several preprocessing versions ({versions}); move the old "
                f"ones away and collect anew: {made_by(folder)}"
            )
        for c in chunks:
            if columns and c.meta["columns"] != columns:
                fail(
                    f"{c.path}: telemetry of {c.meta['columns']} columns, expected the {columns} "
                    "of car.telemetry.TELEMETRY; move it away, or write it again"
                )
        out[name] = [c for c in chunks if not c.held_out], [c for c in chunks if c.held_out]
        for part, want in zip(out[name], ("training", "held-out")):
            if not part:
                fail(
                    f"{folder}: no episode on a {want} track among {len(chunks)}, 20,000 frames "
                    f"are enough to start; {made_by(folder)}"
                )
            longest = max(c.frames for c in part)
            if longest < steps:
                fail(
                    f"{folder}: no {want} episode lasts the {steps} steps that this needs, the "
                    f"longest has {longest}; lower --repeat, --horizon or --targets where they "
                    f"are set, or collect longer episodes: {made_by(folder)}"
                )
    if hasattr(args, "shares"):
        shares_of(out, args.batch_size, args.shares, each=True)
    return out


# ------------------------------------------------------------------ batches


def shares_of(sources, batch_size, shares=None, each=False):
    """Windows of each source in a batch: exact, adding up to batch_size (largest remainders).
    `each` refuses a batch in which a source, of {name: ...}, with a share has none."""
    shares = np.ones(len(sources)) if shares is None else np.array(shares, float)
    if len(shares) != len(sources) or (shares < 0).any() or shares.sum() == 0:
        names = f" ({' '.join(sources)})" if isinstance(sources, dict) else ""
        fail(
            f"--shares {' '.join(f'{s:g}' for s in shares)}: expected {len(sources)} numbers >= "
            f"0, one for each folder{names}, and not all 0"
        )
    exact = batch_size * shares / shares.sum()
    count = np.floor(exact).astype(int)
    count[np.argsort(count - exact, kind="stable")[: batch_size - count.sum()]] += 1
    for name, n, share in zip(sources, count if each else (), shares):
        if share and not n:
            fail(
                f"--batch_size {batch_size}: too small to hold a window of {name} at its share, "
                f"{share / shares.sum():.2g}; raise it, or leave that folder out of --data"
            )
    return count


def spread(n, rng):
    """A random order of 0..n-1 in which neighbours are far apart, where n is large enough: one
    residue class modulo about sqrt(n) after the other, consecutive ones never in a row."""
    modulus = math.isqrt(n)
    steps = [a for a in range(2, modulus - 1) if math.gcd(a, modulus) == 1]
    if not steps:
        return rng.permutation(n)
    rank = np.empty(modulus, int)
    step, first = rng.choice(steps), rng.integers(modulus)
    rank[(step * np.arange(modulus) + first) % modulus] = np.arange(modulus)
    return np.lexsort((rng.random(n), rank[np.arange(n) % modulus]))


class Stream:
    """The order of one source's windows: `size` a batch, each once per pass, from many episodes.

    `windows` holds their number in each episode. `width` episodes are open at a time, some giving
    more than others lest they all end at once; one that is used up makes room for the next. When
    none is left to open, they give in proportion to what they have left, so that a pass ends in all
    of them together.
    """

    def __init__(self, windows, size, width, key):
        self.windows, self.size, self.width, self.key = windows, size, width, key
        self.total = sum(windows)

    def batches(self, start=0):
        """Endless lists of (visit, episode, windows, whether it is used up) from batch `start` on;
        a visit is one opening of an episode."""
        at = start * self.size // self.total * self.total  # the pass in which the batch begins
        batch, skip = [], start * self.size - at  # windows of that pass which are not wanted
        while True:
            for visit, episode, windows, last in self._one_pass(at):
                at += len(windows)
                windows, skip = windows[skip:], max(0, skip - len(windows))
                if len(windows) or last:
                    batch.append((visit, episode, windows, last))
                if at % self.size == 0 and not skip:
                    if any(len(w) for _, _, w, _ in batch):
                        yield batch
                    batch = []

    def _one_pass(self, at):
        n_pass = at // self.total
        rng = np.random.default_rng([*self.key, n_pass])
        waiting = deque(e for e in rng.permutation(len(self.windows)).tolist() if self.windows[e])
        slots, opened = [], 0  # [episode, order of its windows, how many are used, its weight]
        end = at + self.total
        while at < end:
            while waiting and len(slots) < self.width:
                episode = waiting.popleft()
                slots.append(
                    [
                        episode,
                        spread(self.windows[episode], rng),
                        0,
                        4 + int(12 * (opened * GOLDEN % 1)),
                    ]
                )
                opened += 1
            want = min(self.size - at % self.size, end - at)
            left = np.array([len(order) - used for _, order, used, _ in slots])
            weights = np.array([w for *_, w in slots]) if waiting else left
            mixed = rng.permutation(len(left))
            give = np.empty_like(left)
            give[mixed] = np.diff(weights[mixed].cumsum() * want // weights.sum(), prepend=0)
            give = np.minimum(give, left)
            for slot, n, rest in zip(slots, give.tolist(), (left - give).tolist()):
                if n:
                    episode, order, used, _ = slot
                    slot[2] += n
                    yield (n_pass, episode), episode, order[used : used + n], rest == 0
                    at += n
            slots = [slot for slot in slots if slot[2] < len(slot[1])]


class Loader:
    """Mixed, shuffled batches with an exact share of each source; a pure function of seed and step.

    sources: a list of lists of Chunk. Each batch holds windows of `latents` latents, `repeat`
    steps apart, with the `history` frames that the first one needs. Each source is a Stream: every
    window is served once per pass, every file read and inflated once per pass, by `threads` ahead
    of time. `latents=2, history=1, repeat=1` serves triplets (state, action, next state). In place
    of a chunk that turns out to be damaged the next one serves; `damage` counts them. A GPU copies
    faster from `pinned` memory.
    """

    def __init__(
        self,
        sources,
        batch_size,
        latents=2,
        history=1,
        repeat=1,
        shares=None,
        seed=0,
        threads=2,
        pinned=False,
    ):
        self.sources, self.seed, self.threads, self.pinned = sources, seed, threads, pinned
        self.latents, self.history, self.repeat = latents, history, repeat
        self.counts = shares_of(sources, batch_size, shares).tolist()
        self.damage = [Damage.of(chunks) for chunks in sources]
        width = -(-OPEN // sum(n > 0 for n in self.counts))
        self.streams = [
            Stream([self._windows(c) for c in chunks], n, width, (seed, s))
            for s, (chunks, n) in enumerate(zip(sources, self.counts))
        ]
        self.windows = sum(stream.total for stream in self.streams)
        for chunks, stream in zip(sources, self.streams):
            if stream.total == 0:
                fail(
                    f"{chunks[0].path.parent}: no episode is as long as {self._span()} steps, the "
                    f"longest has {max(c.frames for c in chunks)}"
                )

    def _span(self):
        return (self.latents - 1) * self.repeat  # steps from the first latent to the last

    def _windows(self, chunk):
        return max(0, chunk.frames + 1 - self._span())

    def _read(self, s, episode):
        """(Chunk, its arrays) of an episode, or of the next one that is whole."""
        chunks = self.sources[s]
        for k in range(len(chunks)):
            chunk = chunks[(episode + k) % len(chunks)]
            if self._windows(chunk):
                try:
                    return chunk, read_chunk(chunk.path, "obs", "act")
                except Refusal as e:
                    self.damage[s].add(e)

    def _fill(self, data, starts, places, obs, act):
        """Copies the windows whose z0 is at `starts` to `places` of obs (B, L, 64, 64, 3) and act
        (B, latents - 1, 3)."""
        R, K = self.repeat, self.latents
        starts = starts % (len(data["act"]) + 1 - self._span())  # an understudy may be shorter
        rows = starts[:, None] + R * np.arange(1 - self.history, K)
        for place, row in zip(places, np.maximum(rows, 0)):  # twice as fast as in one go
            np.take(data["obs"], row, axis=0, out=obs[place], mode="clip")
        if K > 1:
            steps = starts[:, None] + np.arange((K - 1) * R)
            act[places] = data["act"][steps].reshape(-1, K - 1, R, 3).mean(axis=2)

    def _planned(self, start, pool):
        """Endless (step, [(source, future of `_read`, windows)]) with the reading AHEAD of time."""
        plans = [
            (s, stream.batches(start)) for s, stream in enumerate(self.streams) if self.counts[s]
        ]
        files, line = {}, deque()
        while True:
            batch = []
            for s, plan in plans:
                for visit, episode, windows, last in next(plan):
                    if (s, visit) not in files and len(windows):
                        files[s, visit] = pool.submit(self._read, s, episode)
                    if len(windows):
                        batch.append((s, files[s, visit], windows))
                    if last:
                        files.pop((s, visit), None)
            line.append(batch)
            if len(line) > AHEAD:
                yield start, line.popleft()
                start += 1

    def batches(self, start=0, labels=False):
        """Endless (obs (B, L, 3, 64, 64) uint8, act (B, latents - 1, 3)) from step `start` on.

        L = latents + history - 1. Windows lie in a random order: with `labels` a third value says
        where each is from, a list of B (index of the source, Chunk). Closing the generator ends
        its threads.
        """
        import torch  # here, so that a machine that only collects needs none

        L, K, B = self.latents + self.history - 1, self.latents, sum(self.counts)
        pool = ThreadPoolExecutor(self.threads)
        try:
            for step, batch in self._planned(start, pool):
                obs = torch.empty((B, L, *FRAME), dtype=torch.uint8, pin_memory=self.pinned)
                act = torch.empty((B, K - 1, 3), pin_memory=self.pinned)
                places = np.random.default_rng([self.seed, step]).permutation(B)
                names = [None] * B
                for s, file, windows in batch:
                    n, (chunk, data) = len(windows), file.result()
                    self._fill(data, windows, places[:n], obs.numpy(), act.numpy())
                    for i in places[:n] if labels else ():
                        names[i] = s, chunk
                    places = places[n:]
                yield (obs.permute(0, 1, 4, 2, 3), act, *([names] if labels else ()))
        finally:
            pool.shutdown(cancel_futures=True)


def triplets(batch):
    """(state, action, next state) of a batch with two latents and one frame of history."""
    obs, act = batch
    return obs[:, 0], act[:, 0], obs[:, 1]


def sample_frames(chunks, history, repeat, count, seed=0, fields=("telemetry",), skip=0):
    """A fixed sample for probes and pictures: (obs (count, history, 3, 64, 64), {field: rows}), in
    order of the chunks; fewer than `count` where the last chunks are damaged.

    The frames are spread evenly over the chunks, a damaged one's come from the next; those before
    `skip` (the zoom) are left out.
    """
    import torch  # here, so that a machine that only collects needs none

    rng = np.random.default_rng([seed, 7])
    chunks = [c for c in chunks if c.frames > skip + 1]
    per = np.diff(np.linspace(0, count, len(chunks) + 1).astype(int))
    obs, rows, n = [], {k: [] for k in fields}, 0
    for chunk, share in zip(chunks, per):
        n += share
        if n == 0:
            continue
        try:
            data = read_chunk(chunk.path, "obs", *fields)
        except Refusal as e:
            Damage.of([c for c in chunks if c.path.parent == chunk.path.parent]).add(e)
            continue
        t, n = np.sort(rng.integers(skip, chunk.frames, size=n)), 0
        back = repeat * np.arange(1 - history, 1)
        obs.append(data["obs"][np.maximum(t[:, None] + back, 0)])
        for k in fields:
            rows[k].append(data[k][t])
    return (
        torch.from_numpy(np.concatenate(obs)).permute(0, 1, 4, 2, 3),
        {k: np.concatenate(v) for k, v in rows.items()},
    )


# ------------------------------------------------------------------ latents


def read_ahead(chunks, *names, threads=4):
    """(chunk, its `read_chunk`, or None where it is damaged) of each, read by threads meanwhile."""
    line = deque()

    def first():
        chunk, data = line.popleft()
        try:
            return chunk, data.result()
        except Refusal as e:
            Damage.of([chunk]).add(e)
            return chunk, None

    with ThreadPoolExecutor(threads) as pool:
        for chunk in chunks:
            line.append((chunk, pool.submit(read_chunk, chunk.path, *names)))
            if len(line) > 2 * threads:
                yield first()
        while line:
            yield first()


# ------------------------------------------------------------------ inspection


def verify(chunks):
    """(whole chunks, reasons of the damaged ones): every byte is inflated, every CRC checked."""
    whole, damaged = [], []
    for chunk in progress(chunks, desc="verify", unit="chunk", leave=False):
        try:
            read_chunk(chunk.path)
            whole.append(chunk)
        except Refusal as e:
            damaged.append(str(e))
    return whole, damaged


def main():
    p = Parser(description=__doc__, formatter_class=Help)
    p.add_argument("folders", nargs="+", type=Path, help="folders of chunks")
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--verify",
        action="store_true",
        default=True,
        help="inflate everything and check each CRC (the default)",
    )
    how.add_argument(
        "--quick",
        dest="verify",
        action="store_false",
        help="look at sizes and descriptions only: finds what is cut off or foreign",
    )
    args = p.parse_args()
    for folder in args.folders:
        require_chunks(folder)
    print(
        f"{'folder':24} {'chunks':>7} {'episodes':>8} {'held out':>8} {'frames':>10} {'MB':>8} "
        f"{'B/frame':>7} {'return':>15} {'laps':>5} {'twice':>5} {'damaged':>7}"
    )
    bad, pixels, start = 0, 0, time.process_time()
    for folder in args.folders:
        chunks, damaged, duplicates = index(folder)
        if args.verify:
            chunks, inside = verify(chunks)
            damaged += inside
        size = sum(c.path.stat().st_size for c in chunks)
        frames = sum(c.frames for c in chunks)
        returns = [c.meta["return_"] for c in chunks]
        mean = f"{np.mean(returns):8.1f} ± {np.std(returns):4.0f}" if chunks else f"{'-':>15}"
        laps = sum(bool(c.meta.get("lap_finished")) for c in chunks)
        files = len(chunks) + len(damaged) + len(duplicates)
        print(
            f"{str(folder):24} {files:7} {len(chunks):8} {sum(c.held_out for c in chunks):8} "
            f"{frames:10,} {size / 1e6:8.1f} {size / max(1, frames):7.0f} {mean} "
            f"{laps:5} {len(duplicates):5} {len(damaged):7}"
        )
        for line in duplicates + damaged:
            print(f"  {line}")
        bad += len(damaged)
        pixels += sum(c.frames + 1 for c in chunks) * math.prod(FRAME)
    if args.verify:
        seconds = time.process_time() - start
        print(f"{pixels / 1e6:,.0f} MB of pixels read, {pixels / 1e6 / seconds:,.0f} MB/s a core")
    if bad:
        print(
            f"{bad} damaged: training skips them, and refuses to start above {MAX_DAMAGED:.0%}; "
            f"of each, {MEND}"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
