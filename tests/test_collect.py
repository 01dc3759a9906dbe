"""Collectors: killed, stopped, out of disk, merged from two machines; their seeds and mistakes."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, children, script, workers_of

from buffer import index, read_chunk
from car.env import make_env
from collect_race_data import pace_of
from collect_recovery_data import ACTION_NOISE, NOISE_BURST, FaultyExpert
from support.workers import FIRST_SEED, episode_number, seeds_of

GONE = 10  # s within which a stopped collector has left nothing behind
REPLACED = 5  # s within which a killed worker has a successor


def start(root, frames, workers=2, name="collect_data.py", more=()):
    flags = ["--root", root, "--frames", frames, "--workers", workers, *more]
    command = [sys.executable, REPO / name, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([str(word) for word in command], **pipes)


def descendants(pid):
    """Pids of all that a process started, directly or not."""
    return [p for child in children(pid) for p in (child, *descendants(child))]


def wait_for(condition, seconds):
    """Seconds until condition() is true; fails when they run out."""
    begin = time.time()
    while not condition():
        assert time.time() - begin < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.time() - begin


def alive(pids):
    """Those of the pids that run; one that is dead and not yet waited for does not."""

    def runs(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    return [p for p in pids if runs(p)]


def whole(folder):
    """Frames in the folder; fails unless every file in it can be read to its end."""
    chunks, damaged, duplicates = index(folder)
    assert not damaged and not duplicates
    for c in chunks:
        read_chunk(c.path)
    return sum(c.frames for c in chunks)


def storm(root, kills, seed):
    """So many SIGKILLs at random moments, most to workers, some to the parent, which is started
    again; then the collection is led to its end."""
    rng, folder = random.Random(seed), root / "data"
    lost = 0  # episodes that a kill may have cost
    process = start(root, 10**6)
    for _ in range(kills):
        wait_for(lambda: len(alive(workers_of(process.pid))) == 2, 30)
        time.sleep(rng.uniform(0, 0.6))
        if rng.random() < 0.1:
            family = descendants(process.pid)
            process.kill()
            process.communicate()
            wait_for(lambda: not alive(family), REPLACED)  # no orphans
            lost += 2
            process = start(root, 10**6)
        else:
            victim = rng.choice(alive(workers_of(process.pid)))
            os.kill(victim, signal.SIGKILL)
            lost += 1
            wait_for(lambda: len(set(alive(workers_of(process.pid))) - {victim}) == 2, REPLACED)
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=GONE)
    assert process.returncode == 130
    wait_for(lambda: not alive(family), GONE)
    have = whole(folder)
    numbers = defaultdict(list)  # of the episodes of each worker of each run
    for path in folder.glob("*.npz"):
        stem, episode = re.fullmatch(r"(.+-w\d+)-e(\d+)", path.stem).groups()
        numbers[stem].append(int(episode))
    missing = sum(max(n) + 1 - len(n) for n in numbers.values())
    assert missing <= lost, "more than the episode in hand was lost"
    process = start(root, have + 1200)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{have:,} frames" in said, said
    assert whole(folder) >= have + 1200
    assert not list(folder.glob(".*"))
    return kills, missing


def test_killed_workers_and_parents_cost_one_episode_each_at_most(tmp_path):
    storm(tmp_path, kills=12, seed=0)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    print(storm(tmp_path, kills=200, seed=1))


def test_workers_end_with_their_parent(tmp_path):
    process = start(tmp_path, 10**6, 1, "collect_race_data.py")
    folder = tmp_path / "data_race"
    wait_for(lambda: list(folder.glob("*.npz")), 30)
    family = descendants(process.pid)
    process.kill()
    wait_for(lambda: not alive(family), 2)


def test_two_collectors_of_one_machine_do_not_drive_the_same(tmp_path):
    first = start(tmp_path, 50_000, 1)
    wait_for(lambda: list((tmp_path / "data").glob("*.npz")), 30)
    second = script("collect_data.py", "--frames", "60000", "--workers", "1", root=tmp_path)
    assert second.returncode == 2 and "--machine_id" in second.stderr
    flags = ["--frames", 2000, "--workers", 1, "--machine_id", 1]
    other = script("collect_data.py", *flags, root=tmp_path)
    assert other.returncode == 0, other.stderr
    first.terminate()
    first.communicate(timeout=GONE)
    whole(tmp_path / "data")
    assert not list((tmp_path / "data").glob(".*"))


def test_half_written_files_of_killed_collectors_are_removed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    ours, other = (f".data-{socket.gethostname()}-s0m{m}r000-abcdef-w00-e000000" for m in (0, 1))
    for name in (ours, other):
        (folder / f"{name}.npz.123.tmp").touch()
    done = script("collect_data.py", "--frames", "300", "--workers", "1", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.glob(".*")] == [f"{other}.npz.123.tmp"]  # may be in use


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_keeps_what_is_finished_and_goes_on_to_the_target(tmp_path, number):
    process = start(tmp_path, 50_000)
    folder = tmp_path / "data"
    wait_for(lambda: len(list(folder.glob("*.npz"))) >= 3, 60)
    family = descendants(process.pid)
    process.send_signal(number)
    process.communicate(timeout=GONE)
    assert process.returncode == 130
    wait_for(lambda: not alive(family), GONE)
    have = whole(folder)
    assert have >= 900 and not list(folder.glob(".*"))
    again = script("collect_data.py", "--frames", have + 300, "--workers", "1", root=tmp_path)
    assert again.returncode == 0 and f"{have:,} frames" in again.stdout
    assert have + 300 <= whole(folder) <= have + 600
    reached = script("collect_data.py", "--frames", have, root=tmp_path)
    assert reached.returncode == 0 and "target is reached" in reached.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 580 MiB."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=580m", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk takes root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_ends_the_run_in_one_line(small_disk):
    process = start(small_disk, 30_000)
    folder = small_disk / "data"
    wait_for(lambda: list(folder.glob("*.npz")), 60)
    with open(small_disk / "filler", "wb") as f:
        for block in (1 << 20, 1 << 12):  # until it is full
            with contextlib.suppress(OSError):
                while os.write(f.fileno(), bytes(block)):
                    pass
    said, _ = process.communicate(timeout=60)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert "No space left" in errors[0] and "free some space" in errors[0]
    have = whole(folder)
    assert not list(folder.glob(".*"))
    (small_disk / "filler").unlink()
    goes_on = script("collect_data.py", "--frames", have + 900, "--workers", "2", root=small_disk)
    assert goes_on.returncode == 0, goes_on.stderr


def all_seeds(machines, workers, episodes):
    """Fails unless every episode's track and noise are its own, on tracks that may be collected."""
    tracks, noises = set(), set()
    for machine in range(machines):
        job = {"seed": 0, "machine_id": machine, "source": "data", "run": 0, "workers": workers}
        for worker in range(workers):
            for episode in range(episodes):
                track, rng = seeds_of(job, worker, episode)
                assert FIRST_SEED <= track < 2**63
                tracks.add(track)
                noises.add(int(rng.bit_generator.state["state"]["state"]))
    assert len(tracks) == len(noises) == machines * workers * episodes


