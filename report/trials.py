"""The driver off the lap: recovery from bad starts, energies of behaviours, the energy landscape.

recovery    places a car on the grass beside the road, askew, too fast before a bend, or spinning,
            --starts times, and lets each driver drive. The figure is the share of cars that recover
            within 3 s. A recovered car has three wheels on the road, a heading within 0.5 rad of
            the line's and more than 15 units/s, all for 0.2 s. A bend has to be behind it. Random
            driving and the expert stand beside the driver.
turned      drives 2 s, then turns the car round on the grass, --turns times. The driver sees all of
            it, and takes over. The figure is the share of cars that recover in the lap's direction
            within 8 s. Beside the driver stands one without the memory of its heading.
behaviours  energies of lapping, and of what must cost more: standing on the road, creeping along
            it, driving the wrong way round after a turn, circling on the grass. Driving the right
            way at the same speed stands beside the wrong way. `way` adds to the density the energy
            of the wrong way, by the memory of one who saw the start. A car that circles starts at
            any angle, so its `way` means little.
landscape   energies of plans that hold steering and throttle, in four situations. Axes and prints
            are actions: the steering in rad (the joint stops at 0.4), gas and brake from 0 to 1.
            Gas ends at the limit of --max_gas.

It takes the fast env and tracks for choosing. It writes ROOT/visuals/trials.json and
visuals/energy_landscape.png. Twelve minutes on a CPU core, most of them for `turned`.

    python -m report.trials
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import math
from functools import partial

import numpy as np
import torch
from scipy.stats import binomtest

from car import FPS, ZOOM_STEPS
from car.env import make_env
from car.telemetry import RECOVERY_HOLD, centre_line, is_recovered, place_beside, telemetry_of
from collect_race_data import MAX_OFFSET, RACE_PACES, Expert
from drive_mpc import BaselineDriver, load_driver
from report.page import print_table
from support.checkpoints import require_dir
from support.cli import Number, fail, parser, run_main, track_number
from support.files import replace_atomically, versions, writable
from support.latents import encode
from support.pictures import ornament, pyplot, save_figure
from support.plan_config import BRAKE, STEER, planning, to_action
from support.progress import progress

TRIES = 20  # to turn a car round
DRIVEN, TURNING, BACK_WITHIN = 2.0, 6.0, 8.0  # s: driven before a turn, turned, to come back
REJOINED = 4.0  # s in which a turned car finds the road, the wrong way round
TURNED_BY = 2.2  # rad that a turned car is off the road's direction, at least
KINDS = ("on the grass", "askew", "too fast", "spinning")  # of recovery starts
WITHIN = 3.0  # s in which a car must recover
BEND = 6  # tiles of 3.5 units from the sharpest one of a bend to its end
HELD = {  # speed held in units/s, and direction: 1 is the lap's
    "the same way at 45 units/s": (45, 1),
    "the wrong way at 45 units/s": (45, -1),
    "creeping": (8, 1),
}
BEHAVIOURS = ("lapping", *HELD, "standing on the road", "circling on the grass")
SECONDS = 3.0  # of each behaviour on each track
ENERGIES = "density", "classifier", "way"
HELD_ACTIONS = 31  # steerings, and throttles, of a landscape
SHARE = "{share:.1%} ({low:.0%} to {high:.0%})".format  # of `recovery_share`
PARTS = ("recovery", "turned", "behaviours", "landscape")


def arguments():
    p = parser(__doc__, models=True)
    count = Number(int, 1, 10**6)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to try")
    p.add_argument("--starts", type=count, default=200, help="recovery: how many bad starts")
    p.add_argument("--turns", type=count, default=50, help="turned: how many cars")
    p.add_argument("--track_seed", type=track_number, default=200_600, help="the first track")
    p.add_argument("--tracks", type=count, default=20, help="how many tracks")
    planning(p)
    return p.parse_args()


def reset_past_zoom(env, seed):
    """Resets env to a track, past the opening zoom; returns each tile's |curvature|, 1/units."""
    env.reset(seed=seed)
    env.unwrapped.t = math.inf  # the camera has arrived
    return np.abs(centre_line(env.unwrapped).curvature)


