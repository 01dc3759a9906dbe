"""What the predictor's pictures and its nulls show: windows under their own names, and actions of
another episode."""

import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import CHAIN, FakeEncoder, script
from PIL import Image

from buffer import load_sources, write_chunk
from car.telemetry import TELEMETRY
from support.dreams import animate_dream, draw_dream, dream_windows
from support.latents import Latents, WindowSampler
from support.reconstruction_sheet import PICTURES, draw_sheet

COLORS = {"data_race": (160, 40, 40), "data_recovery": (40, 200, 40), "data": (40, 40, 200)}


def episode(folder, number, T=120, color=(0, 0, 0)):
    """An episode of one color, whose actions tell its number."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.zeros(T, bool)
    act = np.tile(np.float32([number / 100, 0.1, 0]), (T, 1))
    return write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": 10_000_000 + number,
            "preprocess": 1,
            "uid": f"{folder.name}-{number}",
            "policy": {},
        },
        obs=np.full((T + 1, 64, 64, 3), color, np.uint8),
        act=act,
        reward=np.full(T, number, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=np.zeros((T + 1, len(TELEMETRY)), np.float32),
    )


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """A root with three folders, each of one color; tracks 0, 10 and 20 are held out."""
    root = tmp_path_factory.mktemp("colored")
    for name, color in COLORS.items():
        for number in (0, 10, 20, 1, 2, 3):
            episode(root / name, number, color=color)
    return root


def sources_of(root, names):
    return load_sources(root, list(names))


def near(picture, color):
    """Where a picture (H, W, 3) has about this color."""
    return np.abs(picture.astype(int) - color).max(axis=-1) < 12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", [("data_race", "data_recovery", "data"), ("data", "data_race")])
def test_each_dreamt_window_comes_from_the_folder_that_it_names(colored, tmp_path, seed, order):
    encoder = SimpleNamespace(history=3, repeat=2)
    obs, act, names = dream_windows(sources_of(colored, order), encoder, 4, seed)
    assert obs.shape[1:] == (7, 3, 64, 64) and act.shape == (len(names), 4, 3)
    assert names == [name for name in order for _ in range(2)]
    for window, name in zip(obs, names):
        assert (window.permute(0, 2, 3, 1).numpy() == COLORS[name]).all(), name


@pytest.mark.parametrize("seed", [0, 5])
def test_the_gif_shows_each_window_under_its_name(colored, tmp_path, seed):
    encoder = SimpleNamespace(history=1, repeat=2)
    obs, _, names = dream_windows(sources_of(colored, COLORS), encoder, 4, seed)
    real = obs.permute(0, 1, 3, 4, 2).numpy()
    animate_dream(real, real, names, tmp_path / "d.gif", 0.04)
    picture = np.array(Image.open(tmp_path / "d.gif").convert("RGB"))
    middles = [np.nonzero(near(picture, COLORS[name]).any(axis=0))[0].mean() for name in COLORS]
    assert middles == sorted(middles)  # left to right, as the names


def rows_of(path):
    """The sources that a sheet shows from top to bottom, by their colors."""
    picture = cv2.imread(str(path))[..., ::-1]
    shown = {name: near(picture, color).any(axis=1) for name, color in COLORS.items()}
    return sorted((n for n, rows in shown.items() if rows.any()), key=lambda n: shown[n].argmax())


def test_the_sheet_of_dreams_has_a_row_of_each_source_by_its_name(chain, tmp_path, colored):
    """The stage itself, with the small chain's nets: its real frames say which row is whose."""
    (tmp_path / "models").mkdir()
    for name in ("encoder_mixed_ep2.pth", "decoder_ep2.pth"):
        (tmp_path / "models" / name).symlink_to(chain[0] / "models" / name)
    for name in COLORS:
        (tmp_path / name).symlink_to(colored / name)
    done = script(
        "train_predictor.py",
        "--epochs",
        1,
        "--steps_per_epoch",
        2,
        "--batch_size",
        8,
        "--hidden",
        8,
        "--horizon",
        5,
        "--threads",
        1,
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "visuals" / "dream_ep1.png") == list(COLORS)


