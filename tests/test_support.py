"""What scripts meet on real machines: signals, closed streams, encodings, file systems, other
clones of the code, no torch."""

import argparse
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAIN, REPO, script

from buffer import index, read_meta, write_chunk
from support.checkpoints import read
from support.cli import Number, Refusal, command, cores
from support.files import git_commit, lock_file, replace_atomically
from support.pictures import ornament

ENCODER = REPO / "models" / "pretrained" / "encoder_mixed_ep8.pth"
UNPRIVILEGED = 65534  # the user id of nobody


def shell(line, **env):
    """Runs a line of bash in the repository; its output, errors included, as text."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        text=True,
        errors="replace",  # head may cut a sign in two
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        env={**os.environ, "PY": sys.executable, **env},
    )


def episode(folder, uid, columns=20, steps=60):
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.zeros(steps, bool)
    return write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": 10_000_001,
            "uid": uid,
            "policy": {},
            "preprocess": 1,
        },
        obs=np.zeros((steps + 1, 64, 64, 3), np.uint8),
        act=np.zeros((steps, 3), np.float32),
        reward=np.zeros(steps, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=np.zeros((steps + 1, columns), np.float32),
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder of a few episodes."""
    root = tmp_path_factory.mktemp("collected")
    done = script("collect_data.py", "--frames", "900", "--workers", "2", root=root)
    assert done.returncode == 0, done.stderr
    return root / "data"


# ------------------------------------------------------------------ signals and streams


