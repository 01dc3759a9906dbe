"""Day 4: model predictive control. The car plans in a learned latent space, from pixels alone.

Every `repeat` steps the driver encodes the last frames. It draws --samples candidate plans, rolls
them out over --horizon latents, and follows those of lowest cost. It reads ROOT/models, or the
weights that come with the code. It shows a window if there is a display, and writes
visuals/drive_mpc.mp4 and .gif. --json writes the scores after each drive; run the same command
again to continue an unfinished file.

Policies to compare with: `random`; `expert`, who reads the simulator; `no_model`, random plans that
are followed while the present energy falls; `untrained`, a fresh predictor; `imitation`, the policy
that proposes plans. Tracks 100000 to 100099 are for reporting, 200000 to 299999 for choosing.

    python drive_mpc.py --episodes 3 --track_seed 100000
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import math
import secrets
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from buffer import index, write_chunk
from car import ZOOM_STEPS
from car.env import observe
from car.episode import EpisodeRecorder
from car.telemetry import telemetry
from collect_race_data import Expert
from networks import POLICY_STEPS, Predictor
from support import checkpoints
from support.cli import Number, Stop, fail, fraction, parser, run_main, track_number
from support.device import cast_weights, set_up
from support.disturbance import DISTURBANCES, Disturbance, disturbed_env
from support.dreams import load_decoder
from support.files import is_stream, lock_file, output_file, writable
from support.heading import SURE, HeadingMemory, turn_readout
from support.lap_view import VIDEO_FPS, LapView
from support.latents import encode_present
from support.palette import Palette
from support.pictures import VideoRecorder
from support.plan_config import PlanConfig, clip_plan, planning, shift, take_gas, to_action
from support.progress import progress
from support.rollout_cost import RolloutCost
from support.scores import COLUMNS, Report, compare, row_line, row_name, score_settings
from support.window import NoWindow, keys_text, open_window
from support.workers import FIRST_SEED, chunk_provenance

LEARN_COLORS = 40  # step at which the palette is learned: the camera has nearly arrived
START_GAS, GAS_RISE = 0.06, 0.0325  # gas of the first step, and its rise in each step of the zoom
WORST = 1e9  # cost of a rollout that overflowed
DECAY, REUSED, MOMENTUM, LEAST_STD = 1.25, 0.3, 0.1, 0.1  # iCEM's; the first three as published
SELF_DRIVEN_DIR = "data_mpc"  # folder of the episodes that --save_data writes
BASELINES = ["random", "expert"]  # policies that use no nets
# in the order of the table
POLICIES = ["random", "no_model", "untrained", "imitation", "mpc", "expert"]


def arguments():
    p = parser(__doc__, models=True)
    p.epilog = keys_text()
    add = p.add_argument_group("task").add_argument
    add("--episodes", type=Number(int, 1, 100_000), default=3, help="tracks, one episode each")
    add("--track_seed", type=track_number, default=100_000, help="first track; the next follow")
    add("--policy", default="mpc", choices=POLICIES, help="who drives")
    add("--compare", nargs="*", default=[], choices=POLICIES, help="others on the same tracks")
    add("--env", choices=["official", "fast"], default="official", help="fast: to experiment")
    add("--pace", type=fraction, default=1.0, help="of the expert: 1 for the score, 0 calm")
    add("--disturb", choices=DISTURBANCES, default="none", help="what disturbs the driver's frames")
    followed = "share of the plans that are followed to their end, to record what they lead to"
    add("--open_loop", type=fraction, help=followed)
    planning(p)
    add = p.add_argument_group("output").add_argument
    add("--json", type=output_file, help="file of the scores, written after each drive")
    saved = f"episodes of --policy go to ROOT/{SELF_DRIVEN_DIR}, of tracks from {FIRST_SEED} on"
    add("--save_data", action="store_true", help=saved)
    add("--film", type=Number(int, 0, 1000), default=1, help="laps of --policy in the film")
    add("--headless", action="store_true", help="no window: as fast as it goes")
    add("--no_video", action="store_true", help="scores only, no window, no pictures")
    args = p.parse_args()
    if args.save_data and args.track_seed < FIRST_SEED:
        p.error(f"--save_data: tracks below {FIRST_SEED} are never learned from")
    if args.open_loop and args.policy in BASELINES:
        p.error(f"--open_loop: {args.policy} makes no plans; leave it out")
    if args.save_data and args.disturb != "none":
        p.error("--save_data: disturbed frames are not kept; leave out --disturb")
    return args


# ------------------------------------------------------------------ planner


@torch.inference_mode()
def propose(z, predictor, cost, cfg, generator=None):
    """Plans (P, H, 2) that the cost model's policy makes while it drives the dream from z (1, D).

    P is cfg.policy_share of the candidates, rounded up. Noise is added to all but the first.
    Random plans seldom brake and turn in at the right moment.
    """
    P, H = math.ceil(cfg.policy_share * cfg.samples), cfg.horizon
    if not P:
        return z.new_empty(0, H, 2)
    white = torch.randn(P, H, 2, generator=generator, device=z.device)
    noise = cfg.policy_noise * z.new_tensor(cfg.noise) * cfg.correlate(white)
    noise[:1] = 0
    h, steps = predictor.to_state(z[:, : predictor.dim]).expand(P, -1), []
    for few in noise.split(POLICY_STEPS, dim=1):
        for u in steps[-POLICY_STEPS:]:
            h = predictor.transition(h, to_action(u))
        u = clip_plan(cost.expert_plan(h)[:, : few.shape[1]] + few, cfg.max_gas)
        steps += u.unbind(1)
    return torch.stack(steps, dim=1)


class Plan(NamedTuple):
    """What the planner remembers from one plan to the next."""

    u: torch.Tensor  # (H, 2) the plan that is followed
    mean: torch.Tensor  # (H, 2) mean of the last candidates; icem follows its best elite instead
    elites: torch.Tensor  # (K, H, 2) the best candidates, in order of their cost

    @staticmethod
    def none(H, device="cpu"):
        """The Plan before the first one: coasting straight on."""
        u = torch.zeros(H, 2, device=device)
        return Plan(u, u, u[None])


@torch.inference_mode()
def plan(z, rollout_cost, previous, cfg, generator=None, proposals=()):
    """(the next Plan, costs (N,) of the candidates of its last iteration).

    z (1, D): the present latent. rollout_cost(z, act (N, H, 3)) -> costs (N,).
    previous: the last Plan, not yet shifted. It goes on if all costs are equal.
    proposals (P, H, 2): plans that take the place of random ones in the first iteration.
    cfg: PlanConfig. Refuses costs of which none is finite.

    mppi: Williams et al. 2017. icem: Pinneri et al. 2020, arXiv:2008.06389. Each iteration of icem
    has fewer candidates, and keeps a share of the elites, also for the next plan. Mean and spread
    have momentum. Unlike in the paper, the mean is a candidate in every iteration.
    """
    icem, K = cfg.planner == "icem", min(cfg.elites, cfg.samples - 1)
    u, mean, elites = map(shift, previous)
    std = torch.tensor(cfg.noise, device=z.device).expand_as(mean)
    for i in range(cfg.n_iterations):
        # draw candidates: the mean, noise around it, and earlier elites
        N = min(cfg.samples, max(int(cfg.samples / DECAY**i), 2 * K)) if icem else cfg.samples
        drawn = cfg.draw_plans(N, mean, std, generator)
        drawn[0] = mean
        if icem:
            kept = elites[: max(1, int(REUSED * K))]
            steps = len(mean) - (i == 0)  # the last action of a shifted elite is drawn anew
            drawn[N - len(kept) :, :steps] = kept[:, :steps]
        elif i > 0:
            drawn[-K:] = elites
        if i == 0 and len(proposals):
            drawn[1 : 1 + len(proposals)] = proposals[: N - 1]

        # roll out
        costs = rollout_cost(z, to_action(drawn)).nan_to_num(nan=WORST, posinf=WORST)  # (N,)
        if costs.min() >= WORST:
            fail("no rollout has a finite cost; use --precision fp32, or train the predictor again")
        if not costs.max() > costs.min():
            return Plan(u, mean, elites), costs

        # select elites
        low, order = costs.topk(K, largest=False)
        elites = drawn[order]

        # refit mean and spread
        if icem:
            u, mean = elites[0], torch.lerp(elites.mean(dim=0), mean, MOMENTUM)
            std = torch.lerp(elites.std(dim=0, correction=0), std, MOMENTUM).clamp_min(LEAST_STD)
        elif cfg.planner == "mppi":
            weights = torch.softmax((low.min() - low) / (low.std(correction=0) + 1e-9), dim=0)
            u = mean = torch.einsum("n,nta->ta", weights, elites)
        else:
            u = mean = elites[0]
    return Plan(u, mean, elites), costs


# ------------------------------------------------------------------ drivers


class Driver:
    """Drives from pixels: `act(frame)` sees 64x64 frames and its own past plans, nothing else."""

    def __init__(self, nets, cfg, device, dtype, seed=0, models=None):
        self.nets, self.cfg, self.device, self.dtype = nets, cfg, device, dtype
        self.encoder, self.models = cast_weights(nets["encoder"], dtype), models  # to encode only
        of = nets["predictor"], nets["cost"], cfg.energy, turn_readout(self.encoder)
        self.rollout_cost = RolloutCost(*of, dtype)
        self.seed, self.generator = seed, torch.Generator(device)

    def reset(self, track_seed):
        """Begins an episode: nothing is remembered; the same track draws the same noise."""
        self.generator.manual_seed(self.seed + track_seed)
        self.frames = deque(maxlen=self.encoder.span)
        self.planned = Plan.none(self.cfg.horizon, self.device)
        self.u = self.planned.u  # (H, 2) the plan that is followed
        self.open_loop_left = 0  # latents for which it is still followed without another plan
        self.t, self.ms, self.costs = 0, [], None
        self.palette, self.memory, self.action = Palette(), HeadingMemory(), None

    @torch.inference_mode()
    def encode(self):
        """The present latent (1, D) from the frames so far; the first stands for earlier ones."""
        return encode_present(self.encoder, [self.frames], self.device, self.dtype)

    def act(self, frame):
        """frame (64, 64, 3) uint8 -> action (3,) float32; plans every `repeat` steps."""
        start = time.perf_counter()
        if self.t == LEARN_COLORS:
            self.palette.learn(frame)
        frame = self.palette(frame)
        self.frames.append(frame)
        if self.t >= ZOOM_STEPS:
            self.memory.see(frame)
        if self.t < ZOOM_STEPS:
            gas = min(self.cfg.max_gas, START_GAS + GAS_RISE * self.t)  # latents mean little here
            self.action = np.array([0, gas, 0], np.float32)
        elif (self.t - ZOOM_STEPS) % self.encoder.repeat == 0:
            planned = self.replan()
            self.action = to_action(self.u[0]).cpu().numpy()  # waits for the device
            if planned:
                self.ms.append(1000 * (time.perf_counter() - start))
        self.t += 1
        return self.action

    def replan(self):
        """Encodes the present and plans from it -> True; False where an open-loop plan goes on."""
        self.z, cost, share = self.encode(), self.nets["cost"], self.cfg.open_loop
        if cost.energy(self.z) < SURE * cost.random_energy:
            self.memory.settle()
        if self.open_loop_left:
            self.open_loop_left -= 1
            self.planned, self.u = Plan(*map(shift, self.planned)), shift(self.u)
            return False
        self.plan_from(self.z, self.memory.off_course())
        if share and torch.rand((), generator=self.generator, device=self.device) < share:
            self.open_loop_left = self.cfg.horizon - 1
        return True

    def plan_from(self, z, turned=None):
        """Plans from the latent z (1, D), a real or a dreamt one: sets u and costs.

        turned: rad that the car is off its way, if that is known; see `support.heading`.
        """
        self.z, rollout_cost = z, partial(self.rollout_cost, turned=turned)
        cfg, generator = self.cfg, self.generator
        proposals = propose(z, self.nets["predictor"], self.nets["cost"], cfg, generator)
        self.planned, self.costs = plan(z, rollout_cost, self.planned, cfg, generator, proposals)
        self.u = self.planned.u

    @torch.inference_mode()
    def rollout(self):
        """z_hat (H, D) of the present plan."""
        return self.nets["predictor"].rollout(self.z, to_action(self.u)[None])[0]


class NoModelDriver(Driver):
    """Uses no predictor: follows a random plan while the present energy falls, else redraws."""

    def reset(self, track_seed):
        super().reset(track_seed)
        self.now = None

    def plan_from(self, z, turned=None):
        self.z, before = z, self.now
        self.now = float(self.nets["cost"].energy(self.z, self.cfg.energy))
        self.u = shift(self.u)
        if before is None or self.now > before:
            mean, std = torch.zeros_like(self.u), self.u.new_tensor(self.cfg.noise)
            self.u = self.cfg.draw_plans(1, mean, std, self.generator)[0]


class ImitationDriver(Driver):
    """Plans nothing: follows the policy that proposes plans."""

    def plan_from(self, z, turned=None):
        self.z, only = z, replace(self.cfg, samples=1, policy_share=1.0)
        self.u = propose(z, self.nets["predictor"], self.nets["cost"], only)[0]


class BaselineDriver:
    """Drives without nets: uniform random actions, or the expert."""

    def __init__(self, env, policy, pace, seed):
        self.env, self.ms, self.models = env, [], None
        if policy == "expert":
            expert = Expert(pace)
            self.reset = lambda track_seed: expert.reset(env)
            self.act = lambda frame: expert.act(env)
        else:
            self.reset = lambda track_seed: env.action_space.seed(seed + track_seed)
            self.act = lambda frame: env.action_space.sample()


def load_driver(args, cfg, policy="mpc"):
    """(driver, decoder or None) by the flags args, and cfg of `planning`; may set cfg.max_gas."""
    (device, dtype), models = set_up(args), getattr(args, "models", None)
    nets, payloads, folder = checkpoints.load_models(args.root, models, device)
    if policy == "untrained":
        torch.manual_seed(args.seed)
        fresh = Predictor(**nets["predictor"].args)
        nets["predictor"] = fresh.to(device).eval().requires_grad_(False)
    take_gas(cfg, payloads["cost"])
    kind = {"no_model": NoModelDriver, "imitation": ImitationDriver}.get(policy, Driver)
    of = PlanConfig.of(cfg), device, dtype, args.seed, str(folder)
    return kind(nets, *of), load_decoder(folder, checkpoints.fingerprint(nets["encoder"]), device)


# ------------------------------------------------------------------ drives


def drive(env, driver, track_seed, watch=lambda *seen: True, disturbance=None, recorder=None):
    """Drives one episode -> its row of the report, or None when it was broken off.

    `watch(env, frame, driver, return)` sees every step; False breaks off. An EpisodeRecorder keeps
    the episode.
    """
    obs, _ = env.reset(seed=track_seed)
    disturbance = disturbance or Disturbance()
    driver.reset(track_seed)
    disturbance.reset(track_seed)
    seen = observe(env, obs)
    if recorder:
        recorder.add(seen, telemetry(env))
    total, steps, ended, info = 0.0, 0, False, {}
    while not ended:
        frame = disturbance(seen)
        action = driver.act(frame)
        obs, reward, terminated, truncated, info = env.step(action)
        seen = observe(env, obs)
        total, steps, ended = total + reward, steps + 1, terminated or truncated
        if recorder:
            recorder.add(seen, telemetry(env), action, reward)
        if not watch(env, frame, driver, total):
            return None
    if recorder:
        recorder.ends = terminated, truncated

    # score
    tiles, N = env.unwrapped.tile_visited_count, len(env.unwrapped.track)
    p50, p99 = np.percentile(driver.ms, (50, 99)) if driver.ms else (0.0, 0.0)
    return {
        "track_seed": track_seed,
        "return": round(float(total), 2),
        "steps": steps,
        "tiles": tiles,
        "tiles_missed": N - tiles,
        "lap_finished": bool(info.get("lap_finished", False)),
        "plan_ms_p50": round(float(p50), 2),
        "plan_ms_p99": round(float(p99), 2),
    }


def save_episode(folder, policy, kind, row, recorder):
    """Writes a driven episode of an env of this kind; its uid tells policy and track."""
    seed, name = row["track_seed"], f"{folder.name}-{policy}"
    meta = dict(track_seed=seed, uid=f"{name}-t{seed}-{secrets.token_hex(4)}")
    meta |= dict(policy={"name": policy}, lap_finished=row["lap_finished"])
    arrays = recorder.arrays(*recorder.ends)
    write_chunk(folder, chunk_provenance(folder.name, kind) | meta, **arrays)


def drive_policy(args, policy, driver, view, report):
    """Drives a policy on each track that the report lacks; prints a line for each."""
    env = disturbed_env(args.env, args.disturb)
    driver = driver or BaselineDriver(env, policy, args.pace, args.seed)
    disturbance, own = Disturbance(args.disturb), policy == args.policy
    folder = writable(args.root / SELF_DRIVEN_DIR) if args.save_data and own else None
    driven = {c.meta["track_seed"] for c in index(folder)[0]} if folder else set()
    print(f"{view.name:>9}: {COLUMNS}")
    tracks = range(args.track_seed, args.track_seed + args.episodes)
    if again := driven.intersection(tracks):
        print(f"{folder}: has {len(again)} of these tracks; they are not recorded again")
    for i, seed in enumerate(progress(tracks, desc=view.name, unit="track", leave=False)):
        if view.window.over:
            break
        if seed in report.rows[view.name] or seed in driven and not args.json:
            continue
        view.reset(seed, own and i < args.film)
        recorder = EpisodeRecorder() if folder and seed not in driven else None
        row = drive(env, driver, seed, view, disturbance, recorder)
        if row:
            if recorder:
                save_episode(folder, policy, args.env, row, recorder)
            tqdm.write(f"{'':10} {row_line(row)}")
            report.add(view.name, row)
            view.finish(row)
        elif not view.window.over:
            tqdm.write(f"{'':10} {seed:7} left after {view.step} steps, not counted")
    env.close()


def drive_all(args, policies, film, window):
    """Drives every policy on every track -> the Report."""
    loaded = {p: load_driver(args, args, p) for p in policies if p not in BASELINES}
    settings = score_settings(args, {p: driver.nets for p, (driver, _) in loaded.items()})
    names = {p: row_name(p, args.pace) for p in policies}
    models = {names[p]: loaded[p][0].models if p in loaded else None for p in policies}
    report = Report(args.json, settings, models)
    for policy in policies:
        if not window.over:
            driver, decoder = loaded.get(policy, (None, None))
            view = LapView(window, film, names[policy], decoder)
            drive_policy(args, policy, driver, view, report)
    return report


def main():
    args = arguments()
    policies = [p for p in POLICIES if p == args.policy or p in args.compare]
    if not args.save_data and {*policies} - {*BASELINES}:
        checkpoints.require_dir(args.root)
    if args.json and not is_stream(args.json):
        busy = f"--json {args.json}: another drive_mpc.py writes there; choose another name"
        lock_file(args.json.with_name(f".{args.json.name}.lock"), busy)

    stop, film, window = Stop(), None, NoWindow()
    stem = args.root / "visuals" / f"drive_{args.policy}"
    if not args.no_video:
        writable(stem.parent)
        film = VideoRecorder(VIDEO_FPS)
        window = window if args.headless else open_window("TinyJEPA drives")

    report = window.run(lambda: drive_all(args, policies, film, window))
    reports = list(report.summaries().values())
    print(compare(reports, args.env) if reports else "no drive ended: no scores")
    if film and (files := film.save(stem)):
        left = ": the film ends where the drive was left" * window.over
        print(", ".join(map(str, files)) + left)
    if reports:
        report.save(last=True)
    return 130 if stop else 0


if __name__ == "__main__":
    run_main(main)
