"""Imported first by every script: Ctrl-C ends imports quietly, a missing package costs one line."""

import os
import signal
import sys

HINTS = {  # part of an ImportError: what helps
    "libGL": "OpenCV needs it for windows: `pip install --force-reinstall opencv-python-headless`",
    ".so": "a library of the system is missing",
    "": f"{sys.executable} lacks a package; `make install` makes .venv, then use .venv/bin/python",
}


def _explain(kind, error, trace):
    """sys.excepthook during the imports of a script."""
    if not issubclass(kind, ImportError):
        return sys.__excepthook__(kind, error, trace)
    hint = next(hint for part, hint in HINTS.items() if part in str(error))
    print(f"error: {error}; {hint}", file=sys.stderr, flush=True)
    os._exit(2)


signal.signal(signal.SIGINT, signal.SIG_DFL)  # support.cli.run_main takes it back
sys.excepthook = _explain
os.environ["MPLBACKEND"] = "Agg"  # a notebook sets one that needs the notebook
for fd in range(3):  # no file may take the place of a closed standard stream
    try:
        os.fstat(fd)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
