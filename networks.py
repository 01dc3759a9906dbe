"""The nets (encoder and the heads it learns with, decoder, predictor, cost model), the one format
of checkpoints.

`obs` (B, T, C, 64, 64) uint8, `act` (B, T, 3), `z` (B, T, D), `energy` (B,): the vocabulary of the
README. `python networks.py FILE` prints what a checkpoint holds, `--safetensors OUT` writes its
weights for other programs.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import ast
import errno
import fcntl
import io
import itertools
import json
import math
import os
import re
import shlex
import time
import zipfile
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from car_env import OBS_SIZE, SCENE_H
from support.cli import Parser, Refusal, command, fail, optional, run
from support.files import git_commit, lock, output_file, replace_atomically, versions
from support.training import RANK, RANKS
from vicreg import gather

PRETRAINED = Path(__file__).parent / "models" / "pretrained"
SCHEMA = 1  # of checkpoints; a newer one is refused
KEPT, KEPT_EVERY = 3, 10  # of a stage's checkpoints: the last so many, and each such epoch
YOUNG_S = 600  # a checkpoint younger than this is never deleted
TEMPORARY = re.compile(  # names of half-written checkpoints
    r"\.(\w+_ep[0-9]+|\w+_resume|cost_model_final)\.pth\.[0-9]+\.tmp", re.ASCII
)
PANEL = 3 * (OBS_SIZE - SCENE_H) * OBS_SIZE  # pixels of a frame's instruments
ACT = 3  # steer, gas, brake
JUDGED = 3  # every so-manieth latent of a future is judged: neighbours say nearly the same
TROUBLE = 0.3  # of the energy of chaos: most of a lap stays below
DISCOUNT, FORESIGHT = 0.97, 75  # of energies to come, a latent; how many are summed up
INITIAL_STEP = 0.1  # of a linear layer's usual first weights: a fresh predictor hardly moves
ACT_SCALE = (0.15, 0.3, 0.1)  # about their standard deviations: nets see actions of unit size


class TinyEncoder(nn.Module):
    """ResNet-18 (He et al. 2015) without max-pooling: `history` frames -> a latent of `dim`.

    The 4x4 map is projected whole, not averaged: averaging forgets where the road is. `strides` of
    the four stages multiply to 8; 2 2 2 1 shrinks the picture early, for half of the arithmetic
    of 1 2 2 2.
    `repeat` is the number of environment steps between two frames of the history, and between two
    latents.
    The last `gauges` numbers of a latent are principal components of the newest frame's
    instruments, straight from its pixels: bars of speed and yaw rate need no convolutions, which
    are left free for the road. `fit_gauges` finds them before the training.
    `forward` gives standardised latents, the one space in which everything downstream works;
    `features` gives the raw ones that the losses of the encoder see.
    """

    def __init__(self, width=1.0, history=3, repeat=2, dim=512, strides=(1, 2, 2, 2), gauges=0):
        super().__init__()
        self.args = dict(
            width=width,
            history=history,
            repeat=repeat,
            dim=dim,
            strides=list(strides),
            gauges=gauges,
        )
        self.history, self.repeat, self.dim, self.gauges = history, repeat, dim, gauges
        w = max(8, int(64 * width))
        from torchvision.models.resnet import BasicBlock, ResNet  # 2 s: only who builds one waits

        net = ResNet(BasicBlock, [2, 2, 2, 2])
        net.inplanes = w
        self.body = nn.Sequential(
            nn.Conv2d(3 * history, w, 7, stride=2, padding=3, bias=False),  # (w, 32, 32)
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
            *(net._make_layer(BasicBlock, w << i, 2, stride=s) for i, s in enumerate(strides)),
        )  # (8w, 4, 4)
        self.head = nn.Linear(8 * w * 16, dim - gauges)
        for m in self.body.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        if gauges:
            self.register_buffer("panel_mean", torch.zeros(PANEL))
            self.register_buffer("panel_parts", torch.zeros(PANEL, gauges))

    def features(self, x):
        """(N, 3 * history, 64, 64) uint8 or float in 0..255 -> raw latents (N, D)."""
        assert x.shape[1:] == (3 * self.history, 64, 64), tuple(x.shape)
        x = torch.rsub(x.float(), -1.0, alpha=-1 / 127.5)  # to -1..1
        x = x.contiguous(memory_format=torch.channels_last)
        z = self.head(self.body(x).flatten(1)).float()
        if not self.gauges:
            return z
        with torch.autocast(x.device.type, enabled=False):
            gauges = (self.panel(x) - self.panel_mean) @ self.panel_parts
        return torch.cat([z, gauges], dim=1)

    @staticmethod
    def panel(x):
        """The newest frame's instruments of (N, 3 * history, 64, 64) -> (N, PANEL)."""
        return x[:, -3:, SCENE_H:].flatten(1)

    @torch.no_grad()
    def fit_gauges(self, x):
        """Finds the principal components in inputs of training data, among which each then has
        variance 1. x (N, 3 * history, 64, 64) uint8."""
        from sklearn.decomposition import PCA

        panel = self.panel(x).float().cpu().numpy() / 127.5 - 1
        pca = PCA(self.gauges, svd_solver="full").fit(panel)
        size = np.sqrt(np.maximum(pca.explained_variance_, 1e-6))
        self.panel_mean.copy_(torch.from_numpy(pca.mean_))
        self.panel_parts.copy_(torch.from_numpy((pca.components_ / size[:, None]).T))

    def learned(self, z):
        """Latents (..., D) without their gauges."""
        return z[..., : self.dim - self.gauges]

    def untrained(self):
        """A net of the same shape and gauges with fresh weights."""
        net = TinyEncoder(**self.args).to(self.mean.device)
        if self.gauges:
            net.panel_mean.copy_(self.panel_mean)
            net.panel_parts.copy_(self.panel_parts)
        return net

    def forward(self, x):
        """(N, 3 * history, 64, 64) -> standardised latents (N, D), float32."""
        return (self.features(x) - self.mean) / self.std

    @torch.no_grad()
    def calibrate(self, z):
        """Sets the standardisation from raw latents of training data, (N, D)."""
        self.mean.copy_(z.mean(dim=0))
        self.std.copy_(z.std(dim=0).clamp_min(1e-4))


