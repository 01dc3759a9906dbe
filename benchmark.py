"""Speed and faithfulness, measured beside what they replace, in one run.

    python benchmark.py env collect loader fidelity     # 12 minutes on 2 cores

env       steps per CPU second (one core, whatever else the machine does), over whole episodes with
          their resets and observations: the official env with `preprocess`, the fast env, the same
          with `telemetry`, physics alone, and EnvPool's where it is installed. Interleaved rounds;
          medians, and the median ratio to the official env of the same round.
collect   frames per second of the three collectors as they are run, with 1 and 2 workers: policy,
          physics, picture, telemetry, compression, fsync'd file; beside the official env stepped
          before and after. Then the memory of a worker over its episodes.
loader    images per second of mixed batches of 256 and of windows of 16, from compressed chunks in
          the page cache; how batches are mixed; memory; the first batch of 10,000 chunks.
fidelity  mean absolute difference, in grey levels of 255, of `preprocess(official frame)` and the
          fast env's frame of the same state, by situation; writes visuals/fidelity.png.
train     the encoder's training loop, data and augmentation included, beside the bare forward,
          backward and step of the same nets on one prepared batch, taking turns; and what share of
          this device's rate of matrix products that is. Trains on the episodes of --root.
scale     steps per second of the encoder's training, the batch shared by 1 and 2 processes of
          torchrun, from its own log; on CPUs also one process with 2 threads. Data as for train.
plan      milliseconds of a plan as the driver makes it, encoding included, per plan and per
          environment step: with folded products and with a plain rollout of the same nets, and
          with every third latent scored and with all of them, in turns; for --root's nets or those
          that come with the code.
paired    returns of the nets under --root in the official and in the fast env, track by track.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import cv2
import gymnasium
import numpy as np
import pygame
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_encoder
from buffer import AHEAD, Loader, index, load_sources, read_chunk, some_chunks, write_chunk
from car_env import FPS, PLAYFIELD, TELEMETRY, ZOOM_STEPS, make_env, observe, place_car, telemetry
from drive_mpc import Futures, load_driver, planning
from networks import judged, latest, optimise
from support.cli import Help, Number, Parser, fail, fraction, positive, run
from support.training import autocast, keep_memory, set_up

CHOOSING = 200_500  # first of the tracks that nets are compared on: never collected nor reported
MANY = 10**6  # more than any episode has steps
LAPTOP = "--width 0.25 --dim 128 --strides 2 2 2 1 --batch_size 96 --lr 2e-3".split()
PLANS = 200  # that are timed
WARM_UP = 4  # episodes before anything is timed, of the hundreds in a worker's life
FEATURE = {name: i for i, name in enumerate(TELEMETRY)}


def parse_args():
    p = Parser(description=__doc__, formatter_class=Help)
    p.add_argument("what", nargs="+", choices=list(BENCHMARKS), help="what to measure")
    p.add_argument(
        "--root",
        type=Path,
        default=Path("."),
        help="visuals/ is written in here; train and scale read its data*/, plan and "
        "paired its models/",
    )
    p.add_argument(
        "--rounds",
        type=Number(int, 1, 999),
        default=5,
        help="env, train, scale: a median needs an odd number",
    )
    p.add_argument(
        "--frames",
        type=Number(int, 2000, 10**8),
        default=40_000,
        help="loader: of each source; collect: of each worker",
    )
    p.add_argument(
        "--episodes",
        type=Number(int, 2, 10**6),
        default=1000,
        help="collect: over which memory is shown",
    )
    p.add_argument(
        "--batches", type=positive, default=10_000, help="loader: over which memory is shown"
    )
    p.add_argument(
        "--chunks",
        type=Number(int, 1, 10**6),
        default=10_000,
        help="loader: of the folder opened anew",
    )
    p.add_argument(
        "--steps", type=Number(int, 1, 1000), default=1000, help="env: steps of an episode"
    )
    p.add_argument(
        "--train_steps",
        type=Number(int, 1, 10**6),
        default=20,
        help="train, scale: in each of --rounds",
    )
    p.add_argument(
        "--laptop", action="store_true", help="train, scale: the laptop's nets on a GPU too"
    )
    p.add_argument(
        "--tracks", type=Number(int, 2, 1000), default=20, help="fidelity, paired: how many"
    )
    p.add_argument("--gas", type=fraction, help="paired: as in drive_mpc.py")
    return p.parse_args()


def machine():
    """One line: hardware and versions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {m.__name__: m.__version__ for m in (np, cv2, gymnasium, pygame)}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{cpu}, {os.cpu_count()} cores; python {platform.python_version()}, {listed}"


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
    for seed in range(args.rounds):
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


