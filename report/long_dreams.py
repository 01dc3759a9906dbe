"""Part 6: whether dreams of 20 s hold.

A dream goes on from one latent of a new track: the dream model samples the next latent, again and
again. Beside it stand the predictor, the simulator's latents, and a present that does not change.

Physics: R² of speed and yaw rate, read off dreamt latents by ridge probes, under the actions that
were driven. On the lawn, where only the car moves, also after 10 s.
Samples: how far two dreams from one state under the same actions differ in curvature, as a share of
two from different states under different actions.
Stable: the share of dreamt latents that are as near to training latents as 99 in 100 real ones of
expert and recovery driving (mean distance to the NEIGHBOURS nearest).
Roads: the planner drives on for 20 s, in the dream and in the simulator, from the same states. The
figures are Kolmogorov-Smirnov distances of curvature and lateral offset, read off dreamt and real
latents. The row of the simulator drives there again, with other noise of the plans. A dream sees
no more of the track than the driver does, so it invents another one: beside it stand real drives of
other tracks, from other starts. Dreams begin on every second track.
Drivers: the same with several drivers, good and bad. The figures are rank correlations over the
drivers, of what each reaches in the dream and in the simulator.
"""

import math
from collections import deque
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import ks_2samp
from sklearn.neighbors import NearestNeighbors

from car import FPS
from car.env import make_env
from car.episode import run_episode
from car.telemetry import IN_VIEW, TELEMETRY, place_beside
from collect_data import RandomDriver
from drive_mpc import Driver, NoModelDriver
from report.episodes import TRAINED, Samples, at_latent_rate, choose_samples
from report.simulator import end_contacts, restore_state
from report.statistics import bootstrap_intervals, r2, spearman
from support.cli import fail
from support.dreams import draw_strips, paint
from support.latents import encode_present, ridge
from support.pictures import ornament
from support.plan_config import to_action
from support.progress import progress

STEPS = 500  # latents of a dream: 20 s
SHORT, MIDDLE, LONG = 15, 50, 250  # latents: 0.6, 2 and 10 s
AT_ONCE = 5  # latents: 0.2 s, in which the road ahead is in view
SHOWN, SHOWN_DREAMS, PICTURED = (0, SHORT, MIDDLE, 125, LONG, STEPS - 1), 3, "64 plans"
NEIGHBOURS, INSIDE = 5, 0.99
LAWN_STEPS = 1000  # of a random drive there
BOUND = 100.0  # of each number of a dreamt latent: the predictor's dreams explode
TRAINING = 20_000  # latents at most, among which neighbours are looked for
MOTION, ROAD = ("speed", "yaw_rate"), ("curvature_20", "lateral_offset")
STARTS = {"data_race": "expert", "data": "random"}  # of driving, from which the planner goes on
OWN, PREDICTOR, REAL, NOTHING = "dream model", "predictor", "simulator", "nothing changes"
OTHER = "simulator, other tracks"
RANK = "rank correlation with the simulator"
DRIVERS = {  # changes of the planner's settings
    "2 plans": {"samples": 2},
    "4 plans": {"samples": 4},
    "16 plans": {"samples": 16},
    "64 plans": {"samples": 64},
    "density": {"samples": 64, "energy": "density"},
    "classifier": {"samples": 64, "energy": "classifier"},
    "a third of the gas": {"samples": 64, "max_gas": 0.33},
    "untrained predictor": {"samples": 64},
    "no_model": {},
    "random": {},
}


class LawnDriver(RandomDriver):
    """Random driving that begins far beside the road."""

    def start(self, env, rng):
        tile, side = rng.integers(len(env.unwrapped.track)), rng.choice([-1, 1])
        offset, askew, speed = side * rng.uniform(25, 60), rng.uniform(-3, 3), rng.uniform(0, 40)
        place_beside(env, tile, offset, askew, speed)
        return True


class RandomActions:
    """The actions of collect_data.py, for whom latents mean nothing."""

    def reset(self, track):
        self.policy = RandomDriver()
        self.policy.reset(None, np.random.default_rng(track))

    def action(self, z):
        return torch.from_numpy(self.policy.act(None))


class Planner:
    """A Driver of drive_mpc.py that is asked for one action after another."""

    def __init__(self, driver):
        self.driver, self.reset = driver, driver.reset

    def action(self, z):
        """z (1, D) -> (3,)"""
        self.driver.plan_from(z)
        return to_action(self.driver.u[0])


def make_driver(models, planner, name, seed=0):
    """A Planner with the settings that DRIVERS gives to this name, or RandomActions."""
    if name == "random":
        return RandomActions()
    nets = dict(encoder=models.encoder, predictor=models.predictor, cost=models.cost)
    if name == "untrained predictor":
        nets["predictor"] = models.untrained_predictor
    kind = NoModelDriver if name == "no_model" else Driver
    changed = replace(planner, **DRIVERS.get(name, {}))
    return Planner(kind(nets, changed, models.device, models.dtype, seed))