def stack(obs, history, at=None):
    """Windows of frames -> encoder inputs, oldest first.

    obs (B, L, 3, 64, 64) -> (B * T, 3 * history, 64, 64), T latents a window: all
    L - history + 1 that there are, or those `at` these indices.
    """
    B, L, C, H, W = obs.shape
    at = range(L - history + 1) if at is None else at
    obs = obs.permute(0, 1, 3, 4, 2)  # as it lies in memory: the result is channels_last for free
    x = obs.new_empty(B, len(at), H, W, history, C)
    for k, t in enumerate(at):
        for i in range(history):
            x[:, k, ..., i, :] = obs[:, t + i]
    return x.view(-1, H, W, history * C).permute(0, 3, 1, 2)


def mlp(*dims, norm=nn.LayerNorm):
    """Linear layers with normalisation and GELU between them."""
    layers = []
    for a, b in zip(dims[:-2], dims[1:-1]):
        layers += [nn.Linear(a, b), norm(b), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


class Projector(nn.Module):
    """VICReg's expander: the embeddings in which views are compared."""

    def __init__(self, dim=512, hidden=1024):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden)
        self.net = mlp(dim, hidden, hidden, hidden, norm=nn.BatchNorm1d)

    def forward(self, z):
        """(N, D) -> (N, hidden)"""
        return self.net(z)


@lru_cache
def act_scale(device):
    """ACT_SCALE as a tensor there: made once, for a GPU waits for each copy."""
    with torch.inference_mode(False):
        return torch.tensor(ACT_SCALE, device=device)


def unit_act(act):
    """Actions (..., 3) in units of their usual size."""
    return act / act_scale(act.device)


class InverseModel(nn.Module):
    """Which action led from one latent to the next: keeps in the latent what actions move."""

    def __init__(self, dim=512, hidden=256):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden)
        self.net = mlp(2 * dim, hidden, ACT)

    def forward(self, z, z_next):
        """(N, D), (N, D) -> the action in units of its usual size (N, 3)"""
        return self.net(torch.cat([z, z_next], dim=-1))


class BendModel(nn.Module):
    """How a picture was bent, from what that did to its latent. Linear: so the latent has straight
    directions for where the road lies and leads. With `aligned` it also tells how a picture lies,
    as if one that all have in common had been bent."""

    def __init__(self, dim=512, bends=5, aligned=False):
        super().__init__()
        self.args = dict(dim=dim, bends=bends, aligned=aligned)
        self.net = nn.Linear(dim, bends, bias=aligned)

    def lie(self, z):
        """(N, D) -> the bends (N, bends) that undone make pictures alike, but for what bends all
        of them."""
        return self.net(z)

    def forward(self, z, z_bent):
        """(N, D), (N, D) -> (N, bends)"""
        return F.linear(z_bent - z, self.net.weight)


