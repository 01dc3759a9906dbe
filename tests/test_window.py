"""The window and what is drawn in it."""

import sys
import threading
import time

import cv2
import numpy as np
import pygame
import pytest
from conftest import REPO
from processes import finish, start, wait_for
from windows import needs_xvfb, xvfb

import demo_energy
import drive_mpc
import play
from car.env import make_env
from car.renderer import picture
from report.dreams import telling_rows
from support import window as windows
from support.cli import Refusal
from support.dreams import animate_dream
from support.window import KEYS, KEYS_BAR, Window, open_window, plot_with_axis

av = pytest.importorskip("av")


@pytest.mark.parametrize("steps", [20, 90])
def test_the_car_looks_alike_in_both_environments(steps):
    """In the zoom and after it: cheap pictures of what `render()` shows."""
    pictures = []
    for kind in ("official", "fast"):
        env = make_env(kind)
        env.reset(seed=200_000)
        for _ in range(steps):
            env.step(np.array((0, 0.3, 0), np.float32))
        pictures.append(picture(env, (600, 480))[:400])  # without the score
    full = make_env("official", render_mode="rgb_array")
    full.reset(seed=200_000)
    for _ in range(steps):
        full.step(np.array((0, 0.3, 0), np.float32))
    full = cv2.resize(full.render(), (600, 480), interpolation=cv2.INTER_AREA)[:400]
    for found in pictures:
        assert np.abs(found.astype(int) - full).mean() < 4
        assert (np.abs(found[330:400, 270:330].astype(int) - (204, 0, 0)).sum(-1) < 60).sum() > 100


@pytest.mark.parametrize(
    "values",
    [
        [[-57.0, 3.0], [0.5, 37.0]],
        [[-2.0, -2.0]],
        [[0.0, 1e-9]],
        [[0.3, 0.9]],
        [[1e-4, 3.0]],
        [[2.0, 2.0]],
    ],
)
def test_an_axis_has_numbers_and_holds_all_values(values):
    """Values above zero have a logarithmic axis, others a linear one."""
    canvas, values = windows.blank(), np.array(values * 3)
    low, high = plot_with_axis(canvas, (100, 500, 400, 100), values, [(255, 0, 0)] * 2, 9)
    values = np.log10(values) if values.min() > 0 else values
    assert low <= values.min() and values.max() <= high and low < high
    assert (canvas[490:610, 20:95] != windows.PAPER).any()  # numbers left of the box
    assert (canvas[490:610, 480:501] == (255, 0, 0)).all(-1).any()  # the newest at the right


def test_the_rollout_has_gaps_names_and_seconds(tmp_path):
    real, dreamt = np.full((2, 4, 6, 64, 64, 3), 200, np.uint8)
    animate_dream(real, dreamt, ["a", "b", "c", "d"], tmp_path / "x.gif", 0.04)
    from PIL import Image

    gif = Image.open(tmp_path / "x.gif")
    frames = [gif.seek(k) or np.asarray(gif.convert("RGB"), int) for k in range(gif.n_frames)]
    row = (frames[0][100] > 190).all(1)
    assert np.diff(row.astype(int)).tolist().count(1) == 4  # four windows, apart
    at = frames[0].shape[0] // 2
    clock = [f[at - 15 : at + 15, :70].sum() for f in frames]
    assert len(set(clock)) == 6  # the seconds move
    assert all(
        (frames[0][:30, 76 + 200 * i : 100 + 200 * i] > 150).any() for i in range(4)
    )  # names


def test_the_sheet_of_dreams_shows_bends():
    class Samples:
        source = np.array(["race"] * 50 + ["random"] * 50)
        speed, bend = np.full(100, 60.0), np.zeros(100)

        def state(self, name, ahead=0):
            return {"speed": self.speed, "curvature_20": self.bend}[name]

    spots, error = Samples(), np.tile(np.arange(50.0), 2)
    spots.bend[[3, 22]], spots.bend[[70, 74, 99]] = 1.0, [-0.2, -0.5, 0.9]
    spots.speed[:20] = 0  # of those that move 20 to 49, the middle fifth is 32 to 38
    spots.bend[35] = 0.4
    assert telling_rows(spots, error, 15).tolist() == [35, 74]


