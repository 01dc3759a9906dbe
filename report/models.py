"""The nets that the report card tests, and the same nets with fresh weights."""

from functools import cached_property

import numpy as np
import torch

from networks import Predictor
from report.episodes import TRAINED, UNTRAINED, Samples, blocks
from support.checkpoints import fingerprint, latest, load_models, require_dir
from support.cli import fail
from support.device import autocast
from support.dreams import load_decoder, load_dream
from support.latents import encode
from support.progress import progress


class Models:
    """Encoder, predictor and cost model of a folder, and their untrained counterparts.

    A predictor or cost model that is missing, or was trained on another encoder, is None: the card
    leaves out what needs it.
    """

    def __init__(self, root, folder, device, dtype, seed):
        self.device, self.dtype = device, dtype
        nets, payloads, self.folder = load_models(require_dir(root), folder, device, optional=True)
        if "encoder" not in nets:
            fail(f"{self.folder}: no encoder to report on")
        self.path, self.key = latest(self.folder, "encoder_mixed"), fingerprint(nets["encoder"])
        self.encoder, self.predictor, self.cost = map(nets.get, ("encoder", "predictor", "cost"))
        self.cost_payload = payloads.get("cost")

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.untrained_encoder = self.encoder.reinitialized().eval()
            self.untrained_predictor = None
            if self.predictor:
                self.untrained_predictor = Predictor(**self.predictor.args).to(device).eval()

    @cached_property
    def decoder(self):
        """The decoder of this encoder, or None."""
        return load_decoder(self.folder, self.key, self.device)

    @cached_property
    def dream(self):
        """The dream model of this encoder, or None; the planner's predictor drives in it."""
        return load_dream(self.folder, self.encoder, self.device) if self.predictor else None

    def pairs(self):
        """{name: (encoder, predictor)} of the trained and the untrained nets."""
        return {
            TRAINED: (self.encoder, self.predictor),
            UNTRAINED: (self.untrained_encoder, self.untrained_predictor),
        }

    def frame_offsets(self):
        """Offsets, in latents, of the frames that a latent sees."""
        return np.arange(1 - self.encoder.history, 1)

    def encode(self, encoder, obs):
        """obs (n, history, 3, 64, 64) -> standardised latents (n, D) on the CPU."""
        return encode(encoder, obs, self.device, self.dtype).cpu()

    def encode_samples(self, encoder, samples, change=lambda obs: obs):
        """Latents (n, D) of the samples' frames after `change(frames)`, block by block."""
        parts = (samples[rows].frames(self.frame_offsets()) for rows in blocks(len(samples)))
        return torch.cat([self.encode(encoder, change(obs)) for obs in parts])

    def encode_episodes(self, episodes):
        """Fills in each episode's z, of both encoders."""
        for x in progress(episodes, desc="encode", unit="episode", leave=False):
            every = Samples([x], np.zeros(len(x.obs), int), np.arange(len(x.obs)))
            x.z = {name: self.encode_samples(net, every) for name, (net, _) in self.pairs().items()}

    def standardize_untrained(self, samples):
        """Fits the untrained encoder's standardisation to these samples."""
        net, obs = self.untrained_encoder, samples.frames(self.frame_offsets())
        net.fit_standardization(encode(net, obs, self.device, self.dtype, raw=True).float().cpu())

    @torch.no_grad()
    def rollout(self, predictor, z, act):
        """z (n, D), act (n, H, 3) -> z_hat (n, H, D) on the CPU."""
        with autocast(self.device, self.dtype):
            return predictor.rollout(z.to(self.device), act.to(self.device)).float().cpu()
