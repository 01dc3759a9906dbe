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

import os
import platform
from pathlib import Path

import cv2
import gymnasium
import numpy as np
import pygame

from support.cli import Help, Number, Parser, fraction, positive, run
from tools.bench_data import bench_collect, bench_loader
from tools.bench_env import bench_env, bench_fidelity
from tools.bench_train import bench_paired, bench_plan, bench_scale, bench_train


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
        "--repeats",
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
        help="train, scale: in each of --repeats",
    )
    p.add_argument(
        "--laptop", action="store_true", help="train, scale: the laptop's nets on a GPU too"
    )
    p.add_argument(
        "--tracks", type=Number(int, 2, 1000), default=20, help="fidelity, paired: how many"
    )
    p.add_argument("--max_gas", type=fraction, help="paired: as in drive_mpc.py")
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
