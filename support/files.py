"""Files that appear whole or not at all, and where code and results come from. Needs no torch."""

import argparse
import atexit
import errno
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from support import REPO
from support.cli import FULL, Stop, fail

RETRY_S = 5  # seconds between two tries to write to a full disk
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)
# what CIFS, FUSE or a shared folder of a virtual machine answers to fsync of a folder and to flock
NAME_BYTES = 200  # of a file's name that its temporary one repeats; 255 is the most


def writable(folder):
    """Makes the folder and returns it; refuses in one line if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(
            f"{folder}: cannot write there ({e.strerror}); choose another folder or mend its "
            "permissions"
        )
    return folder


def output_file(text):
    """argparse type: the Path of a file to be written, in a folder that is made where it lacks;
    refuses a folder, and a place where nothing can be written, before any work."""
    path = Path(text)
    try:
        if path.is_dir() or text.endswith(("/", os.sep)):
            fail(f"{text}: expected the name of a file, found a folder's")
        path.exists()  # a name that is too long raises here
        if not path.exists() or path.is_file():
            writable(path.parent)
        elif not os.access(path, os.W_OK):
            fail(f"{text}: cannot be written to; mend its permissions")
    except (OSError, ValueError) as e:
        line = f"{text}: {e.strerror}" if isinstance(e, OSError) else str(e)
        raise argparse.ArgumentTypeError(line) from None
    return path


def own_output(path):
    """1 or 2 where `path` is what our own stdout or stderr writes to, a file too; or None."""
    with suppress(OSError):  # nothing there
        found = os.stat(path)
        return next((fd for fd in (1, 2) if os.path.samestat(os.fstat(fd), found)), None)


def is_stream(path):
    """Whether `path` is written to as it is: a device, a pipe or our own output."""
    path = Path(path)
    return own_output(path) is not None or (
        path.exists() and not path.is_file() and not path.is_dir()
    )


def replace_atomically(path, write, patient=True):
    """The file appears whole or not at all: `write(f)` fills a temporary dot-name in the same
    folder, which is flushed, fsync'd and renamed to `path`; then the folder is fsync'd. Where the
    disk is full it says so and tries again until there is room, or a stop is requested.

    A link is followed; a device, a pipe or our own output, /dev/stdout, is written to as it is.
    """
    if is_stream(path):
        sys.stdout.flush()
        fd = own_output(path)
        with open(path if fd is None else os.dup(fd), "wb") as f:
            write(f)
        return
    path, said = Path(os.path.realpath(path)), False
    name = path.name if len(os.fsencode(path.name)) < NAME_BYTES else path.name[-40:]
    tmp = path.with_name(f".{name}.{os.getpid()}.tmp")
    while True:
        try:
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                sync(f.fileno())
            os.replace(tmp, path)
            break
        except OSError as e:
            e.filename, e.filename2 = path, None
            if not patient or e.errno not in FULL or Stop.requested:
                raise
            if not said:
                tqdm.write(f"{path}: {e.strerror}; tries again until there is room")
            said = True
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)
        time.sleep(RETRY_S)
    with suppress(PermissionError):  # of a folder that may be written to and not read
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)


def sync(fd):
    """fsync, where the file system knows it."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise


def lock(file, wait=True):
    """Locks an open file for this process alone -> True; False where another process has it and
    `wait` is not set. A file system without locks says so once, and gives it."""
    import fcntl  # here: Windows has none, and may read checkpoints

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
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
    """Keeps `path` locked until the process ends, whatever ends it; refuses with the line `busy`
    where another process has it. Returns the open file."""
    path = Path(path)
    while True:
        file = open(path, "w")
        if not lock(file, wait=False):
            fail(busy)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # and not one that the process before was about to delete
    atexit.register(_unlock, file, path)
    return file


def _unlock(file, path):
    with suppress(OSError):
        path.unlink()
    file.close()


# ------------------------------------------------------------------ provenance


def git_commit():
    """Commit of the code that runs, '+' behind it when files differ; 'unknown' outside git, and in
    a copy that lies in another repository."""
    here = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook's is another
    git = lambda *args: subprocess.run(
        ["git", "-C", REPO, *args], capture_output=True, text=True, env=here
    ).stdout.strip()
    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != REPO:
            return "unknown"
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(git("status", "--porcelain", "-uno")) or "unknown"
    except OSError:
        return "unknown"


def code_key():
    """16 hex digits that change with any line of the code."""
    import hashlib

    files = sorted([*REPO.glob("*.py"), *REPO.glob("support/*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def versions():
    """Versions that decide what a run computes: a dict of str."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for name in (
        "torch",
        "torchvision",
        "gymnasium",
        "box2d",
        "pygame-ce",
        "numpy",
        "opencv-python-headless",
    ):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out