# ------------------------------------------------------------------ windows


@pytest.fixture
def shown(monkeypatch):
    """A Window on SDL's driver for tests, and a function that presses a key in it."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    window = Window("test")

    def press(key, kinds=(pygame.KEYDOWN, pygame.KEYUP)):
        for kind in kinds:
            pygame.event.post(pygame.event.Event(kind, key=key))

    yield window, press
    window.close()


PICTURE = np.full((120, 160, 3), 90, np.uint8)


def test_a_lap_is_shown_in_real_time(shown):
    window, _ = shown

    def work():
        for _ in range(2):
            began = time.monotonic()
            for step in range(26):
                assert window.show(PICTURE, step / 25) == ""
            assert 0.99 < time.monotonic() - began < 1.5
        for step in range(8):  # slow plans
            time.sleep(0.12)
            window.show(PICTURE, step / 25)
        assert window.pace() < 0.6  # which the bar shows
        began = time.monotonic()
        for step in range(8, 34):  # it hurries by SLACK at most
            window.show(PICTURE, step / 25)
        return time.monotonic() - began

    assert 0.79 < window.run(work) < 1.5 and not window.visible


def test_keys_pause_step_record_help_and_leave(shown):
    window, press = shown
    seen = []

    def work():
        step = 0
        while True:
            command = window.show(PICTURE, step / 25)
            seen.append((command, window.recording))
            step += 1
            if command == "quit":
                return step

    def user():
        wait_for(lambda: len(seen) > 3)
        press(pygame.K_SPACE)
        wait_for(lambda: window.paused)
        time.sleep(0.2)
        before = len(seen)
        time.sleep(0.3)
        assert len(seen) == before  # it stands
        for key in (pygame.K_s, pygame.K_RIGHT, pygame.K_s):
            press(key)
        wait_for(lambda: len(seen) == before + 3)
        press(pygame.K_s, [pygame.KEYDOWN] * 40)  # held: as many as go, and none when let go
        wait_for(lambda: len(seen) > before + 3)
        press(pygame.K_s, [pygame.KEYUP])
        time.sleep(0.3)
        after = len(seen)
        time.sleep(0.3)
        assert len(seen) == after < before + 10
        press(pygame.K_h)
        wait_for(lambda: window.help)
        press(pygame.K_v)
        wait_for(lambda: not window.recording)
        window.record(True)  # what the script would like is less than what the user said
        assert not window.recording
        press(pygame.K_r)
        wait_for(lambda: seen[-1][0] == "next")
        press(pygame.K_SPACE)
        wait_for(lambda: not window.paused and len(seen) > after + 5)
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=0x439, scancode=pygame.KSCAN_Q))

    with pytest.MonkeyPatch.context():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor() as pool:
            done = pool.submit(user)
            assert window.run(work) > 10
            done.result()
    assert window.quit and [c for c, _ in seen if c] == ["next", "quit"]


def test_the_picture_keeps_its_shape_in_a_window_of_any_size(shown):
    window, _ = shown
    window.picture, white = np.full((100, 200, 3), 255, np.uint8), []
    for size in ((900, 300), (300, 700), (60, 50)):
        pygame.display.set_mode(size, pygame.RESIZABLE)
        window.dirty = True
        window._draw()
        there = pygame.surfarray.array3d(pygame.display.get_surface()).min(2) > 250
        there[:, size[1] - windows.BAR :] = False
        xs, ys = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        w, h = xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1
        white.append(w / h)
        assert abs(xs[0] - (size[0] - 1 - xs[-1])) <= 1  # in the middle
    assert np.allclose(white, 2, rtol=0.1)


def test_the_work_goes_on_without_a_display_that_is_lost(shown, capsys, monkeypatch):
    window, _ = shown
    events, lost = window._events, threading.Event()

    def look():  # in the main thread, as SDL wants it: it crashes where another one quits
        if lost.is_set():
            pygame.display.quit()
        events()

    monkeypatch.setattr(window, "_events", look)

    def work():
        window.show(PICTURE, 0)
        lost.set()
        return [window.show(PICTURE, step / 25) for step in range(1, 30)]

    assert window.run(work) == [""] * 29 and not window.visible
    assert "the window is lost" in capsys.readouterr().out


def test_what_the_work_raises_is_raised(shown):
    window, _ = shown
    with pytest.raises(Refusal, match="no good"):
        window.run(lambda: (_ for _ in ()).throw(Refusal("no good")))


def test_help_lists_the_keys(capsys, monkeypatch):
    readme = " ".join((REPO / "README.md").read_text().split())
    for module, keys in ((drive_mpc, KEYS), (demo_energy, KEYS), (play, play.KEYS)):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", "--help"])
        with pytest.raises(SystemExit):
            module.arguments()
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"{key} ({what})" in said for key, what in keys.items())
        assert all(what in readme for what in keys.values())
    assert KEYS_BAR.count("   ") == len(KEYS) - 1


@pytest.mark.parametrize(
    "env", [{"DISPLAY": ":987"}, {"DISPLAY": ":0", "SDL_VIDEODRIVER": "dummy"}, {"DISPLAY": ""}]
)
def test_no_window_is_one_line(env, monkeypatch, capsys):
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    window = open_window("test")
    assert not window.visible and window.run(lambda: 5) == 5 and window.show(PICTURE, 0) == ""
    said = capsys.readouterr().out
    assert said.startswith("no window (") and said.count("\n") == 1 and "files only" in said


def test_the_demo_without_a_display_writes_its_files(tmp_path):
    code, out, err = finish(
        start(
            "demo_energy.py",
            "--steps",
            "75",
            "--samples",
            "4",
            "--threads",
            "1",
            root=tmp_path,
            env={"DISPLAY": ":987"},
        )
    )
    assert code == 0 and "no window" in out and "0.20 s ahead" in out, err
    assert sorted(p.name for p in (tmp_path / "visuals").iterdir()) == [
        "demo_energy.gif",
        "demo_energy.mp4",
        "demo_energy.png",
        "index.html",
    ]
    with av.open(str(tmp_path / "visuals" / "demo_energy.mp4")) as found:
        frames = [f.to_ndarray(format="gray")[200:280, :80].mean() for f in found.decode(video=0)]
    assert len(frames) == 75 // 2 + 50  # from the first second on, and the end for two
    band = np.array(frames) < 0.7 * frames[30]  # a dark one, with text
    assert band[:25].all() and not band[25:37].any() and band[37:].all()


@needs_xvfb
@pytest.mark.parametrize(
    "name", ["drive_mpc.py", pytest.param("demo_energy.py", marks=pytest.mark.slow)]
)
def test_keys_in_a_real_window(tmp_path, name):
    """r leaves a track, q the drive; the film so far is kept, in a lap that was not over."""
    args = {
        "drive_mpc.py": ["--policy", "expert", "--env", "fast"],
        "demo_energy.py": ["--samples", "4"],
    }[name]
    with xvfb(tmp_path) as (env, screen, press):
        process = start(name, *args, "--threads", "1", root=tmp_path, env=env)
        empty = screen()
        wait_for(lambda: screen() != empty or process.poll() is not None)
        waiting = screen()  # the window, before the first picture
        wait_for(lambda: screen() != waiting or process.poll() is not None)
        assert process.poll() is None, finish(process)
        time.sleep(1.5)
        press("r")
        time.sleep(2)  # into the next lap
        press("space")
        time.sleep(0.5)
        still = screen()
        time.sleep(0.3)
        assert screen() == still
        press("Right")
        time.sleep(0.4)
        assert screen() != still
        for _ in range(2):  # full screen, and back
            before = screen()
            press("f")
            wait_for(lambda: screen() != before)
        press("q")
        code, out, err = finish(process)
    assert code == 0, err
    stem = "drive_expert" if name == "drive_mpc.py" else "demo_energy"
    with av.open(str(tmp_path / "visuals" / f"{stem}.mp4")) as found:
        assert sum(1 for _ in found.decode(video=0)) > 25
    if name == "drive_mpc.py":
        assert "100000 left after" in out and "no drive ended" in out
        assert "where the drive was left" in out
