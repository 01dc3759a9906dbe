"""What every stage's run needs: device and precision, several processes, a log with curves."""

import ctypes
import json
import math
import os
import re
import shlex
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
from tqdm import tqdm

from support.cli import cores, fail, optional
from support.files import git_commit, lock_file, versions, writable
from support.pictures import pyplot, save_figure

RANK, LOCAL_RANK, RANKS = (  # which process this is of all, and on its machine; how many there are
    int(os.environ[k]) if dist.is_torchelastic_launched() else default
    for k, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
PATIENCE = timedelta(hours=4)  # others wait while rank 0 encodes, evaluates and paints alone
POINTS = 20  # lines of a log at least, where there are so many steps
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def pick_device(args):
    """torch.device for --device, refused in one line when it is not there. Sets --threads."""
    threads = args.threads or min(torch.get_num_threads(), cores())
    if args.threads or threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # numpy's, and of what is loaded later:
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
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
        fail(
            f"--device {name}: no such GPU, torch sees {torch.cuda.device_count()}"
            f"{why_no_gpu() or f'; {torch_build()}; use --device cpu or auto'}"
        )
    return device


def torch_build():
    """Which torch is installed, in words."""
    kind = (
        f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "CPUs only"
    )
    return f"torch {torch.__version__} (built for {kind})"


def why_no_gpu(dev=Path("/dev")):
    """What keeps torch from a GPU that the machine has, and what mends it; "" where it has none or
    torch sees one."""
    amd, nvidia = dev / "kfd", dev / "nvidia0"
    if torch.cuda.is_available() or not (amd.exists() or nvidia.exists()):
        return ""
    makers = ("AMD", amd, "ROCm", torch.version.hip), ("NVIDIA", nvidia, "CUDA", torch.version.cuda)
    there = [m for m in makers if m[1].exists()]  # a processor's own graphics may be one
    maker, node, kind, built = next((m for m in there if m[3]), there[-1])
    found = f"; the machine has an {maker} GPU ({node}), but {torch_build()}"
    if not built:
        return (
            f"{found} cannot use it: `make install TORCH_INDEX=URL` with pytorch's index for "
            f"{kind}, see the README"
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return f"{found} may not open it: `sudo usermod -aG render,video $USER`, then log in again"
    return (
        f"{found} sees none: look at HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES and the "
        "driver's version"
    )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def name_of(dtype):
    """bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_precision(name, device, was=""):
    """(torch dtype for autocast, the reason in words) of --precision. `auto` takes what a run to be
    resumed had, `was`, where this hardware has it, and else the hardware's best."""
    if name != "auto":
        return DTYPES[name], "as --precision says"
    has, why = hardware_precisions(device)
    if was in has:
        return DTYPES[was], "as the run began"
    return DTYPES[has[0]], why


def hardware_precisions(device):
    """(names of the precisions that the device computes in hardware, the best for training first,
    the reason in words)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = about.gcnArchName.split(":")[0]
            has_bf16 = bool(re.match("gfx(908|90a|94|95|11|12)", arch))  # others emulate it
            has_fp16 = True
        else:
            arch, has_bf16 = f"compute capability {about.major}.{about.minor}", about.major >= 8
            has_fp16 = about.major >= 7  # before, fp16 is slower than fp32
        what = "bf16 in hardware" if has_bf16 else "no bf16 in hardware"
        return ["bf16"] * has_bf16 + ["fp16"] * has_fp16 + ["fp32"], f"{arch}: {what}"
    flags = Path("/proc/cpuinfo")
    flags = flags.read_text() if flags.exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return ["bf16", "fp32"], "bf16 in hardware"
    return ["fp32"], "no bf16 in hardware"


def describe_device(device, dtype, why):
    """The first line of every stage: where it computes, in what, and what keeps it from a GPU."""
    where = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        where = f"{device}, {about.name}, {about.total_memory / 2**30:.0f} GiB"
    print(
        f"device {where}; {name_of(dtype)} ({why}); {torch_build()}"
        f"{why_no_gpu() if device.type == 'cpu' else ''}",
        flush=True,
    )


def set_up(args, ranks=False, was=""):
    """(device, dtype of autocast) of a stage; seeds torch, sets its threads, and says in
    `args.arithmetic` all that decides the last digits. A stage that knows `ranks` joins the other
    processes of torchrun, of which only the first one speaks. `was` is the `arithmetic` of a run to
    be resumed, which keeps its precision."""
    if RANKS > 1 and not ranks:
        fail("this stage runs as one process: start it with python, not torchrun")
    if RANKS > 1 and args.batch_size % RANKS:
        fail(
            f"--batch_size {args.batch_size}: expected a multiple of the {RANKS} processes, which "
            "take equal parts of it"
        )
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
        dist.init_process_group(
            "cpu:gloo" + ",cuda:nccl" * (device.type == "cuda"), timeout=PATIENCE
        )
    keep_memory()
    dtype, why = pick_precision(args.precision, device, was.split(", ")[1] if was else "")
    if len({tuple(pick) for pick in everywhere(list(DTYPES).index(name_of(dtype)))}) > 1:
        dtype, why = torch.float32, "the processes have unlike hardware"
    describe_device(device, dtype, why)
    if getattr(args, "compile", False):
        try_compiler(device)
    args.arithmetic = (
        f"{device.type}, {name_of(dtype)}, threads {torch.get_num_threads()}, "
        f"processes {RANKS}" + ", compiled" * getattr(args, "compile", False)
    )
    torch.manual_seed(args.seed)
    return device, dtype


def try_compiler(device):
    """Refuses --compile in one line where torch finds no compiler for the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:  # of a dozen kinds, and a hundred lines
        line = next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)
        fail(
            f"--compile: torch cannot compile here ({line[:200]}); install a C++ compiler (on "
            "Debian g++), or leave it out"
        )


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
    return any(requested for (requested,) in everywhere(stop.requested))


def same_start(step, per_epoch):
    """Steps an epoch as rank 0 counts them; refuses ranks that would not start at the same step."""
    starts = everywhere(step, per_epoch)
    if len({step for step, _ in starts}) > 1:
        fail(
            f"the processes would start at steps {[int(step) for step, _ in starts]}: all "
            "machines need the same files under --root/models"
        )
    return int(starts[0][1])


@contextmanager
def in_turn():
    """The block runs in one rank after the other: what the first one makes, the others find."""
    for _ in range(RANK):
        everywhere()
    yield
    for _ in range(RANKS - RANK):
        everywhere()


def only_run(args, stage):
    """Refuses a second run of a stage in one ROOT: logs and checkpoints of the two would mix. Of
    several ranks the first one holds the lock."""
    if RANK == 0:
        models = writable(args.root / "models")
        lock_file(
            models / f".{stage}.lock",
            f"{models}: another train_{stage}.py is at work "
            "there; wait until it has ended, or give this one another --root",
        )


class RunLog:
    """`ROOT/models/<stage>.jsonl`, one JSON object a line, and `ROOT/visuals/<stage>_curves.png`.

    The first line of a run holds command, arguments, versions and commit. Lines are appended, so
    a resumed run continues its curves; a fresh run starts the file anew. With --tensorboard the
    same goes to `ROOT/models/tensorboard/<stage>`. Of several ranks the first one writes. Where it
    cannot be written, a line says so and the run goes on.
    """

    def __init__(self, args, stage, resumed=False):
        self.start, self.last, self.every = time.monotonic(), -math.inf, args.log_every
        self.lost = False  # whether the last line could not be written
        self.path = writable(args.root / "models") / f"{stage}.jsonl"
        self.png = writable(args.root / "visuals") / f"{stage}_curves.png"
        if not resumed and RANK == 0:
            self.path.unlink(missing_ok=True)
        self._write(
            {
                "command": shlex.join(sys.argv),
                "time": time.strftime("%F %T"),
                "args": {k: str(v) for k, v in vars(args).items()},
                "versions": versions(),
                "commit": git_commit(),
            }
        )
        self.board = summary_writer(args, stage, self.rows()) if args.tensorboard else None

    def _write(self, row):
        if RANK:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            self.lost = False
        except OSError as e:
            if not self.lost:
                tqdm.write(
                    f"{self.path}: {e.strerror}; lines of the log are lost until it can be "
                    "written again"
                )
            self.lost = True

    def rows(self):
        """The steps logged so far, in order; a line that a kill tore is passed over."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return sorted((r for r in rows if "step" in r), key=lambda r: r["step"])

    def due(self, step, steps):
        """Whether this step is logged: --log_every seconds after the last line, and POINTS times in
        all steps, so that short runs have curves too; on the first rank."""
        return RANK == 0 and (
            step % max(1, steps // POINTS) == 0 or time.monotonic() - self.last >= self.every
        )

    def log(self, step, **values):
        """One line; tensors and numpy numbers become floats (this is where the device waits)."""
        self.last = time.monotonic()
        numbers = {
            k: v.item() if isinstance(v, torch.Tensor) else float(v) for k, v in values.items()
        }
        values = {k: float(f"{v:.9g}") for k, v in numbers.items()}  # float32 to the last bit
        self._write({"step": int(step), "seconds": round(self.last - self.start, 1), **values})
        if self.board:
            for k, v in values.items():
                self.board.add_scalar(k, v, int(step))
        return values

    def curves(self):
        """Redraws the picture: one panel a quantity, `val_x` over `x`, and `untrained_x`, what a
        net had before its training, as a dashed line: the one to beat."""
        rows = self.rows()
        names = [
            k for k in dict.fromkeys(k for r in rows for k in r) if k not in ("step", "seconds")
        ]
        panels = dict.fromkeys(n.removeprefix("val_").removeprefix("untrained_") for n in names)
        if not panels:
            return
        plt = pyplot()
        cols = min(4, len(panels))
        fig, axes = plt.subplots(
            -(-len(panels) // cols),
            cols,
            squeeze=False,
            figsize=(3.4 * cols, 2.5 * -(-len(panels) // cols)),
            layout="constrained",
        )
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, name in zip(axes.flat, panels):
            for key, style in (
                (name, dict(lw=1, marker=".", ms=2, color="tab:blue", label="train")),
                (
                    "val_" + name,
                    dict(lw=1.5, marker="o", ms=3, color="tab:orange", label="held out"),
                ),
            ):
                pts = np.array([(r["step"], r[key]) for r in rows if key in r])
                if len(pts):
                    ax.plot(*pts.T, **style, clip_on=False)  # an AUC of 1 lies on the edge
            for untrained in [r["untrained_" + name] for r in rows if "untrained_" + name in r][
                -1:
            ]:
                ax.axhline(untrained, color="tab:gray", ls="--", lw=1.2, label="untrained")
            pts = np.array(
                [r[k] for r in rows for k in (name, "val_" + name, "untrained_" + name) if k in r]
            )
            pts = pts[np.isfinite(pts)]
            if len(pts) and (pts > 0).all() and pts.max() > 50 * pts.min():
                ax.set_yscale("log")
            elif len(pts):
                ax.set_ylim(*span(name, pts.min(), pts.max()))
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        shown = {
            label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())
        }
        fig.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=3, fontsize=8)
        fig.supxlabel("step", fontsize=8)
        save_figure(fig, self.png)


def span(name, low, high):
    """The ends of a linear axis for values from low to high, so wide that noise does not look like
    learning: R² and AUC up to 1, from 0.9 and 0.5 or below; else a tenth of the values at least."""
    if name.startswith("r2_"):
        return min(0.9, low - 0.05 * (1 - low)), 1.0
    if name.startswith("auc_"):
        return max(0.0, min(0.5, low - 0.02)), 1.0
    middle, half = (low + high) / 2, max(0.55 * (high - low), 0.05 * max(abs(low), abs(high)), 1e-9)
    bottom = middle - half
    return (bottom if low < 0 else max(0.0, bottom)), middle + half


def summary_writer(args, stage, rows):
    """TensorBoard's writer for rank 0; it hides what an earlier run showed beyond its last row."""
    board = optional("torch.utils.tensorboard", "tensorboard")
    folder = args.root / "models" / "tensorboard" / stage
    end = rows[-1]["step"] if rows else 0
    return board.SummaryWriter(folder, purge_step=end + 1) if RANK == 0 else None
