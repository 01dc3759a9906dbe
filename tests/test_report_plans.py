"""The report card's plans: driven from a restored state, filmed and scored."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from car import FPS
from car.env import make_env
from car.episode import run_episode
from car.telemetry import TELEMETRY, centre_line, place_car
from collect_race_data import Expert
from collect_recovery_data import FaultyExpert
from report.episodes import TRAINED, at_latent_rate
from report.plans import (
    AFTER,
    along,
    outcome,
    play,
    simulated_frames,
    supervised_outcome,
    track_progress,
)
from report.simulator import restore_state, save_state
from report.statistics import spearman
from support.workers import FIRST_SEED


def test_a_restored_state_goes_on_as_the_first_one_did():
    """The same positions after 30 steps, in another env that drove other plans before."""
    env, other, rng = make_env("fast"), make_env("fast"), np.random.default_rng(0)
    driver = FaultyExpert(1.0)
    env.reset(seed=200_003), other.reset(seed=200_003)
    driver.reset(env, rng)
    saved, acts, at = [], [], []
    for _ in range(400):
        saved.append(save_state(env))
        at.append((*env.unwrapped.car.hull.position, env.unwrapped.car.hull.angle))
        acts.append(driver.act(env))
        env.step(acts[-1])
    worst, careless = [], []
    for t in range(60, 360, 20):
        restore_state(other, saved[t])
        *_, car = play(other, acts[t : t + 30])
        worst.append(np.abs(np.subtract((*car.hull.position, car.hull.angle), at[t + 30])).max())
        place_car(other, *at[t])  # without speeds and wheels
        *_, car = play(other, acts[t : t + 30])
        careless.append(np.abs(np.subtract(car.hull.position, at[t + 30][:2])).max())
    assert np.median(worst) < 1e-4 and max(worst) < 1e-3, worst
    assert min(careless) > 1


class Weaver:
    """Holds each action for two steps, on and off the gas, left and right."""

    max_steps = 160

    def reset(self, env, rng):
        self.t = 0

    def act(self, env):
        self.t += 1
        half = (self.t - 1) // 2
        return np.array([0.1 * math.sin(half / 3), 0.3 * (half % 7 > 1), 0], np.float32)


def test_simulated_frames_are_those_of_the_episode():
    env, other, saved = make_env("fast"), make_env("fast"), []
    save = lambda env, t: saved.append(save_state(env)) if t % 2 == 0 else None
    arrays, _ = run_episode(env, Weaver(), 200_004, np.random.default_rng(0), save)
    episode = at_latent_rate("data", 200_004, arrays, 2, saved)
    other.reset(seed=200_004)
    plans = np.stack([episode.act[40:55], episode.act[25:40]])
    frames = simulated_frames(other, episode, 40, plans, 2).astype(int)
    off = np.abs(frames - episode.obs[41:56]).mean(axis=(1, 2, 3, 4))
    assert off[0] < 0.5 and off[1] > 2 * off[0] + 0.2, off  # grey levels, of 255


def test_outcomes_tell_driving_from_standing_and_from_the_grass():
    env = make_env("fast")
    env.reset(seed=200_000)
    _, beta, x, y = env.unwrapped.track[10]
    place_car(env, x, y, beta, speed=40)
    start = save_state(env)
    on = outcome(env, start, np.tile(np.float32((0, 0.3, 0)), (30, 1)), 17)
    braked = outcome(env, start, np.tile(np.float32((0, 0, 0.8)), (30, 1)), 17)
    assert 5 < on < 9 and braked < on - 2  # 0.6 s at 40 units/s are 6.9 tiles
    place_car(env, x + 30 * np.cos(beta), y + 30 * np.sin(beta), beta, speed=40)
    grass = save_state(env)
    act = np.tile(np.float32((0, 0.3, 0)), (30, 1))
    assert abs(outcome(env, grass, act, 0) - outcome(env, grass, act, 17) - 17 * 0.6) < 0.5


def test_an_expert_goes_on_from_where_a_plan_ended():
    env, expert, given = make_env("fast"), Expert(0.5), []
    env.reset(seed=200_000)
    expert.reset(env)
    _, beta, x, y = env.unwrapped.track[10]
    place_car(env, x, y, beta, speed=40)
    start, plan = save_state(env), np.tile(np.float32((0, 0.3, 0)), (10, 1))
    scribe = SimpleNamespace(
        act=lambda env: given.append(expert.act(env)) or given[-1], nearest=expert.nearest
    )
    made = outcome(env, start, plan, 17, scribe)
    assert len(given) == AFTER * FPS
    assert made == pytest.approx(outcome(env, start, np.concatenate([plan, given]), 17), abs=1e-3)
    assert made > outcome(env, start, plan, 17) + 5 * AFTER
    outcome(env, start, np.tile(np.float32((0.3, 0.3, 0)), (60, 1)), 17, expert)  # elsewhere
    assert made == outcome(env, start, plan, 17, expert)


def test_a_probe_that_saw_the_labels_tells_the_outcome():
    """From latents that hold no more than tiles made and wheels off the road, of another track."""
    env, parts = make_env("fast"), []
    column = list(TELEMETRY).index
    for track in range(FIRST_SEED, FIRST_SEED + 6):
        arrays, _ = run_episode(env, FaultyExpert(1.0), track, np.random.default_rng(track))
        parts.append(at_latent_rate("data_recovery", track, arrays, 2))
        state, line = parts[-1].state, centre_line(env.unwrapped)
        at = [sum(line.place(*xy)[:2]) for xy in state[:, [column("x"), column("y")]].tolist()]
        n = len(env.unwrapped.track)
        made = [0] + [track_progress(*step, n) for step in zip(at, at[1:])]
        z = torch.tensor(np.c_[made, state[:, column("wheels_off_road")]]).float()
        parts[-1].z = {TRAINED: z}
    models = SimpleNamespace(encoder=SimpleNamespace(repeat=2))
    cfg = SimpleNamespace(train_frames=2000, seed=0, off_road=17)
    predict = supervised_outcome(models, parts[:5], cfg)
    z = z[1:].unfold(0, 15, 1).transpose(1, 2)
    truth = (z[..., 0] - 17 * z[..., 1] / 4 / 25).sum(dim=1).numpy()
    assert truth.std() > 2 and spearman(predict(z), truth) > 0.98
    assert np.abs(predict(z) - truth).mean() < 0.5  # tiles


def test_a_shortcut_over_the_grass_makes_no_tiles():
    """From one part of the track over to another, dozens of tiles further along or back."""
    env = make_env("fast")
    env.reset(seed=200_000)
    track, line = env.unwrapped.track, centre_line(env.unwrapped)
    for _, beta, x, y in track:
        at = lambda s: (x - s * np.cos(beta), y - s * np.sin(beta))  # s units to the left
        tile = lambda s: line.place(*at(s))[0]
        apart = lambda s: abs(
            (tile(s) - tile(s - 1) + len(track) / 2) % len(track) - len(track) / 2
        )
        border = next((s for s in range(15, 60) if apart(s) > 20), None)
        if border:
            break
    place_car(env, *at(border - 8), beta + np.pi / 2, speed=40)
    before, _ = along(env)
    saved = save_state(env)
    made = outcome(env, saved, np.zeros((30, 3), np.float32), 0)
    assert abs(along(env)[0] - before) > 20 and abs(made) < 10
