"""Chunks, split, windows and batches, seen through the public interface."""

import io
import json
import os
import struct
import tempfile
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import buffer
from buffer import Loader, index, load_sources, read_chunk, sample_frames, write_chunk
from support.cli import Refusal


def make(folder, uid, T, number, track_seed=None, **meta):
    """An episode whose pixels and actions tell where they come from: episode and step."""
    obs = np.zeros((T + 1, 64, 64, 3), np.uint8)
    track_seed = track_seed or 10_000_001 + 10 * number
    obs[:, 0, 0, 0] = number % 256
    obs[:, 0, 0, 1] = np.arange(T + 1) % 256
    obs[:, 0, 0, 2] = np.arange(T + 1) // 256
    act = np.stack([np.full(T, number), np.arange(T), np.zeros(T)], 1).astype(np.float32)
    ends = np.zeros(T, bool)
    folder.mkdir(parents=True, exist_ok=True)
    return write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": track_seed,
            "uid": uid,
            "policy": {"name": "test"},
            "preprocess": 1,
            **meta,
        },
        obs=obs,
        act=act,
        reward=np.ones(T, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=np.zeros((T + 1, 4), np.float32),
    )


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
    good = dict(
        obs=np.zeros((4, 64, 64, 3), np.uint8),
        act=np.zeros((3, 3), np.float32),
        reward=np.zeros(3, np.float32),
        terminated=np.zeros(3, bool),
        truncated=np.zeros(3, bool),
        telemetry=np.zeros((4, 2), np.float32),
    )
    meta = {"source": "a", "track_seed": 1, "uid": "u", "policy": {}, "preprocess": 1}
    for name in ("obs", "act", "reward", "telemetry"):
        with pytest.raises(ValueError):
            write_chunk(tmp_path, meta, **{**good, name: good[name][:-1]})
    with pytest.raises(ValueError, match="finite"):
        write_chunk(tmp_path, meta, **{**good, "act": np.full((3, 3), np.nan, np.float32)})
    assert not list(tmp_path.iterdir())


def rewritten(path, name, **members):
    """The episode of a chunk as another's, some members' bytes replaced."""
    stem = name.removesuffix(".npz")
    meta = buffer.read_meta(path) | {"uid": stem, "track_seed": sum(stem.encode())}
    members = {"meta": npy(np.array(json.dumps(meta)))} | members
    with (
        zipfile.ZipFile(path) as z,
        zipfile.ZipFile(path.with_name(name), "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in z.namelist():
            out.writestr(member, members.get(member.removesuffix(".npy"), z.read(member)))


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def flip(path, back=2000):
    """Flips a byte of the pixels."""
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"obs.npy") + back] ^= 0xFF
    path.write_bytes(raw)


