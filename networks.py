"""The nets: encoder and the heads it learns with, decoder, predictor, cost model.

Shapes: `obs` (B, T, 3, 64, 64) uint8, `act` (B, T, 3), `z` (B, T, D), `energy` (B,).
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from car import OBS_SIZE, SCENE_H

HUD_VALUES = 3 * (OBS_SIZE - SCENE_H) * OBS_SIZE  # values of a frame's HUD
ACT = 3  # steer, gas, brake
ACTION_SCALE = (0.15, 0.3, 0.1)  # about their standard deviations: nets see actions of unit size
INITIAL_STEP = 0.1  # of a linear layer's usual first weights: a fresh predictor hardly moves
SCORE_EVERY = 3  # the cost looks at every third latent of a rollout: neighbours are alike
OOD_THRESHOLD = 0.3  # of the energy of random driving; most of a lap stays below
DISCOUNT, VALUE_HORIZON = 0.97, 75  # per latent; latents whose energies the value sums up


# ------------------------------------------------------------------ encoder


class TinyEncoder(nn.Module):
    """ResNet-18 (He et al. 2015) without max-pooling: `history` frames -> a latent of size `dim`.

    channels: of the first stage. repeat: environment steps between two frames, and two latents.
    strides: of the four stages; their product is 8. 2 2 2 1 costs half of 1 2 2 2. The 4x4 map is
    projected whole: averaging it would forget where the road is.
    hud_pca: the last numbers of a latent are principal components of the newest frame's HUD. The
    bars of speed and yaw rate need no convolutions. `fit_hud_pca` finds them before the training.
    `forward` gives standardized latents, in which all other nets work. `features` gives raw ones,
    which the encoder's losses see.
    """

    def __init__(self, channels=64, history=3, repeat=2, dim=512, strides=(1, 2, 2, 2), hud_pca=0):
        super().__init__()
        self.args = dict(channels=channels, history=history, repeat=repeat, dim=dim)
        self.args |= dict(strides=list(strides), hud_pca=hud_pca)
        self.history, self.repeat, self.dim, self.hud_pca = history, repeat, dim, hud_pca
        from torchvision.models.resnet import BasicBlock, ResNet  # 2 s of import

        net = ResNet(BasicBlock, [2, 2, 2, 2])
        net.inplanes = w = channels
        self.body = nn.Sequential(
            nn.Conv2d(3 * history, w, 7, stride=2, padding=3, bias=False),  # (w, 32, 32)
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
            *(net._make_layer(BasicBlock, w << i, 2, stride=s) for i, s in enumerate(strides)),
        )  # (8w, 4, 4)
        self.head = nn.Linear(8 * w * 16, dim - hud_pca)
        for m in self.body.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        if hud_pca:
            self.register_buffer("pca_mean", torch.zeros(HUD_VALUES))
            self.register_buffer("pca_components", torch.zeros(HUD_VALUES, hud_pca))

    @property
    def span(self):
        """Consecutive frames of the environment from the first to the last one in a latent."""
        return (self.history - 1) * self.repeat + 1

    def features(self, x):
        """(N, 3 * history, 64, 64) uint8 or float in 0..255 -> raw latents (N, D)."""
        assert x.shape[1:] == (3 * self.history, 64, 64), tuple(x.shape)
        x = torch.rsub(x.float(), -1.0, alpha=-1 / 127.5)  # to -1..1
        x = x.contiguous(memory_format=torch.channels_last)
        z = self.head(self.body(x).flatten(1)).float()
        if not self.hud_pca:
            return z
        with torch.autocast(x.device.type, enabled=False):
            hud_pca = (self.hud_pixels(x) - self.pca_mean) @ self.pca_components
        return torch.cat([z, hud_pca], dim=1)

    @staticmethod
    def hud_pixels(x):
        """The newest frame's HUD: (N, 3 * history, 64, 64) -> (N, HUD_VALUES)."""
        return x[:, -3:, SCENE_H:].flatten(1)

    @torch.no_grad()
    def fit_hud_pca(self, x):
        """Fits the principal components to training inputs x (N, 3 * history, 64, 64) uint8.

        Each component gets variance 1.
        """
        from sklearn.decomposition import PCA

        hud = self.hud_pixels(x).float().cpu().numpy() / 127.5 - 1
        pca = PCA(self.hud_pca, svd_solver="full").fit(hud)
        size = np.sqrt(np.maximum(pca.explained_variance_, 1e-6))
        self.pca_mean.copy_(torch.from_numpy(pca.mean_))
        self.pca_components.copy_(torch.from_numpy((pca.components_ / size[:, None]).T))

    def conv_dims(self, z):
        """Latents (..., D) without their HUD components."""
        return z[..., : self.dim - self.hud_pca]

    def reinitialized(self):
        """A net of the same shape and HUD components with fresh weights."""
        net = TinyEncoder(**self.args).to(self.mean.device)
        if self.hud_pca:
            net.pca_mean.copy_(self.pca_mean)
            net.pca_components.copy_(self.pca_components)
        return net

    def forward(self, x):
        """(N, 3 * history, 64, 64) -> standardized latents (N, D), float32."""
        return (self.features(x) - self.mean) / self.std

    @torch.no_grad()
    def fit_standardization(self, z):
        """Sets the standardization from raw latents of training data (N, D)."""
        self.mean.copy_(z.mean(dim=0))
        self.std.copy_(z.std(dim=0).clamp_min(1e-4))


