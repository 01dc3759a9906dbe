"""Films and pictures, as a user meets them."""

import io
import json
import os
import resource
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from processes import QUICK, finish, start, wait_for

from support.index_page import write_index
from support.pictures import VideoRecorder, ornament

av = pytest.importorskip("av")

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


# ------------------------------------------------------------------ the page of all pictures


def visuals(tmp_path):
    """A folder with two epochs of a picture, a film, odd names, and the scores of a drive."""
    folder = tmp_path / "a <root> & more" / "visuals"
    folder.mkdir(parents=True)
    film().save(folder / "drive_mpc")
    for i, name in enumerate(
        ("reconstruct_ep2.png", "reconstruct_ep10.png", "energy_<b>&#1 %.png")
    ):
        cv2.imwrite(str(folder / name), np.full((30, 40, 3), 50, np.uint8))
        os.utime(folder / name, (1e9 + i, 1e9 + i))
    row = {"mean": 1.0, "std": 0.5, "laps_finished": 1, "episodes": [{}, {}]}
    (folder / "scores & <b>.json").write_text(json.dumps({"rows": {"mpc <i>": row}}))
    (folder / "report.json").write_text("{}")
    (folder / "damaged.json").write_text("{")
    write_index(folder)
    return folder


def test_the_page_lists_the_newest_picture_the_film_and_the_scores(tmp_path):
    page = (visuals(tmp_path) / "index.html").read_text()
    assert "reconstruct_ep10.png" in page and "reconstruct_ep2.png" not in page
    assert '<video src="drive_mpc.mp4?' in page
    assert "<td>mpc &lt;i&gt;<td>1.0 ± 0.5<td>1/2" in page
    assert "report.json" not in page and "damaged.json" not in page
    assert "a &lt;root&gt; &amp; more" in page and "scores &amp; &lt;b&gt;.json" in page
    assert 'src="energy_%3Cb%3E%26%231%20%25.png?' in page and "energy_&lt;b&gt;&amp;#1" in page
    assert "<b>" not in page and "<i>" not in page


def test_a_page_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, capsys):
    folder = visuals(tmp_path)

    def refuse(path, write):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("support.index_page.replace_atomically", refuse)
    before = (folder / "index.html").read_text()
    with ornament(folder / "x.png"):
        (folder / "x.png").write_bytes(b"drawn")
    assert capsys.readouterr().out == "" and (folder / "index.html").read_text() == before
    write_index(tmp_path)  # a folder of another name has no page
    assert not (tmp_path / "index.html").exists()


# ------------------------------------------------------------------ in a browser

BROWSER = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
BROWSER += ["--autoplay-policy=no-user-gesture-required"]
chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")


def browse(tmp_path, page, *flags):
    """What Chromium prints about a page."""
    command = [*BROWSER, f"--user-data-dir={tmp_path}/profile", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@chromium
def test_chromium_plays_the_film_of_the_page(tmp_path):
    """A copy of the page says so once its film plays."""
    folder = visuals(tmp_path)
    page = (folder / "index.html").read_text()
    page = page.replace('http-equiv="refresh"', "")  # which would begin the film again
    (folder / "copy.html").write_text(
        page
        + """<p id=said>none</p><script>
        const v = document.querySelector('video'), p = document.querySelector('#said')
        const say = what => p.textContent = `${what} ${v.videoWidth}x${v.videoHeight}`
        v.onerror = () => say('error ' + v.error.code)
        v.ontimeupdate = () => v.currentTime > 1 && say('plays')
        window.onload = () => v.play()</script>"""
    )
    found = browse(tmp_path, folder / "copy.html", "--virtual-time-budget=20000", "--dump-dom")
    assert "plays 128x96" in found, found


@chromium
def test_chromium_renders_the_page(tmp_path):
    folder, shot = visuals(tmp_path), tmp_path / "page.png"
    browse(tmp_path, folder / "index.html", f"--screenshot={shot}", "--window-size=800,900")
    picture = cv2.imread(str(shot)).reshape(-1, 3)
    grey = (np.abs(picture.astype(int) - 50).max(1) < 3).sum()
    assert grey > 2 * 30 * 40 * 0.9  # two pictures of 40 x 30, and no broken one


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
    assert code == 0, err
    steps = [e["steps"] for e in json.loads((tmp_path / "s.json").read_text())["episodes"]]
    assert len(steps) == 3
    with av.open(str(tmp_path / "visuals" / "drive_expert.mp4")) as found:
        frames = [f.to_ndarray(format="rgb24")[::4, ::4].astype(int) for f in found.decode(video=0)]
    assert len(frames) == steps[0] // 2 + 50 + steps[1] // 2 + 50  # each lap's end for two seconds
    end = steps[0] // 2
    assert (
        np.abs(frames[end + 5] - frames[end + 45]).mean()
        < 1
        < np.abs(frames[end + 5] - frames[end + 60]).mean()
    )
