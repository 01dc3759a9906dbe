"""Exports and benchmarks: what other programs read, and that each table is what it says."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, script

from buffer import index, read_chunk, write_chunk
from networks import CostModel, Predictor, TinyEncoder
from support.checkpoints import fingerprint, load_frozen, save
from support.cli import Refusal
from tools import checkpoint
from tools.bench_train import PLAN_SIZES
from tools.checkpoint import export_safetensors
from tools.export import export_minari


@pytest.fixture
def data(tmp_path):
    """A root with two folders of three short episodes of noise."""
    rng, root = np.random.default_rng(0), tmp_path / "noise"
    for s, source in enumerate(("data_race", "data")):
        (root / source).mkdir(parents=True)
        for i, T in enumerate((20, 31, 7)):
            ends = np.zeros(T, bool)
            meta = {"source": source, "track_seed": 10 * s + i, "uid": f"{source}{i}"}
            write_chunk(
                root / source,
                {**meta, "policy": {}, "preprocess": 1},
                obs=rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8),
                act=rng.uniform(0, 1, (T, 3)).astype(np.float32),
                reward=np.ones(T, np.float32),
                terminated=ends,
                truncated=ends,
                telemetry=rng.uniform(-0.5, 0.5, (T + 1, 5)).astype(np.float32),
            )
    return root


# ------------------------------------------------------------------ exports


def test_minari_reads_the_export(data, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", minversion="0.5.4")
    pytest.importorskip("h5py")
    folders = [data / "data_race", data / "data", data / "data"]  # an episode counts once
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")  # the export sets it
    monkeypatch.chdir(tmp_path)
    export_minari(folders, Path("minari"), "carracing-v0")  # as the README has it
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = minari.load_dataset("carracing-v0")
    chunks = index(data / "data_race")[0] + index(data / "data")[0]
    assert dataset.total_episodes == len(chunks)
    assert dataset.total_steps == sum(c.frames for c in chunks)
    for chunk, found in zip(chunks, dataset.iterate_episodes()):
        want = read_chunk(chunk.path)
        for ours, theirs in (
            ("obs", found.observations),
            ("act", found.actions),
            ("reward", found.rewards),
            ("terminated", found.terminations),
            ("truncated", found.truncations),
            ("telemetry", found.infos["telemetry"]),
        ):
            assert np.array_equal(want[ours], theirs), ours
        assert dataset.observation_space.contains(found.observations[0])
    about = next(iter(dataset.storage.get_episode_metadata([0])))
    assert about["seed"] == chunks[0].meta["track_seed"]
    assert json.loads(about["options"]["meta"])["uid"] == chunks[0].meta["uid"]
    again = script("tools.export", data / "data", "--out", tmp_path / "minari")
    assert again.returncode == 2 and "exists already" in again.stderr
    again = script("tools.export", data / "data", "--name", "rides", "--out", tmp_path / "m")
    assert again.returncode == 2 and "ends in a version" in again.stderr
    assert [p.name for p in (tmp_path / "minari").iterdir()] == ["carracing-v0"]


def test_safetensors_hold_the_weights_and_what_rebuilds_the_nets(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("safetensors.torch")
    nets = {"encoder": TinyEncoder(8, dim=16), "predictor": Predictor(16, 8)}
    save(tmp_path / "a.pth", nets)
    out = tmp_path / "new" / "a.safetensors"
    done = script("tools.checkpoint", tmp_path / "a.pth", "--safetensors", out)
    assert done.returncode == 0, done.stderr
    with safetensors.safe_open(out, "pt") as f:
        about = {name: json.loads(text) for name, text in f.metadata().items()}
        weights = {key: f.get_tensor(key) for key in f.keys()}
    assert about["predictor"]["class"] == "Predictor"
    again = TinyEncoder(**about["encoder"]["args"])
    again.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    )
    assert fingerprint(again) == fingerprint(nets["encoder"])


def test_a_checkpoint_in_half_precision_is_half_as_large_and_nearly_the_same(tmp_path):
    net = CostModel(16, 64)
    save(tmp_path / "p.pth", {"cost": net}, encoder_key="k")
    done = script("tools.checkpoint", tmp_path / "p.pth", "--half", tmp_path / "half.pth")
    assert done.returncode == 0, done.stderr
    sizes = [(tmp_path / name).stat().st_size for name in ("half.pth", "p.pth")]
    assert sizes[0] < 0.6 * sizes[1]
    again, payload = load_frozen(tmp_path / "half.pth", "cost", "cpu")
    assert payload["encoder_key"] == "k"
    for x, y in zip(again.state_dict().values(), net.state_dict().values()):
        assert x.dtype == torch.float32 and torch.allclose(x, y, rtol=1e-3, atol=1e-6)

    save(tmp_path / "e.pth", {"predictor": Predictor(16, 8)})
    net.mu.fill_(1e6)
    save(tmp_path / "large.pth", {"cost": net})
    for name, why in (("e", "would not know it"), ("large", "too large"), ("p", "itself")):
        out = tmp_path / ("p.pth" if name == "p" else "no.pth")
        refused = script("tools.checkpoint", tmp_path / f"{name}.pth", "--half", out)
        assert refused.returncode == 2 and why in refused.stderr, refused.stderr
        assert not (tmp_path / "no.pth").exists()


@pytest.mark.parametrize(
    "package, export",
    [
        ("minari", lambda root: export_minari([root / "data"], root / "out", "noise-v0")),
        ("safetensors", lambda root: export_safetensors(root / "a.pth", root / "out")),
    ],
)
def test_a_package_that_is_missing_is_named_in_one_line(
    data, tmp_path, monkeypatch, package, export
):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    save(tmp_path / "a.pth", {"predictor": Predictor(16, 8)})
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    with pytest.raises(Refusal, match=f"pip install '{package}") as refusal:
        export(tmp_path)
    assert "\n" not in str(refusal.value)


def test_shipped_weights_name_no_path_of_the_machine_that_made_them():
    paths = list((REPO / "models" / "pretrained").glob("*.pth"))
    for path in paths:
        args = torch.load(path, weights_only=True)["args"]
        assert not [v for v in args.values() if "/" in v], (path, args)
    assert len(paths) == 5


def test_a_checkpoint_is_not_exported_over_itself(tmp_path, monkeypatch, capsys):
    shipped = next((REPO / "models" / "pretrained").glob("predictor*"))
    path = Path(shutil.copy(shipped, tmp_path / "p.pth"))
    before = path.read_bytes()
    for out, why in ((path, "the checkpoint itself"), (tmp_path, "found a folder")):
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(path), "--safetensors", str(out)])
        with pytest.raises(SystemExit) as e:
            checkpoint.main()
        said = capsys.readouterr().err
        assert e.value.code == 2 and said.count("\n") == 1 and why in said, said
    assert path.read_bytes() == before


# ------------------------------------------------------------------ benchmarks


@pytest.mark.slow
def test_plans_are_timed_by_threads_load_and_size(tmp_path):
    done = script("benchmark.py", "plan", "--plans", 5, "--drives", 0, root=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    loads = [row for row in rows if row[1:2] == ["threads,"]]
    sizes = [row for row in rows if len(row) == 7 and row[0].isdigit()]
    assert {row[2] for row in loads} == {"0", "1"} and len(sizes) == len(PLAN_SIZES)
    for p50, p99 in [row[-2:] for row in loads] + [row[2:4] for row in sizes]:
        assert 0 < float(p50) <= float(p99)


@pytest.mark.slow
def test_the_loader_and_the_collectors_are_timed(tmp_path):
    done = script("benchmark.py", "collect", "loader", "--frames", 2500, root=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert sum(row[:1] == [name] for row in rows for name in ("data", "data_race")) == 4
    assert [row[:2] for row in rows if row[:1] in (["256"], ["32"])] == [["256", "1"], ["32", "16"]]


@pytest.mark.slow
def test_the_fast_env_is_at_least_eight_times_the_stock_one(tmp_path):
    done = script("benchmark.py", "env", "--repeats", "1", "--steps", "250", root=tmp_path)
    ratio = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("fast env  ")]
    assert float(ratio[0]) >= 8, done.stdout


@pytest.mark.slow
def test_training_is_timed_beside_the_bare_net(chain):
    done = script("benchmark.py", "train", "--repeats", 1, "--train_steps", 2, root=chain[0])
    assert done.returncode == 0, done.stderr
    ms = [float(x) for x in re.findall(r"([\d.]+) ms a step", done.stdout)]
    share = float(re.search(r"the loop runs at ([\d.]+)%", done.stdout)[1])
    assert len(ms) == 2 and share == pytest.approx(100 * ms[1] / ms[0], abs=0.5)