# ------------------------------------------------------------------ dreams and drives


class Dream:
    """A dream from latents z (n, D): `step(act (n, 3))` -> the latents that follow."""

    def __init__(self, models, z, seed=0):
        self.model, self.z, self.memory = models.dream, z, None
        self.generator = torch.Generator(z.device).manual_seed(seed)

    def step(self, act):
        of = dict(memory=self.memory, generator=self.generator)
        self.z, self.memory = self.model.step(self.z, act, **of)
        return self.z


class PredictorDream:
    """The same of the predictor: its rollout under all actions so far."""

    def __init__(self, models, z, seed=0):
        self.predictor, self.z, self.act = models.predictor, z, []

    @torch.no_grad()
    def step(self, act):
        self.act.append(act)
        return self.predictor.rollout(self.z, torch.stack(self.act, dim=1))[:, -1]


DREAMS = {OWN: Dream, PREDICTOR: PredictorDream}


def bounded(z):
    """Latents of dreams that may have exploded, whose probes are to be read."""
    return z.nan_to_num(BOUND, BOUND, -BOUND).clamp(-BOUND, BOUND)


def under_actions(models, kind, z, act, seed):
    """Latents (n, H, D) of a dream that begins at z (n, D), under act (n, H, 3)."""
    dream, act = kind(models, z.to(models.device), seed), act.to(models.device)
    return bounded(torch.stack([dream.step(a) for a in act.unbind(1)], dim=1)).cpu()


def driven_dream(models, kind, starts, steps, driver, seed):
    """Latents (n, steps, D) of dreams from Samples, in which drivers made by `driver()` drive."""
    z = starts.z(0, 0)[:, 0].to(models.device)
    dream, drivers, out = kind(models, z, seed), [driver() for _ in z], []
    for one, track in zip(drivers, starts.track):
        one.reset(int(track))
    for _ in range(steps):
        out.append(z.cpu())
        act = torch.stack([one.action(row[None]) for one, row in zip(drivers, z)])
        z = bounded(dream.step(act.to(z)))
    return torch.stack(out, dim=1)


def real_drives(models, starts, steps, driver):
    """The same in the simulator, from the state of each sample. Laps go on after their end. A car
    that leaves the field stands there.
    """
    env, e, one, out = make_env("fast"), models.encoder, driver(), []
    for x, k in starts:
        env.reset(seed=x.track)
        env.unwrapped.t = math.inf  # the zoom is over
        restore_state(env, x.saved[k])
        one.reset(x.track)
        past = x.obs[np.maximum(k + models.frame_offsets(), 0)]
        frames, gone = deque(past.repeat(e.repeat, axis=0), maxlen=e.span), False
        z = []
        for t in range(steps):
            now = encode_present(e, [frames], models.device, models.dtype)
            z.append(now.cpu())
            action = one.action(now).cpu().numpy()
            for step in range(0 if gone else e.repeat):
                frame, _, ended, _, info = env.step(action)
                if t == step == 0:
                    end_contacts(env)
                frames.append(frame)
                gone = ended and not info.get("lap_finished")
        out.append(torch.cat(z))
    env.close()
    return torch.stack(out)


# ------------------------------------------------------------------ figures


class Reader:
    """What ridge probes read off latents, and how near training latents are."""

    def __init__(self, models, train, test, cfg):
        self.planned = models.encoder.planned
        samples = choose_samples(train, cfg.train_frames, cfg.seed)
        z, view = samples.z(0, 0)[:, 0], samples.within(IN_VIEW)
        seen = z[:, : self.planned].numpy()
        values = lambda names: np.stack([samples.state(name) for name in names], axis=1)
        off_road = samples.state("wheels_off_road") > 0
        self.probes = {
            "motion": ridge(seen, values(MOTION)),
            "road": ridge(seen[view], values(ROAD)[view]),
            "off road": ridge(seen, off_road.astype(float)),
        }
        some = np.random.default_rng(cfg.seed).permutation(len(z))[:TRAINING]
        self.near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(z[some].numpy())
        real = [x.z[TRAINED][x.first :: 5] for x in test if x.source != "data"]
        self.limit = np.quantile(self.distance(torch.cat(real)), INSIDE)

    def distance(self, z):
        """(...) mean distance of latents (..., D) to training latents."""
        found, _ = self.near.kneighbors(z.flatten(0, -2).numpy())
        return found.mean(axis=1).reshape(z.shape[:-1])

    def inside(self, z):
        """(...) whether latents (..., D) are as near to training latents as real ones are."""
        return (self.distance(z) <= self.limit).astype(float)

    def __call__(self, name, z):
        """(..., k) of latents (..., D)."""
        found = self.probes[name].predict(z[..., : self.planned].flatten(0, -2).numpy())
        return found.reshape(*z.shape[:-1], -1)