@pytest.fixture
def ruins(tmp_path):
    """A folder with one good chunk and one of each kind of damage: {file name: reason}."""
    folder = tmp_path / "a"
    whole = make(folder, "good", 50, 0)
    raw = whole.read_bytes()
    meta = json.loads(str(np.load(whole)["meta"]))
    flip(make(folder, "flipped", 50, 1), back=100)
    (folder / "truncated.npz").write_bytes(raw[: len(raw) // 2])
    (folder / "text.npz").write_text("this is not a chunk")
    (folder / "empty.npz").touch()
    np.savez(folder / "foreign.npz", images=np.zeros(3))
    np.savez(folder / "objects.npz", obs=np.array([{}], dtype=object), meta=np.array("{}"))
    objects = npy(np.array([[{}] * 3] * 50, dtype=object))
    rewritten(whole, "pickled.npz", act=objects.ljust(728)[:728])
    rewritten(whole, "nan.npz", act=npy(np.full((50, 3), np.nan, np.float32)))
    rewritten(whole, "schema.npz", meta=npy(np.array(json.dumps({**meta, "schema": 99}))))
    for name, change in (
        ("list", {"uid": ["x"]}),
        ("seed", {"track_seed": "1"}),
        ("nothing", {"preprocess": None}),
    ):
        rewritten(whole, f"{name}.npz", meta=npy(np.array(json.dumps({**meta, **change}))))
    broken = npy(np.array(json.dumps(meta)))
    rewritten(whole, "header.npz", meta=broken.replace(b"{'descr'", b"{'descr("))
    rewritten(whole, "deep.npz", meta=npy(np.array("[" * 50_000)))
    os.mkfifo(folder / "pipe.npz")
    rewritten(whole, "bomb.npz", obs=bytes(10**8))
    rewritten(whole, "shape.npz", obs=npy(np.zeros((51, 32, 128, 3), np.uint8)))
    return folder, {
        "flipped": "damaged",
        "truncated": "zip",
        "text": "zip",
        "empty": "zip",
        "foreign": "move it away",
        "objects": "meta: expected schema",
        "pickled": "another array",
        "nan": "finite",
        "schema": "schema 99",
        "list": "uid",
        "seed": "track_seed",
        "nothing": "preprocess",
        "header": "meta",
        "deep": "recursion",
        "pipe": "not a file",
        "bomb": "obs holds",
        "shape": "obs",
    }


def test_each_damage_is_named_with_its_reason(ruins):
    folder, reasons = ruins
    done = script("buffer.py", folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    for name, reason in reasons.items():
        said = [line for line in lines if f"{name}.npz" in line]
        assert len(said) == 1 and reason in said[0], (name, said)
    assert len(lines) == len(reasons) and f"{len(reasons)} damaged" in done.stdout


def test_a_zip_bomb_never_unfolds(tmp_path):
    """A member whose stream is larger than the archive's directory says."""
    path = make(tmp_path, "x", 50, 1)
    with zipfile.ZipFile(path) as z:
        members = {n: z.read(n) for n in z.namelist()}
    size = len(members["obs.npy"])
    members["obs.npy"] = members["obs.npy"] + bytes(2 * 10**8)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for n, body in members.items():
            z.writestr(n, body)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", size + 2 * 10**8), struct.pack("<I", size)))
    tracemalloc.start()
    with pytest.raises(Refusal, match="x.npz"):
        read_chunk(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * size
    tracemalloc.stop()


def test_an_episode_under_two_names_counts_once(tmp_path):
    for uid, T, seed in (("one", 9, 10_000_001), ("two", 9, 10_000_001), ("more", 9, 10_000_002)):
        make(tmp_path, uid, T, 0, track_seed=seed)
    chunks, damaged, duplicates = index(tmp_path)
    assert len(chunks) == 2 and not damaged
    assert len(duplicates) == 1 and "one.npz" in duplicates[0] and "two.npz" in duplicates[0]


def test_of_two_copies_the_one_under_its_own_name_counts(tmp_path):
    own = make(tmp_path, "own", 9, 0)
    (tmp_path / "another.npz").write_bytes(own.read_bytes())
    chunks, _, duplicates = index(tmp_path)
    assert [c.path.name for c in chunks] == ["own.npz"] and "another.npz" in duplicates[0]


def test_no_track_is_in_both_halves(tmp_path):
    for name in "ab":  # both folders drove the same tracks
        for i in range(20):
            make(tmp_path / name, f"{name}{i}", 3, 0, track_seed=10_000_000 + i)
    sources = load_sources(tmp_path, ["a", "b"])
    train, held = (
        {c.meta["track_seed"] for split in sources.values() for c in split[part]} for part in (0, 1)
    )
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
            now = step[:, history - 1 : -1]
            assert torch.equal(act[..., 0].int(), episode[:, : latents - 1])
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


@pytest.mark.parametrize("seed", range(5))
def test_labels_say_where_each_window_is_from_and_change_nothing(folders, seed):
    loader = Loader(folders, 7, latents=2, history=2, seed=seed)
    plain, labelled = loader.batches(start=3), loader.batches(start=3, labels=True)
    for _ in range(12):
        obs, act, labels = next(labelled)
        assert all(torch.equal(x, y) for x, y in zip(next(plain), (obs, act), strict=True))
        numbers = where(obs)[0][:, 0].tolist()
        assert ["ab"[n // 10] for n in numbers] == ["ab"[s] for s, _ in labels]
        assert [f"{'ab'[n // 10]}{n % 10}" for n in numbers] == [c.meta["uid"] for _, c in labels]
    plain.close(), labelled.close()


def test_a_window_of_a_fallback_episode_bears_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer, "MAX_DAMAGED", 1)
    for i in range(4):
        make(tmp_path / "a", f"a{i}", 20, i)
    chunks = index(tmp_path / "a")[0]
    for i in (0, 2):  # damaged after the index was made
        whole = chunks[i].path.read_bytes()
        chunks[i].path.write_bytes(whole[:400] + bytes(40) + whole[440:])
    loader = Loader([chunks], 5, latents=2)
    stream = loader.batches(labels=True)
    seen = set()
    for _ in range(12):
        obs, _, labels = next(stream)
        for n, (source, chunk) in zip(where(obs)[0][:, 0].tolist(), labels):
            assert (source, chunk.meta["uid"]) == (0, f"a{n}")
            seen.add(n)
    stream.close()
    assert seen == {1, 3}


def test_frames_of_a_damaged_chunk_are_left_out_and_its_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer, "MAX_DAMAGED", 1)
    for name, first in (("a", 0), ("b", 10)):
        for i in range(4):
            make(tmp_path / name, f"{name}{i}", 20, first + i)
    chunks = [c for name in "ab" for c in index(tmp_path / name)[0]]
    whole = chunks[5].path.read_bytes()
    chunks[5].path.write_bytes(whole[:400] + bytes(40) + whole[440:])
    obs, states = sample_frames(chunks, 2, 1, 16)
    assert where(obs)[0][:, 0].tolist() == [*np.repeat([0, 1, 2, 3, 10, 12, 13], 2)]
    assert len(states) == 14
    assert len(buffer.damaged_files[tmp_path / "b"]) == 1
    assert tmp_path / "a" not in buffer.damaged_files


@pytest.mark.parametrize("history, repeat, latents", [(1, 2, 1), (3, 2, 1), (3, 5, 4)])
def test_rows_of_the_frames_in_a_latent(history, repeat, latents):
    rows = buffer.history_rows([0, 3, 50], history, repeat, latents)
    assert rows.shape == (3, history + latents - 1)
    for step, own in zip((0, 3, 50), rows.tolist()):
        back = [step + repeat * k for k in range(1 - history, latents)]
        assert own == [max(0, row) for row in back]


def test_a_closed_loader_leaves_no_thread(folders):
    before = threading.active_count()
    stream = Loader(folders, 6).batches()
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_two_latents_and_one_frame_are_triplets(folders):
    stream = Loader(folders, 6, latents=2, history=1, repeat=1).batches()
    obs, act = next(stream)
    stream.close()
    (e0, t0), (e1, t1) = where(obs[:, 0]), where(obs[:, 1])
    assert torch.equal(e0, e1) and torch.equal(t1, t0 + 1)
    assert torch.equal(act[:, 0, 1].int(), t0)


def test_a_source_without_held_out_tracks_is_refused(tmp_path, folders):
    with pytest.raises(Refusal, match="held-out"):
        load_sources(tmp_path, ["a"])


def test_the_loader_skips_and_counts_damage_and_refuses_much_of_it(tmp_path, capsys):
    for i in range(300):
        make(tmp_path / "a", f"a{i:03d}", 6, number=i)
    chunks = index(tmp_path / "a")[0]
    for i in (7, 8, 250):
        flip(chunks[i].path, back=100)
    assert len(index(tmp_path / "a")[0]) == 300  # from outside they look whole
    loader = Loader([chunks], 50, latents=2)
    stream = loader.batches()
    for _ in range(loader.windows // 50):
        obs, act = next(stream)
        assert (where(obs)[0] == where(obs)[0][:, :1]).all() and torch.isfinite(act).all()
    stream.close()
    assert len(buffer.damaged_files[tmp_path / "a"]) == 3
    said = capsys.readouterr().out
    assert all(said.count(chunks[i].path.name) == 1 for i in (7, 8, 250))
    flip(chunks[100].path, back=100)
    stream = Loader([chunks], 50, latents=2).batches()
    with pytest.raises(Refusal, match="4 of 300 chunks are unreadable"):
        for _ in range(loader.windows // 50):
            next(stream)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=8), min_size=1, max_size=3),
    latents=st.integers(1, 6),
    history=st.integers(1, 3),
    repeat=st.integers(1, 3),
    size=st.integers(1, 20),
    threads=st.integers(1, 5),
    seed=st.integers(0, 9),
    start=st.integers(0, 30),
)
def test_any_mix_of_lengths_windows_and_threads(
    lengths, latents, history, repeat, size, threads, seed, start
):
    """Windows inside one episode, each once per pass, the same stream however it is read."""
    span, ids, sources = (latents - 1) * repeat, {}, []
    size = max(size, len(lengths))
    with tempfile.TemporaryDirectory() as tmp:
        for s, ts in enumerate(lengths):
            for i, T in enumerate(ts):
                ids[len(ids)] = s, T
                make(Path(tmp) / str(s), f"{s}-{i}", T, len(ids) - 1)
            sources.append(index(Path(tmp) / str(s))[0])
        loader = Loader.__new__(Loader)
        if any(max(ts) < span for ts in lengths):
            with pytest.raises(Refusal, match="no episode has"):
                loader.__init__(sources, size, latents, history, repeat, seed=seed)
            return
        loader.__init__(sources, size, latents, history, repeat, seed=seed, threads=threads)
        stream, seen = loader.batches(), [[] for _ in sources]
        batches = [next(stream) for _ in range(40)]
        stream.close()
        for obs, _ in batches:
            episode, step = where(obs)
            assert (episode == episode[:, :1]).all()
            now = step[:, history - 1]
            assert torch.equal(
                step, (now[:, None] + repeat * torch.arange(1 - history, latents)).clamp(min=0)
            )
            owner = [ids[int(e)] for e in episode[:, 0]]
            assert all(t + span <= T for (_, T), t in zip(owner, now.tolist()))
            assert [sum(s == k for s, _ in owner) for k in range(len(sources))] == loader.counts
            for (s, _), e, t in zip(owner, episode[:, 0].tolist(), now.tolist()):
                seen[s].append((e, t))
        for s, (ts, n) in enumerate(zip(lengths, loader.counts)):
            one_pass = sum(max(0, T + 1 - span) for T in ts)
            whole = len(seen[s]) // one_pass * one_pass if n == 1 else 0
            for i in range(0, whole, one_pass):  # a batch of one is in the order of service
                assert len(set(seen[s][i : i + one_pass])) == one_pass
            first = seen[s][: one_pass // n * n]
            assert len(set(first)) == len(first)
        again = Loader(sources, size, latents, history, repeat, seed=seed, threads=1)
        stream = again.batches(start)
        for obs, act in batches[start:]:
            same = next(stream)
            assert torch.equal(obs, same[0]) and torch.equal(act, same[1])
        stream.close()


def test_neighbours_of_an_episode_are_far_apart_in_a_batch(tmp_path):
    for i in range(70):
        make(tmp_path / "a", f"a{i:02d}", 300, number=i)
    loader = Loader([index(tmp_path / "a")[0]], 256)
    stream = loader.batches()
    for _ in range(loader.windows // 256 - 1):
        episode, step = (x[:, 0].numpy() for x in where(next(stream)[0]))
        assert len(set(episode)) >= 64
        order = np.lexsort((step, episode))
        assert (np.diff(step[order])[np.diff(episode[order]) == 0] > 1).all()
    stream.close()


def test_reading_checks_everything_at_300_megabytes_a_second(tmp_path):
    rng = np.random.default_rng(0)
    path = make(tmp_path, "x", 900, 0)
    data = {k: np.array(v) for k, v in read_chunk(path).items()}
    flat = rng.integers(0, 256, (901, 8, 8, 3)).repeat(8, 1).repeat(8, 2)  # compresses as frames do
    data["obs"] = (flat + rng.integers(0, 2, (901, 1, 1, 3))).astype(np.uint8)
    meta = {**buffer.read_meta(path), "uid": "y"}
    path = write_chunk(tmp_path, meta, **data)
    speeds = []
    for _ in range(5):
        start = time.process_time()
        read_chunk(path)
        speeds.append(data["obs"].nbytes / 1e6 / (time.process_time() - start))
    assert max(speeds) >= 300