def stack_frames(obs, history, at=None):
    """Windows of frames -> encoder inputs, oldest first.

    obs (B, L, 3, 64, 64) -> (B * T, 3 * history, 64, 64), T latents a window: all L - history + 1,
    or those `at` some indices.
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
    """Linear layers with normalization and GELU between them."""
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
def action_scale(device):
    """ACTION_SCALE on the device, made once: each copy would stall a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(ACTION_SCALE, device=device)


def normalize_action(act):
    """Actions (..., 3) in units of their usual size."""
    return act / action_scale(act.device)


class InverseModel(nn.Module):
    """The action between two latents: it keeps in the latent what actions move."""

    def __init__(self, dim=512, hidden=256):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden)
        self.net = mlp(2 * dim, hidden, ACT)

    def forward(self, z, z_next):
        """(N, D), (N, D) -> the action in units of its usual size (N, 3)"""
        return self.net(torch.cat([z, z_next], dim=-1))


class WarpHead(nn.Module):
    """How a frame was warped, from the change of its latent.

    It is linear, so the latent has straight directions for where the road lies and leads. An
    `aligned` head also predicts the warp that aligns a frame with all others.
    """

    def __init__(self, dim=512, warps=5, aligned=False):
        super().__init__()
        self.args = dict(dim=dim, warps=warps, aligned=aligned)
        self.net = nn.Linear(dim, warps, bias=aligned)

    def predict_alignment(self, z):
        """(N, D) -> warps (N, warps) that, undone, make frames alike."""
        return self.net(z)

    def forward(self, z, z_warped):
        """(N, D), (N, D) -> (N, warps)"""
        return F.linear(z_warped - z, self.net.weight)


# ------------------------------------------------------------------ decoder, predictor, cost model


