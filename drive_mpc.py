"""Day 4: model predictive control. The car minimises energy in its imagination, from pixels alone.

Every `repeat` steps: encode the last frames, dream --samples futures of correlated actions over
--horizon latents, sum the energy of each, act. Drives the official CarRacing-v3. Reads ROOT/models,
or where it has no encoder, the weights that come with the code; shows the drives in a window where
there is a display, writes visuals/drive_mpc.mp4, .gif and, with --json, a file of scores, after
each drive: the same command goes on with it. `--policy random`, `expert`, `no_model` (follows
random plans while the energy of the present state falls) and `untrained` (a fresh predictor) give
the rows to compare with, by the same code. The driver gets observations and remembers its own
actions; scores and tiles are read from the simulator after the fact.

    python drive_mpc.py --episodes 3 --track_seed 100000
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import secrets
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from buffer import write_chunk
from car import MAX_STEPS, ZOOM_STEPS
from car.env import make_env, observe
from car.telemetry import telemetry
from collect_race_data import Expert
from networks import DISCOUNT, Predictor, normalize_action, scored_steps, stack_frames
from support.checkpoints import (
    find_models,
    fingerprint,
    latest,
    load_frozen,
    need_nets,
    pretrained_hint,
    require_dir,
)
from support.cli import Number, Stop, command, fail, fraction, parser, run, track_number
from support.device import autocast, set_up
from support.dreams import load_decoder
from support.files import is_stream, lock_file, output_file, writable
from support.lap_view import VIDEO_FPS, LapView
from support.pictures import VideoRecorder
from support.progress import progress
from support.scores import Report, compare, row_name, summary
from support.window import KEYS_TEXT, NoWindow, open_window
from support.workers import FIRST_SEED, chunk_provenance

START_GAS = 0.25  # held through the opening zoom, in which latents mean little
STEER = 0.5  # steering of a plan's u = 1; the joint stops at 0.4, so full lock is well inside
BRAKE = 0.4  # brake of u = -1; 0.1 to 0.3 is a lot
RHO = 0.8  # correlation of the AR(1) noise of a plan from step to step
BETA = 2.0  # exponent of the power-law noise: power falls with frequency ** BETA
NOISE = 0.4, 0.5  # its standard deviation in units of full steering, full throttle
DISTURBANCES = ["none", "colours", "noise", "late"]
NOISE_STD, DELAY_STEPS = (
    10,
    2,
)  # grey levels, standard deviation of noise; steps that late frames lie back
OWN = "data_mpc"  # folder of the episodes that --save_data writes
POLICIES = ["random", "no_model", "untrained", "mpc", "expert"]  # in the order of the table
WORST = 1e9  # energy of a future that overflowed
ROUNDS = {"shooting": 1, "icem": 3, "mppi": 1}  # of refinement, unless --iterations says otherwise
DECAY, REUSED, MOMENTUM, LEAST_STD = 1.25, 0.3, 0.1, 0.1  # of iCEM; three are the paper's


def arguments():
    p = parser(__doc__, models=True)
    p.epilog = KEYS_TEXT
    g = p.add_argument_group("task")
    g.add_argument(
        "--episodes", type=Number(int, 1, 100_000), default=3, help="tracks, one episode each"
    )
    g.add_argument(
        "--track_seed",
        type=track_number,
        default=100_000,
        help="of the first episode; the next ones follow. 100000 to 100099 are for "
        "reporting, 200000 to 299999 for choosing",
    )
    g.add_argument(
        "--policy",
        default="mpc",
        choices=POLICIES,
        help="who drives; all but mpc are rows to compare it with",
    )
    g.add_argument(
        "--compare",
        nargs="*",
        default=[],
        choices=POLICIES,
        metavar="POLICY",
        help="also drive these policies on the same tracks, for the rows of a table",
    )
    g.add_argument(
        "--env",
        choices=["official", "fast"],
        default="official",
        help="scores are the official environment's; fast is for experiments",
    )
    g.add_argument(
        "--pace",
        type=fraction,
        default=1.0,
        help="of the expert: 1 drives for the score, 0 is calm",
    )
    g.add_argument(
        "--disturb",
        choices=DISTURBANCES,
        default="none",
        help="what the driver was not trained for: other colours of lawn and road, "
        f"frames with noise of {NOISE_STD} grey levels, or {DELAY_STEPS} steps old",
    )
    planning(p)
    g = p.add_argument_group("output")
    g.add_argument(
        "--json",
        type=output_file,
        help="write the scores there after each drive; the same command goes on with an "
        "unfinished file",
    )
    g.add_argument(
        "--save_data",
        action="store_true",
        help=f"write each episode of --policy as a chunk to ROOT/{OWN}, to learn from: "
        f"only on tracks from {FIRST_SEED} on",
    )
    g.add_argument(
        "--film",
        type=Number(int, 0, 1000),
        default=1,
        help="laps of --policy that the film shows, the first ones",
    )
    g.add_argument("--headless", action="store_true", help="no window: as fast as it goes")
    g.add_argument("--no_video", action="store_true", help="scores only, no window, no pictures")
    args = p.parse_args()
    if args.save_data and args.track_seed < FIRST_SEED:
        p.error(
            f"--save_data --track_seed {args.track_seed}: tracks below {FIRST_SEED} are never "
            f"learned from; expected {FIRST_SEED} or more"
        )
    return args


def planning(p):
    """The flags of planner and energy, the same wherever a plan is made."""
    g = p.add_argument_group("planner")
    g.add_argument(
        "--planner",
        choices=["shooting", "icem", "mppi"],
        default="mppi",
        help="shooting: the plan of lowest energy; icem: elites refine mean and spread, "
        "and are kept for the next plan; mppi: the elites' mean weighted by energy",
    )
    g.add_argument(
        "--energy",
        choices=["value", "density", "classifier"],
        default="value",
        help="of a latent: distance to the expert's, with what is to come of it in "
        "trouble, or without; or the classifier's logit",
    )
    g.add_argument(
        "--samples",
        type=Number(int, 2, 10**6),
        default=1000,
        help=f"futures dreamt in a round; icem: {DECAY} times fewer in each next one",
    )
    g.add_argument(
        "--horizon", type=Number(int, 1, MAX_STEPS), default=15, help="latents in a future"
    )
    g.add_argument(
        "--iterations",
        type=Number(int, 1, 1000),
        help=f"of refinement (default: icem {ROUNDS['icem']}, mppi {ROUNDS['mppi']}; "
        "shooting has one)",
    )
    g.add_argument(
        "--elites",
        type=Number(int, 1, 10**6),
        default=32,
        help="best plans of a round, from which icem and mppi make the next",
    )
    g.add_argument(
        "--noise_kind",
        choices=list(NOISES),
        default="ar1",
        help="how the actions of a plan hang together in time: ar1, by --rho from step "
        "to step; powerlaw, by a spectrum that falls with frequency ** --beta, as "
        "iCEM's do. A horizon of 15 has 8 frequencies, 0 included",
    )
    g.add_argument(
        "--rho",
        type=Number(float, 0, 0.9999),
        default=RHO,
        help="ar1: correlation from step to step, variance kept",
    )
    g.add_argument(
        "--beta",
        type=Number(float, 0, 10),
        default=BETA,
        help="powerlaw: 0 is white noise, 1 pink, 2 red",
    )
    g.add_argument(
        "--noise",
        type=Number(float, 0, 100),
        nargs=2,
        default=list(NOISE),
        metavar=("STEER", "THROTTLE"),
        help="standard deviation, in units of full",
    )
    g.add_argument(
        "--max_gas",
        type=fraction,
        help="at most, in a plan (default: the limit that train_cost_model.py stored "
        "with these nets, by how well they imagine; those that trained for minutes "
        "may spin the car with more than 0.5)",
    )


# ------------------------------------------------------------------ planner


def ar1_noise(white, rho):
    """White noise (N, H, 2) -> stationary AR(1) noise of unit variance: correlation rho ** lag."""
    H = white.shape[1]
    lag = (torch.arange(H)[:, None] - torch.arange(H)).abs()
    root = torch.linalg.cholesky(float(rho) ** lag.double()).float().to(white.device)
    return torch.einsum("ts,nsa->nta", root, white)


def powerlaw_noise(white, beta):
    """White noise (N, H, 2) -> power-law noise of unit variance: power ~ frequency ** -beta (Timmer
    and Koenig 1995).

    The frequencies are those of H steps, 0 to H // 2 periods of them; frequency 0, what a plan
    holds throughout, has the power of one period. So the noise is periodic: a plan's end is
    correlated with its beginning, where AR(1) noise has forgotten it.
    """
    H = white.shape[1]
    periods = torch.fft.fftfreq(H, 1 / H, dtype=torch.float64).abs().clamp_min(1)
    gain = periods ** (-beta / 2)
    gain = (gain / gain.square().mean().sqrt())[: H // 2 + 1, None].float().to(white.device)
    return torch.fft.irfft(torch.fft.rfft(white, dim=1) * gain, n=H, dim=1)


NOISES = {
    "ar1": lambda white, cfg: ar1_noise(white, cfg.rho),
    "powerlaw": lambda white, cfg: powerlaw_noise(white, cfg.beta),
}


def draw_plans(N, mean, std, cfg, generator=None):
    """N random plans (N, H, 2) around mean (H, 2), within what can be done; `std` (H, 2) or (2,)
    scales the noise of cfg."""
    white = torch.randn(N, len(mean), 2, generator=generator, device=mean.device)
    return clip_plan(mean + std * NOISES[cfg.noise_kind](white, cfg), cfg.max_gas)


def clip_plan(u, gas):
    """Plans u (..., 2) within what can be done: -1..1, throttle no further than `gas`."""
    return u.clamp(u.new_tensor([-1.0, -1.0]), u.new_tensor([1.0, gas]))


def to_action(u):
    """Plans u (..., 2) in -1..1 (steer, throttle) -> actions (..., 3): steer, gas, brake."""
    steer, throttle = u.unbind(-1)
    return torch.stack([STEER * steer, throttle.clamp_min(0), BRAKE * (-throttle).clamp_min(0)], -1)


class RolloutCost:
    """Costs of many futures of one latent, dreamt and judged in one pass, in float32.

    `(z (1, D), act (N, H, 3)) -> (N,)`: CostModel.judge of `predictor.rollout`. For the density,
    Predictor.step, read and CostModel.energy are folded: of the dreams only the predictor's
    coordinates are written, in place, and the judge is one product for each that it looks at.
    `looks(H)` says which those are.
    """

    def __init__(self, predictor, cost, kind, looks=scored_steps):
        self.predictor, self.cost, self.kind, self.looks = predictor, cost, kind, looks
        self.into, self.out = (
            layer.weight.T.contiguous() for layer in (predictor.into, predictor.out)
        )
        self.judge = predictor.to_latent.weight.T @ cost.whiten  # (S, D)

    @torch.inference_mode()
    def __call__(self, z, act):
        N, H, _ = act.shape
        p, cost = self.predictor, self.cost
        if self.kind == "classifier":
            return cost.rollout_cost(z, p.rollout(z.expand(N, -1), act), self.kind)
        trouble = self.kind == "value" and cost.is_ood(z)
        h, a = p.to_state(z), normalize_action(act).transpose(0, 1).contiguous()
        rests = p.residual(z, h, H)[0] + p.to_latent.bias  # (H, D)
        bias = (rests - cost.mu) @ cost.whiten
        x = torch.cat([h.expand(N, -1), a[0]], dim=1)  # coordinates and action
        y, off = x.new_empty(N, p.into.out_features), x.new_empty(N, p.dim)
        norm, total, looks = x.new_empty(N), x.new_zeros(N), self.looks(H)
        for t in range(H):
            x[:, p.state :] = a[t]
            torch.addmm(p.into.bias, x, self.into, out=y)
            x[:, : p.state].addmm_(F.silu(y, inplace=True), self.out)
            if t not in looks:
                continue
            torch.addmm(bias[t], x[:, : p.state], self.judge, out=off)
            torch.linalg.vector_norm(off, dim=1, out=norm)
            norm.square_().mul_(0.5 / p.dim)
            total.add_(cost.saturate(norm) if trouble else norm, alpha=H / len(looks))
        if trouble:
            last = torch.addmm(rests[-1], x[:, : p.state], p.to_latent.weight.T)
            total.add_(cost.terminal_value(last), alpha=DISCOUNT**H)
        return total


class Plan(NamedTuple):
    """What the planner remembers from one plan to the next."""

    u: torch.Tensor  # (H, 2) the plan that is followed
    mean: torch.Tensor  # (H, 2) around which plans were drawn last: of icem not the one followed
    elites: torch.Tensor  # (K, H, 2) the best plans that were drawn, in order of their energy

    @staticmethod
    def none(H, device="cpu"):
        """Before the first one: coasting straight on."""
        u = torch.zeros(H, 2, device=device)
        return Plan(u, u, u[None])

    def shifted(self):
        """The same a step later, with the last action going on."""
        return Plan(*(torch.cat([u[..., 1:, :], u[..., -1:, :]], dim=-2) for u in self))


@torch.inference_mode()
def plan(z, futures, previous, cfg, generator=None):
    """The next Plan, and the energies (N,) of the candidates of its last round.

    z (1, D) is the present latent, `previous` the last Plan, not yet shifted; cfg has the fields of
    `planning`; futures(z, act (N, H, 3)) gives energies (N,), as `Futures` does. When all futures
    cost the same the last plan goes on.

    mppi: Williams et al. 2017. icem: Pinneri et al. 2020, arXiv:2008.06389: fewer candidates in
    each round; a share of the elites is kept for the next round and, shifted, for the next plan;
    mean and spread follow the elites with a momentum, the spread no less than LEAST_STD; the best
    elite is followed. Its noise is --noise_kind powerlaw. Unlike theirs, the mean is a candidate in
    every round, not in the last one only.
    """
    N, icem, last = cfg.samples, cfg.planner == "icem", previous.shifted()
    K = min(cfg.elites, N - 1)
    (u, mean, elites), std = last, torch.tensor(cfg.noise, device=z.device).expand_as(last.mean)
    for i in range(1 if cfg.planner == "shooting" else cfg.iterations or ROUNDS[cfg.planner]):
        n = min(N, max(int(N / DECAY**i), 2 * K)) if icem else N
        drawn = draw_plans(n, mean, std, cfg, generator)
        drawn[0] = mean
        if icem:
            kept = elites[: max(1, int(REUSED * K))]
            steps = len(mean) - (i == 0)  # the last action of a shifted elite is drawn anew
            drawn[n - len(kept) :, :steps] = kept[:, :steps]
        elif i > 0:
            drawn[-K:] = elites
        energies = futures(z, to_action(drawn)).nan_to_num(nan=WORST, posinf=WORST)  # (n,)
        if energies.min() >= WORST:
            fail(
                "every dreamt future has an energy that is not a number; use --precision fp32, or "
                "train the predictor again"
            )
        low, order = energies.topk(K, largest=False)
        if not energies.max() > energies.min():
            return Plan(u, mean, elites), energies  # in the first round the last plan
        elites = drawn[order]
        if icem:
            u, mean = elites[0], torch.lerp(elites.mean(dim=0), mean, MOMENTUM)
            std = torch.lerp(elites.std(dim=0, correction=0), std, MOMENTUM).clamp_min(LEAST_STD)
        elif cfg.planner == "mppi":
            weights = torch.softmax((low.min() - low) / (low.std(correction=0) + 1e-9), dim=0)
            u = mean = torch.einsum("n,nta->ta", weights, elites)
        else:
            u = mean = elites[0]
    return Plan(u, mean, elites), energies


class Driver:
    """Drives from pixels: `act(frame)` sees 64x64 frames and its own past plans, nothing else."""

    def __init__(self, nets, cfg, device, dtype, seed=0):
        self.nets, self.cfg, self.device, self.dtype = nets, cfg, device, dtype
        self.encoder = nets["encoder"]
        self.futures = RolloutCost(nets["predictor"], nets["cost"], cfg.energy)
        self.seed, self.generator = seed, torch.Generator(device)

    def reset(self, track_seed):
        """A new episode: nothing is remembered; the same track draws the same noise."""
        e = self.encoder
        self.generator.manual_seed(self.seed + track_seed)
        self.frames = deque(maxlen=(e.history - 1) * e.repeat + 1)
        self.planned = Plan.none(self.cfg.horizon, self.device)
        self.u = self.planned.u  # (H, 2) what is followed
        self.t, self.ms, self.energies = 0, [], None
        self.action = np.array([0, START_GAS, 0], np.float32)

    @torch.inference_mode()
    def encode(self):
        """The present latent (1, D) from the frames so far; the first stands for earlier ones."""
        e, seen = self.encoder, list(self.frames)
        picked = [seen[max(0, len(seen) - 1 - k * e.repeat)] for k in reversed(range(e.history))]
        obs = torch.from_numpy(np.stack(picked)).permute(0, 3, 1, 2)[None].to(self.device)
        with autocast(self.device, self.dtype):
            return e(stack_frames(obs, e.history))

    def act(self, frame):
        """frame (64, 64, 3) uint8 -> action (3,) float32; plans every `repeat` steps."""
        self.frames.append(frame)
        if self.t >= ZOOM_STEPS and (self.t - ZOOM_STEPS) % self.encoder.repeat == 0:
            start = time.perf_counter()
            self.replan()
            self.action = to_action(self.u[0]).cpu().numpy()  # waits for the device
            self.ms.append(1000 * (time.perf_counter() - start))
        self.t += 1
        return self.action

    def replan(self):
        """Encodes, dreams, judges: sets the plan."""
        self.z = self.encode()
        self.planned, self.energies = plan(
            self.z, self.futures, self.planned, self.cfg, self.generator
        )
        self.u = self.planned.u

    @torch.inference_mode()
    def dream(self):
        """z_hat (H, D) of the present plan."""
        return self.nets["predictor"].rollout(self.z, to_action(self.u)[None])[0]


class NoModelDriver(Driver):
    """Cannot imagine: follows a random plan while the energy of the present falls, else redraws."""

    def reset(self, track_seed):
        super().reset(track_seed)
        self.now = None

    def replan(self):
        self.z, before = self.encode(), self.now
        self.now = float(self.nets["cost"].energy(self.z, self.cfg.energy))
        self.u = torch.cat([self.u[1:], self.u[-1:]])
        if before is None or self.now > before:
            self.u = draw_plans(
                1,
                torch.zeros_like(self.u),
                self.u.new_tensor(self.cfg.noise),
                self.cfg,
                self.generator,
            )[0]


def take_gas(cfg, of_cost):
    """Sets --max_gas, where it was not given, to the limit in a cost model's payload; says so."""
    if cfg.max_gas is None:
        cfg.max_gas = of_cost.get("max_gas", 1.0)
        print(
            f"gas up to {cfg.max_gas:g}, "
            + (
                "stored with the cost model"
                if "max_gas" in of_cost
                else "for the cost model stores no limit"
            )
        )


