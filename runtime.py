"""What every stage's run needs: common arguments, device and precision, a log with curves,
one-line failures and a clean stop. No learning happens here.
"""

import argparse
import ctypes
import errno
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

RANK, LOCAL_RANK, RANKS = (  # which process this is of all, and on its machine; how many there are
    int(os.environ[k]) if dist.is_torchelastic_launched() else default
    for k, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
PATIENCE = timedelta(hours=4)  # others wait while rank 0 encodes, evaluates and paints alone
FASTER = 0.9  # of the time: --precision auto wants that much before it gives up range or digits
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt
RETRY_S = 5  # seconds between two tries to write to a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk, or quota, answers


# ------------------------------------------------------------------ arguments and failures

class Refusal(ValueError):
    """Bad input, said in one line: the file, what was expected, what was found, what mends it."""


def fail(message):
    """Raises Refusal; `run` turns it into one line on stderr and exit code 2."""
    raise Refusal(message)


def run(main):
    """Calls a script's main; exit codes: 0 done, 2 refused in one line, 130 stopped and saved."""
    try:
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    except Refusal as e:
        tqdm.write(f"error: {e}", file=sys.stderr)  # on a line of its own, bar or not
        sys.exit(2)
    except OSError as e:
        if e.errno not in FULL:
            raise
        tqdm.write(f"error: {e.filename}: {e.strerror}; free some space and run the "
                   "same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and behind each flag its default where it has one."""

    def _get_help_string(self, action):
        silent = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        silent = silent or "default" in action.help
        return action.help + " (default: %(default)s)" * (not silent)


class Parser(argparse.ArgumentParser):
    """One that refuses arguments in one line, and not behind a page of its usage."""

    def error(self, message):
        self.exit(2, f"error: {message}; `python {self.prog} --help` explains\n")


def parser(doc, seed=True, device=True, data=False, shares=True):
    """An ArgumentParser with the flags that stages share; `doc` is the script's docstring."""
    p = Parser(description=doc, formatter_class=Help)
    g = p.add_argument_group("runtime")
    g.add_argument("--root", type=Path, default=Path("."),
                   help="folder that holds data*/, models/ and visuals/: one experiment each "
                        "(default: here)")
    if seed:
        g.add_argument("--seed", type=natural, default=0,
                       help="same seed, same machine: same run (default 0)")
    if device:
        g.add_argument("--device", default="auto",
                       help="auto, cpu, cuda or cuda:1 (ROCm cards are cuda too); auto takes the "
                            "first GPU there is")
        g.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                       help="auto: the fastest here of those that the hardware has (bf16 never "
                            "on RDNA2), timed; losses are fp32 always")
        g.add_argument("--threads", type=natural, default=0,
                       help="CPU threads (0: all cores); lower it beside another heavy job")
    if data:
        g.add_argument("--data", nargs="+", default=["data_race", "data_recovery", "data"],
                       help="folders under --root to learn from")
        if shares:
            g.add_argument("--shares", type=float, nargs="+",
                           help="share of each folder of --data in a batch, in the same order "
                                "(default: equal)")
        g.add_argument("--fresh", action="store_true",
                       help="start again although a half-finished run could be resumed")
        g.add_argument("--compile", action="store_true",
                       help="torch.compile the net: minutes at the start, then faster steps where "
                            "torch knows the device well; one process only, not tried on ROCm")
        g.add_argument("--tensorboard", action="store_true",
                       help="log to ROOT/models/tensorboard/ too, where the package is installed")
        g.add_argument("--save_every", type=float, default=15,
                       help="minutes of training that a crash may cost at most, where epochs are "
                            "longer")
        g.add_argument("--log_every", type=float, default=5,
                       help="seconds between two lines of the log; 0 logs each step, which a GPU "
                            "waits for")
    return p


def optimisation(p, batch_size, epochs=50, steps_per_epoch=0, lr=1e-3, weight_decay=1e-4):
    """The flags of a training loop, with a stage's own defaults; `batch_size` is in its units."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=positive, default=epochs,
                   help="each ends with a look at held-out tracks, and a checkpoint")
    g.add_argument("--batch_size", type=positive, default=batch_size,
                   help="of a step: windows, or latents of each class for the cost model")
    g.add_argument("--steps_per_epoch", type=natural, default=steps_per_epoch,
                   help="0: as many as show the data about once")
    g.add_argument("--lr", type=rate, default=lr, help="peak of the cosine schedule")
    g.add_argument("--weight_decay", type=float, default=weight_decay, help="AdamW's, decoupled")


def positive(text):
    """argparse type: an integer > 0."""
    if int(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def natural(text):
    """argparse type: an integer >= 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def rate(text):
    """argparse type: a number > 0 that float32 can multiply with."""
    if not 0 < float(text) <= 1e30:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def fraction(text):
    """argparse type: a number in [0, 1]."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return float(text)


def writable(folder):
    """Makes the folder and returns it; refuses in one line if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"{folder}: cannot write there ({e.strerror}); choose another folder or mend its "
             "permissions")
    return folder


