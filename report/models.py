"""The nets that the report card tests, and the same nets with fresh weights."""

import numpy as np
import torch

from networks import Predictor
from report.episodes import TRAINED, UNTRAINED, Samples, blocks
from support.checkpoints import (
    find_models,
    fingerprint,
    latest,
    load_frozen,
    pretrained_hint,
    require_dir,
)
from support.cli import command
from support.device import autocast
from support.latents import encode
from support.progress import progress


class Models:
    """Encoder, predictor and cost model that belong together, and their untrained counterparts.

    The encoder is that of `checkpoint`, or the newest of the folder. A predictor or cost model that
    is missing, or was trained on another encoder, is None: the card leaves out what needs it.
    """

    def __init__(self, root, folder, checkpoint, device, dtype, seed):
        self.root, self.device, self.dtype = require_dir(root), device, dtype
        self.folder = (folder or root / "models") if checkpoint else find_models(root, folder)
        self.path = checkpoint or latest(self.folder, "encoder_mixed")
        self.encoder, _ = load_frozen(self.path, "encoder", device, "train_encoder.py")
        self.key = fingerprint(self.encoder)

        path = latest(self.folder, "predictor")
        self.predictor, _ = self._matching(path, "predictor", "train_predictor.py")
        path = self.folder / "cost_model_final.pth"
        self.cost, self.cost_payload = self._matching(path, "cost", "train_cost_model.py")

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.untrained_encoder = self.encoder.reinitialized().eval()
            self.untrained_predictor = None
            if self.predictor:
                self.untrained_predictor = Predictor(**self.predictor.args).to(device).eval()

    def _matching(self, path, name, script):
        """(net, payload), or (None, None) and a line that says why."""
        if not path.exists():
            makes = f"{command(script, self.root)} makes it{pretrained_hint(self.folder)}"
            print(f"no {name}: {path} is not there; {makes}")
            return None, None
        net, payload = load_frozen(path, name, self.device, script)
        keys = {"encoder": (self.key, self.path)}
        if name == "cost" and self.predictor:
            keys["predictor"] = fingerprint(self.predictor), latest(self.folder, "predictor")
        for other, (key, its_path) in keys.items():
            if payload.get(f"{other}_key") != key:
                print(f"no {name}: {path} was trained on another {other} than {its_path}")
                return None, None
        return net, payload

    def pairs(self):
        """{name: (encoder, predictor)} of the trained and the untrained nets."""
        return {
            TRAINED: (self.encoder, self.predictor),
            UNTRAINED: (self.untrained_encoder, self.untrained_predictor),
        }

    def newest(self):
        """Offsets, in latents, of the frames that a latent sees."""
        return np.arange(1 - self.encoder.history, 1)

    def encode(self, encoder, obs):
        """obs (n, history, 3, 64, 64) -> standardised latents (n, D) on the CPU."""
        raw = encode(encoder, obs, self.device, self.dtype, raw=True).float().cpu()
        return (raw - encoder.mean.cpu()) / encoder.std.cpu()

    def encode_samples(self, encoder, samples, change=lambda obs: obs):
        """Latents (n, D) of the samples' frames after `change(frames)`, block by block."""
        parts = (samples[rows].frames(self.newest()) for rows in blocks(len(samples)))
        return torch.cat([self.encode(encoder, change(obs)) for obs in parts])

    def encode_episodes(self, episodes):
        """Fills in each episode's z, of both encoders."""
        for x in progress(episodes, desc="encode", unit="episode", leave=False):
            every = Samples([x], np.zeros(len(x.obs), int), np.arange(len(x.obs)))
            x.z = {name: self.encode_samples(net, every) for name, (net, _) in self.pairs().items()}

    def standardize_untrained(self, samples):
        """Fits the untrained encoder's standardisation to these samples."""
        net, obs = self.untrained_encoder, samples.frames(self.newest())
        net.fit_standardization(encode(net, obs, self.device, self.dtype, raw=True).float().cpu())

    @torch.no_grad()
    def rollout(self, predictor, z, act):
        """z (n, D), act (n, H, 3) -> z_hat (n, H, D) on the CPU."""
        with autocast(self.device, self.dtype):
            return predictor.rollout(z.to(self.device), act.to(self.device)).float().cpu()
