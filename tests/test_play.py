"""`play.py`: a script of keys drives the simulator and the dream; keys in a real window."""

import json

import numpy as np
import pytest
from conftest import script
from processes import finish, start, wait_for
from windows import needs_xvfb, xvfb

import play
from buffer import index, read_chunk

av = pytest.importorskip("av")
QUICK = ["--samples", "16", "--threads", "1", "--headless"]
KEYS = """
0 up down        # gas
0.4 e
1 left down
1.4 left up
1.6 tab          # into the dream
2 t
2.4 a            # the planner drives
2.8 right down   # and is overridden
3.2 right up
4 3
4.2 tab          # and out
4.4 space
4.6 s
4.8 space
5 v
5.2 r
5.4 v
6 q
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    root = tmp_path_factory.mktemp("play")
    (root / "keys.txt").write_text(KEYS)
    done = script("play.py", *QUICK, "--keys", root / "keys.txt", "--data", "mine", root=root)
    assert done.returncode == 0, done.stderr
    return root, done, json.loads((root / "visuals" / "play.json").read_text())["ticks"]


def at(ticks, seconds):
    """The tick that the keys of this second moved."""
    return ticks[round(seconds / play.TICK)]


def test_arrows_drive_along_ramps(played):
    *_, ticks = played
    gas = [row["action"][1] for row in ticks[:25]]
    assert np.allclose(np.diff([0, *gas])[:10], play.RAMP[1], atol=1e-3) and gas[-1] == play.GAS
    assert at(ticks, 1.36)["action"][0] == -play.STEER and at(ticks, 1.56)["action"][0] == 0
    assert at(ticks, 1.5)["speed"][1] > 10 and at(ticks, 1.36)["yaw_rate"][1] > 0.2


def test_a_dream_goes_on_from_the_present(played):
    """What is read off it stays near the simulator under the same actions, for a while."""
    *_, ticks = played
    assert not at(ticks, 1.56)["dreaming"] and at(ticks, 1.6)["dreaming"]
    dreamt, true = np.array([row["speed"] for row in ticks[40:50]]).T
    assert abs(dreamt[-1] - true[-1]) < abs(true[0] - true[-1]) and (dreamt != true).all()
    seconds = np.array([row["dream_seconds"] for row in ticks])
    assert np.allclose(seconds[40:50], play.TICK * np.arange(1, 11))
    assert np.allclose(seconds[50:100], play.TICK * np.arange(1, 51))  # after the teleport
    assert seconds[100] == 0  # --refresh


def test_an_arrow_overrides_the_autopilot(played):
    *_, ticks = played
    assert at(ticks, 2.4)["autopilot"]
    human = [row["action"][0] for row in ticks[72:80]]
    assert human[-1] == play.STEER and np.all(np.diff(human) >= 0)
    assert len({row["action"][0] for row in ticks[81:90]}) > 1


def test_a_teleport_is_a_surprise(played):
    *_, ticks = played
    surprise = lambda a, b: [row["energies"][2] for row in ticks[a:b]]
    assert max(surprise(50, 56)) > 5 * np.median(surprise(60, 99))


def test_pause_and_one_step(played):
    *_, ticks = played
    still = ticks[110:115]
    assert all(row["paused"] for row in still)
    state = lambda row: (row["speed"], row["return"])
    assert len({str(state(row)) for row in still}) == 1
    assert state(ticks[115]) != state(ticks[114]) and state(ticks[116]) == state(ticks[115])
    assert at(ticks, 4)["temperature"] == 0.6 and at(ticks, 5.2)["track"] == ticks[0]["track"] + 1


def test_what_was_recorded_is_film_and_episodes(played):
    """A teleport and a new track end an episode; the pause in recording leaves its gap."""
    root, done, ticks = played
    with av.open(str(root / "visuals" / "play.mp4")) as film:
        frames = sum(1 for _ in film.decode(video=0))
    assert frames == sum(not 5 <= row["seconds"] < 5.4 for row in ticks)
    assert (root / "visuals" / "play.gif").is_file()
    chunks = sorted(index(root / "mine")[0], key=lambda c: c.path.stat().st_mtime)
    assert [c.frames for c in chunks] == [2 * 50, 2 * 66, 2 * 16]  # 9 ticks of pause were not
    assert [c.meta["track_seed"] for c in chunks] == [10_000_000, 10_000_000, 10_000_001]
    act = read_chunk(chunks[0].path, "act")["act"]
    assert np.allclose(act[::2, 0], [row["action"][0] for row in ticks[:50]], atol=1e-3)
    assert "p99" in done.stdout and "R²" in done.stdout


@pytest.mark.parametrize("line", ["left down", "1 left sideways", "1 nokey", "-1 tab", "1 a b c"])
def test_a_bad_line_of_keys_is_named(tmp_path, line):
    (tmp_path / "keys.txt").write_text(f"0 up down\n{line}\n")
    done = script("play.py", *QUICK, "--keys", tmp_path / "keys.txt", root=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"keys.txt, line 2: {line}" in done.stderr and "expected" in done.stderr


def test_what_cannot_be_played_is_one_line(tmp_path):
    for args, word in (
        ((), "--headless --keys FILE"),
        (("--headless",), "belong together"),
        (("--data", "mine", "--track_seed", "5"), "never learned from"),
    ):
        done = script("play.py", *args, "--threads", "1", root=tmp_path)
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@needs_xvfb
def test_keys_drive_in_a_real_window(tmp_path):
    with xvfb(tmp_path) as (env, screen, press):
        args = "--samples", "16", "--threads", "1"
        process = start("play.py", *args, root=tmp_path, env=env)
        empty = screen()
        wait_for(lambda: screen() != empty or process.poll() is not None)
        waiting = screen()
        wait_for(lambda: screen() != waiting or process.poll() is not None)
        assert process.poll() is None, finish(process)
        for key in ("v", "a", "Tab", "e", "h", "h", "space"):
            press(key)
        wait_for(lambda: screen() == screen())  # it stands
        still = screen()
        press("s")
        wait_for(lambda: screen() != still)
        press("q")
        code, out, err = finish(process)
    assert code == 0 and "ticks" in out, err
    with av.open(str(tmp_path / "visuals" / "play.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) > 5
