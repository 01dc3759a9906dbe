"""Files that appear whole or not at all, and where code and results come from. Needs no torch."""

import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from support.cli import FULL, Stop, fail

RETRY_S = 5  # seconds between two tries to write to a full disk


def writable(folder):
    """Makes the folder and returns it; refuses in one line if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"{folder}: cannot write there ({e.strerror}); choose another folder or mend its "
             "permissions")
    return folder


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


def git_commit():
    """Commit of the code that runs, '+' behind it when files differ; 'unknown' outside git."""
    here = Path(__file__).parent.parent
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
                 "opencv-python-headless"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out