def load_driver(args, cfg, policy="mpc"):
    """(driver, decoder or None): the nets of ROOT/models, or those that come with the code, checked
    to belong together; sets cfg.max_gas to their own limit where it is None."""
    device, dtype = set_up(args)
    models = find_models(args.root, getattr(args, "models", None))
    need_nets(models, args.root)
    encoder, _ = load_frozen(latest(models, "encoder_mixed"), "encoder", device, "train_encoder.py")
    predictor, of_predictor = load_frozen(
        latest(models, "predictor"), "predictor", device, "train_predictor.py"
    )
    cost, of_cost = load_frozen(
        models / "cost_model_final.pth", "cost", device, "train_cost_model.py"
    )
    key = fingerprint(encoder)
    for name, payload, stem, on, its_key in (
        ("train_predictor.py", of_predictor, "encoder_mixed", "encoder", key),
        ("train_cost_model.py", of_cost, "encoder_mixed", "encoder", key),
        ("train_cost_model.py", of_cost, "predictor", "predictor", fingerprint(predictor)),
    ):
        if payload.get(f"{on}_key") != its_key:
            fail(
                f"{models}: what {name} wrote belongs to another {on} than "
                f"{latest(models, stem)}; run {command(name, args.root, '--fresh')}"
                f"{pretrained_hint(models)}"
            )
    if policy == "untrained":
        torch.manual_seed(args.seed)
        predictor = Predictor(**predictor.args).to(device).eval().requires_grad_(False)
    nets = {"encoder": encoder, "predictor": predictor, "cost": cost}
    kind = NoModelDriver if policy == "no_model" else Driver
    take_gas(cfg, of_cost)
    driver = kind(nets, cfg, device, dtype, args.seed)
    driver.models = str(models)
    return driver, load_decoder(models, key, device)