def sharp_bend(curvature, rng):
    """The middle tile of a random one of the five sharpest bends."""
    rest, tiles = curvature.copy(), []
    for _ in range(5):
        i = int(rest.argmax())
        tiles.append(i)
        rest[np.arange(i - 10, i + 10) % len(rest)] = 0
    return tiles[rng.integers(5)]


# ------------------------------------------------------------------ recovery


def place_in_recovery_start(kind, env, curvature, rng):
    """Places the car in a bad start of this kind.

    Returns the frame, and the tiles that the car must pass before it can count as recovered.
    """
    sign, tile, passed = rng.choice((-1, 1)), int(rng.integers(len(curvature))), 0
    uniform = rng.uniform

    if kind == "on the grass":
        place = sign * uniform(8, 16), uniform(-0.5, 0.5), uniform(0, 30)
    elif kind == "askew":
        place = uniform(-4, 4), sign * uniform(0.5, math.pi / 2), uniform(0, 40)
    elif kind == "too fast":  # 10 to 20 units before a bend that allows 50 units/s
        ahead = int(rng.integers(3, 7))
        tile, passed = sharp_bend(curvature, rng) - ahead, ahead + BEND
        place = uniform(-2, 2), 0.0, uniform(60, 80)
    else:
        place = uniform(-4, 4), uniform(-0.5, 0.5), uniform(10, 50), sign * uniform(3, 6)
    return place_beside(env, tile, *place), passed


def seconds_to_recover(env, driver, frame, within=WITHIN, passed=-math.inf):
    """Seconds until the car has recovered, `passed` tiles further on; None after `within`."""
    held, n, start = 0, len(env.unwrapped.track), telemetry_of(env)["tile_index"]
    for step in range(round((within + RECOVERY_HOLD) * FPS)):
        frame, _, ended, _, _ = env.unwrapped.step(driver.act(frame))
        state = telemetry_of(env)
        made = (state["tile_index"] - start + n / 2) % n - n / 2
        wheels = 4 - state["wheels_off_road"]
        back = is_recovered(wheels, state["heading_error"], state["forward_speed"])
        held = held + 1 if back and made >= passed else 0
        if ended:
            return None
        if held == round(RECOVERY_HOLD * FPS):
            return (step + 1) / FPS - RECOVERY_HOLD
    return None


def recovery_share(seconds):
    """{share, low, high (its 95 % interval), n} of times; None is a car that did not recover."""
    share = binomtest(sum(s is not None for s in seconds), len(seconds))
    low, high = share.proportion_ci(method="wilson")
    return {"share": share.statistic, "low": low, "high": high, "n": len(seconds)}


def recovery(driver, starts, tracks, seed):
    """{driver: {kind or "all": recovery_share}}, printed as a table."""
    env, took = make_env("fast"), {}
    drivers = {
        "mpc": driver,
        "expert": BaselineDriver(env, "expert", RACE_PACES[0], seed),
        "random": BaselineDriver(env, "random", 0, seed),
    }
    for i in progress(range(starts), desc="recovery", unit="start", leave=False):
        kind, track = KINDS[i % len(KINDS)], tracks[i % len(tracks)]
        for name, d in drivers.items():
            curvature, rng = reset_past_zoom(env, track), np.random.default_rng([seed, i])
            frame, passed = place_in_recovery_start(kind, env, curvature, rng)
            d.reset(track)
            d.t = ZOOM_STEPS  # the opening second's routine is over
            seconds = seconds_to_recover(env, d, frame, passed=passed)
            for key in (kind, "all"):
                took.setdefault(name, {}).setdefault(key, []).append(seconds)
    env.close()

    kinds = [kind for kind in (*KINDS, "all") if kind in took["mpc"]]
    out = {name: {kind: recovery_share(by[kind]) for kind in kinds} for name, by in took.items()}
    rows = {kind: [SHARE(**by[kind]) for by in out.values()] for kind in kinds}
    title = f"recovered within {WITHIN:.0f} s (95 % interval), {starts} starts"
    print_table(title, list(out), rows)
    return out


