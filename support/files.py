"""Files that appear whole or not at all, locks, provenance of results. Needs no torch."""

import argparse
import atexit
import errno
import hashlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from support import REPO
from support.cli import fail

# errors with which CIFS, FUSE and shared folders answer fsync of a folder, and flock
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)
NAME_BYTES = 200  # longest name that a temporary file repeats; a file system takes 255
VERSIONED = ("torch", "torchvision", "gymnasium", "box2d", "pygame-ce", "numpy")
VERSIONED += ("opencv-python-headless",)


def writable(folder):
    """Makes the folder and returns it. Refuses one that cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"{folder}: cannot write there ({e.strerror}); choose another or mend its permissions")
    return folder


def output_file(text):
    """argparse type: the Path of a file to write. Makes its folder; refuses bad places early."""
    path = Path(text)
    try:
        if path.is_dir() or text.endswith(("/", os.sep)):
            fail(f"{text}: expected the name of a file, found a folder's")
        if not path.exists() or path.is_file():
            writable(path.parent)
        elif not os.access(path, os.W_OK):
            fail(f"{text}: cannot be written to; mend its permissions")
    except (OSError, ValueError) as e:
        line = f"{text}: {e.strerror}" if isinstance(e, OSError) else str(e)
        raise argparse.ArgumentTypeError(line) from None
    return path


# ------------------------------------------------------------------ writing


def own_output(path):
    """1 or 2 if `path` is the file behind our stdout or stderr, else None."""
    with suppress(OSError):  # nothing there
        found = os.stat(path)
        return next((fd for fd in (1, 2) if os.path.samestat(os.fstat(fd), found)), None)


def is_stream(path):
    """Whether `path` is a device, a pipe or our own output: written to directly."""
    path = Path(path)
    special = path.exists() and not path.is_file() and not path.is_dir()
    return special or own_output(path) is not None


def replace_atomically(path, write):
    """The file appears whole or not at all.

    `write(f)` fills a temporary dot-name in the same folder, which is flushed, fsync'd and renamed
    to `path`; then the folder is fsync'd. A link is followed. A stream is written to directly.
    """
    if is_stream(path):
        sys.stdout.flush()
        fd = own_output(path)
        with open(path if fd is None else os.dup(fd), "wb") as f:
            write(f)
        return

    # a whole file under another name, then its name
    path = Path(os.path.realpath(path))
    name = path.name if len(os.fsencode(path.name)) < NAME_BYTES else path.name[-40:]
    tmp = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            sync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        e.filename, e.filename2 = path, None
        raise
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)

    # the folder's entry; a folder may be writable and not readable
    with suppress(PermissionError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)


def sync(fd):
    """fsync, if the file system supports it."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise


def back_up(folder, paths):
    """Moves files into a new dated folder inside `folder`. Nothing is deleted."""
    paths = [p for p in paths if p.exists()]
    if not paths:
        return
    for k in itertools.count():
        target = folder / (time.strftime("replaced-%Y%m%d-%H%M%S") + (f"-{k}" if k else ""))
        with suppress(FileExistsError):
            target.mkdir()
            break
    for path in paths:
        path.rename(target / path.name)


# ------------------------------------------------------------------ locks


def lock(file, wait=True):
    """Locks an open file for this process -> True; False if another holds it and `wait` is off.

    A file system without locks grants it, and a line says so once.
    """
    import fcntl  # here: Windows has none, and may read checkpoints

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise
        _say_no_locks(Path(file.name).parent)
    return True


@lru_cache
def _say_no_locks(folder):
    tqdm.write(f"{folder}: this file system has no locks; start nothing twice there")


def lock_file(path, busy):
    """Locks `path` until the process ends. Refuses with the line `busy` if another process has it.

    Returns the open file.
    """
    path = Path(path)
    while True:
        file = open(path, "w")
        if not lock(file, wait=False):
            fail(busy)
        with suppress(FileNotFoundError):  # the process before may have deleted its name meanwhile
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
    atexit.register(_unlock, file, path)
    return file


def _unlock(file, path):
    with suppress(OSError):
        path.unlink()
    file.close()


# ------------------------------------------------------------------ provenance


@lru_cache
def git_commit():
    """Commit of the running code, "+" if files differ; "unknown" outside its own repository."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook sets others
    env["GIT_CEILING_DIRECTORIES"] = str(REPO.parent)  # a repository around it is another's
    words = "describe --always --dirty=+ --abbrev=12 --exclude=*".split()
    command = ["git", "-C", REPO, *words]
    try:
        found = subprocess.run(command, capture_output=True, text=True, env=env).stdout.strip()
    except OSError:  # git is not installed
        found = ""
    return found or "unknown"


def code_key():
    """16 hex digits that change with any line of the code that drives: scripts, car/, support/."""
    folders = (REPO, *(REPO / name for name in ("car", "support")))
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def versions():
    """{package: version} of all that decides what a run computes."""
    out = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out
