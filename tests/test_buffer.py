"""Chunks, split, windows and batches: properties seen through the public face."""

import argparse
import json
import zipfile

import numpy as np
import pytest
import torch

import buffer
from buffer import Latents, Loader, index, read_chunk, triplets, write_chunk
from runtime import Refusal


def make(folder, uid, T, number, track_seed=10_000_001, **meta):
    """An episode whose pixels and actions tell where they come from: episode and step."""
    obs = np.zeros((T + 1, 64, 64, 3), np.uint8)
    obs[:, 0, 0, 0] = number
    obs[:, 0, 0, 1] = np.arange(T + 1) % 256
    obs[:, 0, 0, 2] = np.arange(T + 1) // 256
    act = np.stack([np.full(T, number), np.arange(T), np.zeros(T)], 1).astype(np.float32)
    ends = np.zeros(T, bool)
    folder.mkdir(parents=True, exist_ok=True)
    return write_chunk(folder, {"source": folder.name, "track_seed": track_seed, "uid": uid,
                                "policy": {"name": "test"}, "preprocess": 1, **meta}, obs=obs,
                       act=act, reward=np.ones(T, np.float32), terminated=ends, truncated=ends,
                       telemetry=np.zeros((T + 1, 4), np.float32))


@pytest.fixture
def folders(tmp_path):
    """Two sources of short episodes of unlike lengths, as lists of chunks."""
    lengths = {"a": (9, 30, 4, 57), "b": (40, 12, 25)}
    for name, ts in lengths.items():
        for i, T in enumerate(ts):
            make(tmp_path / name, f"{name}{i}", T, number=i + 10 * (name == "b"))
    return [index(tmp_path / name)[0] for name in lengths]


def where(frames):
    """(episode number, step) of frames (..., 3, 64, 64)."""
    p = frames[..., 0, 0].int()
    return p[..., 0], p[..., 1] + 256 * p[..., 2]


def test_a_chunk_comes_back_as_it_went(tmp_path):
    path = make(tmp_path / "a", "x", 7, 3)
    data = read_chunk(path)
    assert data["obs"].shape == (8, 64, 64, 3) and data["act"].shape == (7, 3)
    assert data["act"].dtype == np.float32 and data["obs"][5, 0, 0, 1] == 5
    with pytest.raises(ValueError, match="once"):
        make(tmp_path / "a", "x", 7, 3)
    with np.load(path, allow_pickle=False) as z:  # numpy reads it too
        assert json.loads(str(z["meta"]))["uid"] == "x"
    assert not list((tmp_path / "a").glob(".*"))