class TinyDecoder(nn.Module):
    """Latent -> the newest frame: a 4x4 map, then four transposed convolutions. For eyes only."""

    def __init__(self, dim=512, width=64):
        super().__init__()
        self.args = dict(dim=dim, width=width)
        w = width
        self.stem = nn.Linear(dim, 4 * w * 16)
        up = lambda i, o: nn.Sequential(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
        )
        self.body = nn.Sequential(
            up(4 * w, 2 * w),
            up(2 * w, w),
            up(w, w // 2),  # 8, 16, 32
            nn.ConvTranspose2d(w // 2, 3, 4, stride=2, padding=1),
        )  # 64
        self.w = w

    def forward(self, z):
        """(N, D) -> frames (N, 3, 64, 64), 0..1 in float32; clamp to show them."""
        x = self.stem(z).view(-1, 4 * self.w, 4, 4)
        return torch.sigmoid(self.body(x.contiguous(memory_format=torch.channels_last)).float())


class Predictor(nn.Module):
    """Autoregressive residual MLP that dreams in coordinates of its own, small enough to be fast.

    h[0] = lift(z), h[t+1] = h[t] + f(h[t], act[t]),
    z_hat[t] = read(h[t]) + fade**t * (z - read(h[0])):
    what the coordinates do not carry of the present fades, each latent at a rate that is learned.
    `lift` runs once for all futures of a plan; only f, `hidden` wide on `state` coordinates, runs
    for each step of each.
    """

    def __init__(self, dim=512, hidden=512, state=256, dropout=0.0):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden, state=state, dropout=dropout)
        self.dim, self.state = dim, state
        self.skip = nn.Linear(dim, state)
        self.deep = nn.Sequential(
            nn.Linear(dim, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, state)
        )
        self.into = nn.Linear(state + ACT, hidden)
        self.out = nn.Linear(hidden, state, bias=False)
        self.read = nn.Linear(state, dim)
        self.fade = nn.Parameter(torch.full((dim,), 2.0))  # logits; at first nearly all stays
        with torch.no_grad():
            self.out.weight.mul_(INITIAL_STEP)
        self.drop = nn.Dropout(dropout)

    def lift(self, z):
        """z (N, D) -> coordinates h (N, S)."""
        return self.skip(z) + self.deep(z)

    def step(self, h, act):
        """h (N, S), act (N, 3) -> the next h (N, S)."""
        return h + self.out(self.drop(F.silu(self.into(torch.cat([h, unit_act(act)], dim=-1)))))

    def rests(self, z, h, H):
        """(N, H, D): what of z (N, D) its h (N, S) does not carry, and is left of it at 1..H."""
        t = torch.arange(1, H + 1, device=z.device)
        return self.fade.sigmoid() ** t[:, None] * (z - self.read(h))[:, None]

    def rollout(self, z, act):
        """z (N, D), act (N, H, 3) -> z_hat (N, H, D): each step eats the one before."""
        N, H, A = act.shape
        assert z.shape == (N, self.dim) and A == ACT, (tuple(z.shape), tuple(act.shape))
        h = self.lift(z)
        out = [h]
        for t in range(H):
            out.append(self.step(out[-1], act[:, t]))
        return self.read(torch.stack(out[1:], dim=1)) + self.rests(z, h, H)


def judged(H):
    """Which latents of a future of H are judged: every JUDGED-th, the last one included."""
    return range((H - 1) % JUDGED, H, JUDGED)


class CostModel(nn.Module):
    """The judge. Three energies, learned on frozen latents without reward and without labels:

    `classifier`: the logit of random against expert (the sigmoid is the score, 0 expert 1 random);
    `density`: half the squared Mahalanobis distance to the expert's latents, over D; it rises
    in every direction that leaves the expert, where a classifier only knows the seen ones;
    `value`: the density on the road; in trouble, where it knows no way back, the density bounded
    and what of it is to come after the horizon, as an expert who recovers would have it.
    """

    def __init__(self, dim=512, hidden=256):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden)
        self.net = mlp(dim, hidden, hidden, 1)
        self.value = mlp(dim, hidden, hidden, 1)
        self.register_buffer("mu", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))
        self.register_buffer("chaos", torch.ones(()))
        weights = DISCOUNT ** torch.arange(FORESIGHT)
        self.register_buffer("discount", weights / weights.sum(), persistent=False)

    @torch.no_grad()
    def fit_density(self, z, chaos, shrinkage=0.05):
        """Mean and covariance of expert latents (N, D), of which a fixed share, `shrinkage`, is a
        round one of the same trace; what energy the latents of random driving have, chaos (M, D),
        in the median."""
        from sklearn.covariance import shrunk_covariance

        z = z.double()
        cov = torch.cov(z.T).reshape(self.mu.numel(), -1)  # of one number torch makes a scalar
        if len(z) < 2 or not cov.diagonal().mean() > 0:
            fail(
                f"the density: the {len(z)} latents of the expert are all alike; train the "
                "encoder on frames that differ"
            )
        cov = torch.from_numpy(shrunk_covariance(cov.cpu().numpy(), shrinkage)).to(z)
        self.mu.copy_(z.mean(dim=0))
        self.whiten.copy_(torch.linalg.cholesky(torch.linalg.inv(cov)))  # white: (z - mu) @ it
        self.chaos.copy_(self.energy(chaos).median())

    def energy(self, z, kind="density"):
        """(..., D) -> (...): low where an expert would be. Of one latent `value` is the density."""
        if kind == "classifier":
            return self.net(z).squeeze(-1).float()
        return ((z - self.mu) @ self.whiten).float().pow(2).mean(dim=-1) / 2

    forward = energy

    def in_trouble(self, z):
        """Whether the present latent (1, D) is so unlike an expert's that `value` looks further."""
        return bool(self.energy(z) > TROUBLE * self.chaos)

    def foretold(self, z):
        """(..., D) -> (...): sum of the bounded energies after a latent, discounted."""
        weights = (1 - DISCOUNT**FORESIGHT) / (1 - DISCOUNT)  # their sum
        return weights * self.chaos * self.value(z).squeeze(-1).float().clamp_min(0)

    def bounded(self, energy):
        """Energies, in 0..chaos: further from the expert than far is no worse."""
        return self.chaos * energy / (energy + self.chaos)

    def came(self, z):
        """What `value` learns: windows (B, T + FORESIGHT, D) as they came -> (B, T) in 0..1, the
        discounted mean of the bounded energies of the FORESIGHT latents after each."""
        share = self.bounded(self.energy(z)) / self.chaos
        return share[:, 1:].unfold(1, FORESIGHT, 1) @ self.discount

    def judge(self, z, z_hat, kind="value"):
        """Of futures z_hat (N, H, D) of the present z (1, D): (N,), the sum of the energies of
        their latents, told from those that are `judged`."""
        H = z_hat.shape[1]
        energies = self.energy(z_hat[:, list(judged(H))], kind)
        if kind == "value" and self.in_trouble(z):
            energies = self.bounded(energies)
            return H * energies.mean(dim=1) + DISCOUNT**H * self.foretold(z_hat[:, -1])
        return H * energies.mean(dim=1)


