"""The dream model: it samples the next latent, again and again, so that a dream holds.

The predictor gives the mean of what may come, which blurs after two seconds. Here a recurrent net
remembers what was seen, and a flow draws one of the latents that may follow.
Shapes: `z` (B, D) or (B, T, D), all of a latent; `act` (B, 3) or (B, T, 3).
"""

import math

import torch
from torch import nn

from networks import ACT, INITIAL_STEP, normalize_action

MAX_NOISE = 0.5  # of the latents seen in training, in units of a usual change of the latent
SEEN_NOISE = 0.1  # what a dream says that its latents have
FLOW_STEPS = 6  # of Euler's method
FREQUENCIES = 8  # of the flow's time
LEAST_VARIANCE = 1e-3  # of a direction of change, over the mean of all


class DreamModel(nn.Module):
    """p(z[t+1] | z[0..t], act[0..t]): a GRU remembers, a flow samples the change of the latent.

    Changes are whitened: y = (z[t+1] - z[t]) W. The flow goes straight from noise at time 0 to y at
    time 1 (flow matching, Lipman et al. 2022). Its net predicts y itself: what the past determines
    comes out without noise. In training the latents seen carry noise of a known level (Valevski et
    al. 2024, GameNGen): so the net learns to mend its own errors.
    """

    def __init__(self, dim=512, hidden=512, width=1024, depth=2):
        super().__init__()
        self.args = dict(dim=dim, hidden=hidden, width=width, depth=depth)
        self.dim = dim
        self.memory = nn.GRU(dim + ACT + 1, hidden, batch_first=True)
        self.condition = nn.Linear(hidden + dim + ACT + 1, width)
        self.into = nn.Linear(dim + 2 * FREQUENCIES, width, bias=False)
        block = lambda: nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.register_buffer("whiten", torch.eye(dim))
        self.register_buffer("color", torch.eye(dim))
        with torch.no_grad():
            for layer in (*(b[-1] for b in self.blocks), self.out[-1]):
                layer.weight.mul_(INITIAL_STEP)

    @torch.no_grad()
    def fit_changes(self, change):
        """Sets the whitening from changes of latents (N, D)."""
        values, vectors = torch.linalg.eigh(torch.cov(change.double().T))
        root = values.clamp_min(LEAST_VARIANCE * values.mean()).sqrt()
        self.whiten.copy_(vectors / root @ vectors.T)
        self.color.copy_(vectors * root @ vectors.T)

    def remember(self, z, act, noise, h=None):
        """z (B, T, D), act (B, T, 3), noise (B, T, 1) -> what the flow sees (B, T, width), h."""
        seen = torch.cat([z, normalize_action(act), noise], dim=2)
        remembered, h = self.memory(seen, h)
        return self.condition(torch.cat([remembered, seen], dim=2)), h

    def denoise(self, x, time, condition):
        """The expected y (..., D), given x (..., D) on the way at time (..., 1) in 0..1."""
        waves = time * torch.arange(1, FREQUENCIES + 1, device=x.device) * math.pi / 2
        y = self.into(torch.cat([x, waves.sin(), waves.cos()], dim=-1)) + condition
        for block in self.blocks:
            y = y + block(y)
        return self.out(y)

    def loss(self, z, act):
        """Squared error (B, T) of the flow's y: z (B, T + 1, D), act (B, T, 3)."""
        noise = MAX_NOISE * torch.rand(len(z), 1, 1, device=z.device).expand(-1, act.shape[1], 1)
        with torch.autocast(z.device.type, enabled=False):
            seen = z[:, :-1] + noise * (torch.randn_like(z[:, 1:]) @ self.color)
            y = (z[:, 1:] - seen) @ self.whiten
        time = torch.rand_like(noise)
        x = torch.lerp(torch.randn_like(y), y, time)
        condition, _ = self.remember(seen, act, noise)
        return (self.denoise(x, time, condition).float() - y).pow(2).mean(dim=2)

    @torch.no_grad()
    def step(self, z, act, h=None, temperature=1.0, generator=None):
        """Samples the latent that follows z (B, D) under act (B, 3) -> (it, the memory h).

        h: of the step before, None at the start of a dream. temperature: of the noise that the flow
        starts from; 0 draws the same latent each time.
        """
        noise = z.new_full((len(z), 1, 1), SEEN_NOISE)
        condition, h = self.remember(z[:, None], act[:, None], noise, h)
        x = temperature * torch.randn(z.shape, device=z.device, generator=generator)
        for k in range(FLOW_STEPS):
            time = z.new_full((len(z), 1), k / FLOW_STEPS)
            y = self.denoise(x, time, condition[:, 0]).float()
            x = x + (y - x) / (FLOW_STEPS - k)
        return z + x @ self.color, h
