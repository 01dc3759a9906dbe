"""What every stage's run needs: device and precision, several processes, a log with curves."""

import ctypes
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

from support.cli import FULL, fail, optional
from support.files import git_commit, versions, writable
from support.pictures import pyplot, save_figure

RANK, LOCAL_RANK, RANKS = (  # which process this is of all, and on its machine; how many there are
    int(os.environ[k]) if dist.is_torchelastic_launched() else default
    for k, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
PATIENCE = timedelta(hours=4)  # others wait while rank 0 encodes, evaluates and paints alone
FASTER = 0.9  # of the time: --precision auto wants that much before it gives up range or digits
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def pick_device(args):
    """torch.device for --device, refused in one line when it is not there. Sets --threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
        threadpool_limits(args.threads)  # numpy's, and of what is loaded later:
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(args.threads))
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        fail(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: no such GPU, torch {torch.__version__} sees "
             f"{torch.cuda.device_count()}; use --device cpu or auto")
    return device


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def name_of(dtype):
    """bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_precision(name, device):
    """torch dtype for autocast; says what `auto` took and why. The same on all ranks."""
    if name != "auto":
        return DTYPES[name]
    has, why = hardware_precisions(device)
    seconds = [time_steps(device, DTYPES[k]) if k in has and len(has) > 1 else
               0.0 if k in has else float("inf") for k in DTYPES]
    seconds = dict(zip(DTYPES, map(max, zip(*everywhere(*seconds)))))  # of the slowest rank
    half = "fp16" if seconds["fp16"] < FASTER * seconds["bf16"] else "bf16"
    took = half if seconds[half] < FASTER * seconds["fp32"] else "fp32"
    timed = ", ".join(f"{k} {1000 * t:.1f}" for k, t in seconds.items() if 0 < t < float("inf"))
    print(f"precision {took}: {why}" + (f"; ms a step of convolutions: {timed}" if timed else ""))
    return DTYPES[took]


def hardware_precisions(device):
    """(names of the precisions that the device computes in hardware, the reason in words)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = about.gcnArchName.split(":")[0]
            has_bf16 = not arch.startswith("gfx10")  # RDNA2 reports bf16 and emulates it
        else:
            arch, has_bf16 = f"compute capability {about.major}.{about.minor}", about.major >= 8
        what = "has bf16" if has_bf16 else "has no bf16 in hardware"
        return (["bf16"] if has_bf16 else []) + ["fp16", "fp32"], f"{about.name} ({arch}) {what}"
    flags = Path("/proc/cpuinfo")
    flags = flags.read_text() if flags.exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return ["bf16", "fp32"], "this CPU has bf16"
    return ["fp32"], "this CPU has no bf16 in hardware"


def time_steps(device, dtype, steps=5):
    """Seconds of one forward and backward of the encoder's kind of work, the best of a few."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(9, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
                        nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                        nn.Linear(2048, 512)).to(device, memory_format=torch.channels_last)
    x = torch.randn(512 if device.type == "cuda" else 8, 9, 32, 32, device=device).contiguous(
        memory_format=torch.channels_last)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(3 + steps):  # the first ones choose kernels and are slow
        start = time.perf_counter()
        with autocast(device, dtype):
            net(x).float().mean().backward()
        sync()
        best = min(best, time.perf_counter() - start)
    return best


def set_up(args, ranks=False):
    """(device, dtype of autocast) of a stage; seeds torch, sets its threads, and says in
    `args.arithmetic` all that decides the last digits. A stage that knows `ranks` joins the other
    processes of torchrun, of which only the first one speaks."""
    if RANKS > 1 and not ranks:
        fail("this stage runs as one process: start it with python, not torchrun")
    if RANKS > 1 and args.batch_size % RANKS:
        fail(f"--batch_size {args.batch_size}: expected a multiple of the {RANKS} processes, which "
             "take equal parts of it")
    if RANKS > 1 and args.compile:
        fail("--compile: for one process only; leave it out under torchrun")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    if getattr(args, "tensorboard", False):  # before anything is moved or trained
        optional("torch.utils.tensorboard", "tensorboard")
    device = pick_device(args)
    if RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo" + ",cuda:nccl" * (device.type == "cuda"),
                                timeout=PATIENCE)
    keep_memory()
    dtype = pick_precision(args.precision, device)
    args.arithmetic = (f"{device.type}, {name_of(dtype)}, threads {torch.get_num_threads()}, "
                       f"processes {RANKS}" + ", compiled" * getattr(args, "compile", False))
    torch.manual_seed(args.seed)
    return device, dtype


def keep_memory():
    """Has glibc keep what is freed for the next step, not give it back to the kernel, which
    zeroes each page anew: a sixth of a training step on two cores. Elsewhere it does nothing."""
    with suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device, dtype):
    """The autocast context of this device and dtype; none in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def on_device(batches, device, work=lambda *batch: batch):
    """`work` of each batch on `device`; a GPU copies and does it while the one before is in use."""
    if device.type != "cuda":
        yield from (work(*[x.to(device) for x in batch]) for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def fetch():
        with torch.cuda.stream(side):
            done = work(*[x.to(device, non_blocking=True) for x in next(batches)])
            return done, side.record_event()

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch)
        while True:
            batch, finished = ahead.result()
            ahead = pool.submit(fetch)
            now = torch.cuda.current_stream(device)
            now.wait_event(finished)
            for x in batch:
                if x is not None:
                    x.record_stream(now)
            yield batch


def encoded_at_once(device):
    """How many pictures a frozen encoder is shown in one go: on a CPU few, whose maps stay in its
    caches, an eighth faster than 256 on two threads and a quarter to a third on one."""
    return 64 if device.type == "cpu" else 256


def everywhere(*numbers):
    """The numbers of all ranks, a list each, in order of rank; all wait for the last one."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if RANKS == 1:
        return [mine.tolist()]
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return [numbers.tolist() for numbers in every]