def test_draw_dream_takes_a_row_a_name(tmp_path):
    real = np.zeros((2, 6, 64, 64, 3), np.uint8)
    real[0], real[1] = COLORS["data"], COLORS["data_race"]
    draw_dream(real, real, ["data", "data_race"], tmp_path / "d.png", 0.04)
    assert rows_of(tmp_path / "d.png") == ["data", "data_race"]


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 4, 2), (3, 0, 4)])
def test_the_sheet_of_reconstructions_has_rows_by_name_where_frames_are_few(tmp_path, counts):
    """A source of few whole frames leaves cells empty; no other one's fill them."""
    names = [name for name, n in zip(COLORS, counts) for _ in range(n)]
    frames = np.stack([np.full((64, 64, 3), COLORS[name], np.uint8) for name in names])
    draw_sheet(frames, frames.astype(np.float32), names, 1, tmp_path / "s.png")
    assert rows_of(tmp_path / "s.png") == list(dict.fromkeys(names))
    picture = cv2.imread(str(tmp_path / "s.png"))[..., ::-1]
    area = {name: near(picture, COLORS[name]).sum() for name in names}
    for name, n in zip(COLORS, counts):
        assert n == 0 or area[name] / max(area.values()) == pytest.approx(n / PICTURES, abs=0.05)


@pytest.mark.parametrize("held", [(0,), (0, 10), (0, 10, 20, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_swapped_actions_are_of_another_episode_of_the_same_source(tmp_path, held, seed):
    """Also where a source has one held-out episode, and where the cache lies in another order."""
    for k, name in enumerate(COLORS):
        for number in (*held, 1 + 2 * k, 2 + 2 * k):
            episode(tmp_path / name, number + 100 * k, T=90 + number)
    sources = sources_of(tmp_path, COLORS)
    chunks = [c for split in sources.values() for part in split for c in part]
    np.random.default_rng(seed).shuffle(chunks)
    encoder = FakeEncoder(lambda frames: torch.zeros(len(frames), 4), 4, history=1)
    cache = Latents(tmp_path, "0123456789abcdef-p1-fp32", encoder, chunks)
    sampler = WindowSampler(cache, sources, 1, 60, 8, seed=seed)
    for step in range(3):
        own, other = sampler(step)[1][..., 0], sampler.swapped(step)[..., 0]
        assert own.shape == other.shape
        assert (own == own[:, :1]).all() and (other == other[:, :1]).all()  # of one episode each
        assert (own[:, 0] != other[:, 0]).all()
        assert torch.equal(own[:, 0].round().int(), other[:, 0].round().int())  # of the same source
        assert len(other[:, 0].unique()) > 3


def test_a_run_goes_on_with_other_data(chain, tmp_path):
    shutil.copytree(chain[0] / "models", tmp_path / "models")
    for name in ("data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    args = CHAIN["train_predictor.py"][2:]
    more = "--epochs", "3", "--data", "data_race", "data_recovery", "--shares", "0.75", "0.25"
    done = script("train_predictor.py", *args, *more, root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the run so far had --data" in done.stdout and "the data has changed" in done.stdout
    read = lambda n: torch.load(tmp_path / "models" / f"predictor_ep{n}.pth", weights_only=True)
    before, after = read(2), read(3)
    assert (before["step"], after["step"]) == (40, 60)
    seen = {k: after["frames_seen"][k] - before["frames_seen"][k] for k in before["frames_seen"]}
    assert seen == {"data_race": 20 * 24 * 16, "data_recovery": 20 * 8 * 16, "data": 0}


def test_a_run_starts_from_another_predictor(chain, tmp_path):
    """With its weights. One that does not fit is refused; a resumed run needs it no more."""
    shutil.copytree(chain[0] / "models", tmp_path / "models")
    for name in ("data_race", "data_recovery", "data"):
        (tmp_path / name).symlink_to(chain[0] / name)
    start = tmp_path / "start.pth"
    shutil.copy(chain[0] / "models" / "predictor_ep2.pth", start)

    def train(*more):
        args = *CHAIN["train_predictor.py"], "--epochs", 1, "--steps_per_epoch", 1, "--lr", 1e-9
        return script("train_predictor.py", *args, "--start", start, *more, root=tmp_path)

    done = train("--fresh")
    assert done.returncode == 0, done.stderr
    read = lambda path: torch.load(path, weights_only=True)["nets"]["predictor"]["weights"]
    before, after = read(start), read(tmp_path / "models" / "predictor_ep1.pth")
    assert all(torch.allclose(w, after[k], atol=1e-6) for k, w in before.items())

    done = train("--fresh", "--hidden", 32)
    assert done.returncode == 2 and "has other sizes; add --hidden 64 --state 256" in done.stderr
    payload = torch.load(start, weights_only=True)
    torch.save(payload | {"encoder_key": "0" * 16}, start)
    done = train("--fresh")
    assert done.returncode == 2 and "was trained on another encoder" in done.stderr
    start.unlink()
    done = train("--fresh")
    assert done.returncode == 2 and f"{start}: not found" in done.stderr
    assert train("--epochs", 2).returncode == 0
