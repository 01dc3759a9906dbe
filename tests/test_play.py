"""`play.py`: a script of keys drives the simulator and the dream; keys in a real window."""

import json
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, script
from processes import finish, start, wait_for
from windows import needs_xvfb, xvfb

import play
from buffer import index, read_chunk
from dream import TEMPERATURE, DreamModel
from support.cli import Refusal
from support.play_keys import KeyScript
from support.play_view import compose

av = pytest.importorskip("av")
QUICK = ["--samples", "16", "--threads", "1", "--headless"]
KEYS = """
0 up down        # gas
0.4 e
1 tab            # into the dream
2 t
2.3 up up
2.4 a            # the planner drives
2.8 right down   # and is overridden
3.2 right up
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
    flags = "--keys", root / "keys.txt", "--data", "mine", "--refresh", 2
    flags += "--track_seed", 10_000_001
    done = script("play.py", *QUICK, *flags, root=root)
    assert done.returncode == 0, done.stderr
    return root, done, json.loads((root / "visuals" / "play.json").read_text())["ticks"]


def at(ticks, seconds):
    """The tick that the keys of this second moved."""
    return ticks[round(seconds / play.TICK)]


def test_arrows_drive_along_ramps(played):
    *_, ticks = played
    gas = [row["action"][1] for row in ticks[:25]]
    assert np.allclose(np.diff([0, *gas])[:10], play.RAMP[1], atol=1e-3) and gas[-1] == play.GAS
    assert at(ticks, 0.96)["speed"][1] > 10
    assert at(ticks, 3.16)["action"][0] == play.STEER and at(ticks, 3.16)["yaw_rate"][1] < -0.2


def test_a_dream_goes_on_from_the_present(played):
    """What is read off it stays near the simulator under the same actions, for a while."""
    *_, ticks = played
    assert not at(ticks, 0.96)["dreaming"] and at(ticks, 1)["dreaming"]
    dreamt, true = np.array([row["speed"] for row in ticks[25:35]]).T
    assert abs(dreamt[-1] - true[-1]) < abs(true[0] - true[-1]) / 2
    seconds = np.array([row["dream_seconds"] for row in ticks])
    assert np.allclose(seconds[25:50], play.TICK * np.arange(1, 26))
    assert np.allclose(seconds[50:100], play.TICK * np.arange(1, 51))  # after the teleport
    assert seconds[100] == 0  # --refresh


def test_an_arrow_overrides_the_autopilot(played):
    *_, ticks = played
    assert at(ticks, 2.4)["autopilot"]
    human = [row["action"][0] for row in ticks[72:80]]
    assert human[-1] == play.STEER and np.all(np.diff(human) >= 0)
    assert at(ticks, 3)["manual"] and not at(ticks, 2.6)["manual"]
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
    assert at(ticks, 5.2)["track"] == ticks[0]["track"] + 1


def test_what_was_recorded_is_film_and_episodes(played):
    """A teleport and a new track end an episode; one of under two seconds is not kept."""
    root, done, ticks = played
    with av.open(str(root / "visuals" / "play.mp4")) as film:
        frames = sum(1 for _ in film.decode(video=0))
    assert frames == sum(not 5 <= row["seconds"] < 5.4 for row in ticks)
    assert (root / "visuals" / "play.gif").is_file()
    chunks = sorted(index(root / "mine")[0], key=lambda c: c.path.stat().st_mtime)
    assert [c.frames for c in chunks] == [2 * 50, 2 * 66]  # 9 ticks of pause were not
    assert [c.meta["track_seed"] for c in chunks] == [10_000_001] * 2
    names = [c.meta["policy"]["name"] for c in chunks]
    assert names == ["human", "autopilot-human"]
    assert play.first_track(root / "mine") == 10_000_002
    assert play.first_track(root / "else") == 10_000_000  # held out, so two tracks are enough
    act = read_chunk(chunks[0].path, "act")["act"]
    assert np.allclose(act[::2, 0], [row["action"][0] for row in ticks[:50]], atol=1e-3)
    assert "p99" in done.stdout and "R²" in done.stdout


@pytest.mark.parametrize(
    "line", ["left down", "1 left sideways", "1 nokey", "-1 tab", "1 a b c", "1 ²"]
)
def test_a_bad_line_of_keys_is_named(tmp_path, line):
    (tmp_path / "keys.txt").write_text(f"0 up down\n{line}\n")
    with pytest.raises(Refusal, match=f"keys.txt, line 2: {re.escape(line)}.*expected"):
        KeyScript(tmp_path / "keys.txt")


def test_what_cannot_be_played_is_one_line(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "keys.txt"
    bad.write_text("left down\n")
    for args, word in (((), "--headless --keys FILE"), ((*QUICK, "--keys", bad), "line 1")):
        done = script("play.py", *args, "--threads", "1", root=tmp_path)
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    for args, word in (
        ("--headless", "belong together"),
        ("--data mine --track_seed 5", "never learned from"),
        ("--data data_race/", "choose another name"),
    ):
        monkeypatch.setattr(sys, "argv", ["play.py", *args.split()])
        with pytest.raises(SystemExit) as ended:
            play.arguments()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and word in said and said.count("\n") == 1


@needs_xvfb
def test_keys_drive_in_a_real_window(tmp_path):
    with xvfb(tmp_path) as (env, screen, press):
        args = "--samples", "16", "--threads", "1", "--data", "mine"
        process = start("play.py", *args, root=tmp_path, env=env)
        empty = screen()
        wait_for(lambda: screen() != empty or process.poll() is not None)
        waiting = screen()
        wait_for(lambda: screen() != waiting or process.poll() is not None)
        assert process.poll() is None, finish(process)
        press("v")
        press("Up", "keydown")
        time.sleep(2.5)
        press("Up", "keyup")
        time.sleep(0.5)
        for key in ("a", "Tab", "e", "h", "h", "space"):
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
    (chunk,) = index(tmp_path / "mine")[0]
    gas = read_chunk(chunk.path, "act")["act"][:, 1]
    assert gas.max() == np.float32(play.GAS) and "human" in chunk.meta["policy"]["name"]


def test_a_stop_before_the_first_tick_is_quiet(tmp_path):
    (tmp_path / "keys.txt").write_text("9 up down\n")
    args = *QUICK, "--keys", tmp_path / "keys.txt"
    process = start("play.py", *args, root=tmp_path)
    wait_for(lambda: "gas up to" in process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 130 and "Traceback" not in err


# ------------------------------------------------------------------ without a window


@pytest.fixture
def game(tmp_path, monkeypatch):
    words = ["play.py", *QUICK, "--keys", "none", "--root", str(tmp_path), "--energy", "classifier"]
    words += ["--track_seed", "10000001"]
    monkeypatch.setattr(sys, "argv", words)
    args = play.arguments()
    monkeypatch.setattr(play, "PROBE_EPISODES", 3)
    return play.Game(args, play.load_driver(args, args)[0], tmp_path)


def test_an_episode_ends_with_the_field_and_before_it_is_too_long(
    game, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(play, "MAX_STEPS", 150)
    for _ in range(2000):
        game.tick({"up"}, [], recording=True)
        if game.ended:
            break
    assert game.ended == "left the field"
    chunks = sorted(index(tmp_path)[0], key=lambda c: c.path.stat().st_mtime)
    assert {c.frames for c in chunks[:-1]} == {150} and 100 <= chunks[-1].frames <= 150
    ends = read_chunk(chunks[-1].path, "terminated")["terminated"]
    assert ends[-1] and not read_chunk(chunks[0].path, "terminated")["terminated"].any()
    before = game.total
    game.tick({"up"}, [], recording=True)  # it stands
    assert game.total == before and game.recorder is None
    game.tick(set(), ["r"])
    assert not game.ended and game.total > before
    game.tick(set(), [], recording=True)
    game.tick(set(), [])
    assert "too short for an episode" in capsys.readouterr().out
    assert len(index(tmp_path)[0]) == len(chunks)


def test_episodes_of_one_track_and_return_are_no_copies(game, tmp_path, monkeypatch):
    """Driving on grass scores the same each time."""
    monkeypatch.setattr(play, "MAX_STEPS", 150)
    while not game.ended and len(index(tmp_path)[0]) < 4:
        game.tick({"up", "left"}, [], recording=True)
    chunks, _, duplicates = index(tmp_path)
    assert len(chunks) == len(list(tmp_path.glob("*.npz"))) and not duplicates
    assert len({(c.meta["track_seed"], c.frames, c.meta["return_"]) for c in chunks}) < len(chunks)


def test_without_a_plan_you_drive(game):
    """Also where a paused autopilot meets a new track."""
    game.tick(set(), ["a"])
    assert not game.manual
    game.tick(set(), ["space"])
    game.tick(set(), ["r"])
    assert game.manual and game.autopilot
    compose(game, play.load_driver(game.args, game.args)[1])
    game.tick(set(), ["space"])
    assert not game.manual


def test_energies_are_those_of_the_density(game):
    game.tick(set(), ["e", "a"])
    for _ in range(6):
        game.tick(set(), [])
    yours, best, surprise = game.trace[-1]
    assert yours == pytest.approx(float(game.cost.energy(game.z)))
    assert best > 0 and surprise > 0


def test_a_dream_model_samples_at_the_temperature_of_the_keys(game):
    torch.manual_seed(0)
    game.model = DreamModel(game.predictor.args, hidden=8, width=16).eval()
    futures = []
    for key in ("0", "0", "5", "5"):
        game.dreaming = False
        game.press("tab")
        game.press(key)
        game.action, z = np.zeros(3, np.float32), game.z
        game.advance()
        assert game.temperature == TEMPERATURE * int(key) / 5 and game.dream_ticks == 1
        futures.append(game.z - z)
    assert torch.equal(*futures[:2]) and not torch.equal(*futures[2:]) and game.memory is not None
    game.teleport()
    assert game.memory is None


def test_only_dreams_of_the_predictor_begin_anew_by_default(game, tmp_path):
    assert game.model and not game.refresh
    (tmp_path / "models").mkdir()
    for path in (REPO / "models" / "pretrained").glob("*.pth"):
        if not path.name.startswith("dream"):
            shutil.copy(path, tmp_path / "models")
    other = play.Game(game.args, play.load_driver(game.args, game.args)[0], tmp_path)
    assert other.model is None
    other.press("tab")
    ticks = []
    for _ in range(60):
        other.tick(set(), [])
        ticks.append(other.dream_ticks)
    assert ticks == [*range(1, 51), *range(10)]  # 2 s, then anew


def test_a_dream_that_overflows_begins_anew(game):
    game.tick(set(), ["tab"])
    game.z = torch.full_like(game.z, float("nan"))
    game.tick(set(), [])
    assert game.z.isfinite().all() and game.dream_ticks == 0


def test_plans_fit_into_a_tick(game):
    game.args.samples, game.driver.cfg.samples, game.plan_ms = 1000, 500, 20.0
    game.fit_plans(60.0)  # of 40
    assert play.LEAST_SAMPLES <= game.driver.cfg.samples < 500
    game.driver.cfg.samples = 500
    game.fit_plans(25.0)
    assert 500 < game.driver.cfg.samples <= 1000
