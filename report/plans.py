"""Part 4: whether the energy ranks plans as the simulator does."""

import math
from itertools import chain

import numpy as np
import torch

from car import FPS
from car.env import make_env
from car.episode import restore_state
from car.physics import is_tile
from car.telemetry import TELEMETRY, centre_line
from collect_race_data import Expert
from drive_mpc import Plan, RolloutCost, draw_plans, plan, to_action
from report.episodes import OWN, choose_samples, planes
from report.probes import fit_standardised, regressor
from report.statistics import cells, spearman
from support.cli import fail
from support.progress import progress

IN_SIGHT = 20.0, math.pi / 2  # the same, where a plan can still find the road
MAX_TILES_PER_STEP = (
    2  # tiles in a step that nobody drives: another part of the track is nearer now
)
AFTER, PACE = 1, 0.5  # seconds that an expert goes on from where a plan ended, and its pace
WARM_UP = 5  # plans made before the judged one, as the driver would have


def play(env, actions):
    """Steps env (T, 3) from a state just restored -> yields its car after each step."""
    env = env.unwrapped
    for t, action in enumerate(actions):
        env.step(action)
        if t == 0:  # of the tiles restored, the new car's contacts never end: ask Box2D
            for w in env.car.wheels:
                w.tiles = {
                    c.other.userData
                    for c in w.contacts
                    if c.contact.touching and is_tile(c.other.userData)
                }
        yield env.car


def along(env):
    """How far along the track the car is, in tiles, and the track's number of tiles."""
    line, at = centre_line(env.unwrapped), env.unwrapped.car.hull.position
    return line.along(at.x, at.y), len(line.x)


def way(before, now, n):
    """Tiles from one place along a track of n tiles to another, where that is no leap."""
    step = (now - before + n / 2) % n - n / 2
    return step * (abs(step) < MAX_TILES_PER_STEP)


def outcome(env, saved, actions, off_road, expert=None):
    """Tiles made by actions (T, 3) less `off_road` a second of all four wheels off the road; with
    an `expert` also what it makes of it in AFTER seconds more."""
    if expert:
        expert.nearest.last = None  # it comes from where another plan ended
        actions = chain(actions, (expert.act(env) for _ in range(AFTER * FPS)))
    restore_state(env, saved)
    before, n = along(env)
    made = off = 0
    for car in play(env, actions):
        off += sum(not w.tiles for w in car.wheels) / 4 / FPS
        now, _ = along(env)
        made, before = made + way(before, now, n), now
    return made - off_road * off


def lived_frames(env, episode, k, act, repeat):
    """What really comes of plans act (n, H, 3) from latent k on, in a fast env on the episode's
    track: (n, H, 64, 64, 3), one frame a latent."""
    env.unwrapped.t = math.inf  # the zoom is over
    env.unwrapped.defer()
    for actions in act.repeat(repeat, axis=1):
        restore_state(env, episode.saved[k])
        for _ in play(env, actions):
            pass
    frames = env.unwrapped.painted()  # of each plan the car as it is placed, then every step
    return frames.reshape(len(act), -1, *frames.shape[1:])[:, repeat::repeat]


def lived_latents(subject, env, episode, k, act):
    """The latents (n, H, D) to which plans act (n, H, 3) really lead."""
    h, (n, H, _) = subject.encoder.history, act.shape
    came = lived_frames(env, episode, k, act, subject.encoder.repeat)
    past = np.broadcast_to(episode.obs[k + 2 - h : k + 1], (n, h - 1, *came.shape[2:]))
    film = np.concatenate([past, came], axis=1)  # (n, h - 1 + H, 64, 64, 3)
    obs = np.stack([film[:, t : t + h] for t in range(H)], axis=1).reshape(n * H, h, 64, 64, 3)
    return subject.encode(subject.encoder, planes(obs)).view(n, H, -1)


def tiles_made(spots, env):
    """(n,): how far along its track the car came in the latent before each spot."""
    out = np.zeros(len(spots))
    x, y = (list(TELEMETRY).index(name) for name in "xy")
    for e in np.unique(spots.e):
        env.reset(seed=spots.episodes[e].track)
        line = centre_line(env.unwrapped)
        for row in np.flatnonzero(spots.e == e):
            state = spots.episodes[e].state[spots.k[row] - 1 : spots.k[row] + 1]
            out[row] = way(*(line.along(s[x], s[y]) for s in state), len(line.x))
    return out


def taught_outcome(subject, train, env, args):
    """A judge that saw the labels: told(z (n, H, D)) -> outcomes (n,) of plans, by the word of an
    MLP on the tiles just made and the wheels off the road that each latent tells. env lends its
    tracks. Where --supervised_steps is 0: nans.
    """
    if not args.supervised_steps:
        return lambda z: np.full(len(z), np.nan)
    spots = choose_samples(train, args.train_frames, args.seed, behind=1)
    z = spots.z(0, 0)[:, 0].numpy()
    off = args.off_road * subject.encoder.repeat / FPS * spots.state("wheels_off_road") / 4
    y = np.stack([tiles_made(spots, env), -off], axis=1)
    size = y.std(axis=0) + 1e-6
    net = fit_standardised(regressor("mlp", args.seed, (256, 128)), z, y / size)
    worth = lambda z: net(z.flatten(0, 1).cpu().numpy()) @ size
    return lambda z: worth(z).reshape(z.shape[:2]).sum(axis=1)


def candidates(previous, cfg, generator):
    """Plans u (N, H, 2) around those of the last Plan, shifted: as in the planner's first round."""
    mean = previous.shifted().mean
    u = draw_plans(cfg.samples, mean, mean.new_tensor(cfg.noise), cfg, generator)
    u[0] = mean
    return u


