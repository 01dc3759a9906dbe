"""The dream model: it samples the next latent, again and again, so that a dream holds.

The predictor gives the mean of what may come, which blurs within two seconds. Here a recurrent net
remembers what was seen, and a flow draws one of the latents that may follow.
Shapes: `z` (B, D) or (B, T, D), all of a latent; `act` (B, 3) or (B, T, 3).
"""

import math

import torch
from torch import nn

from networks import ACT, INITIAL_STEP, Predictor, normalize_action

MAX_NOISE = 2.0  # of the latents seen in training, in units of `scale`
SEEN_NOISE = 0.3  # the level that a dream gives for its own latents; noise is MAX_NOISE * level²
TEMPERATURE = 0.6  # of a dream; at 1, as it was learned, some dreams leave what is real
RARE = 0.002  # share of real latents beyond either bound of a dream's numbers
ANCHORS = 1, 16, 100  # latents after which rollouts of the predictor start anew; see docs/LOG.md
FAR = 5.0  # what a guess differs from the linear one at most, in units of `scale`
FLOW_STEPS = 3  # of the midpoint method; six of Euler's give 0.8 of a Gaussian's deviation
FREQUENCIES = 8  # of the flow's time
GATES = 0.5, 0.2, 0.1  # first shares of the guesses in what is expected