# ---- collect -------------------------------------------------------------------------------------

SOURCES = {
    "data_race": "collect_race_data.py",
    "data_recovery": "collect_recovery_data.py",
    "data": "collect_data.py",
}
HERE = Path(__file__).parent


def stock_rate(steps=600):
    """Frames per second of the official env as it is: no telemetry, nothing written."""
    env = make_env("official")
    actions = drive(7, steps)
    env.reset(seed=7)
    start = time.monotonic()
    for action in actions:
        env.step(action)
    return len(actions) / (time.monotonic() - start)


def collecting(root, script, frames, workers, watch=lambda pid: None):
    """Runs a collector; watch(its pid) is called twice a second."""
    command = [
        sys.executable,
        HERE / script,
        "--root",
        root,
        "--frames",
        frames,
        "--workers",
        workers,
    ]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=said)
        while process.poll() is None:
            watch(process.pid)
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read())


def steady_rate(folder):
    """Frames per second while all workers drive: from each one's first file to its last."""
    ends = defaultdict(list)
    for chunk in index(folder)[0]:
        ends[chunk.meta["worker"]].append((chunk.path.stat().st_mtime, chunk.frames))
    rate = 0
    for files in map(sorted, ends.values()):
        if len(files) < 2:
            sys.exit(f"{folder}: a worker wrote one episode only; raise --frames")
        rate += sum(n for _, n in files[1:]) / (files[-1][0] - files[0][0])
    return rate


def bench_collect(args):
    print(
        f"{'collector':20s}{'workers':>8s}{'frames/s':>10s}{'x stock a core':>16s}{'B/frame':>9s}"
    )
    for name, script in SOURCES.items():
        rates, stock = {1: [], 2: []}, [stock_rate()]
        for workers in (1, 2, 2, 1):  # the machine's own drift falls on both
            with tempfile.TemporaryDirectory() as root:
                collecting(root, script, args.frames * workers, workers)
                folder = Path(root) / name
                rates[workers].append(steady_rate(folder))
                size = sum(p.stat().st_size for p in folder.glob("*.npz"))
                frames = sum(c.frames for c in index(folder)[0])
            stock.append(stock_rate())
        for workers, both in rates.items():
            rate = statistics.mean(both)
            times = rate / workers / statistics.mean(stock)
            print(f"{name:20s}{workers:8d}{rate:10.0f}{times:16.1f}{size / frames:9.0f}")
        ratio = sum(rates[2]) / sum(rates[1])
        print(f"{'':20s}two workers are {ratio:.2f} times one")
    memory_of_a_worker(args.episodes)


def memory_of_a_worker(episodes):
    """Prints the private memory of a random driver's worker over its episodes."""
    rows = []

    def watch(pid):
        done = len(list(folder.glob("*.npz")))
        rows.extend((done, w, private_mib(w)) for w in workers_of(pid)[-1:])

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "data"
        collecting(root, SOURCES["data"], 300 * episodes, 1, watch)
    lives = defaultdict(list)
    for done, pid, mib in rows:
        lives[pid].append((done, mib))
    print(f"private MiB of the worker over {rows[-1][0]} episodes, a line a process")
    for life in lives.values():
        picked = sorted({int(i) for i in np.linspace(min(4, len(life) - 1), len(life) - 1, 6)})
        print("  " + ", ".join(f"{life[i][1]:.0f} after {life[i][0]}" for i in picked))


def children(pid):
    """Pids of the processes that this one started, oldest first."""
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return sorted(int(p) for task in tasks for p in task.read_text().split())
    except OSError:
        return []


