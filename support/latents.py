"""Latents of all frames, encoded once and kept on disk; samplers of them."""

import json
import re
import time
from functools import cached_property

import numpy as np
import torch

from buffer import history_rows, made_by, read_ahead, shares_of
from car import ZOOM_STEPS
from networks import VALUE_HORIZON, stack_frames
from support.checkpoints import fingerprint, latest, load_frozen
from support.cli import command, fail
from support.device import DTYPES, autocast, encode_batch_size, name_of
from support.distributed import RANK, rank_by_rank
from support.files import lock, replace_atomically, sync, versions, writable
from support.progress import progress
from support.run import check_input, read_resume

ENERGY_BATCH = 8192  # latents whose energies are computed together
INDEX_EVERY = 300  # s of encoding that a crash may cost
OURS = re.compile(r"latents_[0-9a-f]{16}-p[0-9]+-(bf16|fp16|fp32)\.(f16|json)")  # what it writes


@torch.no_grad()
def encode(encoder, obs, device, dtype, raw=False):
    """Frame stacks obs (N, history, 3, 64, 64) uint8 -> latents (N, D), float32, on the device.

    raw: before the standardization, as the encoder's losses see them.
    """
    net, out = encoder.features if raw else encoder, []
    for part in obs.split(encode_batch_size(device)):
        with autocast(device, dtype):
            out.append(net(stack_frames(part.to(device), encoder.history)))
    return torch.cat(out)


def encode_present(encoder, drives, device, dtype):
    """Latents (n, D) of the last of n drives' frames, at least one (64, 64, 3) uint8 each.

    The first frame of a drive stands for earlier ones.
    """
    rows = history_rows([len(drives[0]) - 1], encoder.history, encoder.repeat)[0]
    obs = np.stack([[frames[i] for i in rows] for frames in drives])
    return encode(encoder, torch.from_numpy(obs).permute(0, 1, 4, 2, 3), device, dtype)


def ridge(x, y, alpha=1.0):
    """A ridge regression of y on standardised x (n, D), fitted: a probe, if x are latents."""
    from sklearn.linear_model import Ridge  # 1 s, which a refusal need not take
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(x, y)