# ------------------------------------------------------------------ turned round


def turn_round(env, driver, track, rng):
    """Drives, then turns the car round on the grass; returns the frame.

    The driver sees every frame, but does not decide in the turn. Begins again where the car meets
    another stretch of the road.
    """
    for _ in range(TRIES):
        curvature = reset_past_zoom(env, track)
        frame = place_beside(env, int(rng.integers(len(curvature))), speed=rng.uniform(20, 50))
        driver.reset(track)
        driver.t = ZOOM_STEPS
        for _ in range(round(DRIVEN * FPS)):
            frame = env.unwrapped.step(driver.act(frame))[0]

        side, speed = rng.choice((-1, 1)), rng.uniform(15, 30)
        for _ in range(round(TURNING * FPS)):
            driver.act(frame)
            state = telemetry_of(env)
            lacking = (speed - state["forward_speed"]) / 20
            action = [0.4 * side, np.clip(lacking, 0, 0.5), np.clip(-lacking, 0, 0.3)]
            frame = env.unwrapped.step(np.array(action, np.float32))[0]
            if state["wheels_off_road"] == 4 and side * state["heading_error"] > TURNED_BY:
                return frame
    fail(f"track {track}: the car did not turn round in {TRIES} tries; choose other tracks")


def turned(driver, turns, tracks, seed):
    """{driver: recovery_share} of cars that were turned round, printed as a table."""
    env, back, cost = make_env("fast"), {}, driver.rollout_cost
    readout = cost.turn_readout
    for name, memory in (("mpc", readout), ("mpc without its memory", None)):
        cost.turn_readout, back[name] = memory, []
        for i in progress(range(turns), desc="turned", unit="start", leave=False):
            rng = np.random.default_rng([seed, i])
            frame = turn_round(env, driver, tracks[i % len(tracks)], rng)
            back[name].append(seconds_to_recover(env, driver, frame, BACK_WITHIN))
    cost.turn_readout = readout
    env.close()
    out = {name: recovery_share(cars) for name, cars in back.items()}
    title = f"back the right way within {BACK_WITHIN:.0f} s (95 % interval), {turns} turned cars"
    print_table(title, ["share"], {name: [SHARE(**share)] for name, share in out.items()})
    return out


# ------------------------------------------------------------------ behaviours


def hold_line(speed, sign, env):
    """An action that keeps to the middle of the road; sign 1 is the lap's direction, -1 against."""
    s = telemetry_of(env)
    askew = math.remainder(s["heading_error"] - math.pi * (sign < 0), 2 * math.pi)
    turn = askew + sign * (0.06 * s["lateral_offset"] + 6.0 * s["curvature_10"] * (sign > 0))
    excess = s["forward_speed"] - speed
    action = [np.clip(-turn, -0.5, 0.5), np.clip(-excess, 0, 0.3), 0.1 * (excess > 10)]
    return np.array(action, np.float32)