def command(script, root=Path("."), flags=""):
    """The command line of a stage, in backticks, for a message that says what mends it."""
    where = "" if Path(root) == Path(".") else f" --root {root}"
    return f"`python {script}{where}" + f" {flags}" * bool(flags) + "`"


# ------------------------------------------------------------------ device and precision

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


def encoded_at_once(device):
    """How many pictures a frozen encoder is shown in one go: on a CPU few, whose maps stay in its
    caches, an eighth faster than 256 on two threads and a quarter to a third on one."""
    return 64 if device.type == "cpu" else 256


# ------------------------------------------------------------------ several processes (torchrun)

def everywhere(*numbers):
    """The numbers of all ranks, a list each, in order of rank; all wait for the last one."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if RANKS == 1:
        return [mine.tolist()]
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return [numbers.tolist() for numbers in every]


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


# ------------------------------------------------------------------ provenance

def git_commit():
    """Commit of the code that runs, '+' behind it when files differ; 'unknown' outside git."""
    here = Path(__file__).parent
    try:
        run = lambda *a: subprocess.run(["git", "-C", here, *a], capture_output=True, text=True)
        head = run("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "") \
            or "unknown"
    except OSError:
        return "unknown"


def versions():
    """Versions that decide what a run computes: a dict of str."""
    from importlib.metadata import PackageNotFoundError, version
    out = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "gymnasium", "box2d", "pygame-ce", "numpy",
                 "opencv-python"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


# ------------------------------------------------------------------ log and curves

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


def optional(module, package):
    """A module of a package that only this feature needs; without it one line says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        lacking = "" if e.name == module.split(".")[0] else f" whole ({e})"
        fail(f"{package} is not installed{lacking} and this needs it: `pip install '{package}'`")


def pyplot():
    """matplotlib.pyplot on a backend that needs no display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def replace_atomically(path, write, patient=True):
    """The file appears whole or not at all: `write(f)` fills a temporary dot-name in the same
    folder, which is flushed, fsync'd and renamed to `path`; then the folder is fsync'd. Where the
    disk is full it says so and tries again until there is room, or a stop is requested."""
    path, said = Path(path), False
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    while True:
        try:
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            break
        except OSError as e:
            e.filename = path
            if not patient or e.errno not in FULL or Stop.requested:
                raise
            if not said:
                tqdm.write(f"{path}: {e.strerror}; tries again until there is room")
            said = True
        finally:
            tmp.unlink(missing_ok=True)
        time.sleep(RETRY_S)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_figure(fig, path):
    """A matplotlib figure as PNG, whole or not at all."""
    replace_atomically(path, lambda f: fig.savefig(f, format="png", dpi=110))
    pyplot().close(fig)


def save_gif(path, frames, fps):
    """Frames (H, W, 3) uint8 as an endless GIF, whole or not at all."""
    from PIL import Image
    palette = Image.fromarray(np.concatenate(frames[::max(1, len(frames) // 8)])).quantize(255)
    pictures = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE)
                for f in frames]
    replace_atomically(path, lambda f: pictures[0].save(
        f, format="GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0))


def save_mp4(path, frames, fps):
    """Frames (H, W, 3) uint8 as a video, whole or not at all; OpenCV wants a real file name."""
    import cv2
    h, w, _ = frames[0].shape
    tmp = Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
    out = cv2.VideoWriter(str(tmp), cv2.VideoWriter_fourcc(*"mp4v"), fps, (w, h))
    if not out.isOpened():
        fail(f"{path}: OpenCV cannot write mp4 there")
    for frame in frames:
        out.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    out.release()
    os.replace(tmp, path)


# ------------------------------------------------------------------ clean stop

class Stop:
    """True once Ctrl-C or SIGTERM came; a second Ctrl-C ends at once.

    Loops look at it between two steps, save, and leave with exit code 130.
    """

    requested = False  # of the process: signals have no other address

    def __init__(self):
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self._handle)

    def _handle(self, sig, frame):
        if self.requested:
            raise KeyboardInterrupt
        Stop.requested = True
        print("\nstopping as soon as nothing is lost (again to quit at once)", file=sys.stderr)

    def __bool__(self):
        return self.requested

    def anywhere(self):
        """True once it came to any rank. All ranks ask together, between the same two steps."""
        return any(requested for requested, in everywhere(self.requested))


def stopped(args, when):
    """Says that a run was stopped and saved, and what goes on with it -> its exit code."""
    print(f"stopped {when}; the same command " + "without --fresh " * args.fresh + "goes on")
    return 130
