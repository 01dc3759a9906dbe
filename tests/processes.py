"""Scripts as processes that a test starts, signals and waits for."""

import os
import subprocess
import sys
import time

from conftest import REPO

QUICK = ["--env", "fast", "--threads", "1"]
DIST_TIMEOUT = 120  # s, far more than any of these takes


def start(name, *args, root, env=None):
    """A script, started as a user does, with this environment on top of ours."""
    command = [sys.executable, str(REPO / name), *map(str, args), "--root", str(root)]
    return subprocess.Popen(
        command,
        env=os.environ | {"DISPLAY": "", "WAYLAND_DISPLAY": ""} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )


def finish(process):
    """-> (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=DIST_TIMEOUT)
    return process.returncode, out, err


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found
