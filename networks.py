"""The nets: encoder and the heads it learns with, decoder, predictor, cost model.

Shapes: `obs` (B, T, 3, 64, 64) uint8, `act` (B, T, 3), `z` (B, T, D), `energy` (B,).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from car import OBS_SIZE, SCENE_H

HUD_VALUES = 3 * (OBS_SIZE - SCENE_H) * OBS_SIZE  # values of a frame's HUD
SCENE_VALUES = 3 * SCENE_H * OBS_SIZE  # values of a frame's scene
ACT = 3  # steer, gas, brake
ACTION_SCALE = (0.15, 0.3, 0.1)  # about their standard deviations: nets see actions of unit size
INITIAL_STEP = 0.1  # of a linear layer's usual first weights: a fresh predictor hardly moves
SCORE_EVERY = 3  # the cost looks at every third latent of a rollout: neighbours are alike
OOD_THRESHOLD = 0.3  # of the energy of random driving; most of a lap stays below
DISCOUNT, VALUE_HORIZON = 0.97, 75  # per latent; latents whose energies the value sums up
VALUE_WEIGHT = (1 - DISCOUNT**VALUE_HORIZON) / (1 - DISCOUNT)  # sum of their weights
POLICY_STEPS = 3  # latents that the policy plans at once: it is asked five times for 15
MISTAKE_WEIGHT = 0.008  # of a mistake's logit, over random driving's energy


# ------------------------------------------------------------------ encoder


class TinyEncoder(nn.Module):
    """ResNet-18 (He et al. 2015) without max-pooling: `history` frames -> a latent of size `dim`.

    channels: of the first stage. repeat: environment steps between two frames, and two latents.
    strides: of the four stages; their product is 8. 2 2 2 1 costs half of 1 2 2 2. The 4x4 map is
    projected whole: averaging it would forget where the road is.

    A latent has three parts, `dim` numbers in all. The first two, `planned` numbers, are predicted
    and planned with.
    conv: what the losses train.
    hud_pca: principal components of the newest frame's HUD. The bars of speed and yaw rate need no
    convolutions.
    scene_pca: principal components of the newest frame's scene, its looks: kerbs and lawn. The
    predictor lets them fade. Planner and cost model do not see them.
    `support.pca.fit_pca` finds the components before the training. `forward` gives standardized
    latents, in which all other nets work. `features` gives the planned part raw, for the losses.
    """

    def __init__(
        self, channels, history=3, repeat=2, dim=512, strides=(1, 2, 2, 2), hud_pca=0, scene_pca=0
    ):
        super().__init__()
        self.args = dict(channels=channels, history=history, repeat=repeat, dim=dim)
        self.args |= dict(strides=list(strides), hud_pca=hud_pca, scene_pca=scene_pca)
        self.history, self.repeat, self.dim = history, repeat, dim
        self.hud_pca, self.scene_pca, self.planned = hud_pca, scene_pca, dim - scene_pca

        # conv part
        from torchvision.models.resnet import BasicBlock, ResNet  # 2 s of import

        net = ResNet(BasicBlock, [2, 2, 2, 2])
        net.inplanes = w = channels
        self.body = nn.Sequential(
            nn.Conv2d(3 * history, w, 7, stride=2, padding=3, bias=False),  # (w, 32, 32)
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
            *(net._make_layer(BasicBlock, w << i, 2, stride=s) for i, s in enumerate(strides)),
        )  # (8w, 4, 4)
        self.head = nn.Linear(8 * w * 16, self.planned - hud_pca)
        for m in self.body.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", torch.zeros(self.planned))
        self.register_buffer("std", torch.ones(self.planned))
        if hud_pca:
            self.register_buffer("pca_mean", torch.zeros(HUD_VALUES))
            self.register_buffer("pca_components", torch.zeros(HUD_VALUES, hud_pca))
        if scene_pca:
            self.register_buffer("scene_mean", torch.zeros(SCENE_VALUES))
            self.register_buffer("scene_components", torch.zeros(SCENE_VALUES, scene_pca))

    @property
    def span(self):
        """Consecutive frames of the environment from the first to the last one in a latent."""
        return (self.history - 1) * self.repeat + 1

    def features(self, x):
        """(N, 3 * history, 64, 64) uint8 or float in 0..255 -> raw planned part (N, planned)."""
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

    @staticmethod
    def scene_pixels(x):
        """The newest frame's scene: (N, 3 * history, 64, 64) -> (N, SCENE_VALUES)."""
        return x[:, -3:, :SCENE_H].flatten(1)

    def conv_dims(self, z):
        """The conv part of latents (..., D)."""
        return z[..., : self.planned - self.hud_pca]

    def reinitialized(self):
        """A net of the same shape and components with fresh weights."""
        net = TinyEncoder(**self.args).to(self.mean.device)
        for name, buffer in self.named_buffers():
            if name.startswith(("pca_", "scene_")):
                net.get_buffer(name).copy_(buffer)
        return net

    def forward(self, x):
        """(N, 3 * history, 64, 64) -> standardized latents (N, D), float32."""
        z = (self.features(x) - self.mean) / self.std
        if not self.scene_pca:
            return z
        with torch.autocast(x.device.type, enabled=False):
            scene = (self.scene_pixels(x).float() - self.scene_mean) @ self.scene_components
        return torch.cat([z, scene], dim=1)

    @torch.no_grad()
    def fit_standardization(self, z):
        """Sets the standardization from raw planned parts of training data (N, planned)."""
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
    """Latent -> the newest frame: a linear image of its components, corrected by convolutions.

    linear: the last numbers of the latent are principal components, from which the image is drawn
    as it is. The correction: a 4x4 map, three transposed convolutions, two convolutions that see
    the linear image too.
    """

    def __init__(self, dim=512, channels=64, linear=0):
        super().__init__()
        self.args = dict(dim=dim, channels=channels, linear=linear)
        self.w = w = channels
        self.linear = linear
        self.stem = nn.Linear(dim, 4 * w * 16)
        up = lambda i, o: nn.Sequential(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
        )
        self.body = nn.Sequential(up(4 * w, 2 * w), up(2 * w, w), up(w, w // 2))  # (w / 2, 32, 32)
        self.image = nn.Linear(linear + 1, 3 * OBS_SIZE**2, bias=False)
        self.out = nn.Sequential(
            nn.Conv2d(w // 2 + 12, w, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(w, 12, 3, padding=1),
        )  # four pixels of the frame in each of 32x32
        with torch.no_grad():
            self.image.weight.zero_()
            self.out[-1].weight.mul_(INITIAL_STEP)

    def components(self, z):
        """(N, D) -> what the linear image is drawn from, and 1 (N, linear + 1)."""
        return torch.cat([z[:, z.shape[1] - self.linear :], torch.ones_like(z[:, :1])], dim=1)

    @torch.no_grad()
    def fit_image(self, z, frames, ridge=1.0):
        """Sets the linear image by ridge regression: z (N, D), frames (N, 3, 64, 64) in 0..1."""
        x, y = self.components(z).double(), frames.flatten(1).double()
        gram = x.T @ x + ridge * torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        self.image.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)

    def forward(self, z):
        """(N, D) -> frames (N, 3, 64, 64), about 0..1 in float32; clamp to show them."""
        x = self.stem(z).view(-1, 4 * self.w, 4, 4)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        with torch.autocast(z.device.type, enabled=False):
            image = self.image(self.components(z.float())).view(-1, 3, OBS_SIZE, OBS_SIZE)
        x = self.out(torch.cat([x, 4 * F.pixel_unshuffle(image, 2) - 2], dim=1))
        return image + F.pixel_shuffle(x.float(), 2)


class Predictor(nn.Module):
    """Autoregressive residual MLP with a state h of its own, small enough to be fast.

    h[0] = to_state(z), h[t+1] = h[t] + f(h[t], act[t]),
    z_hat[t] = to_latent(h[t]) + decay**t * (z - to_latent(h[0])).
    The residual, what the state lacks of the present latent, decays at a learned rate per number.
    All candidates of a plan share `to_state(z)`; f runs for each step of each.
    dim: of the planned part of a latent. looks: of the rest, which fades likewise:
    looks_hat[t] = look(h[t], h[0], looks) + fade**t * looks.
    """

    def __init__(self, dim=512, hidden=512, state=256, dropout=0.0, looks=0):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden, state=state, dropout=dropout, looks=looks)
        self.dim, self.state, self.looks = dim, state, looks
        self.skip = nn.Linear(dim, state)
        silu_mlp = lambda i, h, o: nn.Sequential(nn.Linear(i, h), nn.SiLU(), nn.Linear(h, o))
        self.deep = silu_mlp(dim, 2 * hidden, state)
        self.into = nn.Linear(state + ACT, hidden)
        self.out = nn.Linear(hidden, state, bias=False)
        self.to_latent = nn.Linear(state, dim)
        self.decay_logit = nn.Parameter(torch.full((dim,), 2.0))  # at first nearly all stays
        with torch.no_grad():
            self.out.weight.mul_(INITIAL_STEP)
        self.drop = nn.Dropout(dropout)
        if looks:
            self.look = silu_mlp(2 * state + looks, hidden, looks)
            self.fade_logit = nn.Parameter(torch.zeros(looks))

    def to_state(self, z):
        """z (N, D) -> state h (N, S)."""
        return self.skip(z) + self.deep(z)

    def transition(self, h, act):
        """h (N, S), act (N, 3) -> the next h (N, S)."""
        x = self.into(torch.cat([h, normalize_action(act)], dim=-1))
        return h + self.out(self.drop(F.silu(x)))

    def residual(self, z, h, H):
        """What the state h (N, S) lacks of z (N, D), as it decays over 1..H -> (N, H, D)."""
        t = torch.arange(1, H + 1, device=z.device)
        return self.decay_logit.sigmoid() ** t[:, None] * (z - self.to_latent(h))[:, None]

    def states(self, z, act):
        """z (N, dim), act (N, H, 3) -> states h from now on (N, 1 + H, S)."""
        h = [self.to_state(z)]
        for t in range(act.shape[1]):
            h.append(self.transition(h[-1], act[:, t]))
        return torch.stack(h, dim=1)

    def latents(self, h, z):
        """States h (N, 1 + H, S) that began at z (N, dim) -> z_hat (N, H, dim)."""
        return self.to_latent(h[:, 1:]) + self.residual(z, h[:, 0], h.shape[1] - 1)

    def future_looks(self, h, looks):
        """States h (N, 1 + H, S) that began with these looks (N, looks) -> (N, H, looks).

        No gradient reaches the states: looks change nothing of what is planned with.
        """
        h, H = h.detach(), h.shape[1] - 1
        now = torch.cat([h[:, 0], looks], dim=1)[:, None].expand(-1, H, -1)
        t = torch.arange(1, H + 1, device=h.device)
        faded = self.fade_logit.sigmoid() ** t[:, None] * looks[:, None]
        return self.look(torch.cat([h[:, 1:], now], dim=2)) + faded

    def rollout(self, z, act):
        """z (N, D), act (N, H, 3) -> z_hat (N, H, D). D: `dim`, or with looks `dim + looks`."""
        D, fits = z.shape[1], act.dim() == 3 and len(z) == len(act) and act.shape[2] == ACT
        assert fits and D in (self.dim, self.dim + self.looks), (tuple(z.shape), tuple(act.shape))
        planned = z[:, : self.dim]
        h = self.states(planned, act)
        z_hat = self.latents(h, planned)
        if D == self.dim:
            return z_hat
        return torch.cat([z_hat, self.future_looks(h, z[:, self.dim :])], dim=2)


def scored_steps(H):
    """Indices of a rollout of H latents that the cost looks at, the last one included."""
    return range((H - 1) % SCORE_EVERY, H, SCORE_EVERY)


class CostModel(nn.Module):
    """Energies of frozen latents, learned without reward and without labels.

    They see the first `dim` numbers of a latent, the planned part.

    classifier: the logit of random against expert; its sigmoid is 0 for expert, 1 for random.
    density: half the squared Mahalanobis distance to expert latents, over D. It rises in every
    direction that leaves the expert; a classifier knows only the directions it saw.
    mistake: the logit of an expert who recovers from mistakes against one who makes none.
    value: density and a little of `mistake`. Out of distribution, the saturated density and a
    terminal value, the energy that follows while an expert recovers.
    policy: a predictor's state -> what an expert plans from there on, see `expert_plan`.
    """

    def __init__(self, dim=512, hidden=256, state=256):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden, state=state)
        self.classifier = mlp(dim, hidden, hidden, 1)
        self.value = mlp(dim, hidden, hidden, 1)
        self.mistake = mlp(dim, hidden, hidden, 1)
        self.policy = mlp(state, hidden, hidden, 2 * POLICY_STEPS)
        self.register_buffer("mu", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))  # of z - mu
        self.register_buffer("random_energy", torch.ones(()))
        weights = DISCOUNT ** torch.arange(VALUE_HORIZON)
        self.register_buffer("discount", weights / weights.sum(), persistent=False)

    def seen(self, z):
        """The part of latents (..., D) that the energies see."""
        return z[..., : len(self.mu)]

    def energy(self, z, kind="density"):
        """(..., D) -> (...): low where an expert would be. One latent's `value` is its density."""
        z = self.seen(z)
        if kind in ("classifier", "mistake"):
            return getattr(self, kind)(z).squeeze(-1).float()
        return ((z - self.mu) @ self.whiten).float().pow(2).mean(dim=-1) / 2

    def mistake_energy(self, logit):
        """Logits (...) of mistakes -> (...): what they add to the density."""
        return MISTAKE_WEIGHT * self.random_energy * F.softplus(logit)

    def expert_plan(self, h):
        """States h (..., S) of a predictor -> the plans (..., POLICY_STEPS, 2) of an expert."""
        return self.policy(h).unflatten(-1, (POLICY_STEPS, 2))

    def is_ood(self, z):
        """Whether the present latent (1, D) is out of the experts' distribution."""
        return bool(self.energy(z) > OOD_THRESHOLD * self.random_energy)

    def terminal_value(self, z):
        """(..., D) -> (...): discounted sum of the saturated energies after a latent."""
        return VALUE_WEIGHT * self.random_energy * self.predicted_value(z).float().clamp_min(0)

    def wrong_way(self, turned):
        """Energies (...) of a car `turned` (...) rad off its way: none below a quarter turn."""
        return self.random_energy * (-turned.cos()).clamp_min(0)

    def predicted_value(self, z):
        """(..., D) -> (...): what `value_target` is expected to be."""
        return self.value(self.seen(z)).squeeze(-1)

    def saturate(self, energy):
        """Bounds energies to 0..random_energy: farther than far from the expert is no worse."""
        return self.random_energy * energy / (energy + self.random_energy)

    def value_target(self, energy):
        """What `value` learns: energies of real windows (B, T + VALUE_HORIZON) -> (B, T) in 0..1.

        The discounted mean of the saturated energies of the VALUE_HORIZON latents after each.
        """
        share = self.saturate(energy) / self.random_energy
        return share[:, 1:].unfold(1, VALUE_HORIZON, 1) @ self.discount

    def rollout_cost(self, z, z_hat, kind="value"):
        """z_hat (N, H, D) of the present z (1, D) -> (N,), H times the mean of `scored_steps`."""
        H = z_hat.shape[1]
        scored = z_hat[:, list(scored_steps(H))]
        energies, end = self.energy(scored, kind), 0
        if kind == "value" and self.is_ood(z):
            energies = self.saturate(energies)
            end = DISCOUNT**H * self.terminal_value(z_hat[:, -1])
        elif kind == "value":
            energies = energies + self.mistake_energy(self.energy(scored, "mistake"))
        return H * energies.mean(dim=1) + end