class DreamModel(nn.Module):
    """p(z[t+1] | z[0..t], act[0..t]): a GRU remembers, a flow samples what linear maps lack.

    The flow works with y = (z[t+1] - linear(z[t], act[t])) / scale. It goes straight from noise at
    time 0 to y at time 1 (flow matching, Lipman et al. 2022). Its net predicts y itself, so what
    the past determines comes out without noise. It sees guesses of a predictor, whose rollouts
    start anew after each of ANCHORS: short ones know the road, long ones how the car moves. It is
    a copy of the planner's, which learns longer rollouts.
    In training the latents seen carry noise of a known level (Valevski et al. 2024, GameNGen): so
    the net learns to mend its own errors. Half of the noise is the same in all of a window, because
    errors of a dream last. Numbers of a dream stay within the range of nearly all real ones.
    """

    def __init__(self, predictor, hidden=512, width=768, depth=2):
        """predictor: the arguments of a Predictor."""
        super().__init__()
        self.args = dict(predictor=predictor, hidden=hidden, width=width, depth=depth)
        self.predictor = Predictor(**predictor)
        if self.predictor.looks:  # those of a dream are the flow's
            self.predictor.look.requires_grad_(False)
            self.predictor.fade_logit.requires_grad_(False)
        self.planned = self.predictor.dim
        self.dim = dim = self.planned + self.predictor.looks
        self.linear = nn.Linear(dim + ACT, dim).requires_grad_(False)
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("bounds", torch.tensor([[-1e3], [1e3]]).repeat(1, dim))

        self.memory = nn.GRU(dim + ACT + 1, hidden, batch_first=True)
        guessed = len(ANCHORS) * self.planned
        self.condition = nn.Linear(hidden + dim + ACT + 1 + guessed, width)
        self.gates = nn.Parameter(torch.tensor(GATES)[:, None].repeat(1, self.planned))
        self.into = nn.Linear(dim + 2 * FREQUENCIES, width, bias=False)
        block = lambda: nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        with torch.no_grad():
            for layer in (*(b[-1] for b in self.blocks), self.out[-1]):
                layer.weight.mul_(INITIAL_STEP)

    def train(self, mode=True):
        """As of any net, but the predictor stays as it is used: without dropout."""
        super().train(mode)
        self.predictor.eval()
        return self

    @torch.no_grad()
    def fit(self, z, act, z_next, ridge=1.0):
        """Fits the linear map, the scale of what it lacks, and the bounds: z (N, D), act (N, 3)."""
        x = torch.cat([z, normalize_action(act), torch.ones_like(z[:, :1])], dim=1).double()
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ z_next.double())
        self.linear.weight.copy_(weight[:-1].T)
        self.linear.bias.copy_(weight[-1])
        rare = int(RARE * len(z))
        self.bounds.copy_(z.sort(dim=0).values[[rare, -1 - rare]])
        self.scale.copy_((z_next - x @ weight).std(dim=0).clamp_min(1e-4))

    def expect(self, z, act):
        """What follows z (..., D) under act (..., 3), linearly."""
        with torch.autocast(z.device.type, enabled=False):
            return self.linear(torch.cat([z, normalize_action(act)], dim=-1))

    @torch.no_grad()
    def guesses(self, base, rollouts):
        """What rollouts (..., planned) of the predictor add to base (..., D), in units of scale."""
        P = self.planned
        return [((z - base[..., :P]) / self.scale[:P]).clamp(-FAR, FAR) for z in rollouts]

    def remember(self, z, act, noise, guesses, h=None, at=slice(None)):
        """z (B, T, D), act (B, T, 3), noise (B, T, 1), guesses (B, T, planned) ->
        (what the flow is conditioned on: (B, T, width), and the guesses' part of y), h.

        at: of which of the T latents.
        """
        seen = torch.cat([z, normalize_action(act), noise], dim=2)
        remembered, h = self.memory(seen, h)
        guesses = [guess[:, at] for guess in guesses]
        guessed = sum(gate * guess for gate, guess in zip(self.gates, guesses))
        guessed = nn.functional.pad(guessed, (0, self.dim - self.planned))
        known = torch.cat([remembered[:, at], seen[:, at], *guesses], dim=2)
        return (self.condition(known), guessed), h

    def denoise(self, x, time, condition, guessed):
        """The expected y (..., D), given x (..., D) on the way at time (..., 1) in 0..1."""
        waves = time * torch.arange(1, FREQUENCIES + 1, device=x.device) * math.pi / 2
        y = self.into(torch.cat([x, waves.sin(), waves.cos()], dim=-1)) + condition
        for block in self.blocks:
            y = y + block(y)
        return self.out(y).float() + guessed

    def see(self, seen, act, noise, at=slice(None)):
        """Windows seen (B, T, D), act (B, T, 3), noise (B, T, 1) -> (base (B, T, D), condition).

        at: of which of the T latents.
        """
        base = self.expect(seen, act)
        guesses = self.guesses(base, [self.rollouts(seen, act, every) for every in ANCHORS])
        return base[:, at], self.remember(seen, act, noise, guesses, at=at)[0]

    @torch.no_grad()
    def rollouts(self, z, act, every):
        """Rollouts (B, T, planned) of the predictor, begun at every so many of z (B, T, D)."""
        (B, T), rest = act.shape[:2], -act.shape[1] % every
        act = nn.functional.pad(act, (0, 0, 0, rest)).reshape(-1, every, ACT)
        z = z[:, ::every, : self.planned].flatten(0, 1)
        return self.predictor.rollout(z, act).reshape(B, T + rest, -1)[:, :T]

    def go_on(self, run, every, z, act):
        """A rollout of the predictor, a step further under act (B, 3): (state, rest, steps).

        rest: what the state lacks of the latent. After `every` steps it starts anew, at z (B, D).
        """
        p = self.predictor
        if run is None or run[2] == every:
            planned = z[:, : self.planned]
            state = p.to_state(planned)
            run = state, planned - p.to_latent(state), 0
        state, rest, steps = run
        return p.transition(state, act), p.decay_logit.sigmoid() * rest, steps + 1

    @torch.no_grad()
    def mean_error(self, z, act):
        """Squared error (B, T, D) of the mean in units of `scale`, as `loss`, without noise."""
        noise = z.new_zeros(*act.shape[:2], 1)
        base, condition = self.see(z[:, :-1], act, noise)
        mean = self.denoise(torch.zeros_like(base), noise, *condition)
        return (mean - (z[:, 1:] - base) / self.scale).pow(2)

    def loss(self, z, act):
        """Squared error (B, n) of the flow's y: z (B, T + 1, D), act (B, T, 3).

        Of n, every second one, of the T latents: neighbours teach much the same.
        """
        T = act.shape[1]
        at = slice(int(torch.randint(min(2, T), ())), None, 2)
        noise = torch.rand(len(z), 1, 1, device=z.device).expand(-1, T, 1)
        n = (torch.randn_like(z[:, 1:]) + torch.randn_like(z[:, :1])) / math.sqrt(2)
        seen = z[:, :-1] + MAX_NOISE * noise**2 * self.scale * n
        base, condition = self.see(seen, act, noise, at)
        y, time = (z[:, 1:][:, at] - base) / self.scale, torch.rand_like(noise[:, at])
        x = torch.lerp(torch.randn_like(y), y, time)
        return (self.denoise(x, time, *condition) - y).pow(2).mean(dim=2)

    def rollout_error(self, z, act):
        """Squared error (B, T) of the predictor's rollout: z (B, T + 1, D), act (B, T, 3).

        T is at most the last of ANCHORS: later latents are left out.
        """
        planned = z[:, : ANCHORS[-1] + 1, : self.planned]
        z_hat = self.predictor.rollout(planned[:, 0], act[:, : ANCHORS[-1]]).float()
        return (z_hat - planned[:, 1:]).pow(2).mean(dim=2)

    @torch.no_grad()
    def step(self, z, act, memory=None, temperature=TEMPERATURE, generator=None):
        """Samples the latent that follows z (B, D) under act (B, 3) -> (it, the next memory).

        memory: of the step before, None at the start of a dream; (h (1, B, hidden) of the GRU, the
        rollout so far of each of ANCHORS, as `go_on` makes it). temperature: how far the sample
        may be from the mean; 0 is the mean, 1 as it was learned.
        """
        level = SEEN_NOISE if memory else 0.0
        base = self.expect(z, act)
        h, runs = memory or (None, [None] * len(ANCHORS))
        runs = [self.go_on(run, every, z, act) for every, run in zip(ANCHORS, runs)]
        ends = [self.predictor.to_latent(state) + rest for state, rest, _ in runs]
        guesses = [guess[:, None] for guess in self.guesses(base, ends)]
        seen = z[:, None], act[:, None], z.new_full((len(z), 1, 1), level)
        condition, h = self.remember(*seen, guesses, h)
        condition = [c[:, 0] for c in condition]

        # the midpoint method
        time = z.new_zeros(len(z), 1)
        mean = self.denoise(torch.zeros_like(z), time, *condition)
        x = torch.randn(z.shape, device=z.device, generator=generator)
        velocity = lambda x, t: (self.denoise(x, time + t, *condition) - x) / (1 - t)
        for k in range(FLOW_STEPS if temperature else 0):
            t, half = k / FLOW_STEPS, 0.5 / FLOW_STEPS
            x = x + 2 * half * velocity(x + half * velocity(x, t), t + half)
        y = mean + temperature * (x - mean)
        return (base + y * self.scale).clamp(*self.bounds), (h, runs)
