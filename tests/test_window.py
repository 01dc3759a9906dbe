"""Windows, films and the files of scores, as a user meets them."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pygame
import pytest
from conftest import REPO

import demo_energy
import drive_mpc
import train_predictor
from car.env import make_env
from car.renderer import picture
from networks import CostModel
from report.dreams import telling_rows
from support import window as windows
from support.cli import Refusal, Stop
from support.pictures import VideoRecorder, ornament
from support.scores import Report, row_name, score_settings
from support.window import KEYS, KEYS_BAR, NoWindow, Window, log_axis, open_window
from tools.checkpoint import main as networks_main

av = pytest.importorskip("av")
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


# ------------------------------------------------------------------ films

COLOURS = {"red": (200, 30, 40), "grass": (100, 200, 100), "road": (104, 104, 104)}


def film(count=30):
    """A film of so many frames, of a third of each colour, at 25 frames a second."""
    recorder = VideoRecorder(25)
    bands = np.array(list(COLOURS.values()), np.uint8)[:, None].repeat(32, 0).repeat(128, 1)
    for _ in range(count):
        recorder.add(bands)
    recorder.hold(np.zeros((96, 128, 3), np.uint8), 2.0)
    return recorder


def boxes(mp4):
    """Names of the outer boxes of an MP4, in order."""
    names, at = [], 0
    while at < len(mp4):
        names.append(mp4[at + 4 : at + 8].decode())
        at += int.from_bytes(mp4[at : at + 4], "big") or len(mp4)
    return names


@pytest.mark.parametrize("folder", ["plain", "50 % 100%d: ünï", "x" * 120])
def test_films_are_h264_with_the_index_in_front_under_any_name(tmp_path, folder):
    stem = tmp_path / folder / "a film"
    assert film().save(stem) == [stem.with_suffix(".mp4"), stem.with_suffix(".gif")]
    assert sorted(p.name for p in stem.parent.iterdir()) == ["a film.gif", "a film.mp4"]
    mp4 = stem.with_suffix(".mp4").read_bytes()
    assert boxes(mp4).index("moov") < boxes(mp4).index("mdat")
    with av.open(io.BytesIO(mp4)) as found:
        stream = found.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 25 and (stream.width, stream.height) == (128, 96)
        frames = [f.to_ndarray(format="rgb24") for f in found.decode(video=0)]
    assert len(frames) == 30 + 50 and frames[-1].max() < 8
    for i, color in enumerate(COLOURS.values()):
        assert np.abs(frames[12][32 * i + 8 : 32 * i + 24].mean((0, 1)) - color).max() < 6
    from PIL import Image

    gif = Image.open(stem.with_suffix(".gif"))
    ms = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
    assert ms[-1] == 2000 and np.asarray(gif.convert("RGB")).max() == 0  # the end stands


def test_a_film_that_cannot_be_written_costs_a_line_and_not_the_old_one(tmp_path, capsys):
    stem = tmp_path / "film"
    film().save(stem)
    old = stem.with_suffix(".mp4").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = film(60)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # as good as a full disk
        assert again.save(stem) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("not drawn (File too large)" in line for line in said)
    assert stem.with_suffix(".mp4").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.gif", "film.mp4"]
    (tmp_path / "gone").mkdir()
    with ornament(tmp_path / "gone" / "x.png"):  # its folder is made again
        (tmp_path / "gone").rmdir()
        raise FileNotFoundError(2, "No such file or directory")
    assert "not drawn" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_chromium_plays_the_film(tmp_path):
    film().save(tmp_path / "film")
    (tmp_path / "page.html").write_text("""<video src=film.mp4 muted></video><p>none</p><script>
        const v = document.querySelector('video'), p = document.querySelector('p')
        const say = what => p.textContent = `${what} ${v.videoWidth}x${v.videoHeight}`
        v.onerror = () => say('error ' + v.error.code)
        v.ontimeupdate = () => v.currentTime > 1 && say('plays')
        v.play()</script>""")
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=20000",
            "--autoplay-policy=no-user-gesture-required",
            f"--user-data-dir={tmp_path}/profile",
            "--dump-dom",
            f"file://{tmp_path}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "<p>plays 128x96</p>" in done.stdout, done.stdout


# ------------------------------------------------------------------ pictures


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


def test_energies_below_zero_have_a_linear_axis():
    for values in ([[-57.0, 3.0], [0.5, 37.0]], [[-2.0, -2.0]], [[0.0, 1e-9]]):
        low, high = windows.linear_axis(
            canvas := windows.blank(), (60, 540, 500, 110), np.array(values)
        )
        assert low <= np.min(values) and np.max(values) <= high and low < high
        assert (canvas[530:660, :56] != windows.PAPER).any()  # it has numbers


def test_an_axis_has_numbers_and_holds_all_values():
    canvas = windows.blank()
    for values in (np.array([[0.3, 0.9]]), np.array([[1e-4, 3.0]]), np.array([[2.0, 2.0]])):
        low, high = log_axis(canvas, (100, 500, 400, 100), values)
        assert low <= np.log10(values.min()) and np.log10(values.max()) <= high and low < high
    assert (canvas[490:610, 20:95] != windows.PAPER).any()  # numbers left of the box


def test_the_rollout_has_gaps_names_and_seconds(tmp_path):
    real, dreamt = np.full((2, 4, 6, 64, 64, 3), 200, np.uint8)
    train_predictor.animate_dream(real, dreamt, ["a", "b", "c", "d"], tmp_path / "x.gif", 0.04)
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
        for step in range(8):  # slow plans: it says so and does not hurry afterwards
            time.sleep(0.12)
            window.show(PICTURE, step / 25)
        return window.pace()

    assert window.run(work) < 0.6 and not window.visible


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
        press(pygame.K_f)
        wait_for(lambda: window.full)
        press(pygame.K_f)
        wait_for(lambda: not window.full)
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
    window.picture, window.dirty, white = np.full((100, 200, 3), 255, np.uint8), True, []
    for size in ((900, 300), (300, 700), (60, 50)):
        window.size, window.screen, window.dirty = size, None, True
        window._draw()
        there = pygame.surfarray.array3d(pygame.display.get_surface()).min(2) > 250
        there[:, size[1] - windows.BAR :] = False
        xs, ys = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        w, h = xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1
        white.append(w / h)
        assert abs(xs[0] - (size[0] - 1 - xs[-1])) <= 1  # in the middle
    assert np.allclose(white, 2, rtol=0.1)


def test_what_the_work_raises_is_raised(shown):
    window, _ = shown
    with pytest.raises(Refusal, match="no good"):
        window.run(lambda: (_ for _ in ()).throw(Refusal("no good")))


def test_help_lists_the_keys(capsys, monkeypatch):
    for module in (drive_mpc, demo_energy):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", "--help"])
        with pytest.raises(SystemExit):
            module.arguments()
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"{key} ({what})" in said for key, what in KEYS.items())
    readme = " ".join((REPO / "README.md").read_text().split())
    assert all(what in readme for what in KEYS.values())
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
    ]
    with av.open(str(tmp_path / "visuals" / "demo_energy.mp4")) as found:
        frames = [f.to_ndarray(format="gray")[200:280, :80].mean() for f in found.decode(video=0)]
    assert len(frames) == 75 // 2 + 1 + 50  # from the first second on, and the end for two
    band = np.array(frames) < 0.7 * frames[30]  # a dark one, with text
    assert band[:25].all() and not band[25:38].any() and band[38:].all()


@pytest.mark.skipif(
    not all(map(shutil.which, ("Xvfb", "xdotool", "import"))),
    reason="no Xvfb, xdotool or ImageMagick",
)
@pytest.mark.parametrize(
    "name", ["drive_mpc.py", pytest.param("demo_energy.py", marks=pytest.mark.slow)]
)
def test_keys_in_a_real_window(tmp_path, name):
    """r leaves a track, q the drive; the film so far is kept, in a lap that was not over."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-noreset", "-screen", "0", "1100x800x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    try:
        display = f":{os.read(read, 20).decode().strip()}"
        press = lambda key: subprocess.run(
            ["xdotool", "key", key], check=True, env=os.environ | {"DISPLAY": display}
        )
        picture = tmp_path / "screen.png"

        def screen():
            subprocess.run(
                ["import", "-window", "root", picture],
                check=True,
                env=os.environ | {"DISPLAY": display},
            )
            return cv2.imread(str(picture)).tobytes()

        args = {
            "drive_mpc.py": ["--policy", "expert", "--env", "fast"],
            "demo_energy.py": ["--samples", "4"],
        }[name]
        process = start(name, *args, "--threads", "1", root=tmp_path, env={"DISPLAY": display})
        empty = screen()
        wait_for(lambda: screen() != empty or process.poll() is not None)
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
        press("q")
        code, out, err = finish(process)
    finally:
        server.terminate()
        server.wait()
    assert code == 0, err
    stem = "drive_expert" if name == "drive_mpc.py" else "demo_energy"
    with av.open(str(tmp_path / "visuals" / f"{stem}.mp4")) as found:
        assert sum(1 for _ in found.decode(video=0)) > 25
    if name == "drive_mpc.py":
        assert "100000 left after" in out and "no drive ended" in out
        assert "where the drive was left" in out


