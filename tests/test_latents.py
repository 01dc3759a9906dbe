"""The cache of latents, and what is sampled from it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import FakeEncoder
from conftest import noise_episode as episode
from test_buffer import folders, where  # noqa: F401

import support.latents
from buffer import index, read_chunk
from networks import VALUE_HORIZON, CostModel, Predictor, TinyEncoder, stack_frames
from support.checkpoints import fingerprint
from support.cli import Refusal
from support.device import DTYPES, cast_weights
from support.latents import Latents, LatentSampler, encode
from train_cost_model import fit_density


class Counted:
    """An encoder that notes how many frames it was shown in each call."""

    def __init__(self, encoder, encoded):
        self.encoder, self.encoded = encoder, encoded
        self.dim, self.history, self.repeat = encoder.dim, encoder.history, encoder.repeat

    def __call__(self, x):
        self.encoded.append(len(x))
        return self.encoder(x)


def cache_of(root, encoder, chunks, encoded=None):
    encoded = [] if encoded is None else encoded
    return Latents(root, fingerprint(encoder), Counted(encoder, encoded), chunks)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    net = TinyEncoder(8, dim=16).eval()
    with torch.no_grad():
        net.fit_standardization(net.features(torch.randint(0, 256, (64, 9, 64, 64))))
    return net.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_an_encoder_whose_weights_are_cast_once_gives_the_same_latents(encoder, dtype):
    obs = torch.randint(0, 256, (3, encoder.history, 3, 64, 64), dtype=torch.uint8)
    cpu, cast = torch.device("cpu"), cast_weights(encoder, dtype)
    assert torch.equal(encode(cast, obs, cpu, dtype), encode(encoder, obs, cpu, dtype))
    assert cast.head.weight.dtype == dtype and encoder.head.weight.dtype == torch.float32


def test_cached_latents_are_those_computed_anew(data, tmp_path, encoder):
    chunks = index(data / "data_race")[0] + index(data / "data")[0]
    cache = cache_of(tmp_path, encoder, chunks)
    assert isinstance(cache.z, np.memmap) and cache.z.dtype == np.float16
    rows = sum(c.frames + 1 for c in chunks)
    assert cache.path.stat().st_size == 2 * encoder.dim * rows
    assert 2 * 512 * 5.8e6 * 1.001 < 6e9  # so the whole plan fits, with a row more an episode
    rng, worst = np.random.default_rng(0), 0.0
    for chunk, n in zip(chunks, rng.multinomial(1000, [1 / len(chunks)] * len(chunks))):
        obs, t = read_chunk(chunk.path, "obs")["obs"], rng.integers(chunk.frames + 1, size=n)
        at = np.maximum(t[:, None] + encoder.repeat * np.arange(1 - encoder.history, 1), 0)
        z = encoder(stack_frames(torch.from_numpy(obs[at]).permute(0, 1, 4, 2, 3), encoder.history))
        cached = cache.z[cache.rows[chunk.meta["uid"]][0] + t].astype(np.float32)
        worst = max(worst, float((z - torch.from_numpy(cached)).abs().div(z.abs().clamp(1)).max()))
    assert 0 < worst < 1e-3


def test_an_episode_that_changed_under_its_name_is_encoded_again(tmp_path, encoder):
    rng, folder, encoded = np.random.default_rng(1), tmp_path / "data", []
    paths = [episode(folder, f"e{i}", 70, rng, i) for i in range(3)]
    old = np.array(cache_of(tmp_path, encoder, index(folder)[0], encoded).z)
    paths[1].unlink()
    episode(folder, "e1", 70, rng, 1)  # same name, length and track, other pixels
    chunks = index(folder)[0]
    cache = cache_of(tmp_path, encoder, chunks, encoded)
    assert sum(encoded) == 4 * 71
    fresh = cache_of(tmp_path / "else", encoder, chunks)
    for chunk in chunks:
        a, b = (c.starts([chunk], 1)[0] for c in (cache, fresh))
        assert np.array_equal(cache.z[a : a + 71], fresh.z[b : b + 71])
    assert np.array_equal(cache.z[: len(old)], old)  # nobody who reads them loses rows


@pytest.mark.parametrize("left", ["", "{", "[]", '{"rows": {"e0": [0, 70]}}', '{"rows": 3}'])
def test_an_index_that_cannot_be_understood_is_made_anew(tmp_path, encoder, left):
    folder = tmp_path / "data"
    episode(folder, "e0", 70, np.random.default_rng(2), 1)
    for _ in range(2):
        encoded = []
        cache = cache_of(tmp_path, encoder, index(folder)[0], encoded)
        assert sum(encoded) == 71
        cache.index_path.write_text(left)


def test_a_crash_costs_only_what_the_index_does_not_promise(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(support.latents, "INDEX_EVERY", 0)
    rng, folder = np.random.default_rng(3), tmp_path / "data"
    for i in range(3):
        episode(folder, f"e{i}", 70, rng, i)
    chunks = index(folder)[0]

    class Crashes(Counted):
        def __call__(self, x):
            if len(self.encoded) == 2:
                raise OSError("no space left")
            return super().__call__(x)

    with pytest.raises(OSError):
        Latents(tmp_path, fingerprint(encoder), Crashes(encoder, []), chunks)
    cache = cache_of(tmp_path, encoder, chunks, encoded := [])
    assert sum(encoded) == 2 * 71  # the first one is kept
    fresh = cache_of(tmp_path / "else", encoder, chunks)
    assert np.array_equal(cache.z, fresh.z)


def test_two_that_start_at_once_encode_once(data, tmp_path, encoder):
    chunks, encoded = index(data / "data_race")[0], []
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(cache_of, tmp_path, encoder, chunks, encoded) for _ in range(2)]
    a, b = (future.result() for future in both)
    assert sum(encoded) == sum(c.frames + 1 for c in chunks) == len(a.z) and a.rows == b.rows


def test_the_value_target_is_that_of_the_same_latent_real_or_imagined(tmp_path, encoder):
    rng, H = np.random.default_rng(0), 4
    episode(tmp_path / "data_recovery", "long", 280, rng, 11)
    chunks = index(tmp_path / "data_recovery")[0]
    cache = cache_of(tmp_path, encoder, chunks)
    cost, noise = CostModel(encoder.dim), torch.randn(200, encoder.dim)
    fit_density(cost, noise, 2 * noise)
    sampler = LatentSampler(cache, chunks, Predictor(encoder.dim, 8, 8), H, cost)
    z, target = sampler.sample(64, rng, torch.device("cpu"), torch.float32)
    z, target = (
        z.view(4, 2, -1, encoder.dim),
        target.view(4, 2, -1),
    )  # pick, real or imagined, window
    assert torch.equal(target[:, 0], target[:, 1]) and not torch.equal(z[:, 0], z[:, 1])
    for latent, value in zip(z[:, 0].flatten(0, 1), target[:, 0].flatten()):
        row = int((torch.from_numpy(cache.z.astype(np.float32)) - latent).abs().sum(1).argmin())
        after = cost.value_target(cost.energy(cache.windows([row], 1 + VALUE_HORIZON)[0]))[0, 0]
        assert float(value) == pytest.approx(float(after), rel=1e-4)
    with pytest.raises(
        Refusal, match="lasts 288 steps, 50 of zoom and 238 more, the longest has 280"
    ):
        LatentSampler(cache, chunks, Predictor(encoder.dim, 8, 8), H + 40, cost)


def test_latent_cache_encodes_only_what_is_new(tmp_path, folders):  # noqa: F811
    encoded, one, other = [], f"{'1' * 16}-p1-fp32", f"{'2' * 16}-p1-fp32"  # encoders

    def encode(frames):  # a latent that tells episode and step
        encoded.append(len(frames))
        return torch.stack([x.float() for x in where(frames)], 1)

    encoder = FakeEncoder(encode, 2)
    chunks = folders[0] + folders[1]
    Latents(tmp_path, one, encoder, folders[0])
    first = sum(encoded)
    assert first == sum(c.frames + 1 for c in folders[0])
    cache = Latents(tmp_path, one, encoder, chunks)
    assert sum(encoded) - first == sum(c.frames + 1 for c in folders[1])
    starts = cache.starts(chunks, 5)
    z, act = cache.windows(starts, 5)
    assert (z[..., 0] == z[:, :1, 0]).all() and (z[..., 1].diff(dim=1) == 2).all()
    assert torch.allclose(act[..., 1], z[:, :-1, 1] + 0.5)
    Latents(tmp_path, other, encoder, folders[0])
    assert {p.stem for p in (tmp_path / "models").iterdir()} == {f"latents_{other}"}


def test_a_latent_cache_that_lost_its_end_is_encoded_again(tmp_path, folders):  # noqa: F811
    def encode(frames):
        return torch.stack([x.float() + 1 for x in where(frames)], 1)

    encoder = FakeEncoder(encode, 2)
    whole = Latents(tmp_path, "k", encoder, folders[0])
    rows = np.array(whole.z)
    path = tmp_path / "models" / "latents_k.f16"
    for cut in (0, 10, len(rows) * 2):  # bytes that are left
        path.write_bytes(path.read_bytes()[:cut])
        again = Latents(tmp_path, "k", encoder, folders[0])
        for chunk in folders[0]:
            (a, T, _), (b, *_) = whole.rows[chunk.meta["uid"]], again.rows[chunk.meta["uid"]]
            assert np.array_equal(rows[a : a + T + 1], again.z[b : b + T + 1])
