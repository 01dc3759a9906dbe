"""Speed and fidelity of the environments."""

import statistics
import time

import cv2
import numpy as np

from car import FPS
from car.env import make_env, observe
from car.physics import PLAYFIELD
from car.telemetry import TELEMETRY, place_car, telemetry

WARM_UP = 4  # episodes before anything is timed, of the hundreds in a worker's life

FEATURE = {name: i for i, name in enumerate(TELEMETRY)}


def follow(state, speed=50.0):
    """A plain driver: telemetry (K,) -> action (3,) that keeps to the centre line at `speed`."""
    get = {name: float(state[i]) for name, i in FEATURE.items()}
    turn = get["heading_error"] + 0.06 * get["lateral_offset"] + 6.0 * get["curvature_10"]
    slow = get["speed"] - speed
    return np.array((np.clip(-turn, -1, 1), np.clip(-slow, 0, 0.3), 0.1 * (slow > 10)), np.float32)


# ---- env -----------------------------------------------------------------------------------------


def rollout(env, actions, seed, look):
    """Steps per CPU second over an episode and its reset; `look(env, obs)` at every step."""
    start = time.process_time()
    look(env, env.reset(seed=seed)[0])
    for action in actions:
        look(env, env.step(action)[0])
    return len(actions) / (time.process_time() - start)


def bench_env(args):
    contenders = {
        "official env + preprocess": (make_env("official"), observe),
        "fast env": (make_env("fast"), observe),
        "fast env + telemetry": (make_env("fast"), lambda env, obs: telemetry(env)),
        "physics alone": (make_env("physics"), lambda env, obs: None),
    }
    if envpool := pooled():
        contenders["EnvPool, C++"] = (envpool, lambda env, obs: None)
    for seed in range(90, 90 + WARM_UP):  # the first episodes fill the caches of sprites
        for env, look in contenders.values():
            if seed == 90 or env is not contenders["official env + preprocess"][0]:
                rollout(env, drive(seed, args.steps), seed, look)
    rates = {name: [] for name in contenders}
    for seed in range(args.repeats):
        actions, names = drive(seed, args.steps), list(contenders)
        k = seed % len(names)
        for name in names[k:] + names[:k]:  # nobody always profits from warm caches
            rates[name].append(rollout(contenders[name][0], actions, seed, contenders[name][1]))
    stock = rates["official env + preprocess"]
    print(f"{'env':28s}{'steps/s':>10s}{'us/step':>10s}{'x official':>12s}")
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rate, stock))
        median = statistics.median(rate)
        print(f"{name:28s}{median:10.0f}{1e6 / median:10.1f}{ratio:12.1f}")


def pooled():
    """EnvPool's CarRacing as an env of one, or None where it is not installed."""
    try:
        import envpool
    except ImportError:
        return None

    class Pooled:
        def __init__(self):
            self.env = envpool.make_gymnasium("CarRacing-v3", num_envs=1, num_threads=1)

        def reset(self, seed):
            return self.env.reset()  # it takes a seed only when it is made

        def step(self, action):
            return self.env.step(action[None])

    return Pooled()


# ---- fidelity ------------------------------------------------------------------------------------


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


def compare(tracks):
    """-> {situation: [(error, official, fast)]}, a frame each, both (64, 64, 3) uint8"""
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


def label(image, text, x, y):
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)


def contact_sheet(frames, path, scale=3):
    """Per situation its worst frame: official, fast, and eight times their difference."""
    left, top, side, gap = 90, 28, 64 * scale, 4  # px
    sheet = np.full((top + 3 * (side + gap), left + len(frames) * (side + gap), 3), 255, np.uint8)
    for row, text in enumerate(("official", "fast", "8 x diff")):
        label(sheet, text, 4, top + row * (side + gap) + side // 2)
    for column, (name, rows) in enumerate(frames.items()):
        error, official, fast = max(rows, key=lambda row: row[0])
        difference = cv2.convertScaleAbs(cv2.absdiff(official, fast), alpha=8)
        x = left + column * (side + gap)
        label(sheet, f"{name}: {error:.2f}", x + 4, top - 8)
        for row, picture in enumerate((official, fast, difference)):
            y = top + row * (side + gap)
            sheet[y : y + side, x : x + side] = picture.repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def bench_fidelity(args):
    frames = compare(args.tracks)
    print(f"{'situation':12s}{'frames':>8s}{'mean':>8s}{'worst':>8s}   grey levels of 255")
    everything = {"all": [row for rows in frames.values() for row in rows]}
    for name, rows in (frames | everything).items():
        errors = [row[0] for row in rows]
        print(f"{name:12s}{len(errors):8d}{np.mean(errors):8.3f}{np.max(errors):8.3f}")
    path = args.root / "visuals" / "fidelity.png"
    contact_sheet(frames, path)
    print(f"worst frame of each: {path}")


def drive(seed, steps):
    """The actions of `follow` over one episode: the same for every env of a round."""
    env, actions = make_env("physics"), []
    env.reset(seed=seed)
    for _ in range(steps):
        actions.append(follow(telemetry(env)))
        _, _, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            break
    return actions