def test_random_episodes_last_as_long_as_asked(tmp_path):
    flags = "--frames", 2000, "--workers", 2, "--steps", 350
    assert not script("collect_data.py", *flags, root=tmp_path).returncode
    frames = [c.frames for c in index(tmp_path / "data")[0]]
    assert max(frames) == 350 and min(frames) > 0
    done = script("collect_data.py", "--frames", 2400, "--workers", 2, root=tmp_path)
    assert f"{len(frames)} episodes of --steps 350" in done.stdout
    longest = [c.meta["policy"]["steps"] for c in index(tmp_path / "data")[0]]
    assert Counter(longest)[350] == len(frames) and set(longest) == {300, 350}


def test_no_seed_comes_twice():
    all_seeds(machines=2, workers=32, episodes=100)
    jobs = [
        {"seed": s, "machine_id": m, "source": d, "run": r, "workers": 1}
        for s in (0, 1)
        for m in (0, 1)
        for d in ("data", "data_race")
        for r in (0, 1)
    ]
    assert len({seeds_of(job, 0, 0)[0] for job in jobs}) == len(jobs)


@pytest.mark.slow
def test_no_seed_comes_twice_in_six_million_episodes():
    all_seeds(machines=2, workers=32, episodes=100_000)


def test_a_tenth_of_the_tracks_is_held_out_on_every_machine():
    job = {"seed": 0, "machine_id": 3, "source": "data", "run": 2, "workers": 4}
    paces, counts = [0.1, 0.3, 0.6, 1.0], Counter()
    for worker in range(4):
        for episode in range(100):
            if seeds_of(job, worker, episode)[0] % 10 == 0:
                counts[pace_of(paces, episode_number(job, worker, episode))] += 1
    assert counts == dict.fromkeys(paces, 10)  # and all paces are