# ------------------------------------------------------------------ several processes (torchrun)


class _Loss(nn.Module):
    """What DistributedDataParallel wants to wrap: it averages gradients of `forward` only."""

    def __init__(self, loss_fn, nets):
        super().__init__()
        self.loss_fn, self.nets = loss_fn, nn.ModuleDict(nets)

    def forward(self, *batch):
        return self.loss_fn(self.nets, *batch)


def over_ranks(loss_fn, nets):
    """loss_fn(nets, *batch) as a function of the batch: the part of one rank, while gradients are
    those of the parts of all together, batch statistics included. Every net must be used.
    """
    if RANKS == 1:
        return partial(loss_fn, nets)
    for name, net in nets.items():
        if next(net.parameters()).is_cuda:
            nets[name] = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for norm in net.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norm.forward = partial(norm_over_ranks, norm)
    return nn.parallel.DistributedDataParallel(_Loss(loss_fn, nets))


def norm_over_ranks(norm, x):
    """The forward of a batch norm with the statistics of the batches of all ranks, x (N, C, ...):
    torch's SyncBatchNorm for CPUs, which it does not serve.
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    over = [d for d in range(x.dim()) if d != 1]
    wide = lambda v: v.view(1, -1, *[1] * (x.dim() - 2))
    of_all = lambda v: gather(v[None]).mean(dim=0)
    y = x.float()
    mean = of_all(y.mean(over))
    y = y - wide(mean)
    var = of_all(y.pow(2).mean(over))
    n = RANKS * x.numel() // x.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return (y * wide(norm.weight * (var + norm.eps).rsqrt()) + wide(norm.bias)).to(x.dtype)


# ------------------------------------------------------------------ checkpoints

NETS = {
    "encoder": TinyEncoder,
    "projector": Projector,
    "inverse": InverseModel,
    "bend": BendModel,
    "decoder": TinyDecoder,
    "predictor": Predictor,
    "cost": CostModel,
}


def save(path, nets, **state):
    """Writes {name: net} and any tensors, numbers, strings, lists and dicts, whole or not at all.

    Each net is stored with its class and the arguments that rebuild it, beside versions and commit.
    Refuses nets that are not finite; where the disk is full, waits for room.
    """
    for name, net in nets.items():
        if broken := not_finite(net.state_dict()):
            fail(
                f"step {state.get('step')}: {name}'s {broken} is not finite; {path} was not "
                "written; use --precision fp32, or a lower --lr with --fresh"
            )
    _write(
        path,
        {
            "schema": SCHEMA,
            "versions": versions(),
            "commit": git_commit(),
            **state,
            "nets": {
                name: {"class": type(net).__name__, "args": net.args, "weights": net.state_dict()}
                for name, net in nets.items()
            },
        },
    )


def _write(path, payload):
    """The payload as a file; makes its folder again if that has vanished since the start."""
    if not path.parent.is_dir():
        path.parent.mkdir()
        tqdm.write(f"{path.parent}: was gone, is made again")
    body = io.BytesIO()  # torch.save hides what a full disk answers
    torch.save(payload, body)
    replace_atomically(path, lambda f: f.write(body.getbuffer()))


def not_finite(weights):
    """The name of the first tensor of a state_dict that is not finite, or None."""
    return next((name for name, t in weights.items() if not torch.isfinite(t).all()), None)


class Damaged(Refusal):
    """A checkpoint that is not there, or not whole."""


def mend(path, script, flags="", word="makes it"):
    """The end of a refusal of a checkpoint: what makes it, where its script is known."""
    if path.parent.resolve() == PRETRAINED.resolve():
        return "; `git checkout models/pretrained` brings it back"
    root = path.parent.parent if path.parent.name == "models" else Path(".")
    return f"; {command(script, root, flags)} {word}" if script else ""


def read(path, script=""):
    """The payload of a checkpoint, refused in one line, which names the script that makes it, if it
    is not one of ours."""
    path = Path(path)
    if path.is_dir():
        fail(f"{path}: expected a checkpoint, found a folder")
    if not path.exists():
        raise Damaged(f"{path}: not found{mend(path, script)}")
    try:
        with open(path, "rb") as f:
            torn = zipfile.ZipFile(f).testzip()  # torch does not look at the CRCs
            if torn:
                raise zipfile.BadZipFile(torn)
            f.seek(0)
            payload = torch.load(f, map_location="cpu", weights_only=True)
        schema = payload["schema"]
        if schema == SCHEMA and not all(
            {"class", "args", "weights"} <= set(net) for net in payload["nets"].values()
        ):
            raise KeyError("nets")
    except Exception as e:  # torch raises half a dozen types for damaged or hostile files
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from None  # it may be whole
        raise Damaged(
            f"{path}: expected a checkpoint of this project, found a damaged or foreign "
            f"file ({type(e).__name__}){mend(path, script, word='makes it anew')}"
        ) from e
    if schema != SCHEMA:
        fail(
            f"{path}: expected checkpoint schema {SCHEMA}, found {schema}; update the code"
            f"{mend(path, script, word='makes it anew')}"
        )
    return payload


def build(payload, name, path=Path("checkpoint"), script=""):
    """The named net of a payload with its weights, refused in one line if they do not fit."""
    if name not in payload["nets"]:
        fail(f"{path}: expected a net named {name}, found {', '.join(payload['nets'])}")
    entry, kind = payload["nets"][name], NETS[name]
    if entry["class"] != kind.__name__:
        fail(
            f"{path}: expected {name} to be a {kind.__name__}, found a {entry['class']}"
            f"{mend(path, script)}"
        )
    try:
        net = kind(**entry["args"])
        net.load_state_dict(entry["weights"])
    except Exception as e:  # the arguments of a foreign file may be anything
        fail(
            f"{path}: the weights of {name} do not fit {entry['class']} with {entry['args']} "
            f"({last_line(e)}){mend(path, script, '--fresh', 'makes it anew')}"
        )
    if broken := not_finite(entry["weights"]):
        fail(
            f"{path}: {name}'s {broken} is not finite"
            f"{mend(path, script, '--fresh', 'makes it anew')}"
        )
    return net


def last_line(error):
    """The last line of an exception, which in torch's is the one that says most."""
    return (str(error).splitlines() or [type(error).__name__])[-1].strip()