class TinyDecoder(nn.Module):
    """Latent -> the newest frame: a 4x4 map, then four transposed convolutions."""

    def __init__(self, dim=512, channels=64):
        super().__init__()
        self.args = dict(dim=dim, channels=channels)
        w = channels
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
    """Autoregressive residual MLP with a state h of its own, small enough to be fast.

    h[0] = to_state(z), h[t+1] = h[t] + f(h[t], act[t]),
    z_hat[t] = to_latent(h[t]) + decay**t * (z - to_latent(h[0])).
    The residual, what the state lacks of the present latent, decays at a learned rate per number.
    All candidates of a plan share `to_state(z)`; f runs for each step of each.
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
        self.to_latent = nn.Linear(state, dim)
        self.decay_logit = nn.Parameter(
            torch.full((dim,), 2.0)
        )  # logits; at first nearly all stays
        with torch.no_grad():
            self.out.weight.mul_(INITIAL_STEP)
        self.drop = nn.Dropout(dropout)

    def to_state(self, z):
        """z (N, D) -> state h (N, S)."""
        return self.skip(z) + self.deep(z)

    def transition(self, h, act):
        """h (N, S), act (N, 3) -> the next h (N, S)."""
        return h + self.out(
            self.drop(F.silu(self.into(torch.cat([h, normalize_action(act)], dim=-1))))
        )

    def residual(self, z, h, H):
        """What the state h (N, S) lacks of z (N, D), as it decays over 1..H -> (N, H, D)."""
        t = torch.arange(1, H + 1, device=z.device)
        return self.decay_logit.sigmoid() ** t[:, None] * (z - self.to_latent(h))[:, None]

    def rollout(self, z, act):
        """z (N, D), act (N, H, 3) -> z_hat (N, H, D)."""
        N, H, A = act.shape
        assert z.shape == (N, self.dim) and A == ACT, (tuple(z.shape), tuple(act.shape))
        h = self.to_state(z)
        out = [h]
        for t in range(H):
            out.append(self.transition(out[-1], act[:, t]))
        return self.to_latent(torch.stack(out[1:], dim=1)) + self.residual(z, h, H)


def scored_steps(H):
    """Indices of a rollout of H latents that the cost looks at, the last one included."""
    return range((H - 1) % SCORE_EVERY, H, SCORE_EVERY)


class CostModel(nn.Module):
    """Three energies on frozen latents, learned without reward and without labels.

    classifier: the logit of random against expert; its sigmoid is 0 for expert, 1 for random.
    density: half the squared Mahalanobis distance to expert latents, over D. It rises in every
    direction that leaves the expert; a classifier knows only the directions it saw.
    value: the density. Out of distribution it is the saturated density plus a terminal value, the
    energy that follows while an expert recovers.
    """

    def __init__(self, dim=512, hidden=256):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden)
        self.classifier = mlp(dim, hidden, hidden, 1)
        self.value = mlp(dim, hidden, hidden, 1)
        self.register_buffer("mu", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))
        self.register_buffer("random_energy", torch.ones(()))
        weights = DISCOUNT ** torch.arange(VALUE_HORIZON)
        self.register_buffer("discount", weights / weights.sum(), persistent=False)

    @torch.no_grad()
    def fit_density(self, z, z_random, shrinkage=0.05):
        """Fits the density to expert latents z (N, D), random_energy to z_random (M, D).

        The share `shrinkage` of the covariance is a round one of the same trace. ValueError if the
        expert's latents are all alike.
        """
        from sklearn.covariance import shrunk_covariance

        z = z.double()
        cov = torch.cov(z.T).reshape(self.mu.numel(), -1)  # of D = 1 torch makes a scalar
        if len(z) < 2 or not cov.diagonal().mean() > 0:
            raise ValueError(f"the {len(z)} latents of the expert are all alike")
        cov = torch.from_numpy(shrunk_covariance(cov.cpu().numpy(), shrinkage)).to(z)
        self.mu.copy_(z.mean(dim=0))
        self.whiten.copy_(
            torch.linalg.cholesky(torch.linalg.inv(cov))
        )  # (z - mu) @ whiten is white
        self.random_energy.copy_(self.energy(z_random).median())

    def energy(self, z, kind="density"):
        """(..., D) -> (...): low where an expert would be. One latent's `value` is its density."""
        if kind == "classifier":
            return self.classifier(z).squeeze(-1).float()
        return ((z - self.mu) @ self.whiten).float().pow(2).mean(dim=-1) / 2

    def is_ood(self, z):
        """Whether the present latent (1, D) is out of the experts' distribution."""
        return bool(self.energy(z) > OOD_THRESHOLD * self.random_energy)

    def terminal_value(self, z):
        """(..., D) -> (...): discounted sum of the saturated energies after a latent."""
        weights = (1 - DISCOUNT**VALUE_HORIZON) / (1 - DISCOUNT)  # their sum
        return weights * self.random_energy * self.value(z).squeeze(-1).float().clamp_min(0)

    def saturate(self, energy):
        """Bounds energies to 0..random_energy: farther than far from the expert is no worse."""
        return self.random_energy * energy / (energy + self.random_energy)

    def value_target(self, z):
        """What `value` learns, from real windows z (B, T + VALUE_HORIZON, D) -> (B, T) in 0..1.

        The discounted mean of the saturated energies of the VALUE_HORIZON latents after each.
        """
        share = self.saturate(self.energy(z)) / self.random_energy
        return share[:, 1:].unfold(1, VALUE_HORIZON, 1) @ self.discount

    def rollout_cost(self, z, z_hat, kind="value"):
        """Rollouts z_hat (N, H, D) of the present z (1, D) -> (N,), the sum of their energies.

        It is estimated from the `scored_steps`.
        """
        H = z_hat.shape[1]
        energies = self.energy(z_hat[:, list(scored_steps(H))], kind)
        if kind == "value" and self.is_ood(z):
            energies = self.saturate(energies)
            return H * energies.mean(dim=1) + DISCOUNT**H * self.terminal_value(z_hat[:, -1])
        return H * energies.mean(dim=1)
