"""The nets under test."""

import numpy as np
import torch

from drive_mpc import take_gas
from networks import Predictor
from report.episodes import OWN, TWIN, Samples, blocks
from support.checkpoints import (
    find_models,
    fingerprint,
    latest,
    load_frozen,
    pretrained_hint,
    require_dir,
)
from support.cli import command
from support.device import autocast, set_up
from support.latents import features_of
from support.progress import progress

# ------------------------------------------------------------------ nets


class Models:
    """What is judged: the nets, their untrained twins, and the device they live on."""

    def __init__(self, args):
        self.device, self.dtype = set_up(args)
        require_dir(args.root)
        self.models = args.models or args.root / "models"
        if not args.checkpoint:
            self.models = find_models(args.root, args.models)
        self.path = args.checkpoint or latest(self.models, "encoder_mixed")
        self.encoder, _ = load_frozen(self.path, "encoder", self.device, "train_encoder.py")
        self.key = fingerprint(self.encoder)
        self.payloads = {}
        self.predictor = self._matching(
            args,
            latest(self.models, "predictor"),
            "predictor",
            "train_predictor.py",
            encoder=self.key,
        )
        keys = {"predictor": fingerprint(self.predictor)} if self.predictor else {}
        self.cost = self._matching(
            args,
            self.models / "cost_model_final.pth",
            "cost",
            "train_cost_model.py",
            encoder=self.key,
            **keys,
        )
        if self.cost:
            take_gas(args, self.payloads["cost"])
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.twin = self.encoder.reinitialized().eval()
            self.blank = self.predictor and Predictor(**self.predictor.args).to(self.device).eval()
        self.decoder = None

    def _matching(self, args, path, name, script, **keys):
        """The net if it was trained on the nets of these keys, or None and a line that says why."""
        mend = f"{command(script, args.root)} makes it{pretrained_hint(self.models)}"
        if not path.exists():
            print(f"no {name}: {path} is not there; {mend}")
            return None
        net, payload = load_frozen(path, name, self.device, script)
        for on, key in keys.items():
            if payload.get(f"{on}_key") != key:
                print(
                    f"no {name}: {path} was trained on another {on} than "
                    f"{self.path if on == 'encoder' else latest(self.models, on)}"
                )
                return None
        self.payloads[name] = payload
        return net

    def encode(self, encoder, obs):
        """obs (n, history, 3, 64, 64) -> z (n, D), standardised, on the CPU."""
        raw = features_of(encoder, obs, self.device, self.dtype)
        return (raw - encoder.mean.cpu()) / encoder.std.cpu()

    def encode_now(self, encoder, spots, what="encode", change=lambda obs: obs):
        """z (n, D) of the spots' frames, changed if need be, block by block."""
        bar = progress(
            blocks(len(spots)), desc=what, unit="block", leave=False, disable=what is None
        )
        return torch.cat(
            [self.encode(encoder, change(spots[rows].frames(self.newest()))) for rows in bar]
        )

    def newest(self):
        """Offsets, in latents, of the frames that a latent sees."""
        return np.arange(1 - self.encoder.history, 1)

    def encode_episodes(self, episodes):
        """Fills in each episode's z, of both encoders."""
        for x in progress(episodes, desc="encode", unit="episode", leave=False):
            every = Samples([x], np.zeros(len(x.obs), int), np.arange(len(x.obs)))
            x.z = {
                judge: self.encode_now(encoder, every, what=None)
                for judge, (encoder, _) in self.pairs().items()
            }

    def pairs(self):
        """{judge: (encoder, predictor)}: those under test, and their untrained twins."""
        return {OWN: (self.encoder, self.predictor), TWIN: (self.twin, self.blank)}

    @torch.no_grad()
    def imagine(self, predictor, z, act):
        """z (n, D), act (n, H, 3) -> z_hat (n, H, D) on the CPU."""
        with autocast(self.device, self.dtype):
            return predictor.rollout(z.to(self.device), act.to(self.device)).float().cpu()