class Latents:
    """Latents of every frame of every chunk, in half precision on disk, memory-mapped.

    One file per encoder, preprocessing and precision: `ROOT/models/latents_<key>.f16`, 2 * dim
    bytes a frame. Rows are appended chunk by chunk. The index beside it is written last and knows
    length and CRC of each chunk, so only new or changed chunks are encoded. Files of other encoders
    are deleted. A second process waits for the first and finds its work. If `stop` turns true, what
    is done stays, and KeyboardInterrupt is raised. A GPU with enough memory holds all latents.
    """

    def __init__(self, root, key, encoder, chunks, device="cpu", dtype=torch.float32, stop=False):
        device = torch.device(device)
        stem = writable(root / "models") / f"latents_{key}"
        self.path, self.index_path = stem.with_suffix(".f16"), stem.with_suffix(".json")
        self.dim, self.repeat = encoder.dim, encoder.repeat
        for old in self.path.parent.glob("latents_*"):
            ours = OURS.fullmatch(old.name) and old.is_file()
            if ours and old.stem.split("-")[0] != stem.name.split("-")[0]:
                old.unlink(missing_ok=True)  # another encoder's
        with open(self.path, "ab") as f:
            lock(f)
            self._append(f, encoder, chunks, device, dtype, stop)
        if stop:
            raise KeyboardInterrupt
        self.z = np.memmap(self.path, np.float16, "c", shape=(self.end, self.dim))
        self.act = self._mean_actions(chunks)
        self.table = torch.from_numpy(self.z), torch.from_numpy(self.act)
        if device.type == "cuda" and 2 * self.z.nbytes < torch.cuda.mem_get_info(device)[0]:
            self.table = [x.to(device) for x in self.table]

    def _append(self, f, encoder, chunks, device, dtype, stop):
        """Encodes the chunks that the file lacks, and promises their rows in the index."""
        self.end = self._known(chunks)
        missing = [c for c in chunks if c.meta["uid"] not in self.rows]
        f.truncate(self.end * self.dim * 2)  # only rows that the index does not promise
        saved_at = time.monotonic()
        bar = progress(missing, desc="encode", unit="episode", disable=RANK > 0) if missing else ()
        for chunk, data in read_ahead(bar, "obs", "act"):
            if stop:
                break
            if data is None:
                continue
            obs = torch.tensor(data["obs"], device=device).permute(0, 3, 1, 2)
            rows = history_rows(np.arange(len(obs)), encoder.history, self.repeat)
            rows = torch.from_numpy(rows).to(device)
            parts = [obs[some] for some in rows.split(encode_batch_size(device))]
            z = torch.cat([encode(encoder, part, device, dtype) for part in parts])
            f.write(z.half().cpu().numpy().tobytes())
            self.rows[chunk.meta["uid"]] = self.end, chunk.frames, chunk.meta["crc"]
            self.end += len(z)
            if time.monotonic() - saved_at > INDEX_EVERY:
                self._write_index(f)
                saved_at = time.monotonic()
        if missing:
            self._write_index(f)

    def _write_index(self, f):
        """Promises the rows so far, which are on the disk before the index is."""
        f.flush()
        sync(f.fileno())
        index = {"dim": self.dim, "versions": versions(), "rows": self.rows}
        replace_atomically(self.index_path, lambda f: f.write(json.dumps(index).encode()))

    def _known(self, chunks):
        """Fills self.rows, uid: (first row, frames, CRC), from the index -> end of all its rows.

        Leaves out what the file has lost, and what is another episode now.
        """
        there = self.path.stat().st_size // (2 * self.dim)
        try:
            index = json.loads(self.index_path.read_text())["rows"]
            rows = {u: (a, T, crc) for u, (a, T, crc) in index.items() if a + T + 1 <= there}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            rows = {}  # not there, or not written by this code
        now = {c.meta["uid"]: (c.frames, c.meta["crc"]) for c in chunks}
        self.rows = {uid: row for uid, row in rows.items() if row[1:] == now.get(uid, row[1:])}
        return max((a + T + 1 for a, T, _ in rows.values()), default=0)

    def _mean_actions(self, chunks):
        """(rows, 3): the mean action of the `repeat` steps from each row on."""
        R, out = self.repeat, np.zeros((self.end, 3), np.float32)
        for chunk, data in read_ahead(self.cached(chunks), "act"):
            if data is None:
                del self.rows[chunk.meta["uid"]]
                continue
            a, T, _ = self.rows[chunk.meta["uid"]]
            if T >= R:
                cum = np.cumsum(np.concatenate([np.zeros((1, 3)), data["act"]]), axis=0)
                out[a : a + T + 1 - R] = (cum[R:] - cum[:-R]) / R
        return out

    def cached(self, chunks):
        """Those of the chunks that could be read."""
        return [c for c in chunks if c.meta["uid"] in self.rows]

    def starts(self, chunks, latents, skip=0):
        """Rows at which a window of so many latents can begin without leaving its episode."""
        span = (latents - 1) * self.repeat
        rows = [self.rows[c.meta["uid"]] for c in self.cached(chunks)]
        parts = [np.arange(a + skip, a + T + 1 - span) for a, T, _ in rows if T + 1 - span > skip]
        return np.concatenate(parts) if parts else np.zeros(0, int)

    def refuse_short(self, chunks, steps, why):
        """Refuses chunks of one part of a folder, none of which lasts so many steps."""
        part, folder = "held-out" if chunks[0].held_out else "training", chunks[0].path.parent
        longest = max(c.frames for c in chunks)
        nets = "predictor or dream model"  # a cost model looks as far as its predictor
        lower = f"lower --horizon of the {nets}, or --repeat ({self.repeat}) of the encoder"
        fail(
            f"{folder}: no {part} episode lasts {steps} steps{why}, the longest has {longest}; "
            f"{lower}, or collect longer episodes: {made_by(folder)}"
        )

    def windows(self, starts, latents):
        """(z (B, latents, D) float32, act (B, latents - 1, 3)) of the windows at these rows."""
        z, act = self.table
        rows = np.asarray(starts)[:, None] + self.repeat * np.arange(latents)
        rows = torch.from_numpy(rows).to(z.device)
        return z[rows].float(), act[rows[:, :-1]]


def load_latents(args, stage, sources, device, dtype, stop, predictor=None):
    """(Latents of all chunks, frozen encoder, its key), for `stage`.

    Refuses a `predictor` payload, or a run to resume, of another encoder before it encodes.
    """
    models = args.root / "models"
    newest = latest(models, "encoder_mixed")
    encoder, _ = load_frozen(newest, "encoder", device, "train_encoder.py")
    key = fingerprint(encoder)
    if predictor and predictor["encoder_key"] != key:
        path = latest(models, "predictor")
        anew = command("train_predictor.py", args.root, "--fresh")
        fail(f"{path}: was trained on another encoder than {newest}; run {anew}")
    resume = models / f"{stage}_resume.pth"
    if resume.is_file() and not args.fresh:
        check_input(resume, read_resume(resume), "encoder_key", key)

    chunks = [c for split in sources.values() for part in split for c in part]
    stem = f"{key}-p{chunks[0].meta['preprocess']}"
    with rank_by_rank():
        names = (name_of(dtype), *DTYPES)  # those that exist are taken, whatever their precision
        there = [n for n in names if (models / f"latents_{stem}-{n}.json").is_file()]
        name = there[0] if there else name_of(dtype)
        if name != name_of(dtype):
            print(f"takes the latents that are there, encoded in {name}")
        latents = Latents(args.root, f"{stem}-{name}", encoder, chunks, device, dtype, stop)
    return latents, encoder, key