class BaselineDriver:
    """The rows to compare with that are no pixel drivers: uniform random actions, or the expert."""

    def __init__(self, env, policy, pace, seed):
        self.env, self.ms, self.models = env, [], None
        if policy == "expert":
            self.expert = Expert(pace)
            self.reset = lambda track_seed: self.expert.reset(env)
            self.act = lambda frame: self.expert.act(env)
        else:
            self.reset = lambda track_seed: env.action_space.seed(seed + track_seed)
            self.act = lambda frame: env.action_space.sample()


class Disturbance:
    """What stands between the camera and the driver: nothing, noise, or a delay."""

    def __init__(self, kind="none"):
        self.kind = kind

    def reset(self, track_seed):
        self.rng, self.past = np.random.default_rng(track_seed), deque(maxlen=DELAY_STEPS + 1)

    def __call__(self, frame):
        """frame (64, 64, 3) uint8 -> the one that the driver gets."""
        self.past.append(frame)
        if self.kind == "noise":
            return (
                (frame + self.rng.normal(0, NOISE_STD, frame.shape)).clip(0, 255).astype(np.uint8)
            )
        return self.past[0] if self.kind == "late" else frame


class EpisodeRecorder:
    """Keeps an episode as a chunk of the folder, telemetry beside what the driver saw and did."""

    def __init__(self, folder, policy, kind):
        self.folder, self.policy = writable(folder), policy
        self.meta = chunk_provenance(folder.name, kind)

    def reset(self):
        self.obs, self.act, self.reward, self.state = [], [], [], []

    def see(self, env, frame):
        self.obs.append(frame)
        self.state.append(telemetry(env))

    def save(self, track_seed, terminated, truncated, lap_finished):
        """Writes the episode; the uid tells policy and track, and when."""
        ends = np.zeros((2, len(self.act)), bool)
        ends[:, -1] = terminated, truncated
        uid = f"{self.folder.name}-{self.policy}-t{track_seed}-{secrets.token_hex(4)}"
        write_chunk(
            self.folder,
            self.meta
            | {
                "track_seed": track_seed,
                "uid": uid,
                "policy": {"name": self.policy},
                "lap_finished": lap_finished,
            },
            obs=np.stack(self.obs),
            act=np.stack(self.act),
            reward=np.array(self.reward, np.float32),
            terminated=ends[0],
            truncated=ends[1],
            telemetry=np.stack(self.state),
        )


