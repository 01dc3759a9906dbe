"""Plans: settings of the planner, their flags, units, and the noise of candidates."""

from dataclasses import dataclass, fields

import torch

from car import MAX_STEPS
from support.cli import Number, fraction

STEER = 0.5  # steering of a plan's u = 1; the joint stops at 0.4, so full lock is well inside
BRAKE = 0.4  # brake of u = -1; 0.1 to 0.3 is a lot
ITERATIONS = {"shooting": 1, "icem": 3, "mppi": 1}  # of a plan, unless --iterations says otherwise


@dataclass
class PlanConfig:
    """Settings of the planner: the flags of `planning` and their defaults."""

    planner: str = "mppi"
    energy: str = "value"
    samples: int = 256  # candidates in the first iteration
    policy_share: float = 1 / 16  # of the candidates that the cost model's policy proposes
    policy_noise: float = 0.3  # around the policy, a multiple of `noise`
    horizon: int = 15  # latents in a rollout
    iterations: int | None = None  # None: ITERATIONS of the planner
    elites: int = 32
    noise_kind: str = "ar1"
    rho: float = 0.8  # AR(1) noise: correlation from step to step
    beta: float = 2.0  # power-law noise: power falls with frequency ** beta
    noise: tuple = (0.4, 0.5)  # standard deviation of steering and throttle, in units of full
    open_loop: float = 0.0  # share of the plans that are followed to their end
    max_gas: float | None = None  # most throttle in a plan; None: `take_gas` sets it

    @classmethod
    def of(cls, args):
        """The PlanConfig in the flags of `planning`."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

    @property
    def n_iterations(self):
        """Iterations of a plan; shooting has one."""
        return 1 if self.planner == "shooting" else self.iterations or ITERATIONS[self.planner]

    def correlate(self, white):
        """White noise (N, H, 2) -> noise of `noise_kind`, correlated over the H steps."""
        ar1 = self.noise_kind == "ar1"
        return ar1_noise(white, self.rho) if ar1 else powerlaw_noise(white, self.beta)

    def draw_plans(self, N, mean, std, generator=None):
        """N random plans (N, H, 2) around mean (H, 2), clipped; std (2,) or (H, 2) scales noise."""
        white = torch.randn(N, len(mean), 2, generator=generator, device=mean.device)
        return clip_plan(mean + std * self.correlate(white), self.max_gas)


def planning(p):
    """Adds the flags of planner and energy, the same wherever a plan is made."""
    add = p.add_argument_group("planner").add_argument
    refit = "icem and mppi refit the mean of the candidates to their elites"
    add("--planner", choices=list(ITERATIONS), help=refit)
    energies = ["value", "density", "classifier"]
    add("--energy", choices=energies, help="of a latent: see CostModel in networks.py")
    add("--samples", type=Number(int, 2, 10**6), help="candidates; icem: fewer in each iteration")
    proposed = "share of the candidates that imitate the expert, rounded up; 0 for none"
    add("--policy_share", type=fraction, help=proposed)
    add("--policy_noise", type=Number(float, 0, 100), help="their noise, as a multiple of --noise")
    add("--horizon", type=Number(int, 1, MAX_STEPS), help="latents in a rollout")
    most = f"of icem (default: {ITERATIONS['icem']}) or mppi (default: {ITERATIONS['mppi']})"
    add("--iterations", type=Number(int, 1, 1000), help=most)
    add("--elites", type=Number(int, 1, 10**6), help="best candidates, which make the next mean")
    kinds = "of the candidates over time: ar1 (see --rho) or powerlaw (see --beta)"
    add("--noise_kind", choices=["ar1", "powerlaw"], help=kinds)
    add("--rho", type=Number(float, 0, 0.9999), help="ar1: correlation from step to step")
    add("--beta", type=Number(float, 0, 10), help="powerlaw: 0 is white noise, 1 pink, 2 red")
    deviation = "standard deviation of steering and throttle, of full"
    add("--noise", type=Number(float, 0, 100), nargs=2, help=deviation)
    add("--max_gas", type=fraction, help="most gas in a plan (default: as the cost model stores)")
    p.set_defaults(**vars(PlanConfig()))
    p.set_defaults(threads=1)  # a second one saves a fifth, and waits for other processes


def take_gas(args, payload):
    """Sets args.max_gas, where it is None, to the limit in a cost model's payload; says so."""
    if args.max_gas is None:
        args.max_gas = payload.get("max_gas", 1.0)
        stored = "stored with" if "max_gas" in payload else "no limit is stored with"
        print(f"gas up to {args.max_gas:g}, {stored} the cost model")


def clip_plan(u, max_gas):
    """Clips plans u (..., 2) to -1..1, and their throttle to max_gas."""
    return u.clamp(u.new_tensor([-1.0, -1.0]), u.new_tensor([1.0, max_gas]))


def shift(u):
    """Plans u (..., H, 2) a step later; the last action goes on."""
    return torch.cat([u[..., 1:, :], u[..., -1:, :]], dim=-2)


def to_action(u):
    """Plans u (..., 2) in -1..1 (steer, throttle) -> actions (..., 3): steer, gas, brake."""
    steer, throttle = u.unbind(-1)
    return torch.stack([STEER * steer, throttle.clamp_min(0), BRAKE * (-throttle).clamp_min(0)], -1)


def to_plan(act):
    """Actions (..., 3) -> plans (..., 2) in -1..1 that come nearest."""
    steer, gas, brake = act.unbind(-1)
    return torch.stack([steer / STEER, gas - brake / BRAKE], -1).clamp(-1, 1)


def ar1_noise(white, rho):
    """White noise (N, H, 2) -> stationary AR(1) noise of unit variance: correlation rho ** lag."""
    H = white.shape[1]
    lag = (torch.arange(H)[:, None] - torch.arange(H)).abs()
    root = torch.linalg.cholesky(float(rho) ** lag.double()).float().to(white.device)
    return torch.einsum("ts,nsa->nta", root, white)


def powerlaw_noise(white, beta):
    """White noise (N, H, 2) -> noise of unit variance with power ~ frequency ** -beta (Timmer and
    Koenig 1995).

    Frequency 0, which a plan holds throughout, has the power of one period in H steps. The noise is
    periodic: the end of a plan is correlated with its beginning.
    """
    H = white.shape[1]
    periods = torch.fft.fftfreq(H, 1 / H, dtype=torch.float64).abs().clamp_min(1)
    gain = periods ** (-beta / 2)
    gain = (gain / gain.square().mean().sqrt())[: H // 2 + 1, None].float().to(white.device)
    return torch.fft.irfft(torch.fft.rfft(white, dim=1) * gain, n=H, dim=1)