@pytest.mark.slow
def test_two_machines_are_merged_by_copying(tmp_path):
    for machine in (0, 1):
        flags = ["--frames", 1200, "--workers", 2, "--machine_id", machine]
        done = script("collect_data.py", *flags, root=tmp_path / str(machine))
        assert done.returncode == 0, done.stderr
    ours, theirs = (tmp_path / m / "data" for m in "01")
    parts = [whole(ours), whole(theirs)]

    def merge(source):
        if shutil.which("rsync"):
            subprocess.run(["rsync", "-a", f"{source}/", f"{ours}/"], check=True)
        else:
            subprocess.run(["cp", "-a", "-u", f"{source}/.", f"{ours}/"], check=source != ours)

    for source in (theirs, theirs, ours):  # twice, and onto itself
        merge(source)
        assert whole(ours) == sum(parts)
    first = sorted(theirs.glob("*.npz"))[0]
    shutil.copy(first, ours / "renamed.npz")
    (ours / "cut.npz").write_bytes(first.read_bytes()[:20_000])
    chunks, damaged, duplicates = index(ours)
    assert sum(c.frames for c in chunks) == sum(parts)
    assert len(duplicates) == 1 and "renamed.npz" in duplicates[0] and first.name in duplicates[0]
    assert len(damaged) == 1 and "cut.npz" in damaged[0]
    done = script("collect_data.py", "--frames", sum(parts), root=tmp_path / "0")
    assert "renamed.npz" in done.stdout and "cut.npz" in done.stdout
    assert "target is reached" in done.stdout
    assert len({c.meta["track_seed"] for c in chunks}) == len(chunks)
    assert all(
        re.match(r"data-.+-s0m[01]r000-[0-9a-f]{6}-w0[01]-e\d{6}\.npz", c.path.name) for c in chunks
    )


def test_a_noise_burst_is_as_random_as_a_planner_and_never_gas_with_brake():
    env, driver = make_env("fast"), FaultyExpert(0.2)
    env.reset(seed=FIRST_SEED)
    driver.reset(env, np.random.default_rng(0))
    driver.strength = driver.sign = 1.0  # which a burst does not use
    driver.phases, noise = itertools.repeat("noise_burst"), []
    for _ in range(600):
        action = driver.act(env)
        noise.append(action - np.array(driver.expert.controls(env)))
        assert action[1] * action[2] == 0 and abs(action[0]) <= 1 and action[1:].min() >= 0
        env.step(driver.expert.act(env))  # the car stays on its line
    assert np.std(noise, axis=0)[0] == pytest.approx(NOISE_BURST * ACTION_NOISE, rel=0.3)