def drive(env, driver, track_seed, watch=lambda *seen: True, disturbance=None, tape=None):
    """One episode -> its row of the report, or None when it was broken off.

    `watch(env, frame, driver, return)` sees every step and breaks off by returning False; a `tape`
    keeps the episode.
    """
    obs, _ = env.reset(seed=track_seed)
    disturbance = disturbance or Disturbance()
    for part in (driver, disturbance):
        part.reset(track_seed)
    seen = observe(env, obs)
    if tape:
        tape.reset()
        tape.see(env, seen)
    total, steps, ended, info = 0.0, 0, False, {}
    while not ended:
        frame = disturbance(seen)
        action = driver.act(frame)
        obs, reward, terminated, truncated, info = env.step(action)
        seen = observe(env, obs)
        total, steps, ended = total + reward, steps + 1, terminated or truncated
        if tape:
            tape.see(env, seen)
            tape.act.append(action)
            tape.reward.append(reward)
        if not watch(env, frame, driver, total):
            return None
    if tape:
        tape.save(track_seed, terminated, truncated, bool(info.get("lap_finished", False)))
    tiles, N = env.unwrapped.tile_visited_count, len(env.unwrapped.track)
    ms = np.percentile(driver.ms, (50, 99)) if driver.ms else (0.0, 0.0)
    return {
        "track_seed": track_seed,
        "return": round(float(total), 2),
        "steps": steps,
        "tiles": tiles,
        "tiles_missed": N - tiles,
        "lap_finished": bool(info.get("lap_finished", False)),
        "plan_ms_p50": round(float(ms[0]), 2),
        "plan_ms_p99": round(float(ms[1]), 2),
    }