def lawn_samples(models, cfg):
    """Samples of new random drives whose wheels stay off the road for LONG latents."""
    env, episodes = make_env("fast"), []
    first = cfg.track_seed + 3 * cfg.tracks  # behind those of the other episodes
    for track in range(first, first + cfg.tracks):
        rng = np.random.default_rng([cfg.seed, track])
        arrays, _ = run_episode(env, LawnDriver(LAWN_STEPS), track, rng)
        episodes.append(at_latent_rate("lawn", track, arrays, models.encoder.repeat))
    env.close()
    models.encode_episodes(episodes)
    off = list(TELEMETRY).index("wheels_off_road")
    rows = [
        (e, k)
        for e, x in enumerate(episodes)
        for k in range(x.first, len(x.obs) - LONG, MIDDLE)
        if (x.state[k : k + LONG + 1, off] == 4).all()
    ]
    if not rows:
        fail("--tracks: no random drive stays on the lawn for 10 s; take more of them")
    return Samples(episodes, *np.array(rows).T)


def physics(models, reader, samples, at, cfg):
    """({row: [R² of MOTION, at each of `at` latents ahead]}, {row: (n,) inside after the last})."""
    z, act = samples.z(0, at[-1]), samples.act(at[-1])
    futures = {
        name: under_actions(models, kind, z[:, 0], act, cfg.seed) for name, kind in DREAMS.items()
    } | {NOTHING: z[:, :1].expand_as(z[:, 1:]), REAL: z[:, 1:]}
    rows = {name: [] for name in futures}
    every = lambda y, y_pred: r2(y, y_pred, np.ones(len(y), bool))
    for t in at:
        y = np.stack([samples.state(name, t) for name in MOTION], axis=1)
        for name, future in futures.items():
            arrays = y, reader("motion", future[:, t - 1])
            rows[name] += bootstrap_intervals(every, samples.track, arrays, cfg)
    return rows, {name: reader.inside(x[:, at[-1] - 1]) for name, x in futures.items()}