# ------------------------------------------------------------------ scores


def scores(path):
    return {
        name: [e["return"] for e in r["episodes"]]
        for name, r in json.loads(path.read_text())["rows"].items()
    }


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGHUP],
        pytest.param([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_scores_are_kept_after_each_drive_and_gone_on_with(tmp_path, signals):
    """Hung up, killed and stopped: the same command drives what is missing, and nothing twice."""
    path, episodes = tmp_path / "s.json", len(signals) + 3
    args = [*QUICK, "--no_video", "--policy", "random", "--episodes", episodes, "--json", path]
    kept = lambda: len(scores(path)["random"]) if path.exists() else 0
    for sig in signals:
        before = kept()
        process = start("drive_mpc.py", *args, root=tmp_path)
        wait_for(lambda: kept() > before)
        process.send_signal(sig)
        code, out, err = finish(process)
        assert code == (-9 if sig == signal.SIGKILL else 130), err
        assert not json.loads(path.read_text())["finished"] and kept() < episodes
    left = kept()
    code, out, err = finish(start("drive_mpc.py", *args, root=tmp_path))
    assert code == 0 and f"goes on behind {left} drives" in out, err
    env, report = make_env("fast"), json.loads(path.read_text())
    driver = drive_mpc.BaselineDriver(env, "random", 1.0, 0)
    for row in report["episodes"]:
        assert drive_mpc.drive(env, driver, row["track_seed"]) == row
    assert report["finished"] and len(report["episodes"]) == episodes
    assert report["mean"] == pytest.approx(np.mean(scores(path)["random"]), abs=0.01)
    assert not (tmp_path / "visuals").exists()  # nothing was to be drawn

    report["finished"] = False  # as if it had been stopped, of another seed
    path.write_text(json.dumps(report))
    other = drive_mpc_args("--policy", "random", "--episodes", str(episodes), "--seed", "1")
    assert report_of(path, other).rows == {"random": {}}


def report_of(path, args, policies=("random",), nets=None):
    """The Report of these flags and {policy: {name: net}}."""
    return Report(path, score_settings(args, nets or {}), dict.fromkeys(policies))


def test_scores_of_other_nets_are_not_taken(tmp_path):
    args = drive_mpc_args()
    path = tmp_path / "s.json"
    report = report_of(path, args, ["mpc"])
    row = {
        "track_seed": 5,
        "return": 1.0,
        "steps": 9,
        "tiles": 3,
        "tiles_missed": 0,
        "lap_finished": True,
        "plan_ms_p50": 1.0,
        "plan_ms_p99": 1.0,
    }
    report.add("mpc", row)
    assert report_of(path, args, ["mpc"]).rows == {"mpc": {5: row}}
    nets = {"mpc": {"cost": CostModel(2)}}
    assert report_of(path, args, ["mpc"], nets).rows == {"mpc": {}}


def test_no_score_is_lost_to_a_stop_or_to_a_new_drive(tmp_path, monkeypatch):
    flags = [
        "--policy",
        "random",
        "--compare",
        "expert",
        "--env",
        "fast",
        "--no_video",
        "--episodes",
        "2",
        "--root",
        str(tmp_path),
        "--json",
        str(tmp_path / "s.json"),
    ]
    args, path = drive_mpc_args(*flags), tmp_path / "s.json"
    row = {
        "steps": 9,
        "tiles": 3,
        "tiles_missed": 0,
        "lap_finished": True,
        "plan_ms_p50": 1.0,
        "plan_ms_p99": 1.0,
    }
    policies = ["random", "expert"]
    report = report_of(path, args, policies)
    for name, n in (("random", 2), ("expert", 1)):
        for i in range(n):
            report.add(name, row | {"track_seed": 100_000 + i, "return": 1.0 * i})
    monkeypatch.setattr(Stop, "requested", True)
    again = drive_mpc.drive_all(args, policies, None, NoWindow())
    again.save(last=True)  # stopped before the first drive
    assert scores(path) == {"random": [0.0, 1.0], "expert": [0.0]}
    report.save(finished=True)
    assert report_of(path, args, policies).rows == {"random": {}, "expert": {}}
    assert not path.exists()
    (aside,) = tmp_path.glob("s-*.json")
    assert scores(aside) == {"random": [0.0, 1.0], "expert": [0.0]}
    path.write_text(
        json.dumps({"env_id": 1, "policy": 2, "versions": 3, "episodes": 4, "finished": False})
    )
    with pytest.raises(Refusal, match="no report of drive_mpc.py"):
        report_of(path, args)


def drive_mpc_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["drive_mpc.py", *flags])
        return drive_mpc.arguments()


def refused(capsys, call, *flags):
    """The one line that refuses these flags."""
    with pytest.raises(SystemExit) as e:
        call(*flags)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    return said


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path, why in (
        (tmp_path, "found a folder"),
        (f"{tmp_path}/new/", "found a folder"),
        (tmp_path / "file" / "s.json", "cannot write there"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("/proc/s.json", "/proc"),
    ):
        assert why in refused(capsys, drive_mpc_args, "--json", str(path))
    assert drive_mpc_args("--json", str(tmp_path / "made" / "s.json")).json.parent.is_dir()
    assert drive_mpc_args("--json", "/dev/null").json == Path("/dev/null")
    for text in ("mine", "[1]", '{"a": 1}'):
        (tmp_path / "file").write_text(text)
        args = drive_mpc_args("--json", str(tmp_path / "file"))
        with pytest.raises(Refusal, match="no report of drive_mpc.py"):
            report_of(args.json, args)
        assert (tmp_path / "file").read_text() == text
    (tmp_path / "empty").touch()
    assert report_of(tmp_path / "empty", args).rows == {"random": {}}


def test_a_checkpoint_is_not_exported_over_itself(tmp_path, monkeypatch, capsys):
    shipped = next((REPO / "models" / "pretrained").glob("predictor*"))
    path = shutil.copy(shipped, tmp_path / "p.pth")
    before = Path(path).read_bytes()
    for out, why in ((path, "the checkpoint itself"), (tmp_path, "found a folder")):
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(path), "--safetensors", str(out)])
        assert why in refused(capsys, networks_main)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "flag,values",
    [
        ("--episodes", ["0", "10" * 9]),
        ("--track_seed", ["-1", "9" * 20]),
        ("--film", ["-1"]),
        ("--pace", ["2", "nan"]),
        ("--seed", ["9" * 20]),
    ],
)
def test_numbers_have_ranges(flag, values, capsys):
    for value in values:
        assert "from" in refused(capsys, drive_mpc_args, flag, value)