# ------------------------------------------------------------------ main


def run_policy(args, policy, driver, view, window, stop, kept, save):
    """Drives all episodes with one policy, prints a line each -> its report (None: no episode).

    kept: {track_seed: row} of an earlier run; save(report) is called after each drive.
    """
    env = make_env(args.env, **({"domain_randomize": True} if args.disturb == "colours" else {}))
    disturbance, tape, name = Disturbance(args.disturb), None, row_name(policy, args)
    if args.save_data and policy == args.policy:
        tape = EpisodeRecorder(args.root / OWN, policy, args.env)
    driver = driver or BaselineDriver(env, policy, args.pace, args.seed)
    print(
        f"{name:>9}: {'track':>7} {'return':>7} {'steps':>5} {'tiles':>5} {'missed':>6} "
        f"{'lap':>4} {'plan ms p50':>11} {'p99':>6}"
    )
    done = dict(kept)
    tracks = range(args.track_seed, args.track_seed + args.episodes)
    score = lambda: summary(name, [done[s] for s in sorted(done)], args.env, driver.models)
    for i, seed in enumerate(progress(tracks, desc=name, unit="track", leave=False)):
        if stop or window.quit:
            break
        if seed in kept:
            continue
        watch = lambda *seen: not stop
        if view:
            view.reset(seed)
            window.record(policy == args.policy and i < args.film)
            watch = lambda *seen: view(*seen) and not stop
        r = drive(env, driver, seed, watch, disturbance, tape)
        if r is None and (stop or window.quit):
            break
        if r is None:
            tqdm.write(f"{'':10} {seed:7} left after {view.step} steps, not counted")
            continue
        done[seed] = r
        tqdm.write(
            f"{'':10} {seed:7} {r['return']:7.1f} {r['steps']:5} {r['tiles']:5} "
            f"{r['tiles_missed']:6} {'yes' if r['lap_finished'] else 'no':>4} "
            f"{r['plan_ms_p50']:11.1f} {r['plan_ms_p99']:6.1f}"
        )
        save(score())
        if view:
            view.finish(r)
    env.close()
    return score() if done else None