def test_half_a_transition_is_refused(tmp_path):
    good = dict(obs=np.zeros((4, 64, 64, 3), np.uint8), act=np.zeros((3, 3), np.float32),
                reward=np.zeros(3, np.float32), terminated=np.zeros(3, bool),
                truncated=np.zeros(3, bool), telemetry=np.zeros((4, 2), np.float32))
    meta = {"source": "a", "track_seed": 1, "uid": "u", "policy": {}, "preprocess": 1}
    for name in ("obs", "act", "reward", "telemetry"):
        with pytest.raises(ValueError):
            write_chunk(tmp_path, meta, **{**good, name: good[name][:-1]})
    with pytest.raises(ValueError, match="finite"):
        write_chunk(tmp_path, meta, **{**good, "act": np.full((3, 3), np.nan, np.float32)})
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named_and_skipped(tmp_path):
    folder = tmp_path / "a"
    whole = make(folder, "good", 5, 0)
    raw = whole.read_bytes()
    (folder / "truncated.npz").write_bytes(raw[:len(raw) // 2])
    (folder / "text.npz").write_text("this is not a chunk")
    (folder / "empty.npz").touch()
    np.savez(folder / "objects.npz", obs=np.array([{}], dtype=object), meta=np.array("{}"))
    with zipfile.ZipFile(whole) as z, zipfile.ZipFile(folder / "schema.npz", "w") as out:
        for name in z.namelist():
            body = z.read(name)
            out.writestr(name, _newer(body) if name == "meta.npy" else body)
    (folder / "copy.npz").write_bytes(raw)
    chunks, damaged, duplicates = index(folder)
    assert [c.meta["uid"] for c in chunks] == ["good"] and len(duplicates) == 1
    for name in ("truncated", "text", "empty", "objects", "schema"):
        assert sum(name + ".npz" in line for line in damaged) == 1, damaged


def _newer(body):
    """The meta member with another schema number, as an .npy of the same kind."""
    import io
    meta = json.loads(str(np.load(io.BytesIO(body))))
    out = io.BytesIO()
    np.save(out, np.array(json.dumps({**meta, "schema": 99})))
    return out.getvalue()


def test_a_flipped_byte_is_found(tmp_path):
    path = make(tmp_path, "x", 50, 1)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="x.npz"):
        read_chunk(path)


def test_an_episode_under_two_names_counts_once(tmp_path):
    for uid, T, seed in (("one", 9, 10_000_001), ("two", 9, 10_000_001), ("more", 9, 10_000_002)):
        make(tmp_path, uid, T, 0, track_seed=seed)
    chunks, damaged, duplicates = index(tmp_path)
    assert len(chunks) == 2 and not damaged
    assert len(duplicates) == 1 and "one.npz" in duplicates[0] and "two.npz" in duplicates[0]


def test_no_track_is_in_both_halves(tmp_path):
    for name in "ab":  # both folders drove the same tracks
        for i in range(20):
            make(tmp_path / name, f"{name}{i}", 3, 0, track_seed=10_000_000 + i)
    sources = buffer.load_sources(argparse.Namespace(root=tmp_path, data=["a", "b"]))
    train, held = ({c.meta["track_seed"] for split in sources.values() for c in split[part]}
                   for part in (0, 1))
    assert not train & held and len(train | held) == 20 and len(held) == 2


@pytest.mark.parametrize("latents,history,repeat", [(2, 1, 1), (4, 3, 2), (16, 2, 1), (1, 3, 2)])
def test_windows_stay_inside_one_episode(folders, latents, history, repeat):
    loader = Loader(folders, 8, latents, history, repeat)
    stream = loader.batches()
    for _ in range(30):
        obs, act = next(stream)
        assert obs.shape == (8, latents + history - 1, 3, 64, 64) and obs.dtype == torch.uint8
        episode, step = where(obs)
        assert (episode == episode[:, :1]).all()
        gap = step.diff(dim=1)
        assert ((gap == repeat) | ((step[:, :-1] == 0) & (gap <= repeat))).all()
        if latents > 1:  # act[k] is the mean action between latents k and k + 1
            now = step[:, history - 1:-1]
            assert torch.equal(act[..., 0].int(), episode[:, :latents - 1])
            assert torch.allclose(act[..., 1], now + (repeat - 1) / 2)
    stream.close()


def test_shares_are_exact_and_every_window_comes_once_a_pass(folders):
    loader = Loader(folders, 12, latents=3, repeat=2, shares=[1, 2])
    stream, seen = loader.batches(), []
    in_a = sum(max(0, c.frames + 1 - 4) for c in folders[0])
    for _ in range(in_a // 4):  # 4 of source a in each batch of 12
        episode, step = where(next(stream)[0])
        assert (episode[:, 0] < 10).sum() == 4
        seen += [(int(e), int(s)) for e, s in zip(episode[:, 0], step[:, 0]) if e < 10]
    stream.close()
    assert len(set(seen)) == len(seen) == in_a // 4 * 4


def test_the_stream_is_a_function_of_seed_and_step(folders):
    one, two = (Loader(folders, 6, latents=2, history=2, seed=s) for s in (3, 4))
    a, b, c = one.batches(), one.batches(start=17), two.batches()
    straight = [next(a)[0] for _ in range(20)]
    later = [next(b)[0] for _ in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(straight[17:], later))
    assert not torch.equal(straight[0], next(c)[0])
    for stream in (a, b, c):
        stream.close()


def test_triplets(folders):
    stream = Loader(folders, 6, latents=2, history=1, repeat=1).batches()
    state, action, following = triplets(next(stream))
    stream.close()
    (e0, t0), (e1, t1) = where(state), where(following)
    assert torch.equal(e0, e1) and torch.equal(t1, t0 + 1)
    assert torch.equal(action[:, 1].int(), t0)


def test_latent_cache_encodes_only_what_is_new(tmp_path, folders):
    encoded = []

    def encode(obs):  # a latent that tells episode and step
        encoded.append(len(obs))
        return torch.stack([x.float() for x in where(obs[:, -1])], 1)

    chunks = folders[0] + folders[1]
    Latents(tmp_path, "k", 2, 3, 2, encode, folders[0])
    first = sum(encoded)
    assert first == sum(c.frames + 1 for c in folders[0])
    cache = Latents(tmp_path, "k", 2, 3, 2, encode, chunks)
    assert sum(encoded) - first == sum(c.frames + 1 for c in folders[1])
    starts = cache.starts(chunks, 5)
    z, act = cache.windows(starts, 5)
    assert (z[..., 0] == z[:, :1, 0]).all() and (z[..., 1].diff(dim=1) == 2).all()
    assert torch.allclose(act[..., 1], z[:, :-1, 1] + 0.5)
    Latents(tmp_path, "other", 2, 3, 2, encode, folders[0])
    assert {p.stem for p in (tmp_path / "models").iterdir()} == {"latents_other"}


def test_a_source_without_held_out_tracks_is_refused(tmp_path, folders):
    with pytest.raises(Refusal, match="held-out"):
        buffer.load_sources(argparse.Namespace(root=tmp_path, data=["a"]))


def test_a_payload_damaged_behind_a_good_header_is_refused_by_the_loader(tmp_path, folders):
    path = folders[0][1].path
    raw = bytearray(path.read_bytes())
    at = raw.find(b"obs.npy") + 200
    raw[at:at + 40] = bytes(b ^ 0xFF for b in raw[at:at + 40])
    path.write_bytes(raw)
    assert not index(path.parent)[1]  # the headers are whole
    stream = Loader(folders, 8, latents=2).batches()
    with pytest.raises(Refusal, match=path.name):
        for _ in range(40):
            next(stream)