def load_frozen(path, name, device, script=""):
    """(net, payload): a net from a checkpoint, on the device, in eval mode, without gradients."""
    payload = read(path, script)
    return build(payload, name, Path(path), script).to(device).eval().requires_grad_(False), payload


RUNTIME_ARGS = {
    "root",
    "device",
    "threads",
    "fresh",
    "precision",
    "compile",
    "tensorboard",
    "once",
    "newest",
    "save_every",
    "log_every",
    "arithmetic",
    "epochs",
}  # may change on resume


def so_far(args, step, per_epoch, per_step, **data):
    """What each checkpoint says of its training: arguments, step, epoch, and the frames that were
    seen of each source (`per_step`: in one step); `data` is buffer.provenance's."""
    return dict(
        args={k: str(v) for k, v in vars(args).items()},
        step=step,
        epoch=step // per_epoch,
        per_epoch=per_epoch,
        frames_seen={name: int(n) * step for name, n in per_step.items()},
        **data,
    )


def save_run(path, nets, optim, scaler, **state):
    """Saves all that an interrupted training needs to go on as if it had not been interrupted.

    torch has the only random states that last from step to step: numpy's generators are made
    anew from seed and step. The schedule follows from the step.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    save(
        path,
        nets,
        optim=optim.state_dict(),
        scaler=scaler.state_dict(),
        rng=torch.get_rng_state(),
        rng_cuda=cuda,
        **state,
    )


def hold(path):
    """The checkpoint as an open file, which `rotate` spares while it is open; None: it is gone."""
    with suppress(OSError):
        f = open(path, "rb")
        with suppress(OSError):  # a file system without locks: then rotation asks its age alone
            fcntl.flock(f, fcntl.LOCK_SH)
        return f


def numbered(folder, name):
    """[(N, path)] of the files of a folder that are called `name`, in order of the number N, which
    * stands for in it (-1 without *). Only what this code writes: no `_ep2 (copy).pth`, no
    `_ep02.pth`, no folder."""
    form = re.compile(re.escape(name).replace(r"\*", "(0|[1-9][0-9]{0,9})"))
    found = [(form.fullmatch(p.name), p) for p in Path(folder).glob(name)]
    return sorted((int(m[1]) if m.lastindex else -1, p) for m, p in found if m and p.is_file())


def rotate(folder, prefix, spared=()):
    """Deletes `prefix_ep{N}.pth` but the last KEPT, every KEPT_EVERY-th, the young ones, those of
    epochs in `spared`, and those that a process `hold`s; and what a kill left half written."""
    for epoch, path in numbered(folder, f"{prefix}_ep*.pth")[:-KEPT]:
        with suppress(OSError), open(path, "rb") as f:
            if (
                epoch % KEPT_EVERY
                and epoch not in spared
                and time.time() - os.fstat(f.fileno()).st_mtime > YOUNG_S
            ):
                if lock(f, wait=False):  # not where it is held
                    path.unlink()
    for path in folder.glob(".*.pth.*.tmp"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > YOUNG_S:
                path.unlink()


def set_aside(folder, names):
    """Moves what an earlier run made, the files of these names (`numbered`), to a dated folder
    beside it; nothing is deleted."""
    stale = [p for name in names for _, p in numbered(folder, name)]
    if not stale:
        return
    for k in itertools.count():
        aside = folder / (time.strftime("replaced-%Y%m%d-%H%M%S") + f"-{k}" * (k > 0))
        with suppress(FileExistsError):
            aside.mkdir()
            break
    for p in stale:
        p.rename(aside / p.name)


def read_run(path):
    """The payload of `save_run`'s file."""
    try:
        return read(path)
    except Refusal as e:
        fail(f"{e}; add --fresh to start again")