def drive_all(args, policies, film, window, stop):
    """Drives every policy on every track -> {name: report} of those that ended an episode, and the
    Report that keeps them."""
    loaded = {p: load_driver(args, args, p) for p in policies if p not in ("random", "expert")}
    kept = Report(args.json, args, {p: driver for p, (driver, _) in loaded.items()})
    reports = {
        name: summary(name, list(rows.values()), args.env) for name, rows in kept.rows.items()
    }  # until its policy has its turn
    for policy in policies:
        name = row_name(policy, args)
        driver, decoder = loaded.get(policy, (None, None))
        view = film and LapView(window, film, name, decoder)
        save = lambda report: kept.save(reports | {name: report})
        report = run_policy(args, policy, driver, view, window, stop, kept.rows.get(name, {}), save)
        reports |= {name: report} if report else {}
        if stop or window.quit:
            break
    return reports, kept


def main():
    args = arguments()
    policies = [p for p in POLICIES if p == args.policy or p in args.compare]
    if not args.save_data and {*policies} - {"random", "expert"}:
        require_dir(args.root)
    stop, film, window = Stop(), None, NoWindow()
    stem = args.root / "visuals" / ("drive_mpc" if args.policy == "mpc" else f"drive_{args.policy}")
    if args.json and args.json.resolve() in (
        stem.with_suffix(s).resolve() for s in (".mp4", ".gif")
    ):
        fail(f"--json {args.json}: the film has that name; choose another")
    if args.json and not is_stream(args.json):
        lock_file(
            args.json.with_name(f".{args.json.name}.lock"),
            f"--json {args.json}: another drive_mpc.py writes there; choose another name",
        )
    if not args.no_video:
        writable(stem.parent)
        film = VideoRecorder(VIDEO_FPS)
        window = window if args.headless else open_window("TinyJEPA drives")
    reports, kept = window.run(lambda: drive_all(args, policies, film, window, stop))
    drives = sum(len(r["episodes"]) for r in reports.values())
    print(compare(list(reports.values()), args.env) if reports else "no drive ended: no scores")
    try:
        if reports:
            kept.save(reports, last=True, finished=drives == len(policies) * args.episodes)
    finally:
        if film and (files := film.save(stem)):
            left = bool(stop or window.quit)
            print(", ".join(map(str, files)) + ": the film ends where the drive was left" * left)
    return 130 if stop else 0


if __name__ == "__main__":
    run(main)
