"""A script imports this before all else, and nothing else does: then Ctrl-C ends it
quietly while it imports, and a package that is missing is said in one line.
"""

import os
import signal
import sys


def _explain(kind, error, trace):
    """sys.excepthook while a script imports: a missing package or library in one line."""
    if not issubclass(kind, ImportError):
        return sys.__excepthook__(kind, error, trace)
    if "libGL" in str(error) or "libgthread" in str(error):
        mend = (
            "OpenCV's windows need it; the one without windows does not: `pip uninstall "
            "opencv-python`, `pip install --force-reinstall opencv-python-headless`"
        )
    elif ".so" in str(error):
        mend = "a library of the system is missing"
    else:
        mend = (
            f"{sys.executable} lacks a package; `make install` makes .venv with all of them, "
            "then use .venv/bin/python"
        )
    print(f"error: {error}; {mend}", file=sys.stderr, flush=True)
    os._exit(2)


signal.signal(signal.SIGINT, signal.SIG_DFL)  # support.cli.run takes it back
sys.excepthook = _explain
os.environ["MPLBACKEND"] = "Agg"  # a notebook's names one that needs the notebook
for fd in range(3):  # closed standard streams: no file may take their place
    try:
        os.fstat(fd)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
