"""The command line of every script: flags, failures in one line, a clean stop. Needs no torch."""

import argparse
import ast
import errno
import importlib
import math
import os
import re
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk, or quota, answers


class Refusal(ValueError):
    """Bad input, said in one line: the file, what was expected, what was found, what mends it."""


def fail(message):
    """Raises Refusal; `run` turns it into one line on stderr and exit code 2."""
    raise Refusal(message)


class Output:
    """A standard stream that a script can rely on: it writes what the encoding lacks as "?", and a
    reader that went away (`| head`, a closed terminal) or a full disk raises nothing.

    Where the reader went away, a script that has a Stop saves and ends; any other ends at once.
    """

    def __init__(self, stream):
        self.stream, self.lost = stream or open(os.devnull, "w"), False
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, what, *args):
        try:
            what(*args)
        except OSError as e:
            self.lost = True
            if e.errno in (*FULL, errno.EAGAIN):  # EAGAIN: a pipe that is full and does not wait
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not Stop.installed:
                sys.exit(128 + signal.SIGPIPE)
            Stop.requested = True

    def __getattr__(self, name):
        return getattr(self.stream, name)


HINTS = dict.fromkeys(FULL, "free some space and run the same command again") | {
    errno.EMFILE: "too many for this shell's limit: raise it with `ulimit -n 4096`",
    errno.ENFILE: "too many for this machine",
    errno.EAGAIN: "too many processes for this user: see `ulimit -u`",
}


def run(main):
    """Calls a script's main; exit codes: 0 done, 2 refused in one line, 130 stopped and saved."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.excepthook = sys.__excepthook__  # the imports are over
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()
    except Refusal as e:
        code = refuse(e)
    except OSError as e:
        if not e.errno:  # not of the system
            raise
        where = f"{e.filename}: " * isinstance(e.filename, (str, os.PathLike))
        hint = f"; {HINTS[e.errno]}" if e.errno in HINTS else ""
        code = refuse(f"{where}{os.strerror(e.errno)}{hint}")
    except (MemoryError, RuntimeError) as e:  # torch's is a RuntimeError
        if not isinstance(e, MemoryError) and not re.search("out of memory|t allocate", str(e)):
            raise
        code = refuse("out of memory; lower --batch_size, --samples or --workers")
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    if not code and not Stop.installed and getattr(sys.stdout, "lost", False):
        code = refuse("standard output: no room for all of it")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop
    sys.exit(code)


def refuse(message):
    """Prints the one line of a failure, below a progress bar too -> exit code 2."""
    for bar in list(tqdm._instances):
        bar.close()
    tqdm.write(f"error: {message}", file=sys.stderr)
    return 2


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and behind each flag its range and default where it has one."""

    def _get_help_string(self, action):
        silent = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        silent = silent or "default" in action.help
        more = [str(action.type)] if isinstance(action.type, Number) else []
        more += ["default: %(default)s"] * (not silent)
        return action.help + f" ({'; '.join(more)})" * bool(more)


class Parser(argparse.ArgumentParser):
    """One that refuses arguments in one line, and not behind a page of its usage."""

    def __init__(self, **kw):
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        super().__init__(prog=f"-m {spec.name}" if spec else None, **kw)

    def error(self, message):
        self.exit(2, f"error: {message}; `python {self.prog} --help` explains\n")


def parser(doc, seed=True, device=True, data=False, shares=True, models=False):
    """An ArgumentParser with the flags that stages share; `doc` is the script's docstring."""
    p = Parser(description=doc, formatter_class=Help)
    g = p.add_argument_group("runtime")
    g.add_argument(
        "--root",
        type=Path,
        default=Path("."),
        help="folder that holds data*/, models/ and visuals/: one experiment each (default: here)",
    )
    if models:
        g.add_argument(
            "--models",
            type=Path,
            metavar="FOLDER",
            help="of weights to take, such as models/pretrained (default: ROOT/models, "
            "or where it has no encoder, those that come with the code)",
        )
    if seed:
        g.add_argument(
            "--seed",
            type=seed_number,
            default=0,
            help="same seed, same machine: same run (default 0)",
        )
    if device:
        g.add_argument(
            "--device",
            default="auto",
            help="auto, cpu, cuda or cuda:1 (ROCm cards are cuda too); auto takes the "
            "first GPU there is",
        )
        g.add_argument(
            "--precision",
            default="auto",
            choices=["auto", "bf16", "fp16", "fp32"],
            help="auto: bf16 where the hardware has it (never on RDNA2), else fp16 on a "
            "GPU, else fp32; a resumed run keeps its own; losses are fp32 always",
        )
        g.add_argument(
            "--threads",
            type=Number(int, 0, 1024),
            default=0,
            help="CPU threads (0: all cores); lower it beside another heavy job",
        )
    if data:
        g.add_argument(
            "--data",
            nargs="+",
            type=os.path.normpath,
            help="folders under --root to learn from (default: data_race, "
            "data_recovery and data, those of them that are there)",
        )
        if shares:
            g.add_argument(
                "--shares",
                type=weight,
                nargs="+",
                help="share of each folder of --data in a batch, in the same order "
                "(default: equal)",
            )
        g.add_argument(
            "--fresh",
            action="store_true",
            help="start again although a half-finished run could be resumed",
        )
        g.add_argument(
            "--compile",
            action="store_true",
            help="torch.compile the net: minutes at the start, then faster steps where "
            "torch knows the device well; one process only, not tried on ROCm",
        )
        g.add_argument(
            "--tensorboard",
            action="store_true",
            help="log to ROOT/models/tensorboard/ too, where the package is installed",
        )
        g.add_argument(
            "--save_every",
            type=rate,
            default=15,
            help="minutes of training that a crash may cost at most, where epochs are longer",
        )
        g.add_argument(
            "--log_every",
            type=weight,
            default=5,
            help="seconds between two lines of the log; 0 logs each step, which a GPU waits for",
        )
    return p