def make_policy(name, env, driver, track, rng):
    """Places the car for a behaviour and returns its policy, act(env)."""
    if name in HELD and HELD[name][1] < 0:
        frame = turn_round(env, driver, track, rng)
        for _ in range(round(REJOINED * FPS)):
            frame = env.unwrapped.step(hold_line(*HELD[name], env))[0]
            driver.memory.see(frame)
        return partial(hold_line, *HELD[name])
    driver.reset(track)
    tile = int(rng.integers(len(env.unwrapped.track)))
    if name == "lapping":
        expert = Expert(RACE_PACES[0], max_offset=MAX_OFFSET)  # the teacher
        place_beside(env, tile, speed=45)
        expert.reset(env, rng)
        return expert.act
    if name == "standing on the road":
        place_beside(env, tile, rng.uniform(-3, 3), rng.uniform(-0.3, 0.3))
        return lambda env: np.array([0, 0, 0.8], np.float32)
    if name in HELD:
        place_beside(env, tile, rng.uniform(-3, 3), speed=HELD[name][0])
        return partial(hold_line, *HELD[name])
    side = rng.choice((-1, 1))
    place_beside(env, tile, side * rng.uniform(12, 20), rng.uniform(-math.pi, math.pi), speed=20)
    return lambda env: np.array([0.35 * side, 0.3, 0], np.float32)


def behaviour_energies(name, env, driver, tracks, seed):
    """{energy: (n,)} of the latents of a behaviour on all tracks."""
    z, off_course, R = [], [], driver.encoder.repeat
    for i, track in enumerate(tracks):
        reset_past_zoom(env, track)
        act = make_policy(name, env, driver, track, np.random.default_rng([seed, i]))
        frames, off = [], []
        for _ in range(round(SECONDS * FPS)):
            frames.append(env.unwrapped.step(act(env))[0])
            driver.memory.see(frames[-1])
            off.append(driver.memory.off_course())
        obs = torch.from_numpy(np.stack(frames[::R])[None]).permute(0, 1, 4, 2, 3)
        z.append(encode(driver.encoder, obs, driver.device, driver.dtype))
        off_course += off[::R][-len(z[-1]) :]
    cost, z, off_course = driver.nets["cost"], torch.cat(z), torch.tensor(off_course)
    energies = {kind: cost.energy(z, kind) for kind in ENERGIES[:2]}
    energies["way"] = energies["density"] + cost.wrong_way(off_course.to(z.device))
    return {kind: e.cpu().numpy() for kind, e in energies.items()}


def behaviours(driver, tracks, seed):
    """{behaviour: {energy: [25 %, median, 75 %, share above lapping's median]}} of its frames."""
    env, energies = make_env("fast"), {}
    for name in progress(BEHAVIOURS, desc="behaviours", leave=False):
        energies[name] = behaviour_energies(name, env, driver, tracks, seed)
    env.close()
    median = {kind: np.median(e) for kind, e in energies["lapping"].items()}
    out = {
        name: {
            kind: [*np.percentile(e, (25, 50, 75)).tolist(), float((e > median[kind]).mean())]
            for kind, e in by.items()
        }
        for name, by in energies.items()
    }
    text = "{1:.2f} ({0:.2f} to {2:.2f}) {3:5.0%}".format
    rows = {name: [text(*figures) for figures in by.values()] for name, by in out.items()}
    title = "energy of a frame: median (quarters), and share above the median of lapping"
    print_table(title, ENERGIES, rows)
    return out


# ------------------------------------------------------------------ landscape


def situations(env, curvature, rng):
    """{name: arguments of place_beside} of four situations on the present track."""
    n = len(curvature)
    ahead = np.stack([np.roll(curvature, -k) for k in range(14)]).sum(axis=0)
    straight, hairpin = int(ahead.argmin()), sharp_bend(curvature, rng)
    return {
        "on a straight, 45 units/s": dict(tile=straight, speed=45),
        "into a bend, 45 units/s": dict(tile=(hairpin - 4) % n, speed=45),
        "on the grass, road to the left": dict(tile=straight, offset=13, speed=20),
        "too fast into a bend, 80 units/s": dict(tile=(hairpin - 6) % n, speed=80),
    }