def arithmetic_of(name, args):
    """The arithmetic of the run that ROOT/models/`name` would resume, as set_up wants it; "" where
    there is none."""
    path = args.root / "models" / name
    with suppress(Refusal):
        if path.is_file() and not args.fresh:
            found = read(path).get("args", {}).get("arithmetic", "")
            return found if ", " in found else ""
    return ""


def of_these(path, payload, **must):
    """Refuses a payload with other values of `must`: of the nets, as x_key, it was trained on."""
    for key, now in must.items():
        if payload.get(key, now) != now:
            fail(
                f"{path}: was trained on another {key.removesuffix('_key')}; add --fresh to start "
                "again"
            )


def resume_run(path, nets, optim, scaler, args, made, data_key, **must):
    """Restores `save_run`'s file into nets and optimiser and returns its payload, or None.

    None: there is nothing to resume, or --fresh; then what an earlier run `made` (names beside
    path, its checkpoints first) is set aside. A run with other arguments, or other values of `must`
    (the nets it was trained on), is refused by name; of other data it says so and goes on, with
    epochs as long as they were. With other --epochs it goes on, on the schedule of so many.
    """
    checkpoints = numbered(path.parent, made[0])
    if checkpoints and not args.fresh and not path.is_file():
        fail(
            f"{checkpoints[-1][1]}: is there but {path.name} is not, so its training cannot go "
            "on; --fresh sets it aside and starts again"
        )
    if args.fresh:
        set_aside(path.parent, (path.name, *made))
    if not path.is_file():
        return None
    payload = read_run(path)
    of_these(path, payload, **must)
    restore(path, payload, nets, optim, scaler, args)
    if payload["data_key"] != data_key:
        print(
            f"{path}: the data has changed since; epochs stay as long as they were, --fresh "
            "starts again"
        )
    step, steps = payload["step"], args.epochs * payload["per_epoch"]
    then = payload["args"].get("epochs")
    if then != str(args.epochs) and step < steps:
        print(
            f"{path}: goes on to {args.epochs} epochs instead of {then}; "
            f"the learning rate is a cosine over all {steps} steps, from step {step} on "
            f"{cosine(step, steps, args.lr):.2g}"
        )
    return payload