def optimisation(p, batch_size, epochs=50, steps_per_epoch=0, lr=1e-3, weight_decay=1e-4):
    """The flags of a training loop, with a stage's own defaults; `batch_size` is in its units."""
    g = p.add_argument_group("optimisation")
    g.add_argument(
        "--epochs",
        type=positive,
        default=epochs,
        help="each ends with a look at held-out tracks, and a checkpoint",
    )
    g.add_argument(
        "--batch_size",
        type=batch_number,
        default=batch_size,
        help="of a step: windows, or latents of each class for the cost model",
    )
    g.add_argument(
        "--steps_per_epoch",
        type=nonnegative_int,
        default=steps_per_epoch,
        help="0: as many as show the data about once",
    )
    g.add_argument("--lr", type=rate, default=lr, help="peak of the cosine schedule")
    g.add_argument("--weight_decay", type=weight, default=weight_decay, help="AdamW's, decoupled")


class Number:
    """argparse type: a finite number in a stated range, which `--help` and errors show."""

    def __init__(self, kind, low, high, above=False):
        """kind: int or float; above: `low` itself is not in the range."""
        self.kind, self.low, self.high, self.above = kind, low, high, above

    def __str__(self):
        show = lambda x: f"{x:g}" if self.kind is float and abs(x) > 1e6 else str(x)
        low = f"above {show(self.low)}, up" if self.above else f"from {show(self.low)}"
        return f"{low} to {show(self.high)}"

    def __call__(self, text):
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = float("nan")
        if not self.low <= value <= self.high or self.above and value == self.low:
            what = "an integer" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {self}, found {text}")
        return value


positive = Number(int, 1, 10**9)
nonnegative_int = Number(int, 0, 10**9)
batch_number = Number(int, 1, 10**6)
seed_number = Number(int, 0, 2**32 - 1)
track_number = Number(int, 0, 2**63 - 10**10)  # what collectors draw, and sums with other seeds
rate = Number(float, 0, 1e30, above=True)  # float32 can multiply with it
weight = Number(float, 0, 1e30)
fraction = Number(float, 0, 1)


def command(script, root=Path("."), flags=""):
    """The command line of a stage, in backticks, for a message that says what mends it."""
    where = "" if Path(root) == Path(".") else f" --root {shlex.quote(str(root))}"
    return f"`python {script}{where}" + f" {flags}" * bool(flags) + "`"


def cores():
    """CPU cores that this process may use: by its affinity, and by its container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup; "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        n = min(n, math.ceil(int(quota) / int(period)))
    return max(1, n)


def optional(module, package):
    """A module of a package that only this feature needs; refuses where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        lacking = "" if e.name == module.split(".")[0] else f" whole ({e})"
        fail(f"{package} is not installed{lacking} and this needs it: `pip install '{package}'`")


class Stop:
    """True once Ctrl-C, SIGTERM or SIGHUP (a terminal that was closed) came; a second Ctrl-C ends
    at once.

    Loops look at it between two steps, save, and leave with exit code 130. Under nohup SIGHUP stays
    ignored.
    """

    requested = installed = False  # of the process: signals have no other address

    def __init__(self):
        Stop.installed = True
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:
                signal.signal(sig, self._handle)

    def _handle(self, sig, frame):
        if self.requested and sig == signal.SIGINT:
            raise KeyboardInterrupt
        Stop.requested = True
        with suppress(OSError):  # not print: it may be in the middle of one
            os.write(2, b"\nstopping as soon as nothing is lost (Ctrl-C again quits at once)\n")

    def __bool__(self):
        return self.requested


def stopped(args, when):
    """Says that a run was stopped and saved, and what goes on with it -> its exit code."""
    print(f"stopped {when}; the same command " + "without --fresh " * args.fresh + "goes on")
    return 130


# holds a predictor too


def typed(value):
    """An argument's value, or the text of it that a checkpoint holds, as it is typed in a shell."""
    text = str(value)
    words = [text]
    with suppress(ValueError, SyntaxError):
        words = ast.literal_eval(text) if text.startswith("[") else words
    return " ".join(shlex.quote(str(word)) for word in words)