class WindowSampler:
    """Balanced windows of cached latents: a pure function of seed and step.

    Each of several ranks reads every `ranks`-th window of the same batch.
    """

    def __init__(
        self, latents, sources, part, batch_size, horizon, shares=None, seed=0, ranks=(0, 1), skip=0
    ):
        """sources: of `load_sources`; part: 0 to train, 1 held out; horizon: in latents; ranks:
        this one and their number; skip: steps of each episode before its first window."""
        self.latents, self.sources, self.K, self.seed = latents, sources, horizon + 1, seed
        self.part = slice(ranks[0], None, ranks[1])
        self.starts = [latents.starts(split[part], self.K, skip) for split in sources.values()]
        for split, starts in zip(sources.values(), self.starts):
            if len(starts) == 0:
                why = f" ({horizon} latents, {latents.repeat} steps each)"
                latents.refuse_short(split[part], skip + horizon * latents.repeat, why)
        self.counts = shares_of(self.starts, batch_size, shares)
        self.steps_per_epoch = max(1, sum(map(len, self.starts)) // batch_size)

    def __call__(self, step):
        """(z (B, K, D), act (B, K - 1, 3)) of this step, in order of sources and episodes."""
        return self.latents.windows(np.concatenate(self._starts(step))[self.part], self.K)

    def _starts(self, step):
        """Rows at which the windows of this step begin, an array per source."""
        rng = np.random.default_rng([self.seed, step])
        return [np.sort(s[rng.integers(len(s), size=n)]) for s, n in zip(self.starts, self.counts)]

    @cached_property
    def _every(self):
        """Rows at which windows of both parts can begin, in order, an array per source."""
        both = [train + held for train, held in self.sources.values()]
        return [np.sort(self.latents.starts(chunks, self.K)) for chunks in both]

    def swapped(self, step):
        """act (B, K - 1, 3) for the windows of this step, of another episode of the same source.

        It may be a training episode: a source may have a single held-out one.
        """
        rng = np.random.default_rng([self.seed, step, 1])
        begins = np.sort([a for a, *_ in self.latents.rows.values()] + [len(self.latents.z)])
        others = []
        for starts, every in zip(self._starts(step), self._every):
            after = np.searchsorted(begins, starts, "right")  # the episode behind each window's
            first, end = (np.searchsorted(every, begins[k]) for k in (after - 1, after))
            pick = rng.integers(len(every) - (end - first))  # of the windows before and behind it
            others.append(every[np.where(pick < first, pick, pick + end - first)])
        return self.latents.windows(np.concatenate(others)[self.part], self.K)[1]


class LatentSampler:
    """Single latents of chunks: real ones, and imagined ones from rollouts of the predictor.

    Frames of the zoom are left out: they would tell the classes apart without any driving.
    """

    def __init__(self, latents, chunks, predictor, horizon, cost=None):
        """With a cost model, samples come with the value target of each."""
        self.latents, self.predictor, self.K, self.cost = latents, predictor, horizon + 1, cost
        self.length = self.K + (VALUE_HORIZON if cost else 0)
        self.starts = latents.starts(chunks, self.length, skip=ZOOM_STEPS)
        if len(self.starts) == 0:
            more = (self.length - 1) * latents.repeat
            why = f", {ZOOM_STEPS} of zoom and {more} more"
            latents.refuse_short(chunks, ZOOM_STEPS + more, why)

    @cached_property
    def energies(self):
        """The density of each row that a window may reach, once for all: (rows,), others 0."""
        z, out = self.latents.table[0], torch.zeros(len(self.latents.z))
        reached = np.zeros(len(out), bool)
        for k in range(self.length):
            reached[self.starts + self.latents.repeat * k] = True
        for rows in torch.from_numpy(np.flatnonzero(reached)).split(ENERGY_BATCH):
            part = z[rows.to(z.device)].to(self.cost.mu.device).float()
            out[rows] = self.cost.energy(part).cpu()
        return out

    def real(self, count, seed=0):
        """(N, D): at most `count` of the latents, chosen at random."""
        rng = np.random.default_rng(seed)
        starts = np.sort(rng.permutation(self.starts)[:count])
        return self.latents.windows(starts, 1)[0][:, 0]

    @torch.no_grad()
    def sample(self, count, rng, device, dtype):
        """About (count, planned) on the device: half real, half imagined over the whole horizon.

        With a cost model also (count,), the value target of each.
        """
        H = self.K - 1
        starts = rng.choice(self.starts, max(1, count // 8))
        z, act = (x.to(device) for x in self.latents.windows(starts, self.K))
        z = z[..., : self.predictor.dim]
        with autocast(device, dtype):
            z_hat = self.predictor.rollout(z[:, 0], act[:, :H]).float()
        pick = torch.from_numpy(rng.integers(H, size=(4, len(z)))).to(device)
        rows = torch.arange(len(z), device=device)
        chosen = torch.cat([x[rows, k] for k in pick for x in (z[:, 1:], z_hat)])
        if self.cost is None:
            return chosen
        steps = starts[:, None] + self.latents.repeat * np.arange(self.length)
        target = self.cost.value_target(self.energies[torch.from_numpy(steps)].to(device))[:, 1:]
        return chosen, torch.cat([target[rows, k] for k in pick for _ in range(2)])
