"""Speed and fidelity, each measured beside what it replaces, in one run.

    python benchmark.py env collect loader fidelity     # 12 minutes on 2 cores

env       steps per CPU second of one core, over whole episodes with their resets: the official env
          with `preprocess`, the fast env, the same with `telemetry`, and physics alone. Medians,
          and the median ratio to the official env of a round.
collect   frames per second of the three collectors as they are run, with 1 and 2 workers: policy,
          physics, picture, telemetry, compression, fsync'd file; beside the official env alone.
loader    frames per second of mixed batches, of 256 windows of 1 latent and 32 of 16, from chunks
          in the page cache, and how many episodes a batch mixes.
fidelity  mean absolute difference, in grey levels of 255, of `preprocess(official frame)` and the
          fast env's frame of the same state, by situation; writes visuals/fidelity.png.
train     the encoder's training loop, with data and augmentation, beside the bare forward, backward
          and step of the same nets on one batch; and the share of this device's rate of matrix
          products. Reads the data*/ of --root.
plan      milliseconds of a plan as the driver makes it, encoding included: by threads, alone and
          beside a busy process; then milliseconds and return by numbers of candidate plans and
          iterations, over --drives tracks each (0: no drives). Reads the models/ of --root, or the
          weights that come with the code.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import os
import platform
from pathlib import Path

from support.cli import Number, Parser, run_main
from support.files import versions
from tools.bench_data import bench_collect, bench_loader
from tools.bench_env import bench_env, bench_fidelity
from tools.bench_train import bench_plan, bench_train

BENCHMARKS = {
    "env": lambda args: bench_env(args.repeats, args.steps),
    "collect": lambda args: bench_collect(args.frames),
    "loader": lambda args: bench_loader(args.frames),
    "fidelity": lambda args: bench_fidelity(args.root, args.tracks),
    "train": lambda args: bench_train(args.root, args.repeats, args.train_steps),
    "plan": lambda args: bench_plan(args.root, args.plans, args.drives),
}


def parse_args():
    p = Parser(__doc__)
    number = lambda low, high, default: dict(type=Number(int, low, high), default=default)
    p.add_argument("what", nargs="+", choices=list(BENCHMARKS), help="what to measure")
    p.add_argument("--root", type=Path, default=Path("."), help="of data*/, models/ and visuals/")
    p.add_argument("--repeats", **number(1, 999, 5), help="env, train: of which it shows medians")
    p.add_argument("--steps", **number(1, 1000, 1000), help="env: of an episode")
    p.add_argument("--frames", **number(2000, 10**8, 40_000), help="collect, loader: per worker")
    p.add_argument("--tracks", **number(2, 1000, 20), help="fidelity: how many")
    p.add_argument("--plans", **number(2, 10**6, 200), help="plan: how many are timed")
    p.add_argument("--drives", **number(0, 1000, 5), help="plan: tracks for each size")
    p.add_argument("--train_steps", **number(1, 10**6, 20), help="train: in each of --repeats")
    return p.parse_args()


def main():
    args = parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions()}")
    for name in args.what:
        print(f"\n{name}")
        BENCHMARKS[name](args)


if __name__ == "__main__":
    run_main(main)
