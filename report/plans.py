"""Part 4: whether the energy ranks plans as the simulator does.

Candidates are drawn as the planner draws them, then rolled out by the predictor and driven in the
simulator. The outcome is the number of tiles made along the track, less `--off_road` tiles a second
of four wheels off the road. A shortcut to another part of the track makes no tiles.

A state is restored on a new car: position, angle and speeds of all five bodies, pedals, wheel spin
and touched tiles. Only the joints' warm start is lost: 30 steps later the positions agree to about
1e-4 units.

Beside the energy stands a ridge regression that saw the labels: what these latents could tell. A
plan is worth more, or less, than its 0.6 s. So an expert drives on for a second from where some
plans end, which counts too. Rank correlations are means within a state. Only the two POOLED rows
rank the plans of all states together: there a scorer of states alone does well.
"""

import math
from itertools import chain

import numpy as np
import torch

from car import FPS
from car.env import make_env
from car.telemetry import centre_line
from collect_race_data import Expert
from drive_mpc import Plan, plan
from report.episodes import TRAINED, channels_first, choose_samples, rows_by_source, sources_of
from report.simulator import end_contacts, restore_state
from report.statistics import bootstrap_intervals, spearman
from support.cli import fail
from support.latents import ridge
from support.plan_config import shift, to_action
from support.progress import progress
from support.rollout_cost import RolloutCost

IN_SIGHT = 20.0, math.pi / 2  # units and rad from the centre line: a plan can still find the road
MAX_TILES_PER_STEP = 2  # a larger step means that another part of the track is nearer now
AFTER, PACE = 1, 0.5  # seconds that an expert goes on from where a plan ended, and its pace
WARM_UP = 5  # plans made before the scored one, as the driver would have
STD = "std of the outcomes"
POOLED = "plans of all states: spearman", "the same, untrained predictor"


# ------------------------------------------------------------------ plans in the simulator


def play(env, actions):
    """Steps env (T, 3) from a state just restored; yields its car after each step."""
    env = env.unwrapped
    for t, action in enumerate(actions):
        env.step(action)
        if t == 0:
            end_contacts(env)
        yield env.car


def along(env):
    """(how far along the track the car is, in tiles; the track's number of tiles)."""
    line, at = centre_line(env.unwrapped), env.unwrapped.car.hull.position
    i, t, *_ = line.place(at.x, at.y)
    return i + t, len(line.x)


def track_progress(before, now, n):
    """Tiles from one place along a track of n tiles to another; 0 for a jump."""
    step = (now - before + n / 2) % n - n / 2
    return step * (abs(step) < MAX_TILES_PER_STEP)


def outcome(env, saved, actions, off_road, expert=None):
    """Tiles made by actions (T, 3), less `off_road` a second of all four wheels off the road.

    An `expert` drives on for AFTER seconds, which count too.
    """
    if expert:
        expert.nearest.last = None  # it comes from where another plan ended
        actions = chain(actions, (expert.act(env) for _ in range(AFTER * FPS)))
    restore_state(env, saved)
    env.unwrapped.defer()  # draws nothing
    before, n = along(env)
    made = off = 0
    for car in play(env, actions):
        off += sum(not w.tiles for w in car.wheels) / 4 / FPS
        now, _ = along(env)
        made, before = made + track_progress(before, now, n), now
    return made - off_road * off


def simulated_frames(env, episode, k, act, repeat):
    """Frames (n, H, 64, 64, 3), one a latent, of plans act (n, H, 3) driven from latent k on.

    env is a fast one on the episode's track.
    """
    env.unwrapped.t = math.inf  # the zoom is over
    env.unwrapped.defer()
    for actions in act.repeat(repeat, axis=1):
        restore_state(env, episode.saved[k])
        for _ in play(env, actions):
            pass
    frames = env.unwrapped.deferred_frames()  # of each plan the restored car, then every step
    return frames.reshape(len(act), -1, *frames.shape[1:])[:, repeat::repeat]


def simulated_latents(models, env, episode, k, act):
    """The latents (n, H, D) to which plans act (n, H, 3) lead in the simulator."""
    h, (n, H, _) = models.encoder.history, act.shape
    frames = simulated_frames(env, episode, k, act, models.encoder.repeat)
    past = np.broadcast_to(episode.obs[k + 2 - h : k + 1], (n, h - 1, *frames.shape[2:]))
    film = np.concatenate([past, frames], axis=1)  # (n, h - 1 + H, 64, 64, 3)
    obs = np.stack([film[:, t : t + h] for t in range(H)], axis=1).reshape(n * H, h, 64, 64, 3)
    return models.encode(models.encoder, channels_first(obs)).view(n, H, -1)


# ------------------------------------------------------------------ scores of plans


def supervised_outcome(models, train, cfg):
    """A scorer that saw the labels: predict(z (n, H, D)) -> outcomes (n,) of plans.

    A ridge probe reads what each latent adds to the outcome.
    """
    samples = choose_samples(train, cfg.train_frames, cfg.seed, behind=1)
    tiles = samples.state("tile_index") - samples.state("tile_index", -1)
    tiles *= np.abs(tiles) <= MAX_TILES_PER_STEP  # the last tile is followed by tile 0
    seconds = models.encoder.repeat / FPS * samples.state("wheels_off_road") / 4
    probe = ridge(samples.z(0, 0)[:, 0].numpy(), tiles - cfg.off_road * seconds)
    return lambda z: probe.predict(z.flatten(0, 1).cpu().numpy()).reshape(z.shape[:2]).sum(axis=1)


