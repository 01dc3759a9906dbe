"""The latents of all frames, encoded once and kept on disk."""

import json
import re
from functools import cached_property

import numpy as np
import torch

from buffer import made_by, read_ahead, shares_of
from car import ZOOM_STEPS
from networks import VALUE_HORIZON, stack_frames
from support.checkpoints import fingerprint, latest, load_frozen
from support.cli import command, fail
from support.distributed import RANK, rank_by_rank
from support.files import lock, replace_atomically, sync, versions, writable
from support.progress import progress
from support.resume import check_inputs, read_run
from support.training import DTYPES, autocast, encode_batch_size, name_of

OURS = re.compile(r"latents_[0-9a-f]{16}-p[0-9]+-(bf16|fp16|fp32)\.(f16|json)")  # what it writes


class Latents:
    """Latents of every frame of every chunk, cached on disk in half precision and memory-mapped.

    One file for an encoder, preprocessing and precision, `ROOT/models/latents_<key>.f16`, rows
    appended chunk by chunk, and an index beside it that is written last and knows length and CRC of
    each chunk: only what is new or has changed is encoded. Those of other encoders are deleted.
    2 * dim bytes a frame. A second process waits for the first and finds its work. When `stop`
    turns true it keeps what is done and raises KeyboardInterrupt.
    `encode(obs (B, history, 3, 64, 64) on `device`)` gives z (B, D). Where a GPU has room for all
    latents, windows are cut there.
    """

    def __init__(
        self,
        root,
        key,
        dim,
        history,
        repeat,
        encode,
        chunks,
        progress=iter,
        stop=False,
        device="cpu",
    ):
        device = torch.device(device)
        stem = writable(root / "models") / f"latents_{key}"
        self.path, self.index_path = stem.with_suffix(".f16"), stem.with_suffix(".json")
        self.dim, self.repeat = dim, repeat
        for old in self.path.parent.glob("latents_*"):
            if (
                OURS.fullmatch(old.name)
                and old.is_file()
                and old.stem.split("-")[0] != stem.name.split("-")[0]
            ):
                old.unlink(missing_ok=True)  # another encoder's
        with open(self.path, "ab") as f:
            lock(f)
            end = self._known(chunks)
            missing = [c for c in chunks if c.meta["uid"] not in self.rows]
            f.truncate(end * dim * 2)  # nothing that a reader may have mapped
            for chunk, data in read_ahead(progress(missing) if missing else (), "obs", "act"):
                if stop:
                    break  # what is encoded stays
                if data is None:
                    continue
                obs = torch.tensor(data["obs"], device=device)
                z = self._encode(obs, history, repeat, encode)
                f.write(z.tobytes())
                self.rows[chunk.meta["uid"]] = end, chunk.frames, chunk.meta["crc"]
                end += len(z)
            if missing:
                f.flush()
                sync(f.fileno())  # before the index that promises the rows
                body = json.dumps({"dim": dim, "versions": versions(), "rows": self.rows}).encode()
                replace_atomically(self.index_path, lambda f: f.write(body))
        if stop:
            raise KeyboardInterrupt
        self.z = np.memmap(self.path, np.float16, "c", shape=(end, dim))
        self.act = np.zeros((end, 3), np.float32)  # mean action of the `repeat` steps from a row on
        for chunk, data in read_ahead(self.cached(chunks), "act"):
            if data is None:
                del self.rows[chunk.meta["uid"]]
                continue
            act = data["act"]
            a, T, _ = self.rows[chunk.meta["uid"]]
            if T >= repeat:
                cum = np.cumsum(np.concatenate([np.zeros((1, 3)), act]), axis=0)
                self.act[a : a + T + 1 - repeat] = (cum[repeat:] - cum[:-repeat]) / repeat
        self.table = torch.from_numpy(self.z), torch.from_numpy(self.act)  # as windows are cut
        if device.type == "cuda" and 2 * self.z.nbytes < torch.cuda.mem_get_info(device)[0]:
            self.table = [x.to(device) for x in self.table]

    def _known(self, chunks):
        """Fills self.rows, uid: (first row, frames, CRC), from the index, without what the file has
        lost and what is another episode now; returns the end of all rows that are promised."""
        there = self.path.stat().st_size // (2 * self.dim)
        try:
            rows = {
                uid: (a, T, crc)
                for uid, (a, T, crc) in json.loads(self.index_path.read_text())["rows"].items()
                if a + T + 1 <= there
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            rows = {}  # not there, or not written by this code
        now = {c.meta["uid"]: (c.frames, c.meta["crc"]) for c in chunks}
        self.rows = {uid: row for uid, row in rows.items() if row[1:] == now.get(uid, row[1:])}
        return max((a + T + 1 for a, T, _ in rows.values()), default=0)

    @staticmethod
    def _encode(obs, history, repeat, encode):
        back = repeat * torch.arange(1 - history, 1, device=obs.device)
        rows = (torch.arange(len(obs), device=obs.device)[:, None] + back).clamp_min(0)
        out = [
            encode(obs[some].permute(0, 1, 4, 2, 3))
            for some in rows.split(encode_batch_size(obs.device))
        ]
        return torch.cat(out).half().cpu().numpy()

    def cached(self, chunks):
        """Those of the chunks that could be read."""
        return [c for c in chunks if c.meta["uid"] in self.rows]

    def starts(self, chunks, latents, skip=0):
        """Rows at which a window of `latents` latents can begin without leaving its episode."""
        span = (latents - 1) * self.repeat
        parts = [
            np.arange(a + skip, a + T + 1 - span)
            for a, T, _ in (self.rows[c.meta["uid"]] for c in self.cached(chunks))
            if T + 1 - span > skip
        ]
        return np.concatenate(parts) if parts else np.zeros(0, int)

    def refuse_short(self, chunks, needed, why):
        """Says that none of the chunks, of one part of a folder, lasts so many steps: the longest,
        and what to lower."""
        part = "held-out" if chunks[0].held_out else "training"
        fail(
            f"{chunks[0].path.parent}: no {part} episode lasts {needed} steps{why}, the longest "
            f"has {max(c.frames for c in chunks)}; lower --horizon of train_predictor.py or "
            f"--repeat of train_encoder.py ({self.repeat}), or collect longer episodes: "
            f"{made_by(chunks[0].path.parent)}"
        )

    def windows(self, starts, latents):
        """(z (B, latents, D) float32, act (B, latents - 1, 3)) of the windows at these rows."""
        z, act = self.table
        rows = np.asarray(starts)[:, None] + self.repeat * np.arange(latents)
        rows = torch.from_numpy(rows).to(z.device)
        return z[rows].float(), act[rows[:, :-1]]


@torch.no_grad()
def features_of(encoder, obs, device, dtype):
    """Raw latents of stacked frames: obs (N, history, 3, 64, 64) -> (N, D) on the CPU."""
    out = []
    for part in obs.split(encode_batch_size(device)):
        with autocast(device, dtype):
            out.append(
                encoder.features(stack_frames(part.to(device), encoder.history)).float().cpu()
            )
    return torch.cat(out)


def load_latents(args, device, dtype, sources, stop, resume, predictor=None):
    """(latents of all chunks, frozen encoder, its key): encodes what the cache lacks, unless the
    `predictor`'s payload, or ROOT/models/`resume`, the run to go on, is of another encoder."""
    encoder, _ = load_frozen(
        latest(args.root / "models", "encoder_mixed"), "encoder", device, "train_encoder.py"
    )
    key = fingerprint(encoder)
    models = args.root / "models"
    if predictor and predictor["encoder_key"] != key:
        fail(
            f"{latest(models, 'predictor')}: was trained on another encoder than "
            f"{latest(models, 'encoder_mixed')}; run "
            f"{command('train_predictor.py', args.root, '--fresh')}"
        )
    if (models / resume).is_file() and not args.fresh:
        check_inputs(models / resume, read_run(models / resume), encoder_key=key)

    def encode(obs):
        with torch.no_grad(), autocast(device, dtype):
            return encoder(stack_frames(obs.to(device), encoder.history))

    chunks = [c for split in sources.values() for part in split for c in part]
    bar = lambda items: progress(items, desc="encode", unit="episode", disable=RANK > 0)
    stem = f"{key}-p{chunks[0].meta['preprocess']}"
    with rank_by_rank():
        there = [
            name
            for name in (name_of(dtype), *DTYPES)  # whatever they were encoded in
            if (models / f"latents_{stem}-{name}.json").is_file()
        ]
        encoded_in = (there or [name_of(dtype)])[0]
        if encoded_in != name_of(dtype):
            print(f"takes the latents that are there, encoded in {encoded_in}")
        latents = Latents(
            args.root,
            f"{stem}-{encoded_in}",
            encoder.dim,
            encoder.history,
            encoder.repeat,
            encode,
            chunks,
            bar,
            stop,
            device,
        )
    return latents, encoder, key


class WindowSampler:
    """Balanced windows of cached latents: a pure function of seed and step. Of several ranks each
    reads every so-manieth window of the same batch."""

    def __init__(
        self, latents, sources, part, batch_size, horizon, shares=None, seed=0, rank=0, ranks=1
    ):
        self.latents, self.sources, self.K, self.seed = latents, sources, horizon + 1, seed
        self.part = slice(rank, None, ranks)
        self.starts = [latents.starts(split[part], self.K) for split in sources.values()]
        for split, starts in zip(sources.values(), self.starts):
            if len(starts) == 0:
                latents.refuse_short(
                    split[part],
                    horizon * latents.repeat,
                    f" ({horizon} latents, {latents.repeat} steps each)",
                )
        self.counts = shares_of(self.starts, batch_size, shares)
        self.steps_per_epoch = max(1, sum(map(len, self.starts)) // batch_size)

    def __call__(self, step):
        """(z (B, K, D), act (B, K - 1, 3)) of this step; sources, in each episodes, in order."""
        return self.latents.windows(np.concatenate(self._starts(step))[self.part], self.K)

    def _starts(self, step):
        """The rows at which the windows of this step begin, an array a source."""
        rng = np.random.default_rng([self.seed, step])
        return [np.sort(s[rng.integers(len(s), size=n)]) for s, n in zip(self.starts, self.counts)]

    @cached_property
    def _every(self):
        """The rows at which windows of both parts can begin, in order, an array a source."""
        return [
            np.sort(self.latents.starts(train + held, self.K))
            for train, held in self.sources.values()
        ]

    def swapped(self, step):
        """act (B, K - 1, 3) for the windows of this step: of another episode of the same source,
        which may be one to train on, for a source may have a single held-out episode."""
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
    """Latents of chunks, real ones and ones imagined from them; those of a `cost` model know what
    came after them.

    Frames of the zoom are left out: they would tell the classes apart without any driving.
    """

    def __init__(self, latents, chunks, predictor, horizon, cost=None):
        self.latents, self.predictor, self.K, self.cost = latents, predictor, horizon + 1, cost
        self.length = self.K + (VALUE_HORIZON if cost else 0)
        self.starts = latents.starts(chunks, self.length, skip=ZOOM_STEPS)
        if len(self.starts) == 0:
            more = (self.length - 1) * latents.repeat
            latents.refuse_short(
                chunks, ZOOM_STEPS + more, f", {ZOOM_STEPS} of zoom and {more} more"
            )

    def real(self, count, seed=0):
        """(N, D): at most `count` of the latents, chosen at random."""
        rng = np.random.default_rng(seed)
        starts = np.sort(rng.permutation(self.starts)[:count])
        return self.latents.windows(starts, 1)[0][:, 0]

    @torch.no_grad()
    def sample(self, count, rng, device, dtype):
        """About (count, D) on the device: half real, half imagined up to the whole horizon; with a
        cost model also (count,), its `came` after each."""
        H = self.K - 1
        z, act = (
            x.to(device)
            for x in self.latents.windows(rng.choice(self.starts, max(1, count // 8)), self.length)
        )
        with autocast(device, dtype):
            dreamt = self.predictor.rollout(z[:, 0], act[:, :H]).float()
        pick = torch.from_numpy(rng.integers(H, size=(4, len(z)))).to(device)
        rows = torch.arange(len(z), device=device)
        chosen = torch.cat([x[rows, k] for k in pick for x in (z[:, 1:], dreamt)])
        if self.cost is None:
            return chosen
        came = self.cost.value_target(z)[:, 1:]
        return chosen, torch.cat([came[rows, k] for k in pick for _ in range(2)])