def test_the_demos_numbers_have_ranges(monkeypatch, capsys):
    for flag, value in (("--ahead", "0"), ("--ahead", "9" * 9), ("--steps", "1001")):
        monkeypatch.setattr(sys, "argv", ["demo_energy.py", flag, value])
        assert "from 1 to 1000" in refused(capsys, demo_energy.arguments)


def test_a_calm_expert_says_so_in_its_row(tmp_path):
    code, out, err = finish(
        start(
            "drive_mpc.py",
            *QUICK,
            "--no_video",
            "--policy",
            "expert",
            "--pace",
            "0.9",
            "--episodes",
            "1",
            "--json",
            tmp_path / "s.json",
            root=tmp_path,
        )
    )
    assert code == 0 and "\nexpert, pace 0.9 " in out, err
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["policy"] == "expert, pace 0.9" and list(report["rows"]) == ["expert, pace 0.9"]
    args = drive_mpc_args()
    assert args.pace == 1 and row_name("expert", args.pace) == "expert"
    assert row_name("random", 0.9) == "random"


@pytest.mark.parametrize("into", ["a pipe", "a file"])
def test_scores_go_to_stdout_whatever_it_is(tmp_path, into):
    with open(tmp_path / "out", "w") as file:
        done = subprocess.run(
            [
                sys.executable,
                REPO / "drive_mpc.py",
                *QUICK,
                "--no_video",
                "--policy",
                "random",
                "--episodes",
                "1",
                "--json",
                "/dev/stdout",
                "--root",
                tmp_path,
            ],
            text=True,
            cwd=REPO,
            stdout=subprocess.PIPE if into == "a pipe" else file,
            timeout=DIST_TIMEOUT,
        )
    said = done.stdout if into == "a pipe" else (tmp_path / "out").read_text()
    assert done.returncode == 0
    report, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert report["finished"] and len(report["episodes"]) == 1
    assert "driver" in said and "100000" in said  # and all else that was printed