@torch.inference_mode()
def score_candidates(models, episode, k, seed, planner):
    """(candidates (N, H, 3), their energies (N,) by both predictors, the plan (H, 3)) at latent k.

    The candidates are those of the planner's first round.
    """
    device, generator = models.device, torch.Generator(models.device)
    cost = RolloutCost(models.predictor, models.cost, planner.energy)
    untrained = RolloutCost(models.untrained_predictor, models.cost, planner.energy)
    z = episode.z[TRAINED].to(device)
    last, now = Plan.none(planner.horizon, device), z[k : k + 1]
    for i in range(max(0, k - WARM_UP), k):
        last = plan(z[i : i + 1], cost, last, planner, generator.manual_seed(seed + i))[0]
    chosen = plan(now, cost, last, planner, generator.manual_seed(seed + k))[0].u
    generator.manual_seed(seed + k)
    mean = shift(last.mean)
    u = planner.draw_plans(planner.samples, mean, mean.new_tensor(planner.noise), generator)
    u[0] = mean
    act = to_action(u)
    return [x.cpu().numpy() for x in (act, cost(now, act), untrained(now, act), to_action(chosen))]


def choose_states(samples, cfg):
    """Up to `cfg.states` samples of each source that have the road in sight."""
    rng, rows = np.random.default_rng([cfg.seed, 8]), []
    for source in sources_of(samples):
        own = np.flatnonzero((samples.source == source) & samples.within(IN_SIGHT))
        rows += rng.permutation(own)[: cfg.states].tolist()
    if not rows:
        fail("no window has the road in sight to drive plans from; raise --windows or --tracks")
    return samples[np.array(sorted(rows))]


def drive_plans(models, predict, envs, expert, episode, k, cfg, planner):
    """({figure: value}, energies (N,), energies of an untrained predictor (N,), outcomes (N,)).

    These are of the candidate plans at latent k. `predict` comes from `supervised_outcome`.
    """
    physics, fast = envs
    saved, repeat, n = episode.saved[k], models.encoder.repeat, cfg.replayed_plans
    seed = cfg.seed + 1000 * episode.track
    act, energy, untrained, chosen = score_candidates(models, episode, k, seed, planner)

    # the outcomes of all candidates, and of some with an expert behind them
    drive = lambda a, then=None: outcome(physics, saved, a.repeat(repeat, 0), cfg.off_road, then)
    made = np.array([drive(a) for a in act])
    later = np.array([drive(a, expert) for a in act[:n]])

    # latents of the rollout and of the simulator
    now = episode.z[TRAINED][k : k + 1]
    z_hat = models.rollout(models.predictor, now.expand(len(act), -1), torch.from_numpy(act))
    z = simulated_latents(models, fast, episode, k, act[:n])
    on_device = now.to(models.device), z.to(models.device)
    simulated = models.cost.rollout_cost(*on_device, planner.energy).cpu().numpy()
    supervised, best = predict(z), made.max()
    figures = {
        "spearman": spearman(-energy, made),
        "spearman, untrained predictor": spearman(-untrained, made),
        "spearman, saw the labels": spearman(predict(z_hat), made),
        "of what happened: spearman": spearman(-simulated, made[:n]),
        "of what happened: saw the labels": spearman(supervised, made[:n]),
        f"then {AFTER} s of an expert: spearman": spearman(-energy[:n], later),
        f"then {AFTER} s of an expert: of what happened": spearman(-simulated, later),
        f"then {AFTER} s: of what happened, saw the labels": spearman(supervised, later),
        "regret of the lowest energy": best - made[energy.argmin()],
        "regret of the planner's plan": best - drive(chosen),
        "regret, untrained predictor": best - made[untrained.argmin()],
        "regret of a random plan": best - made.mean(),
        STD: made.std(),
    }
    return figures, energy, untrained, made


def evaluate_plans(models, train, samples, cfg, planner):
    """Part 4: {"all" or source: {figure: estimate}}."""
    states, envs = choose_states(samples, cfg), (make_env("fast"), make_env("fast"))
    predict, expert = supervised_outcome(models, train, cfg), Expert(PACE)
    track, results = None, []
    for episode, k in progress(list(states), desc="plans", unit="state", leave=False):
        if episode.track != track:
            track = episode.track
            for env in envs:
                env.reset(seed=track)
            expert.reset(envs[0])
        results.append(drive_plans(models, predict, envs, expert, episode, k, cfg, planner))
    for env in envs:
        env.close()

    # means over states, and correlations over the plans of all states
    names = (*results[0][0], *POOLED)
    values = np.array([list(figures.values()) for figures, *_ in results])
    energy, untrained, made = (np.array(x) for x in list(zip(*results))[1:])
    pooled = lambda v, e, u, m: [
        *v.mean(axis=0),
        spearman(-e.ravel(), m.ravel()),
        spearman(-u.ravel(), m.ravel()),
    ]
    out = {}
    for source, rows in rows_by_source(states).items():
        arrays = [x[rows] for x in (values, energy, untrained, made)]
        found = bootstrap_intervals(pooled, states.track[rows], arrays, cfg)
        out[source] = dict(zip(names, found))
    return out
