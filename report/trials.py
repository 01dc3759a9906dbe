"""The driver where no lap takes it: in trouble, and what the energy says of other ways to behave.

recovery    --starts places a car in trouble (on the grass beside the road, askew, too fast into a
            bend, spinning) and lets each driver drive: how many are back within 3 s, which means
            that for 0.2 s three wheels are on the road, the heading is within 0.5 rad of the
            line's, and the car moves at more than 15 units/s; a bend has to be behind it.
            Random and expert beside it.
behaviours  the energies of lapping, and of what must cost more: standing on the road, creeping
            along it, driving the wrong way round, circling on the grass. Beside the wrong way,
            the right one at the same speed.
landscape   the energy of plans that hold steering and throttle, in four situations: what the
            planner sees when it looks for the lowest place. Axes and prints are actions: the
            steering in rad (the joint stops at 0.4), gas and brake from 0 to 1. What is above the
            limit of --max_gas is hatched.

Takes the fast env and tracks for choosing; writes ROOT/visuals/trials.json and
visuals/energy_landscape.png. Two minutes on a CPU with `--samples 256 --threads 1`.

    python -m report.trials
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import math
from functools import partial

import numpy as np
import torch

from car import FPS, ZOOM_STEPS
from car.env import make_env
from car.telemetry import TELEMETRY, centre_line, place_beside, telemetry
from collect_race_data import MAX_OFFSET, PACES, Expert
from drive_mpc import BRAKE, STEER, BaselineDriver, load_driver, planning, to_action
from networks import stack_frames
from support.checkpoints import require_dir
from support.cli import Number, parser, run, track_number
from support.device import autocast
from support.files import replace_atomically, versions, writable
from support.pictures import ornament, pyplot, save_figure
from support.progress import progress

WITHIN, HELD = 3.0, 0.2  # s: to be back in, and to stay back
BEND = 6  # tiles of 3.5 units from the sharpest one of a bend to its end
GRID = 31  # steerings, and throttles, of a landscape
BEHAVIOURS = (
    "lapping",
    "the same way at 45 units/s",
    "the wrong way at 45 units/s",
    "creeping",
    "standing on the road",
    "circling on the grass",
)
SECONDS = 3.0  # that each behaviour is watched on each track


def arguments():
    p = parser(__doc__, models=True)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to try")
    p.add_argument(
        "--starts", type=Number(int, 1, 10**6), default=200, help="recovery: cars in trouble"
    )
    p.add_argument("--track_seed", type=track_number, default=200_600, help="the first track")
    p.add_argument("--tracks", type=Number(int, 1, 10**6), default=20, help="how many tracks")
    planning(p)
    return p.parse_args()


def seen(env):
    """{name: value} of the telemetry of env."""
    return dict(zip(TELEMETRY, telemetry(env).tolist()))


def reset_past_zoom(env, seed):
    """Resets env to a track, past the opening zoom; returns how sharp each tile turns, 1/units."""
    env.reset(seed=seed)
    env.unwrapped.t = math.inf  # the camera has arrived
    return np.abs(centre_line(env.unwrapped).curvature)


def bend(curvature, rng):
    """The tile in the middle of a sharp bend, one of the five sharpest."""
    apart, tiles = curvature.copy(), []
    for _ in range(5):
        i = int(apart.argmax())
        tiles.append(i)
        apart[np.arange(i - 10, i + 10) % len(apart)] = 0
    return tiles[rng.integers(5)]


# ------------------------------------------------------------------ recovery


def trouble(kind, env, curvature, rng):
    """Places the car in trouble of a kind -> (what it sees, tiles to pass before it can be back)"""
    sign, tile = rng.choice((-1, 1)), int(rng.integers(len(curvature)))
    if kind == "on the grass":
        return place_beside(
            env, tile, sign * rng.uniform(8, 16), rng.uniform(-0.5, 0.5), rng.uniform(0, 30)
        ), 0
    if kind == "askew":
        return place_beside(
            env, tile, rng.uniform(-4, 4), sign * rng.uniform(0.5, math.pi / 2), rng.uniform(0, 40)
        ), 0
    if kind == "too fast":  # 10 to 20 units before a bend that is made for 50 units/s
        ahead = int(rng.integers(3, 7))
        return place_beside(
            env, bend(curvature, rng) - ahead, rng.uniform(-2, 2), 0.0, rng.uniform(60, 80)
        ), ahead + BEND
    return place_beside(
        env,
        tile,
        rng.uniform(-4, 4),
        rng.uniform(-0.5, 0.5),
        rng.uniform(10, 50),
        sign * rng.uniform(3, 6),
    ), 0


KINDS = ("on the grass", "askew", "too fast", "spinning")


def recover(env, driver, frame, passed, track_seed):
    """Seconds until the car is back on the road and moving, or None after WITHIN.

    It counts as back only so many tiles, `passed`, further on: a bend has to be behind it.
    """
    driver.reset(track_seed)
    driver.t, held = ZOOM_STEPS, 0  # the opening second's routine is over
    n = len(env.unwrapped.track)
    start = seen(env)["tile_index"]
    for step in range(round((WITHIN + HELD) * FPS)):
        frame, _, ended, _, _ = env.unwrapped.step(driver.act(frame))
        s = seen(env)
        made = (s["tile_index"] - start + n / 2) % n - n / 2
        back = (
            s["wheels_off_road"] <= 1
            and abs(s["heading_error"]) < 0.5
            and s["forward_speed"] > 15
            and made >= passed
        )
        held = held + 1 if back else 0
        if ended:
            return None
        if held == round(HELD * FPS):
            return (step + 1) / FPS - HELD
    return None


def wilson(hits, n, z=1.96):
    """The 95 % interval of a share (Wilson 1927)."""
    p, q = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return [(p + q / 2 - half) / (1 + q), (p + q / 2 + half) / (1 + q)]


def recovery(args, driver):
    """{driver: {kind or "all": {share, low, high, n, seconds}}}"""
    env = make_env("fast")
    drivers = {
        "mpc": driver,
        "expert": BaselineDriver(env, "expert", PACES[0], args.seed),
        "random": BaselineDriver(env, "random", 0, args.seed),
    }
    took = {name: {kind: [] for kind in KINDS} for name in drivers}
    for i in progress(range(args.starts), desc="recovery", unit="start", leave=False):
        kind, track = KINDS[i % len(KINDS)], args.track_seed + i % args.tracks
        for name, d in drivers.items():
            curvature = reset_past_zoom(env, track)
            place = trouble(kind, env, curvature, np.random.default_rng([args.seed, i]))
            took[name][kind].append(recover(env, d, *place, track))
    env.close()
    out = {}
    for name, kinds in took.items():
        kinds = kinds | {"all": sum(kinds.values(), [])}
        out[name] = {}
        for kind, seconds in kinds.items():
            if seconds:
                back = [s for s in seconds if s is not None]
                low, high = wilson(len(back), len(seconds))
                out[name][kind] = {
                    "share": len(back) / len(seconds),
                    "low": low,
                    "high": high,
                    "n": len(seconds),
                    "seconds": float(np.median(back)) if back else None,
                }
    print(
        f"\nback on the road and moving within {WITHIN:.0f} s (95 % interval)\n{'':14}"
        + "".join(f"{name:>24}" for name in out)
    )
    for kind in out["mpc"]:
        print(
            f"{kind:14}"
            + "".join(
                f"{r[kind]['share']:10.1%} ({r[kind]['low']:.0%} to {r[kind]['high']:.0%})".rjust(
                    24
                )
                for r in out.values()
            )
            + f"   n = {out['mpc'][kind]['n']}"
        )
    return out


# ------------------------------------------------------------------ behaviours


def hold_line(speed, way, env):
    """Keeps to the middle of the road at a speed, way 1 as the lap goes, -1 against it."""
    s = seen(env)
    askew = (
        s["heading_error"] if way > 0 else math.remainder(s["heading_error"] - math.pi, 2 * math.pi)
    )
    turn = askew + way * (0.06 * s["lateral_offset"] + 6.0 * s["curvature_10"] * (way > 0))
    slow = s["forward_speed"] - speed
    return np.array(
        [np.clip(-turn, -0.5, 0.5), np.clip(-slow, 0, 0.3), 0.1 * (slow > 10)], np.float32
    )


def make_policy(name, env, rng):
    """Begins a behaviour: places the car; returns act(env)."""
    tile = int(rng.integers(len(env.unwrapped.track)))
    if name == "lapping":
        expert = Expert(PACES[0], max_offset=MAX_OFFSET)  # the teacher
        place_beside(env, tile, speed=45)
        expert.reset(env, rng)
        return expert.act
    if name == "standing on the road":
        place_beside(env, tile, rng.uniform(-3, 3), rng.uniform(-0.3, 0.3))
        return lambda env: np.array([0, 0, 0.8], np.float32)
    if name == "creeping":
        place_beside(env, tile, rng.uniform(-3, 3), speed=8)
        return partial(hold_line, 8, 1)
    if name.endswith("at 45 units/s"):
        way = -1 if "wrong" in name else 1
        place_beside(env, tile, rng.uniform(-3, 3), math.pi * (way < 0), speed=45)
        return partial(hold_line, 45, way)
    side = rng.choice((-1, 1))
    place_beside(env, tile, side * rng.uniform(12, 20), rng.uniform(-math.pi, math.pi), speed=20)
    return lambda env: np.array([0.35 * side, 0.3, 0], np.float32)


def behaviours(args, driver):
    """{behaviour: {energy: [25 %, median, 75 %, share above lapping's median]}} of its frames."""
    env, encoder = make_env("fast"), driver.encoder
    energies = {}
    for name in progress(BEHAVIOURS, desc="behaviours", leave=False):
        z = []
        for i in range(args.tracks):
            reset_past_zoom(env, args.track_seed + i)
            rng, frames = np.random.default_rng([args.seed, i]), []
            act = make_policy(name, env, rng)
            for _ in range(round(SECONDS * FPS)):
                frames.append(env.unwrapped.step(act(env))[0])
            film = np.stack(frames[:: encoder.repeat])[None].transpose(0, 1, 4, 2, 3)
            with torch.inference_mode(), autocast(driver.device, driver.dtype):
                z.append(
                    encoder(stack_frames(torch.from_numpy(film).to(driver.device), encoder.history))
                )
        energies[name] = {
            kind: driver.nets["cost"].energy(torch.cat(z), kind).cpu().numpy()
            for kind in ("density", "classifier")
        }
    env.close()
    out = {}
    print(
        f"\nenergy of a frame: median (quarters), and share above the median of lapping\n{'':28}"
        + "".join(f"{kind:>34}" for kind in ("density", "classifier"))
    )
    for name, found in energies.items():
        out[name] = {}
        for kind, e in found.items():
            above = float((e > np.median(energies["lapping"][kind])).mean())
            out[name][kind] = [*np.percentile(e, (25, 50, 75)).tolist(), above]
        print(
            f"{name:28}"
            + "".join(
                f"{r[1]:10.2f} ({r[0]:.2f} to {r[2]:.2f}) {r[3]:5.0%}".rjust(34)
                for r in out[name].values()
            )
        )
    return out


# ------------------------------------------------------------------ landscape


def situations(env, curvature, rng):
    """{name: tile and place} of four situations on the present track."""
    n = len(curvature)
    ahead = lambda tiles: np.stack([np.roll(curvature, -k) for k in range(tiles)]).sum(axis=0)
    straight, hairpin = int(ahead(14).argmin()), bend(curvature, rng)
    return {
        "on a straight, 45 units/s": dict(tile=straight, speed=45),
        "into a bend, 45 units/s": dict(tile=(hairpin - 4) % n, speed=45),
        "on the grass, road to the left": dict(tile=straight, offset=13, speed=20),
        "too fast into a bend, 80 units/s": dict(tile=(hairpin - 6) % n, speed=80),
    }


def energies_of(driver, z, held):
    """Energies (G, G) summed over the horizon of plans that hold u: held (G, G, 2)."""
    u = held.reshape(-1, 1, 2).expand(-1, driver.cfg.horizon, 2).to(driver.device)
    return driver.futures(z, to_action(u)).view(held.shape[:2]).cpu().numpy()


def draw_landscape(ax, act, energy):
    """Draws energies (G, G) over the actions act (G, G, 3), steering by pedals, that were held ->
    the action of lowest energy."""
    steer, pedals = act[:, 0, 0], act[0, :, 1] - act[0, :, 2]  # the brake below zero
    i, j = np.unravel_index(energy.argmin(), energy.shape)
    logs = energy.min() > 0  # a classifier's energies are logits
    ax.contourf(steer, pedals, np.log10(energy.T) if logs else energy.T, 16, cmap="viridis_r")
    ax.plot(
        steer[i],
        pedals[j],
        "o",
        color="crimson",
        markersize=8,
        markeredgecolor="white",
        label="lowest energy",
        clip_on=False,
    )
    if pedals[-1] < 1:
        ax.axhspan(
            pedals[-1],
            1,
            facecolor="0.95",
            edgecolor="0.7",
            hatch="//",
            lw=0,
            label=f"gas above {pedals[-1]:g}: not allowed",
        )
    ax.axhline(0, color="white", lw=0.5)
    ax.axvline(0, color="white", lw=0.5)
    ax.set(
        xlabel="steering held, rad: left to right",
        ylabel="brake (below 0), gas (above)",
        xlim=(-STEER, STEER),
        ylim=(-BRAKE, 1),
    )
    ax.set_title(
        f"energy {energy.min():.1f} (yellow) to {energy.max():.0f} (violet)" + ", log" * bool(logs),
        fontsize=8,
    )
    return {
        **dict(zip(("steer", "gas", "brake"), act[i, j].tolist())),
        "energy": float(energy.min()),
        "highest": float(energy.max()),
    }


def landscape(args, driver):
    """Draws visuals/energy_landscape.png -> {situation: the actions of lowest energy}."""
    env, rng = make_env("fast"), np.random.default_rng(args.seed)
    curvature = reset_past_zoom(env, args.track_seed)
    held = torch.stack(
        torch.meshgrid(
            torch.linspace(-1, 1, GRID), torch.linspace(-1, args.max_gas, GRID), indexing="ij"
        ),
        dim=-1,
    )
    plt = pyplot()
    places, out = situations(env, curvature, rng), {}
    fig, axes = plt.subplots(
        2,
        len(places),
        figsize=(3.2 * len(places), 5.6),
        layout="constrained",
        height_ratios=(1, 1.25),
    )
    for (name, place), (eye, ax) in zip(places.items(), axes.T):
        frame = place_beside(env, **place)
        driver.reset(args.track_seed)
        for _ in range(driver.frames.maxlen):  # it rolls on while the history fills
            driver.frames.append(frame)
            frame = env.unwrapped.step(np.array([0, 0.1, 0], np.float32))[0]
        energy = energies_of(driver, driver.encode(), held)
        eye.imshow(driver.frames[-1], interpolation="nearest")
        eye.set(title=name, xticks=[], yticks=[])
        out[name] = draw_landscape(ax, to_action(held).double().numpy().round(6), energy)
    axes[1, 0].legend(loc="lower left", fontsize=8)
    with ornament(path := args.root / "visuals" / "energy_landscape.png"):
        save_figure(fig, path)
    env.close()
    print("\nplans that hold steering and throttle: the one of lowest energy")
    for name, best in out.items():
        print(
            f"{name:34} steer {best['steer']:+.2f} rad  gas {best['gas']:.2f}  "
            f"brake {best['brake']:.2f}  energy {best['energy']:8.1f} of up to "
            f"{best['highest']:.0f}"
        )
    return out


PARTS = {"recovery": recovery, "behaviours": behaviours, "landscape": landscape}


def main():
    args = arguments()
    visuals = writable(require_dir(args.root) / "visuals")
    driver, _ = load_driver(args, args)
    body = {
        "models": driver.models,
        "versions": versions(),
        "track_seed": args.track_seed,
        "tracks": args.tracks,
    }
    for name in (name for name in PARTS if name in args.parts):
        body[name] = PARTS[name](args, driver)
        text = json.dumps(body, indent=1).encode()
        replace_atomically(writable(visuals) / "trials.json", lambda f: f.write(text))
    print(f"{visuals}/trials.json" + ", energy_landscape.png" * ("landscape" in body))
    return 0


if __name__ == "__main__":
    run(main)