def compare_samples(models, reader, samples, cfg):
    """{latents ahead: estimate}: RMS of the difference in curvature of two dreams from each of the
    Samples, over that of two dreams from different ones.
    """
    z, act = samples.z(0, 0)[:, 0], samples.act(MIDDLE)
    seeds = cfg.seed, cfg.seed + 1
    one, two = (reader("road", under_actions(models, Dream, z, act, s))[..., 0] for s in seeds)
    apart = np.roll(two, len(two) // 2, axis=0)
    rms = lambda x: np.sqrt((x**2).mean())
    share = lambda one, two, apart: rms(one - two) / rms(one - apart)
    steps = AT_ONCE, SHORT, MIDDLE
    curvatures = {t: [x[:, t - 1] for x in (one, two, apart)] for t in steps}
    track = samples.track
    return {t: bootstrap_intervals(share, track, x, cfg)[0] for t, x in curvatures.items()}


def choose_starts(models, test, source, count, cfg, half=0):
    """Samples of new episodes of a source, from which drivers go on: of one half of them."""
    some = [x for x in test if x.source == source][half::2]
    return choose_samples(some, count, cfg.seed, models.encoder.history, MIDDLE)


def all_drives(models, starts, driver, cfg):
    """{"simulator", or a dream: latents (n, STEPS, D)} of a driver."""
    dreams = {
        name: driven_dream(models, kind, starts, STEPS, driver, cfg.seed)
        for name, kind in DREAMS.items()
    }
    return {REAL: real_drives(models, starts, STEPS, driver)} | dreams


def draw_long_dreams(models, test, cfg, driver, path):
    """Draws moments of 20 s from a state of each source: a real drive, then several dreams."""
    if models.decoder is None:
        return
    starts = choose_samples(test, 1, cfg.seed, models.encoder.history, MIDDLE)
    drives = {REAL: real_drives(models, starts, STEPS, driver)}
    for i in range(SHOWN_DREAMS):
        drives[f"dream {i + 1}"] = driven_dream(models, Dream, starts, STEPS, driver, cfg.seed + i)
    shown, seconds = [t for t in SHOWN if t < STEPS], models.encoder.repeat / FPS
    pictures = lambda z: paint(models.decoder, z[shown].to(models.device))
    rows = [
        (f"{source}\n{name}", pictures(z[i]))
        for i, source in enumerate(starts.source)
        for name, z in drives.items()
    ]
    with ornament(path):
        draw_strips(rows, [f"{t * seconds:.1f} s" for t in shown], path)
        print(f"drawn: {path}")


def evaluate_long_dreams(models, train, test, cfg, planner, path):
    """Part 6: {"physics", "stable", "roads", "samples", "drivers": {row: {column: estimate}}}.

    Some dreams are drawn to the file `path`.
    """
    reader, out = Reader(models, train, test, cfg), {"physics": {}, "stable": {}, "roads": {}}
    mean = lambda x: x.mean()

    def add(part, column, rows):
        for name, estimate in rows.items():
            out[part].setdefault(name, {})[column] = estimate

    # under the actions of real drives
    windows = choose_samples(test, cfg.windows, cfg.seed, 0, MIDDLE)
    cases = {
        "expert": (windows[windows.source == "data_race"], (SHORT, MIDDLE)),
        "recovery": (windows[windows.source == "data_recovery"], (SHORT, MIDDLE)),
        "lawn": (lawn_samples(models, cfg), (MIDDLE, LONG)),
    }
    for case, (samples, at) in progress(cases.items(), desc="dreams", leave=False):
        rows, inside = physics(models, reader, samples, at, cfg)
        for i, (t, name) in enumerate((t, name) for t in at for name in MOTION):
            add("physics", f"{case} +{t}, {name}", {row: x[i] for row, x in rows.items()})
        share = lambda x, samples=samples: bootstrap_intervals(mean, samples.track, (x,), cfg)[0]
        add("stable", f"{case} +{at[-1]}", {row: share(x) for row, x in inside.items()})

    agreement = compare_samples(models, reader, cases["expert"][0], cfg)
    out["samples"] = {OWN: {f"expert +{t}, curvature": x for t, x in agreement.items()}}

    # the planner drives on
    driver = lambda name=None, seed=0: lambda: make_driver(models, planner, name, seed)
    for source, kind in progress(STARTS.items(), desc="drives", leave=False):
        starts = choose_starts(models, test, source, cfg.dreams, cfg)
        drives = all_drives(models, starts, driver(), cfg)
        truth = drives[REAL]
        drives[NOTHING] = truth[:, :1].expand_as(truth)
        inside = {name: reader.inside(z[:, LONG::10]) for name, z in drives.items()}
        share = lambda x: bootstrap_intervals(mean, starts.track, (x,), cfg)[0]
        rows = {name: share(x) for name, x in inside.items()}
        add("stable", f"{kind}, planner +{LONG} to {STEPS}", rows)

        # real drives differ, too: by the noise of the plans
        drives[REAL] = real_drives(models, starts, STEPS, driver(seed=1))
        others = choose_starts(models, test, source, cfg.dreams, cfg, half=1)
        drives[OTHER] = real_drives(models, others[: len(starts)], STEPS, driver())
        read = {name: reader("road", z) for name, z in drives.items()}
        wanted, ks = reader("road", truth), lambda x, y: ks_2samp(x.ravel(), y.ravel()).statistic
        for i, name in enumerate(ROAD):
            of = {row: (wanted[..., i], x[..., i]) for row, x in read.items()}
            rows = {r: bootstrap_intervals(ks, starts.track, xy, cfg)[0] for r, xy in of.items()}
            add("roads", f"{kind}, {name}", rows)

    # drivers, good and bad
    starts = choose_starts(models, test, "data_race", max(2, cfg.dreams // 2), cfg)
    reached = {}  # {(figure, where): (n, drivers)}
    for name in progress(DRIVERS, desc="drivers", leave=False):
        for where, z in all_drives(models, starts, driver(name), cfg).items():
            energy = models.cost.energy(z.to(models.device)).mean(dim=1).cpu().numpy()
            on_road = (reader("off road", z)[..., 0] < 0.5).mean(axis=1)
            for figure, value in (("energy", energy), ("on the road", on_road)):
                reached.setdefault((figure, where), []).append(value)
    reached = {key: np.stack(values, axis=1) for key, values in reached.items()}
    out["drivers"] = compare_drivers(reached, starts.track, cfg)
    draw_long_dreams(models, test, cfg, driver(PICTURED), path)
    return out


def compare_drivers(reached, tracks, cfg):
    """{driver, or RANK: {column: estimate}} of {(figure, REAL or a dream): (n, drivers)}."""
    out = {}
    rank = lambda x, y: spearman(x.mean(axis=0), y.mean(axis=0))
    for (figure, where), values in reached.items():
        means = bootstrap_intervals(lambda x: x.mean(axis=0), tracks, (values,), cfg)
        pair = values, reached[figure, REAL]
        for name, x in zip(DRIVERS, means):
            out.setdefault(name, {})[f"{figure}, {where}"] = x
        (agreement,) = bootstrap_intervals(rank, tracks, pair, cfg)
        out.setdefault(RANK, {})[f"{figure}, {where}"] = agreement
    return {name: out[name] for name in (*DRIVERS, RANK)}