@torch.inference_mode()
def judge_plans(subject, episode, k, seed, cfg):
    """(actions (N, H, 3), {judge: energies (N,)}, the planner's own plan (H, 3)) at latent k."""
    device, generator = subject.device, torch.Generator(subject.device)
    futures, blank = (
        RolloutCost(p, subject.cost, cfg.energy) for p in (subject.predictor, subject.blank)
    )
    z = episode.z[OWN].to(device)
    last = Plan.none(cfg.horizon, device)
    for i in range(max(0, k - WARM_UP), k):
        last = plan(z[i : i + 1], futures, last, cfg, generator.manual_seed(seed + i))[0]
    act = to_action(candidates(last, cfg, generator.manual_seed(seed + k)))
    chosen = plan(z[k : k + 1], futures, last, cfg, generator.manual_seed(seed + k))[0].u
    energies = {
        name: judge(z[k : k + 1], act).cpu().numpy()
        for name, judge in (("this model", futures), ("untrained", blank))
    }
    return act.cpu().numpy(), energies, to_action(chosen).cpu().numpy()


def states_of(spots, args):
    """At most --states spots of each source at which the road is in sight."""
    rng, rows = np.random.default_rng([args.seed, 8]), []
    for source in dict.fromkeys(spots.source):
        own = np.flatnonzero((spots.source == source) & spots.within(IN_SIGHT))
        if not len(own):
            print(
                f"{source}: no window has the road in sight, so no plans are judged from there; "
                "raise --windows or --tracks"
            )
        rows += np.sort(rng.permutation(own)[: args.states]).tolist()
    if not rows:
        fail("no window has the road in sight to judge plans from; raise --windows or --tracks")
    return spots[np.array(sorted(rows))]


FIGURES = (
    "spearman",
    "spearman, untrained predictor",
    "spearman, saw the labels",
    "of what came: spearman",
    "of what came: saw the labels",
    f"then {AFTER} s of an expert: spearman",
    f"then {AFTER} s of an expert: of what came",
    f"then {AFTER} s: of what came, saw the labels",
    "regret of the lowest energy",
    "regret of the planner's plan",
    "regret, untrained predictor",
    "regret of a random plan",
    "regret of the simulator's best",
    "spread of the outcomes",
)
POOLED = ("plans of all states: spearman", "the same, untrained predictor")


def drive_plans(subject, told, envs, expert, episode, k, args):
    """(a figure each of FIGURES, energies (N,), those of an untrained predictor, true outcomes
    (N,)) of the plans at latent k; `told` of taught_outcome."""
    physics, fast = envs
    act, energies, own = judge_plans(subject, episode, k, args.seed + 1000 * episode.track, args)
    value = lambda a, expert=None: outcome(
        physics, episode.saved[k], a.repeat(subject.encoder.repeat, axis=0), args.off_road, expert
    )
    made = np.array([value(a) for a in act])
    some, n = act[: args.replayed_plans], args.replayed_plans
    later = np.array([value(a, expert) for a in some])
    dreamt = subject.imagine(
        subject.predictor, episode.z[OWN][k : k + 1].expand(len(act), -1), torch.from_numpy(act)
    )
    came = lived_latents(subject, fast, episode, k, some)
    now = episode.z[OWN][k : k + 1].to(subject.device)
    lived = subject.cost.rollout_cost(now, came.to(subject.device), args.energy).cpu().numpy()
    taught = told(came)
    e, blank = energies["this model"], energies["untrained"]
    driven = (made[e.argmin()], value(own), made[blank.argmin()], made.mean(), made.max())
    figures = [
        spearman(-e, made),
        spearman(-blank, made),
        spearman(told(dreamt), made),
        spearman(-lived, made[:n]),
        spearman(taught, made[:n]),
        spearman(-e[:n], later),
        spearman(-lived, later),
        spearman(taught, later),
        *(made.max() - x for x in driven),
        made.std(),
    ]
    return figures, e, blank, made


def plans(subject, train, spots, args):
    """Part 4: ({"all" or source: {figure: cell}}, energies (n, N), outcomes (n, N), states)."""
    spots, envs = states_of(spots, args), (make_env("physics"), make_env("fast"))
    told, expert = taught_outcome(subject, train, envs[0], args), Expert(PACE)
    track, rows = None, []
    for e, k in progress(
        list(zip(spots.e.tolist(), spots.k.tolist())), desc="plans", unit="state", leave=False
    ):
        episode = spots.episodes[e]
        if episode.track != track:
            track = episode.track
            for env in envs:
                env.reset(seed=track)
            expert.reset(envs[0])
        rows.append(drive_plans(subject, told, envs, expert, episode, k, args))
    for env in envs:
        env.close()
    figures, energy, blank, true = (np.array(x) for x in zip(*rows))
    return summarise(figures, energy, blank, true, spots, args), energy, true, spots


def summarise(figures, energy, blank, true, spots, args):
    """{"all" or source: {figure: cell}} of a row of figures for each state, and of the energies and
    outcomes (n, N) of all states together."""
    out = {}
    for source in ("all", *dict.fromkeys(spots.source)):
        own = np.flatnonzero((spots.source == source) | (source == "all"))
        found = cells(
            lambda r, e, b, t: [
                *r.mean(axis=0),
                spearman(-e.ravel(), t.ravel()),
                spearman(-b.ravel(), t.ravel()),
            ],
            spots.track[own],
            [x[own] for x in (figures, energy, blank, true)],
            args,
        )
        out[source] = dict(zip((*FIGURES, *POOLED), found))
    return out
