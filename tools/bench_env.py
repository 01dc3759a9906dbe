"""Speed and fidelity of the environments."""

import statistics
import time

import cv2
import numpy as np

from car import FPS
from car.env import make_env, observe
from car.physics import PLAYFIELD
from car.telemetry import TELEMETRY, place_car, telemetry
from support.files import writable
from support.pictures import pyplot, save_figure

OFFICIAL = "official env + preprocess"
WARM_UP_EPISODES = 4  # before anything is timed: they fill the caches of sprites


def follow(state, speed=50.0):
    """A plain driver: telemetry (K,) -> action (3,) that keeps to the centre line at `speed`."""
    get = dict(zip(TELEMETRY, map(float, state)))
    turn = get["heading_error"] + 0.06 * get["lateral_offset"] + 6.0 * get["curvature_10"]
    slow = get["speed"] - speed
    return np.array((np.clip(-turn, -1, 1), np.clip(-slow, 0, 0.3), 0.1 * (slow > 10)), np.float32)


def centre_line_actions(seed, steps):
    """The actions of `follow` over one episode, to be played in every env."""
    env, actions = make_env("fast"), []
    env.reset(seed=seed)
    for _ in range(steps):
        actions.append(follow(telemetry(env)))
        _, _, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            break
    return actions


# ------------------------------------------------------------------ env


def steps_per_second(env, actions, seed, read):
    """Steps per CPU second over an episode and its reset, with `read(env, obs)` at every step."""
    start = time.process_time()
    read(env, env.reset(seed=seed)[0])
    for action in actions:
        read(env, env.step(action)[0])
    return len(actions) / (time.process_time() - start)


def bench_env(repeats, steps):
    """Prints steps per CPU second of each env, over `repeats` episodes of `steps` steps."""
    contenders = {
        OFFICIAL: (make_env("official"), observe),
        "fast env": (make_env("fast"), observe),
        "fast env + telemetry": (make_env("fast"), lambda env, obs: telemetry(env)),
        "physics alone": (make_env("fast"), lambda env, obs: env.unwrapped.defer()),
    }
    for seed in range(90, 90 + WARM_UP_EPISODES):
        actions = centre_line_actions(seed, steps)
        for env, read in contenders.values():
            steps_per_second(env, actions, seed, read)

    # rounds of one episode each
    rates = {name: [] for name in contenders}
    for seed in range(repeats):
        actions = centre_line_actions(seed, steps)
        for name, (env, read) in contenders.items():
            rates[name].append(steps_per_second(env, actions, seed, read))

    print(f"{'env':28}{'steps/s':>10}{'us/step':>10}{'x official':>12}")
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rate, rates[OFFICIAL]))
        median = statistics.median(rate)
        print(f"{name:28}{median:10.0f}{1e6 / median:10.1f}{ratio:12.1f}")


# ------------------------------------------------------------------ fidelity


def poses(track, rng):
    """Situation -> (arguments of `place_car` or None, steps, driver), on a track of tiles."""
    turns = np.abs(np.diff([tile[1] for tile in track]))
    _, b, x, y = track[int(rng.integers(len(track)))]
    _, kb, kx, ky = track[int(turns.argmax())]  # the tightest turn has kerbs
    _, sb, sx, sy = track[int(np.convolve(turns, np.ones(12), "valid").argmin())]
    right = np.cos(b), np.sin(b)
    noisy = lambda state: rng.uniform((-1, 0, 0), (1, 0.6, 0.2)).astype(np.float32)
    straight = lambda state: np.array((0, 0.5, 0), np.float32)
    spin = lambda state: np.array((1, 1, 0), np.float32)
    side = float(rng.choice((-1, 1)))
    edge = side * (PLAYFIELD - 12), rng.uniform(-200, 200), -side * 1.3, 20, 0
    return {
        "zoom": (None, FPS, follow),
        "road": ((x, y, b, 40, 0), 50, follow),
        "kerb": ((kx, ky, kb, 20, 0), 25, follow),
        "grass": ((x + 14 * right[0], y + 14 * right[1], b + 0.6, 25, 0), 40, noisy),
        "spin": ((x, y, b, 50, 6 * side), 40, spin),
        "edge": (edge, 25, noisy),
        "speed": ((sx, sy, sb, 95, 0), 20, straight),
    }


def compare_renderers(tracks):
    """{situation: [(error, official, fast)]}, a frame each, both frames (64, 64, 3) uint8."""
    envs = make_env("official"), make_env("fast")
    frames = {}
    for seed in range(tracks):
        obs = [env.reset(seed=seed)[0] for env in envs]
        rng = np.random.default_rng(seed)
        for name, (pose, steps, driver) in poses(envs[0].unwrapped.track, rng).items():
            if pose:
                obs = [place_car(env, *pose) for env in envs]
            for _ in range(steps):
                official, fast = (observe(env, o) for env, o in zip(envs, obs))
                error = cv2.absdiff(official, fast).mean()
                frames.setdefault(name, []).append((error, official, fast))
                action = driver(telemetry(envs[0]))
                obs = [env.unwrapped.step(action)[0] for env in envs]
    return frames


def contact_sheet(frames, path):
    """Draws the worst frame of each situation: official, fast, and eight times their difference."""
    size = dict(figsize=(1.9 * len(frames), 6), layout="constrained", squeeze=False)
    fig, axes = pyplot().subplots(3, len(frames), **size)
    for column, (name, rows) in zip(axes.T, frames.items()):
        error, official, fast = max(rows, key=lambda row: row[0])
        difference = cv2.convertScaleAbs(cv2.absdiff(official, fast), alpha=8)
        for ax, picture in zip(column, (official, fast, difference)):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        column[0].set_title(f"{name}: {error:.2f}")
    for ax, text in zip(axes[:, 0], ("official", "fast", "8 x difference")):
        ax.set_ylabel(text)
    save_figure(fig, path)


def bench_fidelity(root, tracks):
    """Prints how far the fast env's pictures are from the official ones, in each situation."""
    frames = compare_renderers(tracks)
    print(f"{'situation':12}{'frames':>8}{'mean':>8}{'worst':>8}   grey levels of 255")
    everything = {"all": [row for rows in frames.values() for row in rows]}
    for name, rows in (frames | everything).items():
        errors = [row[0] for row in rows]
        print(f"{name:12}{len(errors):8}{np.mean(errors):8.3f}{np.max(errors):8.3f}")
    path = writable(root / "visuals") / "fidelity.png"
    contact_sheet(frames, path)
    print(f"worst frame of each: {path}")
