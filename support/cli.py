"""The command line of every script: flags, one-line errors, a clean stop. Needs no torch."""

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

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk; an exceeded quota
HINTS = dict.fromkeys(FULL, "free some space and run the same command again") | {
    errno.EMFILE: "too many for this shell's limit: raise it with `ulimit -n 4096`",
    errno.ENFILE: "too many for this machine",
    errno.EAGAIN: "too many processes for this user: see `ulimit -u`",
}


# ------------------------------------------------------------------ errors in one line


class Refusal(ValueError):
    """Bad input in one line: the file, the expected, the found, the command that helps."""


def fail(message):
    """Raises Refusal. `run_main` turns it into one line on stderr and exit code 2."""
    raise Refusal(message)


def run_main(main):
    """Calls a script's main. Exit codes: 0 done, 2 refused in one line, 130 stopped and saved."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.excepthook = sys.__excepthook__  # support.start replaced it for the imports
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()
    except Refusal as e:
        code = refuse(e)
    except OSError as e:
        if not e.errno:  # a library's, not the system's
            raise
        where = f"{e.filename}: " if isinstance(e.filename, (str, os.PathLike)) else ""
        hint = f"; {HINTS[e.errno]}" if e.errno in HINTS else ""
        code = refuse(f"{where}{os.strerror(e.errno)}{hint}")
    except (MemoryError, RuntimeError) as e:  # torch raises a RuntimeError
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
    """Prints the line of a failure below all progress bars -> exit code 2."""
    for bar in list(tqdm._instances):
        bar.close()
    tqdm.write(f"error: {message}", file=sys.stderr)
    return 2


class Output:
    """A standard stream whose failures raise nothing: full disks, closed terminals, `| head`.

    It writes "?" for a sign that its encoding lacks. When the reader is gone, a script with a
    Stop saves and ends. Any other script ends at once.
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

    def _try(self, action, *args):
        try:
            action(*args)
        except OSError as e:
            self.lost = True
            if e.errno in (*FULL, errno.EAGAIN):  # EAGAIN: a full pipe that does not block
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not Stop.installed:
                sys.exit(128 + signal.SIGPIPE)
            Stop.requested = True

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Stop:
    """True after Ctrl-C, SIGTERM or SIGHUP (a closed terminal). A second Ctrl-C ends at once.

    Loops look at it between two steps, save, and leave with exit code 130. Under nohup, SIGHUP
    stays ignored.
    """

    requested = installed = False  # class attributes: a signal reaches the whole process

    def __init__(self):
        Stop.installed = True
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:
                signal.signal(sig, self._handle)

    def _handle(self, sig, frame):
        if self.requested and sig == signal.SIGINT:
            raise KeyboardInterrupt
        Stop.requested = True
        with suppress(OSError):  # print may be in the middle of another line
            os.write(2, b"\nstopping as soon as nothing is lost (Ctrl-C again quits at once)\n")

    def __bool__(self):
        return self.requested


# ------------------------------------------------------------------ flags


class Number:
    """argparse type: a finite number in a range, which `--help` and errors show."""

    def __init__(self, kind, low, high, above=False):
        """kind: int or float; above: the range excludes `low`."""
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
            kind = "an integer" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {kind} {self}, found {text}")
        return value


