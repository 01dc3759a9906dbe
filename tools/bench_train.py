"""Speed of training and of planning."""

import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_encoder
from buffer import PREFETCH, load_sources
from car import ZOOM_STEPS
from car.env import make_env
from car.telemetry import telemetry
from drive_mpc import RolloutCost, load_driver
from support.device import autocast, set_up
from support.plan_config import PlanConfig
from support.run import optimise
from tools.bench_env import follow

LAPTOP = (
    "--channels 16 --dim 256 --scene_pca 128 --strides 2 2 2 1 --batch_size 96 --lr 2e-3".split()
)
TUNING_TRACK = 200_500  # one that is never collected nor reported
PLANS = 200  # that are timed
WARM_UP_PLANS = 4


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


def bench_plan(root):
    """Prints milliseconds of a plan: the nets' own methods against folded products, and scoring all
    latents of a rollout against every third."""
    cfg = PlanConfig()
    driver, _ = load_driver(train_encoder.arguments(["--root", str(root)]), cfg)
    predictor, cost = driver.nets["predictor"], driver.nets["cost"]

    rollout = lambda z, act: predictor.rollout(z.expand(len(act), -1), act)
    costs = {
        "plain, all scored": lambda z, act: cost.energy(rollout(z, act)).sum(dim=1),
        "plain, every third": lambda z, act: cost.rollout_cost(z, rollout(z, act), cfg.energy),
        "folded, all scored": RolloutCost(predictor, cost, cfg.energy, range),
        "folded, every third": driver.rollout_cost,
    }

    # drive along the centre line; at each step every cost makes a plan, in turns
    env, took = make_env("fast"), {name: [] for name in costs}
    env.reset(seed=TUNING_TRACK)
    driver.reset(TUNING_TRACK)
    for step in range(ZOOM_STEPS + WARM_UP_PLANS + PLANS):
        driver.frames.append(env.step(follow(telemetry(env)))[0])
        for name in costs if step >= ZOOM_STEPS else ():
            driver.rollout_cost = costs[name]
            start = time.perf_counter()
            driver.replan()
            driver.u.cpu()  # waits for the device
            took[name].append(1000 * (time.perf_counter() - start))

    size = f"{cfg.samples} candidates of {cfg.horizon} latents, {driver.encoder.repeat} steps each"
    print(f"{size}; {driver.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'ms of a plan':20}{'p50':>8}{'p99':>8}")
    for name, ms in took.items():
        print("{:20}{:8.1f}{:8.1f}".format(name, *np.percentile(ms[WARM_UP_PLANS:], (50, 99))))