def workers_of(pid):
    """Pids of a collector's workers; its other child keeps track of what they share."""
    out = []
    for child in children(pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                out.append(child)
    return out


def private_mib(pid):
    """Memory of a process that it shares with none, in MiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


# ---- loader --------------------------------------------------------------------------------------


def bench_loader(args):
    keep_memory()  # as every stage does
    with tempfile.TemporaryDirectory() as tmp:
        root, sources, first = Path(tmp), [], 0
        for name, script in SOURCES.items():
            collecting(root / "raw", script, args.frames, 2)
            first += len(stamp(root / "raw" / name, root / name, first))
            sources.append(index(root / name)[0])
        shutil.rmtree(root / "raw")
        print(f"{first} chunks, {sum(c.frames for s in sources for c in s):,} frames")
        for latents, size, n in ((1, 256, 1500), (16, 32, 500)):
            stream = Loader(sources, size, latents=latents).batches()
            next(stream)
            start = time.monotonic()
            for _ in range(n):
                next(stream)
            rate = n * size * latents / (time.monotonic() - start)
            stream.close()
            print(f"batches of {size} windows of {latents}: {rate:,.0f} frames/s")
        mixing(sources)
        memory_of_the_loader(sources, args.batches)
        opening(root, sources[0], args.chunks)


def stamp(source, folder, first):
    """Copies chunks with their number, from `first` on, and the step in each frame's first pixels;
    returns them."""
    folder.mkdir()
    chunks = index(source)[0]
    for number, chunk in enumerate(chunks, first):
        data = {k: np.array(v) for k, v in read_chunk(chunk.path).items()}
        for t, obs in enumerate(data["obs"]):
            obs[0, 0] = t // 256, t % 256, number // 256
            obs[0, 1] = number % 256
        write_chunk(folder, chunk.meta, **data)
    return chunks


def stamps(obs):
    """(chunk numbers, steps), two (B,) arrays, of obs (B, 1, 3, 64, 64)."""
    (t1, n0), (t0, _), (n1, _) = obs[:, 0, :, 0, :2].permute(1, 2, 0).int().numpy()
    return 256 * n1 + n0, 256 * t1 + t0


def mixing(sources, size=256):
    """Prints how batches of single frames are made up, over one pass of the smallest source."""
    loader = Loader(sources, size)
    stream, ends = loader.batches(), np.cumsum([len(s) for s in sources])
    episodes, nearest, seen = [], [], []
    for _ in range(min(s.total // s.size for s in loader.streams)):
        number, step = stamps(next(stream)[0])
        source = np.searchsorted(ends, number, "right")
        if np.bincount(source, minlength=len(sources)).tolist() != loader.counts:
            sys.exit(f"a batch holds {np.bincount(source)} of the sources, not {loader.counts}")
        episodes.append(len(set(number.tolist())))
        order = np.lexsort((step, number))
        gaps = np.diff(step[order])[np.diff(number[order]) == 0]
        nearest.append(gaps.min(initial=MANY))
        seen.extend((MANY * number + step).tolist())
    stream.close()
    print(
        f"{len(episodes):,} batches of {size}, each exactly {loader.counts}: episodes in a batch "
        f"{min(episodes)} at least, median {statistics.median(episodes):.0f}; frames of the same "
        f"episode in a batch {min(nearest)} steps apart at least; of {len(seen):,} frames "
        f"{len(seen) - len(set(seen))} came twice"
    )


def memory_of_the_loader(sources, batches):
    """Prints this process's private memory, torch included, while batches go by."""
    stream, rows, start = Loader(sources, 256).batches(), [], time.monotonic()
    for i in range(1, batches + 1):
        next(stream)
        if i * 8 % batches < 8:
            rows.append(f"{private_mib(os.getpid()):.0f} after {i:,}")
    stream.close()
    print(
        f"private MiB over batches of 256: {', '.join(rows)} "
        f"({batches * 256 / (time.monotonic() - start):,.0f} frames/s)"
    )


def opening(root, chunks, count, length=20):
    """Prints the seconds to the first batch of a folder of `count` small chunks."""
    folder = root / "many"
    folder.mkdir()
    data = read_chunk(chunks[0].path)
    part = {k: v[: length + (len(v) > chunks[0].frames)] for k, v in data.items()}
    for i in range(count):
        part["reward"] = np.full(length, i, np.float32)
        write_chunk(folder, {**chunks[0].meta, "uid": f"small-{i:06d}", "track_seed": i}, **part)
    start = time.monotonic()
    stream = Loader(
        [load_sources(argparse.Namespace(root=root, data=["many"]))["many"][0]], 256
    ).batches()
    next(stream)
    print(f"first batch of a folder of {count:,} chunks: {time.monotonic() - start:.1f} s")
    stream.close()


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


# ---- train ---------------------------------------------------------------------------------------


def matrix_rate(device, dtype, side=4096, rounds=5):
    """FLOP/s of the best of some products of square matrices: a peak that can be reached."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    count = 20 if device.type == "cuda" else 1  # so that starting them costs nothing
    work = lambda: [a @ a for _ in range(count)]
    return 2 * side**3 * count / min([timed(work, device) for _ in range(rounds + 1)][1:])


def timed(work, device):
    """Seconds that the device works on `work()`."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def bench_train(args):
    flags = LAPTOP if args.laptop or not torch.cuda.is_available() else []
    cfg = train_encoder.arguments(["--root", str(args.root), *flags])
    device, dtype = set_up(cfg)
    sources = load_sources(cfg)
    nets, optim, scaler = train_encoder.make_nets(cfg, device, dtype)
    loader = train_encoder.make_loader(
        cfg, sources, 0, cfg.batch_size, cfg.seed, pinned=device.type == "cuda"
    )
    batches = train_encoder.training_batches(loader, cfg, device)

    def learn(*batch):
        with autocast(device, dtype):
            loss, *_ = train_encoder.loss_fn(nets, *batch, cfg)
        optimise(loss, nets.values(), optim, scaler, cfg.lr)

    def loop():
        for _ in range(args.train_steps):
            learn(*next(batches))

    fixed = next(batches)
    with FlopCounterMode(display=False) as counter:
        learn(*fixed)
    loop()  # everything is warm

    def bare():
        for _ in range(args.train_steps):
            learn(*fixed)

    seconds = []
    for _ in range(args.rounds):
        alone = timed(bare, device)  # while it runs, the loader reads ahead:
        for _ in range(AHEAD):  # what is there already counts for neither
            next(batches)
        seconds.append((timed(loop, device), alone))
    seconds = np.array(seconds) / args.train_steps
    whole, alone = np.median(seconds, axis=0)
    rate, peak = counter.get_total_flops() / whole, matrix_rate(device, dtype)
    print(
        f"{' '.join(flags) or 'full size'}; {device}, {str(dtype)[6:]}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, s in (("the loop", whole), ("the bare net", alone)):
        print(f"{name:14s}{1000 * s:8.1f} ms a step{len(fixed[0]) / s:10,.0f} images/s")
    print(
        f"the loop runs at {np.median(seconds[:, 1] / seconds[:, 0]):.1%} of the bare net, at "
        f"{rate / 1e9:,.0f} GFLOP/s: {rate / peak:.1%} of {peak / 1e9:,.0f}"
    )


# ---- scale ---------------------------------------------------------------------------------------


def bench_scale(args):
    some_chunks(args.root / "data_race")
    gpus = torch.cuda.device_count()
    flags = LAPTOP if args.laptop or not gpus else []
    cfg = train_encoder.arguments(flags)
    images = cfg.batch_size * (len(train_encoder.latents_of(cfg)) + bool(cfg.bend))
    print(
        f"{' '.join(flags) or 'full size'}; {gpus} GPUs, batches of {images} images, torch "
        f"{torch.__version__}\nprocesses threads  ms a step  images/s"
    )
    first = None
    for ranks, threads in ((1, 0), (max(2, gpus), 0)) if gpus else ((1, 1), (1, 2), (2, 1)):
        rate = training_rate(args, ranks, ["--threads", threads, *flags])
        first = first or rate
        print(
            f"{ranks:9d}{threads or 'all':>8}{1000 / rate:11.0f}{images * rate:10,.0f}"
            f"   {rate / first:.2f} times the first",
            flush=True,
        )


def training_rate(args, ranks, flags):
    """Steps per second of train_encoder.py with so many processes, start and end left out."""
    with tempfile.TemporaryDirectory() as tmp:
        for folder in args.root.resolve().glob("data*"):
            (Path(tmp) / folder.name).symlink_to(folder)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            HERE / "train_encoder.py",
            "--root",
            tmp,
            *flags,
            "--epochs",
            1,
            "--steps_per_epoch",
            args.rounds * args.train_steps,
        ]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            fail(
                next(
                    (line for line in done.stderr.splitlines() if line.startswith("error: ")),
                    done.stderr,
                ).removeprefix("error: ")
            )
        rows = map(json.loads, Path(tmp, "models", "encoder.jsonl").read_text().splitlines())
        rows = [row for row in rows if "lr" in row]
    if len(rows) < 3:
        fail(f"{len(rows)} lines were logged, expected 3 at least; raise --train_steps")
    return (rows[-1]["step"] - rows[1]["step"]) / (rows[-1]["seconds"] - rows[1]["seconds"])


# ---- plan ----------------------------------------------------------------------------------------


class PlainFutures:
    """What `Futures` computes on the road, by the nets' own methods, step by step."""

    def __init__(self, predictor, cost, kind, looks):
        self.predictor, self.cost, self.kind, self.looks = predictor, cost, kind, looks

    @torch.inference_mode()
    def __call__(self, z, act):
        N, H, _ = act.shape
        h, looks = self.predictor.lift(z), self.looks(H)
        rests, h = self.predictor.rests(z, h, H)[0], h.expand(N, -1)
        total = torch.zeros(N, device=z.device)
        for t in range(H):
            h = self.predictor.step(h, act[:, t])
            if t in looks:
                total += self.cost.energy(self.predictor.read(h) + rests[t], self.kind)
        return H / len(looks) * total


def bench_plan(args):
    p = argparse.ArgumentParser()
    planning(p)
    cfg = p.parse_args([])
    run_args = train_encoder.arguments(["--root", str(args.root)])
    driver, _ = load_driver(run_args, cfg)
    env = make_env("fast")
    env.reset(seed=CHOOSING)
    driver.reset(CHOOSING)
    ways = {
        f"{name}, {scored} scored": kind(
            driver.nets["predictor"], driver.nets["cost"], cfg.energy, looks
        )
        for scored, looks in (("all", range), ("every third", judged))
        for name, kind in (("plain rollout", PlainFutures), ("folded products", Futures))
    }
    took = {name: [] for name in ways}
    for step in range(ZOOM_STEPS + WARM_UP + PLANS):
        driver.frames.append(env.step(follow(telemetry(env)))[0])
        if step < ZOOM_STEPS:
            continue
        order = list(ways)[step % len(ways) :] + list(ways)[: step % len(ways)]
        for name in order:  # each is the first as often as the others
            driver.futures = ways[name]
            start = time.perf_counter()
            driver.think()
            driver.u.cpu()  # waits for the device
            if step >= ZOOM_STEPS + WARM_UP:
                took[name].append(1000 * (time.perf_counter() - start))
    repeat = driver.encoder.repeat
    print(
        f"{cfg.samples} futures of {cfg.horizon} latents, {repeat} environment steps each, "
        f"{driver.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'ms':30s}{'p50':>8s}{'p99':>8s}   per environment step: {'p50':>6s}{'p99':>8s}")
    for name, ms in took.items():
        p50, p99 = np.percentile(ms, (50, 99))
        driver_s = "   the driver's" * (ways[name] is list(ways.values())[-1])
        print(
            f"{name:30s}{p50:8.1f}{p99:8.1f}{'':24s}{p50 / repeat:8.1f}{p99 / repeat:8.1f}"
            f"{driver_s}"
        )


# ---- paired --------------------------------------------------------------------------------------


def bench_paired(args):
    scores = {}
    if not latest(args.root / "models", "encoder_mixed").exists():
        fail(f"{args.root / 'models'}: no encoder there; `python train_encoder.py` makes it")
    with tempfile.TemporaryDirectory() as tmp:
        runs = []
        for kind in ("official", "fast"):  # side by side, a core each
            command = [
                sys.executable,
                HERE / "drive_mpc.py",
                "--root",
                args.root,
                "--env",
                kind,
                "--episodes",
                args.tracks,
                "--track_seed",
                CHOOSING,
                "--samples",
                256,
                "--threads",
                1,
                "--no_video",
                "--json",
                f"{tmp}/{kind}.json",
                *(() if args.gas is None else ("--gas", args.gas)),
            ]
            runs.append(
                subprocess.Popen(
                    [str(c) for c in command],
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        failed = [process.wait() for process in runs]
        if any(failed):
            sys.exit(1)
        for kind in ("official", "fast"):
            rows = json.loads(Path(tmp, f"{kind}.json").read_text())["episodes"]
            scores[kind] = {row["track_seed"]: row["return"] for row in rows}
    tracks = sorted(scores["official"].keys() & scores["fast"].keys())
    scores = {kind: np.array([found[t] for t in tracks]) for kind, found in scores.items()}
    gap = scores["fast"] - scores["official"]
    print("track     official    fast  difference")
    for track, a, b in zip(tracks, *scores.values()):
        print(f"{track:8d}{a:10.1f}{b:8.1f}{b - a:+12.1f}")
    error = gap.std(ddof=1) / len(gap) ** 0.5
    print(
        f"{'mean':8s}{scores['official'].mean():10.1f}{scores['fast'].mean():8.1f}"
        f"{gap.mean():+12.1f} ± {error:.1f} (standard error), "
        f"{abs(gap.mean()) / scores['official'].mean():.1%} of the mean"
    )


BENCHMARKS = {
    "env": bench_env,
    "collect": bench_collect,
    "loader": bench_loader,
    "fidelity": bench_fidelity,
    "train": bench_train,
    "scale": bench_scale,
    "plan": bench_plan,
    "paired": bench_paired,
}


def main():
    args = parse_args()
    print(machine())
    for name in args.what:
        print(f"\n{name}")
        BENCHMARKS[name](args)


if __name__ == "__main__":
    run(main)
