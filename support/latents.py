"""The latents of all frames, encoded once and kept on disk."""

import json
import re

import numpy as np
import torch

from buffer import made_by, read_ahead
from support.cli import fail
from support.files import lock, replace_atomically, sync, versions, writable
from support.training import encoded_at_once

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
            for some in rows.split(encoded_at_once(obs.device))
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
