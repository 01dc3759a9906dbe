"""Speed of training and of planning."""

import multiprocessing as mp
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_encoder
from buffer import PREFETCH, load_sources
from car.env import make_env
from car.telemetry import telemetry
from drive_mpc import drive, load_driver
from support.device import autocast, set_up
from support.plan_config import PlanConfig
from support.run import optimise
from tools.bench_env import follow

LAPTOP = (
    "--channels 16 --dim 256 --scene_pca 128 --strides 2 2 2 1 --batch_size 96 --lr 2e-3".split()
)
TUNING_TRACK = 200_500  # one that is never collected nor reported
WARM_UP_PLANS = 4
BUSY_START_S = 5.0  # until a busy process is busy
PLAN_SIZES = (  # iterations, candidates
    *((1, 64), (1, 128), (1, 256), (1, 512), (1, 1000)),
    *((2, 64), (2, 128), (2, 256), (2, 512)),
    *((4, 64), (4, 128), (4, 256)),
)


def timed(work, device):
    """Seconds that the device works on `work()`."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


# ------------------------------------------------------------------ train


def matrix_rate(device, dtype, side=4096, repeats=5):
    """FLOP/s of the fastest products of square matrices: a peak that can be reached."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    count = 20 if device.type == "cuda" else 1  # so that starting them costs nothing
    work = lambda: [a @ a for _ in range(count)]
    return 2 * side**3 * count / min([timed(work, device) for _ in range(repeats + 1)][1:])


def bench_train(root, repeats, steps):
    """Prints the speed of the encoder's training loop and of its nets alone, taking turns.

    The nets are those of full size on a GPU, those of a laptop elsewhere.
    """
    flags = [] if torch.cuda.is_available() else LAPTOP
    cfg = train_encoder.arguments(["--root", str(root), *flags])
    device, dtype = set_up(cfg)
    sources = load_sources(cfg.root, cfg.data)
    nets, optim, scaler = train_encoder.make_nets(cfg, device, dtype)
    pinned = device.type == "cuda"
    loader = train_encoder.make_loader(cfg, sources, 0, cfg.batch_size, cfg.seed, pinned=pinned)
    batches = train_encoder.training_batches(loader, cfg, device)
    objective = train_encoder.Objective.of(cfg)

    def step(batch):
        with autocast(device, dtype):
            loss, *_ = train_encoder.loss_fn(nets, *batch, objective)
        optimise(loss, nets.values(), optim, scaler, cfg.lr)

    # warm up
    fixed = next(batches)
    with FlopCounterMode(display=False) as counter:
        step(fixed)
    loop = lambda: [step(next(batches)) for _ in range(steps)]
    bare = lambda: [step(fixed) for _ in range(steps)]
    loop()

    seconds = []
    for _ in range(repeats):
        alone = timed(bare, device)
        for _ in range(PREFETCH):  # what the loader read meanwhile counts for neither
            next(batches)
        seconds.append((timed(loop, device), alone))
    seconds = np.array(seconds) / steps
    whole, alone = np.median(seconds, axis=0)
    rate, peak = counter.get_total_flops() / whole / 1e9, matrix_rate(device, dtype) / 1e9

    size, threads = " ".join(flags) or "full size", torch.get_num_threads()
    print(f"{size}; {device}, {str(dtype)[6:]}, {threads} threads, torch {torch.__version__}")
    for name, s in (("the loop", whole), ("the bare net", alone)):
        print(f"{name:14}{1000 * s:8.1f} ms a step{len(fixed[0]) / s:10,.0f} images/s")
    share = np.median(seconds[:, 1] / seconds[:, 0])
    print(f"the loop runs at {share:.1%} of the bare net, at {rate:,.0f} GFLOP/s: ", end="")
    print(f"{rate / peak:.1%} of {peak:,.0f}")


# ------------------------------------------------------------------ plan


def time_plans(driver, plans):
    """Milliseconds of each of so many plans, as the driver makes them along the road's middle."""
    env = make_env("fast")
    frame, _ = env.reset(seed=TUNING_TRACK)
    driver.reset(TUNING_TRACK)
    while len(driver.ms) < WARM_UP_PLANS + plans:
        driver.act(frame)
        frame = env.step(follow(telemetry(env)))[0]
    env.close()
    return driver.ms[WARM_UP_PLANS:]


def keep_busy():
    """Keeps a core busy with matrix products until the process is killed."""
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        a @ a


@contextmanager
def busy_processes(count):
    """So many processes that keep a core busy each."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=keep_busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(BUSY_START_S if processes else 0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def bench_plan(root, plans, tracks):
    """Prints milliseconds of the default plan by threads and by load; then milliseconds and return
    for other numbers of candidate plans and iterations, with a drive on each of `tracks` tracks."""
    driver, _ = load_driver(train_encoder.arguments(["--root", str(root)]), PlanConfig())
    cfg, cores = driver.cfg, torch.get_num_threads()
    size = f"{cfg.n_iterations} x {cfg.samples} candidates"
    print(f"{size} of {cfg.horizon} latents, {driver.encoder.repeat} steps each; {driver.device}")

    # the default, by threads and load
    print(f"{'ms of a plan':34}{'p50':>8}{'p99':>8}")
    for threads in sorted({1, cores}):
        for busy in (0, 1):
            torch.set_num_threads(threads)
            with busy_processes(busy):
                ms = np.percentile(time_plans(driver, plans), (50, 99))
            name = f"{threads} threads, {busy} busy processes"
            print("{:34}{:8.1f}{:8.1f}".format(name, *ms), flush=True)

    # other sizes, on one thread
    torch.set_num_threads(1)
    heads = "iterations", "candidates", "p50", "p99", "return", "worst", "laps"
    print(f"one thread, tracks from {TUNING_TRACK}")
    print("".join(f"{head:>11}" for head in heads))
    for iterations, samples in PLAN_SIZES:
        driver.cfg = replace(cfg, iterations=iterations, samples=samples)
        ms = np.percentile(time_plans(driver, plans), (50, 99))
        rows = [drive(make_env("fast"), driver, TUNING_TRACK + i) for i in range(tracks)]
        returns = [row["return"] for row in rows] or [np.nan]
        scores = np.mean(returns), np.min(returns), sum(row["lap_finished"] for row in rows)
        line = "{:11}{:11}{:11.1f}{:11.1f}{:11.1f}{:11.1f}{:11}"
        print(line.format(iterations, samples, *ms, *scores), flush=True)