def stopped_anywhere(stop):
    """True once a Stop came to any rank. All ranks ask together, between the same two steps."""
    return any(requested for requested, in everywhere(stop.requested))


def same_start(step, per_epoch):
    """Steps an epoch as rank 0 counts them; refuses ranks that would not start at the same step."""
    starts = everywhere(step, per_epoch)
    if len({step for step, _ in starts}) > 1:
        fail(f"the processes would start at steps {[int(step) for step, _ in starts]}: all "
             "machines need the same files under --root/models")
    return int(starts[0][1])


@contextmanager
def in_turn():
    """The block runs in one rank after the other: what the first one makes, the others find."""
    for _ in range(RANK):
        everywhere()
    yield
    for _ in range(RANKS - RANK):
        everywhere()


class RunLog:
    """`ROOT/models/<stage>.jsonl`, one JSON object a line, and `ROOT/visuals/<stage>_curves.png`.

    The first line of a run holds command, arguments, versions and commit. Lines are appended, so
    a resumed run continues its curves; a fresh run starts the file anew. With --tensorboard the
    same goes to `ROOT/models/tensorboard/<stage>`. Of several ranks the first one writes.
    """

    def __init__(self, args, stage, resumed=False):
        self.start, self.last, self.every = time.time(), 0.0, args.log_every
        self.path = writable(args.root / "models") / f"{stage}.jsonl"
        self.png = writable(args.root / "visuals") / f"{stage}_curves.png"
        if not resumed and RANK == 0:
            self.path.unlink(missing_ok=True)
        self._write({"command": " ".join(sys.argv), "time": time.strftime("%F %T"),
                     "args": {k: str(v) for k, v in vars(args).items()},
                     "versions": versions(), "commit": git_commit()})
        self.board = summary_writer(args, stage, self.rows()) if args.tensorboard else None

    def _write(self, row):
        if RANK:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            if e.errno not in FULL:
                raise
            tqdm.write(f"{self.path}: {e.strerror}; a line of the log is lost")

    def rows(self):
        """The steps logged so far, in order; a line that a kill tore is passed over."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return sorted((r for r in rows if "step" in r), key=lambda r: r["step"])

    def due(self):
        """True when --log_every seconds have passed since the last line; on the first rank."""
        return RANK == 0 and time.time() - self.last >= self.every

    def log(self, step, **values):
        """One line; tensors and numpy numbers become floats (this is where the device waits)."""
        self.last = time.time()
        numbers = {k: v.item() if isinstance(v, torch.Tensor) else float(v)
                   for k, v in values.items()}
        values = {k: float(f"{v:.9g}") for k, v in numbers.items()}  # float32 to the last bit
        self._write({"step": int(step), "seconds": round(self.last - self.start, 1), **values})
        if self.board:
            for k, v in values.items():
                self.board.add_scalar(k, v, int(step))
        return values

    def curves(self):
        """Redraws the picture: one panel a quantity, `val_x` over `x`."""
        rows = self.rows()
        names = [k for k in dict.fromkeys(k for r in rows for k in r)
                 if k not in ("step", "seconds")]
        panels = dict.fromkeys(n.removeprefix("val_") for n in names)
        if not panels:
            return
        plt = pyplot()
        cols = min(4, len(panels))
        fig, axes = plt.subplots(-(-len(panels) // cols), cols, squeeze=False, figsize=(
            3.4 * cols, 2.5 * -(-len(panels) // cols)), layout="constrained")
        for ax in axes.flat[len(panels):]:
            ax.axis("off")
        for ax, name in zip(axes.flat, panels):
            for key, style in ((name, dict(lw=1, marker=".", ms=2, color="tab:blue",
                                           label="train")),
                               ("val_" + name, dict(lw=1.5, marker="o", ms=3, color="tab:orange",
                                                    label="held out"))):
                pts = np.array([(r["step"], r[key]) for r in rows if key in r])
                if len(pts):
                    ax.plot(*pts.T, **style)
            pts = np.array([r[k] for r in rows for k in (name, "val_" + name) if k in r])
            if (pts > 0).all() and pts.max() > 50 * pts.min():
                ax.set_yscale("log")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        shown = {label: line for ax in axes.flat for line, label in zip(
            *ax.get_legend_handles_labels())}
        fig.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=2, fontsize=8)
        fig.supxlabel("step", fontsize=8)
        save_figure(fig, self.png)


def summary_writer(args, stage, rows):
    """TensorBoard's writer for rank 0; it hides what an earlier run showed beyond its last row."""
    board = optional("torch.utils.tensorboard", "tensorboard")
    folder = args.root / "models" / "tensorboard" / stage
    end = rows[-1]["step"] if rows else 0
    return board.SummaryWriter(folder, purge_step=end + 1) if RANK == 0 else None