def restore(path, payload, nets, optim, scaler, args):
    """Puts `save_run`'s payload into nets, optimiser, scaler and random states; refused by name if
    the arguments are others."""
    if "per_epoch" not in payload:
        fail(f"{path}: was written by an older version of this code; add --fresh to start again")
    then = {"gauges": "0", "mirror": "0.0", "align": "0.0", **payload["args"]}  # once had none
    others = [
        f"--{key} {typed(then.get(key))}, this command has {typed(now)}"
        for key, now in vars(args).items()
        if key not in RUNTIME_ARGS and then.get(key) != str(now)
    ]
    if others:
        fail(
            f"{path}: the run to resume had {'; '.join(others)}; repeat its arguments, or add "
            "--fresh to start again"
        )
    if then.get("arithmetic") != args.arithmetic:
        print(
            f"{path}: goes on with {args.arithmetic} instead of {then.get('arithmetic')}, so its "
            "losses may differ in their last digits"
        )
    try:
        for name, net in nets.items():
            net.load_state_dict(payload["nets"][name]["weights"])
        optim.load_state_dict(payload["optim"])
        if payload["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(payload["scaler"])
        torch.set_rng_state(payload["rng"])
        for i, state in enumerate(payload["rng_cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
    except Exception as e:  # a foreign file may hold anything
        fail(f"{path}: does not fit this run ({last_line(e)}); add --fresh to start again")


def already_trained(path, epochs, args, write):
    """Says so of a run that has ended after so many epochs; where its last file is gone or damaged,
    writes it anew: the nets were restored from the run's own file."""
    if RANK:
        return 0
    try:
        read(path)
    except Damaged as e:
        write()
        print(f"{e}; written anew")
    asked = f", {args.epochs} were asked for" if args.epochs < epochs else ""
    print(
        f"already trained: {path}, {epochs} epochs{asked}; a larger --epochs goes on, --fresh "
        "starts again"
    )
    return 0


def reopen(path):
    """Says in the last checkpoint of a run that goes on that it is not the last one any more, which
    the decoder's watcher ends with. Its date stays, so that nothing is drawn anew."""
    with suppress(Damaged):
        payload, then = read(path), path.stat()
        if payload.get("done"):
            _write(path, payload | {"done": False})
            os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


def cosine(step, steps, peak, warmup=0.05):
    """Learning rate: a linear rise over the first `warmup` of all steps, then half a cosine."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def refuse_nan(loss, when):
    """Refuses a loss (or whatever number) that is not finite."""
    if not math.isfinite(loss):
        fail(
            f"{when}: the loss is {float(loss)}; nothing was saved over the last good file; use "
            "--precision fp32, or a lower --lr with --fresh"
        )


def optimise(loss, nets, optim, scaler, lr, when="a step", clip=1.0):
    """One step of the optimiser, gradients clipped to norm `clip`.

    Refuses a loss, or gradients, that are not finite before they reach a weight (fp16's scaler
    skips such gradients); `when` says where that was. A GPU is not waited for: it says so a step
    later, and until then, or at the end, `save` refuses the weights.
    """
    for group in optim.param_groups:
        group["lr"] = lr
    optim.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optim)
    norm = nn.utils.clip_grad_norm_([p for net in nets for p in net.parameters()], clip)
    seen = torch.stack([loss.detach().double(), norm.double()])
    now = seen.to("cpu", non_blocking=True), torch.cuda.Event() if seen.is_cuda else None, when
    if seen.is_cuda:
        now[1].record()
        now, optim.unchecked = getattr(optim, "unchecked", None), now
    if now:
        _refuse_infinite(*now, scaler)
    scaler.step(optim)
    scaler.update()


def _refuse_infinite(seen, arrived, when, scaler):
    """Refuses a loss, or norm of gradients that no scaler looks at, that is not finite."""
    if arrived:
        arrived.synchronize()
    loss, norm = seen.tolist()
    refuse_nan(loss, when)
    if not scaler.is_enabled() and not math.isfinite(norm):
        fail(
            f"{when}: the gradient's norm is {norm}; nothing was saved over the last good file; "
            "use --precision fp32, or a lower --lr with --fresh"
        )


def epoch_of(path):
    """The number in ..._ep{N}.pth, -1 if there is none."""
    m = re.search(r"_ep([0-9]+)\.pth\Z", path.name)
    return int(m.group(1)) if m else -1


def latest(folder, prefix):
    """Path of the highest `prefix_ep{N}.pth`; where there is none, the name of the first."""
    found = numbered(folder, f"{prefix}_ep*.pth")
    return found[-1][1] if found else Path(folder) / f"{prefix}_ep1.pth"


def some_root(root):
    """The Path of a ROOT; refuses one that is not there, where other nets would drive instead."""
    if not Path(root).is_dir():
        fail(
            f"--root {root}: no such folder; leave --root out for the current one, or the weights "
            "that come with the code"
        )
    return Path(root)


def models_of(root, models=None, say=print):
    """The folder of --models, or ROOT/models, or where nothing was trained, the weights that come
    with the code; says so."""
    if models is not None:
        if not latest(models, "encoder_mixed").is_file():
            fail(
                f"--models {models}: no encoder_mixed_ep*.pth there; expected a folder of weights "
                "such as models/pretrained"
            )
        return Path(models)
    models = Path(root) / "models"
    if (models / "encoder_resume.pth").exists() and not latest(models, "encoder_mixed").exists():
        fail(
            f"{models}: its encoder has not finished an epoch; "
            f"{command('train_encoder.py', root)} goes on{meanwhile(models)}"
        )
    ours, shipped = (latest(folder, "encoder_mixed") for folder in (models, PRETRAINED))
    if shipped.exists() and not ours.exists():
        models = Path(os.path.relpath(PRETRAINED))
        say(f"{root}: no encoder there; takes the weights that come with the code, {models}")
    return models


def meanwhile(models):
    """The end of a line about nets that a folder lacks: how to take those that come with the code
    until they are trained."""
    if (
        Path(models).resolve() == PRETRAINED.resolve()
        or not latest(PRETRAINED, "encoder_mixed").is_file()
    ):
        return ""
    return (
        f"; meanwhile --models {typed(os.path.relpath(PRETRAINED))} takes the weights that come "
        "with the code"
    )


def need_nets(models, root):
    """Refuses a folder with an encoder that lacks what drives with it: says what makes that."""
    needed = {
        latest(models, "predictor"): "train_predictor.py",
        models / "cost_model_final.pth": "train_cost_model.py",
    }
    lacking = [path for path in needed if not path.is_file()]
    if lacking:
        names = " and ".join(map(str, lacking))
        made = " and ".join(command(needed[path], root) for path in lacking)
        fail(
            f"{names}: not found; {made} "
            + ("makes it" if len(lacking) == 1 else "make them")
            + meanwhile(models)
        )


def fingerprint(net):
    """16 hex digits that change with any weight or buffer of the net."""
    import hashlib

    h = hashlib.sha256()
    for name, t in sorted(net.state_dict().items()):
        h.update(name.encode())
        h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def describe(path):
    """Lines about a checkpoint: its name, its nets with arguments and sizes, the command that made
    it, then what else it holds."""
    payload = read(path)
    print(path)
    nets, args = payload.pop("nets"), payload.pop("args", {})
    args = args if isinstance(args, dict) else {}  # a foreign file may hold anything
    for name, entry in nets.items():
        size = sum(t.numel() for t in entry["weights"].values())
        print(f"{name:12} {entry['class']} {size / 1e6:.2f}M {entry['args']}")
    if script := next((SCRIPTS[name] for name in SCRIPTS if args and name in nets), None):
        flags = [
            f"--{key}" + f" {typed(value)}" * (value != "True")
            for key, value in args.items()
            if key != "arithmetic" and value not in ("None", "False")
        ]
        print(f"{'command':12} python {script} {' '.join(flags)}")
        print(f"{'arithmetic':12} {args.get('arithmetic', 'unknown')}")
    for key, value in payload.items():
        if key in ("optim", "scaler", "rng", "rng_cuda"):
            value = f"{sum(t.numel() for t in tensors(value)):,} numbers"
        print(f"{key:12} {value}")


SCRIPTS = {
    "encoder": "train_encoder.py",
    "decoder": "train_decoder.py",
    "cost": "train_cost_model.py",
    "predictor": "train_predictor.py",
}  # an encoder's file
# holds a predictor too


def typed(value):
    """An argument's value, or the text of it that a checkpoint holds, as it is typed in a shell."""
    text = str(value)
    words = [text]
    with suppress(ValueError, SyntaxError):
        words = ast.literal_eval(text) if text.startswith("[") else words
    return " ".join(shlex.quote(str(word)) for word in words)


def tensors(value):
    """All tensors in a structure of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [t for v in inside for t in tensors(v)] if isinstance(value, (dict, list)) else []


def export_safetensors(path, out):
    """The weights of a checkpoint as one safetensors file (github.com/huggingface/safetensors):
    tensors `net.parameter`; class and arguments of each net as JSON in the file's metadata.
    """
    nets = read(path)["nets"]
    weights = {
        f"{name}.{key}": tensor.contiguous()
        for name, entry in nets.items()
        for key, tensor in entry["weights"].items()
    }
    about = {
        name: json.dumps({k: entry[k] for k in ("class", "args")}) for name, entry in nets.items()
    }
    body = optional("safetensors.torch", "safetensors").save(weights, about)
    replace_atomically(out, lambda f: f.write(body))
    print(f"{out}: {len(weights)} tensors of {', '.join(nets)}")


def main():
    p = Parser(description="what a checkpoint holds")
    p.add_argument("files", nargs="+", type=Path, help="checkpoints to describe")
    p.add_argument(
        "--safetensors",
        type=output_file,
        metavar="OUT",
        help="write the weights of the one file to OUT instead",
    )
    args = p.parse_args()
    if args.safetensors and len(args.files) > 1:
        p.error("--safetensors takes one file at a time")
    if args.safetensors and args.safetensors.exists() and args.safetensors.samefile(args.files[0]):
        p.error(f"--safetensors {args.safetensors}: is the checkpoint itself; choose another name")
    for path in args.files:
        if args.safetensors:
            export_safetensors(path, args.safetensors)
        else:
            describe(path)
    return 0


if __name__ == "__main__":
    run(main)
