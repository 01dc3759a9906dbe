"""Speed of training and of planning."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_encoder
from buffer import AHEAD, load_sources, require_chunks
from car import ZOOM_STEPS
from car.env import make_env
from car.telemetry import telemetry
from drive_mpc import RolloutCost, load_driver, planning
from networks import scored_steps
from support import REPO
from support.checkpoints import latest
from support.cli import fail
from support.resume import optimise
from support.training import autocast, set_up
from tools.bench_env import follow

CHOOSING = 200_500  # first of the tracks that nets are compared on: never collected nor reported
LAPTOP = "--channels 16 --dim 128 --strides 2 2 2 1 --batch_size 96 --lr 2e-3".split()
PLANS = 200  # that are timed
WARM_UP = 4  # episodes before anything is timed, of the hundreds in a worker's life


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
    for _ in range(args.repeats):
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
    require_chunks(args.root / "data_race")
    gpus = torch.cuda.device_count()
    flags = LAPTOP if args.laptop or not gpus else []
    cfg = train_encoder.arguments(flags)
    images = cfg.batch_size * (len(train_encoder.latents_of(cfg)) + bool(cfg.warp))
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
            REPO / "train_encoder.py",
            "--root",
            tmp,
            *flags,
            "--epochs",
            1,
            "--steps_per_epoch",
            args.repeats * args.train_steps,
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
        h, looks = self.predictor.to_state(z), self.looks(H)
        rests, h = self.predictor.residual(z, h, H)[0], h.expand(N, -1)
        total = torch.zeros(N, device=z.device)
        for t in range(H):
            h = self.predictor.transition(h, act[:, t])
            if t in looks:
                total += self.cost.energy(self.predictor.to_latent(h) + rests[t], self.kind)
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
        for scored, looks in (("all", range), ("every third", scored_steps))
        for name, kind in (("plain rollout", PlainFutures), ("folded products", RolloutCost))
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
            driver.replan()
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
                REPO / "drive_mpc.py",
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
                *(() if args.max_gas is None else ("--max_gas", args.max_gas)),
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