@pytest.mark.slow
def test_the_film_of_a_drive_that_outlives_its_folder(tmp_path):
    """Every lap that --film asks for, with the end for two seconds; visuals/ vanishes meanwhile."""
    process = start(
        "drive_mpc.py",
        *QUICK,
        "--headless",
        "--policy",
        "expert",
        "--episodes",
        "3",
        "--film",
        "2",
        "--json",
        tmp_path / "s.json",
        root=tmp_path,
    )
    wait_for(lambda: (tmp_path / "s.json").exists())
    shutil.rmtree(tmp_path / "visuals")
    code, out, err = finish(process)
    assert code == 0 and len(scores(tmp_path / "s.json")["expert"]) == 3, err
    steps = [e["steps"] for e in json.loads((tmp_path / "s.json").read_text())["episodes"]]
    with av.open(str(tmp_path / "visuals" / "drive_expert.mp4")) as found:
        frames = [f.to_ndarray(format="rgb24")[::4, ::4].astype(int) for f in found.decode(video=0)]
    assert len(frames) == steps[0] // 2 + 50 + steps[1] // 2 + 50  # each lap's end for two seconds
    end = steps[0] // 2
    assert (
        np.abs(frames[end + 5] - frames[end + 45]).mean()
        < 1
        < np.abs(frames[end + 5] - frames[end + 60]).mean()
    )