@pytest.mark.parametrize("name", ["train_encoder.py", "collect_data.py", "drive_mpc.py"])
def test_ctrl_c_while_it_imports_is_quiet(tmp_path, name):
    process = subprocess.Popen(
        [sys.executable, REPO / name, "--root", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and "umath" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)  # until it imports numpy
    process.send_signal(signal.SIGINT)
    said = "".join(process.communicate(timeout=30))
    assert process.returncode in (-signal.SIGINT, 130) and said == "", said


def test_a_closed_terminal_saves_and_nohup_goes_on(tmp_path):
    line = "$PY collect_data.py --workers 1 --frames 1800 --root"
    process = subprocess.Popen(
        [
            sys.executable,
            REPO / "collect_data.py",
            "--workers",
            "1",
            "--frames",
            "90000",
            "--root",
            tmp_path,
        ],
        stderr=subprocess.PIPE,
    )
    while not list((tmp_path / "data").glob("[!.]*.npz")):
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert b"stopping" in process.communicate(timeout=30)[1] and process.returncode == 130
    chunks, damaged, _ = index(tmp_path / "data")
    assert chunks and not damaged
    done = shell(f"nohup {line} '{tmp_path}/b' > '{tmp_path}/log' & sleep 2; kill -HUP $!; wait $!")
    assert done.returncode == 0 and sum(c.frames for c in index(tmp_path / "b/data")[0]) >= 1800


def test_a_reader_that_goes_away_ends_a_script_quietly(collected):
    done = shell(
        f"$PY -m tools.checkpoint '{ENCODER}' '{ENCODER}' | head -n 1 | wc -l; $PY buffer.py "
        f"'{collected}' | true"
    )
    assert "Traceback" not in done.stdout and "rror" not in done.stdout, done.stdout
    assert done.stdout.splitlines()[0] == "1"


def test_closed_and_full_streams_lose_no_data(tmp_path):
    assert (
        shell(f"$PY -m tools.checkpoint '{ENCODER}' > /dev/full").returncode == 2
    )  # its result is lost
    for n, streams in enumerate((">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full 2>&1")):
        done = shell(
            f"$PY collect_data.py --frames 300 --workers 1 --root '{tmp_path}/{n}' {streams}"
        )
        assert done.returncode == 0, (streams, done.stdout)
        chunks, damaged, _ = index(tmp_path / str(n) / "data")
        assert len(chunks) == 1 and not damaged


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r"])
def test_an_encoding_that_lacks_a_sign_stops_nothing(collected, encoding):
    done = shell(f"$PY buffer.py '{collected}'", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and " ? " in done.stdout, done.stdout


# ------------------------------------------------------------------ resources and environment


def test_too_few_open_files_and_cores(tmp_path):
    few = shell(f"ulimit -n 48; $PY collect_data.py --workers 40 --root '{tmp_path}'")
    assert few.returncode == 2 and few.stdout.count("error: ") == 1, few.stdout
    assert "ulimit -n" in few.stdout and "Traceback" not in few.stdout
    assert not list((tmp_path / "data").glob(".*"))
    assert (
        int(shell("taskset -c 0 $PY -c 'from support.cli import cores; print(cores())'").stdout)
        == 1
    )
    assert cores() == len(os.sched_getaffinity(0))


def test_a_long_temporary_folder_and_a_notebooks_environment(tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    done = shell(
        f"$PY collect_data.py --frames 600 --workers 2 --root '{tmp_path}'", TMPDIR=str(long)
    )
    assert done.returncode == 0, done.stdout
    done = shell(
        '$PY -c \'import sys; sys.argv = ["trials.py", "--help"]; import runpy; '
        'runpy.run_module("report.trials", run_name="__main__")\'',
        MPLBACKEND="module://not_there",
    )
    assert done.returncode == 0 and "usage" in done.stdout


def test_collecting_needs_no_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is not here')")
    for name in ("collect_data", "collect_race_data", "collect_recovery_data"):
        done = shell(
            f"$PY {name}.py --frames 100 --workers 1 --root '{tmp_path}'", PYTHONPATH=str(tmp_path)
        )
        assert done.returncode == 0, done.stdout
    folders = " ".join(f"'{tmp_path / name}'" for name in ("data", "data_race", "data_recovery"))
    done = shell(f"$PY buffer.py {folders}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and " 0\n" in done.stdout, done.stdout
    done = shell(f"$PY train_encoder.py --root '{tmp_path}'", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0 and done.stdout.startswith("error: torch is not here"), done.stdout
    assert "make install" in done.stdout and "Traceback" not in done.stdout


def test_workers_run_the_code_of_the_script_that_was_started(tmp_path):
    """In an old clone, a collector of a new one: nothing of the old one runs."""
    for path in REPO.glob("*.py"):
        (tmp_path / path.name).write_text("raise SystemExit('old code ran')")
    (tmp_path / "random.py").write_text("raise SystemExit('code of the working folder ran')")
    done = subprocess.run(
        [
            sys.executable,
            REPO / "collect_data.py",
            "--frames",
            "300",
            "--workers",
            "1",
            "--root",
            ".",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "code" not in done.stderr, done.stderr
    chunk = index(tmp_path / "data")[0][0]
    assert chunk.meta["commit"].rstrip("+") in (git_commit().rstrip("+"), "unknown")


def test_a_copy_inside_another_repository_has_no_commit(tmp_path):
    subprocess.run(
        [
            "bash",
            "-c",
            "git init -q . && git -c user.name=a -c user.email=a@b commit -q "
            "--allow-empty -m other",
        ],
        cwd=tmp_path,
        check=True,
    )
    shutil.copytree(REPO / "support", tmp_path / "copy" / "support")
    run = lambda folder: subprocess.run(
        [sys.executable, "-c", "from support.files import git_commit; print(git_commit())"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "GIT_DIR": str(tmp_path / ".git")},
    ).stdout.strip()
    assert run(tmp_path / "copy") == "unknown"
    assert run(REPO) == git_commit()  # whatever a hook's environment says


def test_make_takes_an_index_for_torch_and_a_root_with_a_space(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-factory.txt"):
        shutil.copy(REPO / name, tmp_path)
    make = lambda *args: (
        subprocess.run(
            ["make", "-n", *args], cwd=tmp_path, text=True, capture_output=True, check=True
        ).stdout
    )
    said = make("demo", "TORCH_INDEX=https://index/rocm", "ROOT=my demo")
    first, rest = said.index('--index-url "https://index/rocm" '), said.index("-r requirements.txt")
    assert first < rest < said.index("collect_race_data.py") and '--root "my demo"' in said
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "torch_index").write_text("https://index/rocm\n")
    (tmp_path / ".venv" / "installed").touch()
    assert "pip" not in make("install", "TORCH_INDEX=https://index/rocm")
    assert "pip" not in make("test")  # it stays
    assert "--force-reinstall" in make("test", "TORCH_INDEX=https://index/cpu")
    assert (
        "TORCH_INDEX="
        in subprocess.run(["make", "help"], cwd=tmp_path, text=True, capture_output=True).stdout
    )


# ------------------------------------------------------------------ file systems


def test_a_file_system_without_fsync_of_folders_and_without_locks(tmp_path, monkeypatch, capsys):
    real = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    path = episode(tmp_path / "a", "x")
    assert read_meta(path)["uid"] == "x"
    import fcntl

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_file(tmp_path / "lock", "another process is at work").close()
    assert "no locks" in capsys.readouterr().out


def test_a_lock_is_for_one_process(tmp_path):
    first = lock_file(tmp_path / "lock", "busy")
    with pytest.raises(Refusal, match="busy"):
        lock_file(tmp_path / "lock", "busy")
    first.close()
    lock_file(tmp_path / "lock", "busy").close()


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    with ornament(tmp_path / "gone" / "x.png"):
        raise RuntimeError("latex could not be found\nand more")
    assert (tmp_path / "gone").is_dir()
    assert capsys.readouterr().out == (
        f"{tmp_path}/gone/x.png: not drawn (latex could not be found); goes on without\n"
    )


def test_outputs_go_into_devices_and_through_links(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    replace_atomically(link, lambda f: f.write(b"new"))
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    replace_atomically(pipe, lambda f: f.write(b"through"))
    assert reader.communicate()[0] == b"through" and pipe.is_fifo()
    name = tmp_path / ("ä" * 120)  # 240 bytes
    replace_atomically(name, lambda f: f.write(b"x"))
    assert name.read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 4


def test_a_users_own_npz_is_to_be_moved_away(tmp_path):
    episode(tmp_path / "data", "x")
    np.savez(tmp_path / "data" / "mine.npz", images=np.zeros((3, 4)))
    done = script("buffer.py", tmp_path / "data")
    line = next(line for line in done.stdout.splitlines() if "mine.npz" in line)
    assert done.returncode == 1 and "move it away" in line and "write_chunk" in line, done.stdout
    assert (tmp_path / "data" / "mine.npz").exists()


# ------------------------------------------------------------------ numbers and commands


@pytest.mark.parametrize(
    "kind, text, good",
    [
        (Number(int, 0, 9), "9", 9),
        (Number(int, 0, 9), "10", None),
        (Number(int, 0, 9), "x", None),
        (Number(float, 0, 1), "nan", None),
        (Number(float, 0, 1, above=True), "0", None),
        (Number(float, 0, 1e30), "inf", None),
        (Number(int, 0, 9), "1e400", None),
    ],
)
def test_numbers_have_a_stated_range(kind, text, good):
    if good is not None:
        assert kind(text) == good
        return
    with pytest.raises(
        argparse.ArgumentTypeError, match=re.escape(f"to {kind.high:g}, found {text}")
    ):
        kind(text)


def test_suggested_commands_can_be_pasted():
    assert command("x.py", Path("my demo"), "--fresh") == "`python x.py --root 'my demo' --fresh`"


# the last, because they wait for the chain


def test_a_training_whose_output_is_cut_off_is_saved(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    args = " ".join(CHAIN["train_encoder.py"]).replace("--epochs 2", "--epochs 100")
    done = shell(f"$PY train_encoder.py {args} --root '{tmp_path}' 2>&1 | head -c 600")
    assert "Traceback" not in done.stdout, done.stdout
    saved = torch.load(tmp_path / "models" / "encoder_resume.pth", weights_only=True)
    assert 20 <= saved["step"] < 2000


def test_what_may_not_be_read_is_not_called_damaged(chain):
    """Root may read all: then the test goes on as nobody."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shutil.copytree(chain[0] / "models", folder / "models")
        path = episode(folder / "data", "x")
        folder.chmod(0o755)
        os.chmod(path, 0)
        os.chmod(folder / "models" / "encoder_mixed_ep2.pth", 0)
        privileged = os.geteuid() == 0
        try:
            if privileged:
                os.seteuid(UNPRIVILEGED)
            with pytest.raises(PermissionError):
                index(folder / "data")
            with pytest.raises(PermissionError):
                read(folder / "models" / "encoder_mixed_ep2.pth")
        finally:
            if privileged:
                os.seteuid(0)
    finally:
        shutil.rmtree(folder)