positive = Number(int, 1, 10**9)
nonnegative_int = Number(int, 0, 10**9)
batch_number = Number(int, 1, 10**6)
seed_number = Number(int, 0, 2**32 - 1)
track_number = Number(int, 0, 2**63 - 10**10)  # what collectors draw, and sums with other seeds
positive_float = Number(float, 0, 1e30, above=True)  # float32 can multiply with it
weight = Number(float, 0, 1e30)
fraction = Number(float, 0, 1)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring unchanged, and range and default behind each flag."""

    def _get_help_string(self, action):
        silent = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        more = [str(action.type)] if isinstance(action.type, Number) else []
        if not silent and "default" not in action.help:
            more.append("default: %(default)s")
        return action.help + (f" ({'; '.join(more)})" if more else "")


class Parser(argparse.ArgumentParser):
    """Refuses arguments in one line, without a page of usage."""

    def __init__(self, description):
        spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m package.module`
        prog = f"-m {spec.name}" if spec else None
        super().__init__(prog, description=description, formatter_class=Help)

    def error(self, message):
        self.exit(2, f"error: {message}; `python {self.prog} --help` explains\n")


def add_flags(group, *flags):
    """Adds flags with one value to an argument group: (name, type, default, help) each."""
    for name, kind, default, text in flags:
        group.add_argument(name, type=kind, default=default, help=text)


def parser(doc, device=True, data=False, shares=True, models=False):
    """A Parser with the flags that stages share; `doc` is the script's docstring."""
    p = Parser(doc)
    g = p.add_argument_group("runtime")
    root = "folder with data*/, models/ and visuals/, one per experiment (default: here)"
    add_flags(g, ("--root", Path, Path("."), root))
    if models:
        text = "folder of weights (default: ROOT/models, or models/pretrained if that has none)"
        g.add_argument("--models", type=Path, metavar="FOLDER", help=text)
    add_flags(g, ("--seed", seed_number, 0, "same seed: same run"))

    # device and precision
    if device:
        text = "auto (the first GPU, or the CPU), cpu, cuda or cuda:1; ROCm cards are cuda too"
        g.add_argument("--device", default="auto", help=text)
        text = "auto: bf16 if the hardware has it, else fp16 on a GPU, fp32 on a CPU"
        kinds = ["auto", "bf16", "fp16", "fp32"]
        g.add_argument("--precision", default="auto", choices=kinds, help=text)
        text = "CPU threads, 0 for all cores; lower it beside another heavy job"
        add_flags(g, ("--threads", Number(int, 0, 1024), 0, text))

    # a stage that trains
    if data:
        which = "those that exist" if shares else "all of which it needs"
        text = f"folders in ROOT (default: data_race, data_recovery and data, {which})"
        g.add_argument("--data", nargs="+", type=os.path.normpath, help=text)
        text = "share of each --data folder in a batch (default: equal)"
        if shares:
            g.add_argument("--shares", type=weight, nargs="+", help=text)
        text = "start again instead of resuming; old files are moved aside"
        g.add_argument("--fresh", action="store_true", help=text)
        add_flags(
            g,
            ("--save_every", positive_float, 15, "minutes of training that a crash may cost"),
            ("--log_every", weight, 5, "seconds between lines of the log; 0 logs each step"),
        )
    return p


def optimisation(p, batch_size, epochs=50, steps_per_epoch=0, lr=1e-3, weight_decay=1e-4):
    """Adds the flags of a training loop, with the stage's own defaults."""
    size = "windows in a step; cost model: latents of each class"
    steps = "0: as many as show the data about once"
    add_flags(
        p.add_argument_group("optimisation"),
        ("--epochs", positive, epochs, "each ends with a held-out evaluation"),
        ("--batch_size", batch_number, batch_size, size),
        ("--steps_per_epoch", nonnegative_int, steps_per_epoch, steps),
        ("--lr", positive_float, lr, "peak of the cosine schedule"),
        ("--weight_decay", weight, weight_decay, "AdamW's, decoupled"),
    )


# ------------------------------------------------------------------ words of messages


def command(script, root=Path("."), flags=""):
    """The command line of a stage, in backticks, for a message."""
    where = "" if Path(root) == Path(".") else f" --root {shlex.quote(str(root))}"
    return f"`python {script}{where}" + (f" {flags}" if flags else "") + "`"


def typed(value):
    """An argument's value, or its text in a checkpoint, as a user types it in a shell."""
    text = str(value)
    words = [text]
    if text.startswith("["):
        with suppress(ValueError, SyntaxError):
            words = ast.literal_eval(text)
    return " ".join(shlex.quote(str(word)) for word in words)


def cores():
    """CPU cores that this process may use, by its affinity and its container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup; "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        n = min(n, math.ceil(int(quota) / int(period)))
    return max(1, n)


def optional(module, package):
    """Imports a module that one feature needs. Refuses if the package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        fail(f"{package} is not installed ({e}) and this needs it: `pip install '{package}'`")