def draw_landscape(ax, act, energy):
    """Draws energies (G, G) over the held actions act (G, G, 3), steering by pedals.

    Returns the action of lowest energy, with its energy and the highest one.
    """
    steer, pedals = act[:, 0, 0], act[0, :, 1] - act[0, :, 2]  # the brake below zero
    i, j = np.unravel_index(energy.argmin(), energy.shape)
    low, high = float(energy.min()), float(energy.max())
    ax.contourf(steer, pedals, np.log10(1 + energy.T - low), 16, cmap="viridis_r")
    dot = dict(color="crimson", markersize=8, markeredgecolor="white", clip_on=False)
    ax.plot(steer[i], pedals[j], "o", label="lowest energy", **dot)
    ax.axhline(0, color="white", lw=0.5)
    ax.axvline(0, color="white", lw=0.5)
    ax.set(xlabel="steering held, rad: left to right", xlim=(-STEER, STEER))
    ax.set(ylabel="brake (below 0), gas (above)", ylim=(-BRAKE, pedals[-1]))
    ax.set_title(f"energy {low:.1f} (yellow) to {high:.0f} (violet), log", fontsize=8)
    best = dict(zip(("steer", "gas", "brake"), act[i, j].tolist()))
    return best | {"energy": low, "highest": high}


def landscape(driver, track, seed, path):
    """Draws the picture `path`; returns {situation: the action of lowest energy}."""
    env, rng = make_env("fast"), np.random.default_rng(seed)
    places = situations(env, reset_past_zoom(env, track), rng)
    axis = lambda high: torch.linspace(-1, high, HELD_ACTIONS)
    held = torch.stack(torch.meshgrid(axis(1), axis(driver.cfg.max_gas), indexing="ij"), dim=-1)
    u = held.reshape(-1, 1, 2).expand(-1, driver.cfg.horizon, 2).to(driver.device)
    size = dict(figsize=(3.2 * len(places), 5.6), height_ratios=(1, 1.25))
    fig, axes = pyplot().subplots(2, len(places), layout="constrained", **size)
    out = {}
    for (name, place), (top, bottom) in zip(places.items(), axes.T):
        # the car rolls on while the driver's history fills
        frame = place_beside(env, **place)
        driver.reset(track)
        for _ in range(driver.frames.maxlen):
            driver.frames.append(frame)
            frame = env.unwrapped.step(np.array([0, 0.1, 0], np.float32))[0]

        # the present frame above the energies of all held actions
        top.imshow(driver.frames[-1], interpolation="nearest")
        top.set(title=name, xticks=[], yticks=[])
        costs = driver.rollout_cost(driver.encode(), to_action(u)).view(HELD_ACTIONS, -1)
        held_act = to_action(held).double().numpy().round(6)
        out[name] = draw_landscape(bottom, held_act, costs.cpu().numpy())
    env.close()
    axes[1, 0].legend(loc="lower left", fontsize=8)
    with ornament(path):
        save_figure(fig, path)
    text = "steer {steer:+.2f} rad  gas {gas:.2f}  brake {brake:.2f}  energy {energy:.1f}"
    rows = {name: [text.format(**best)] for name, best in out.items()}
    print_table("plans that hold steering and throttle", ["lowest energy"], rows)
    return out


def main():
    args = arguments()
    visuals = writable(require_dir(args.root) / "visuals")
    driver, _ = load_driver(args, args)
    tracks = range(args.track_seed, args.track_seed + args.tracks)
    picture = visuals / "energy_landscape.png"
    parts = {
        "recovery": lambda: recovery(driver, args.starts, tracks, args.seed),
        "turned": lambda: turned(driver, args.turns, tracks, args.seed),
        "behaviours": lambda: behaviours(driver, tracks, args.seed),
        "landscape": lambda: landscape(driver, args.track_seed, args.seed, picture),
    }
    report = {"models": driver.models, "versions": versions()}
    report |= {"track_seed": args.track_seed, "tracks": args.tracks}
    for name in (name for name in PARTS if name in args.parts):
        report[name] = parts[name]()
        text = json.dumps(report, indent=1).encode()
        replace_atomically(visuals / "trials.json", lambda f: f.write(text))
    print(f"{visuals}/trials.json")
    return 0


if __name__ == "__main__":
    run_main(main)
