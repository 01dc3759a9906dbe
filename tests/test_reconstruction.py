"""Scores of reconstructions against their references, and the pictures of them."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from car import SCENE_H, ZOOM_STEPS
from car.env import make_env
from car.telemetry import place_beside
from networks import SCENE_VALUES, TinyDecoder, TinyEncoder
from support import reconstruction as rec
from support.pca import RED_WEIGHT, fit_pca
from support.reconstruction_sheet import add_to_progress, kerb_frames
from train_decoder import train_autoencoder


@pytest.fixture(scope="module")
def frames():
    """(60, 64, 64, 3) uint8: places beside three tracks, some with kerbs."""
    env, rng, out = make_env("fast"), np.random.default_rng(0), []
    for seed in (200_001, 200_002, 200_003):
        env.reset(seed=seed)
        for _ in range(ZOOM_STEPS):
            env.step(np.zeros(3, np.float32))
        for _ in range(20):
            tile = int(rng.integers(len(env.unwrapped.track)))
            place = rng.uniform(-9, 9), rng.normal(0, 0.4), rng.uniform(0, 50)
            out.append(place_beside(env, tile, *place))
    env.close()
    return np.stack(out)


def test_regions_are_what_the_renderer_draws(frames):
    masks = rec.regions(frames)
    assert tuple(masks) == rec.REGIONS
    mean = {name: frames[mask].mean(axis=0) for name, mask in masks.items()}
    red, green, blue = mean["lawn"]
    assert abs(red - rec.GRASS_RED) < 4 and green > 190 and abs(blue - red) < 8
    assert mean["kerbs"][0] > 200 and mean["kerbs"][1] < 190  # red and white in turns
    assert mean["car"][0] > mean["car"][1]
    assert masks["instruments"].sum() == len(frames) * 64 * (64 - SCENE_H)
    assert masks["kerbs"].mean() < 0.01 and masks["kerbs"].any((1, 2)).sum() > 10
    assert not (masks["kerbs"] & (masks["lawn"] | masks["car"])).any()


def test_scores_are_those_of_numpy_and_scikit_learn(frames):
    rng = np.random.default_rng(1)
    decoded = np.clip(frames + rng.normal(0, 30, frames.shape), 0, 255).astype(np.float32)
    found = dict(zip(rec.SCORES, rec.scores(*rec.frame_sums(frames, decoded)), strict=True))
    masks = rec.regions(frames)
    for name, mask in masks.items():
        error = np.square(decoded[mask] - frames[mask].astype(float)).mean()
        assert found[f"{name}, dB"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)
    kerbs, world = masks["kerbs"], ~(masks["car"] | masks["instruments"])
    red = decoded[..., 0]
    assert found["red at kerbs"] == pytest.approx(red[kerbs].mean() - rec.GRASS_RED, abs=0.1)
    wanted = roc_auc_score(kerbs[world], red[world].round())
    assert found["kerb AUC"] == pytest.approx(wanted, abs=1e-6)
    lawn = [x.mean(axis=3)[masks["lawn"]] for x in (frames, decoded)]
    assert found["lawn r"] == pytest.approx(np.corrcoef(*lawn)[0, 1], abs=1e-4)


def test_a_perfect_reconstruction_and_an_empty_one(frames):
    perfect = dict(zip(rec.SCORES, rec.scores(*rec.frame_sums(frames, frames.astype(np.float32)))))
    assert perfect["frame, dB"] > 200 or np.isinf(perfect["frame, dB"])
    assert perfect["kerb AUC"] == 1 and perfect["lawn r"] == pytest.approx(1)
    grey = rec.scores(*rec.frame_sums(frames, np.full(frames.shape, 102, np.float32)))
    grey = dict(zip(rec.SCORES, grey))
    assert grey["kerb AUC"] == 0.5 and grey["red at kerbs"] == 0 and np.isnan(grey["lawn r"])
    none = rec.scores(*rec.frame_sums(np.zeros_like(frames), frames.astype(np.float32)))
    assert np.isnan(dict(zip(rec.SCORES, none))["kerb AUC"])  # no kerb in black frames


def test_baselines_are_those_of_scikit_learn(frames):
    flat = frames.reshape(len(frames), -1).astype(np.float32)
    pca = PCA(5, svd_solver="full").fit(flat[:40])
    want = pca.inverse_transform(pca.transform(flat[40:])).clip(0, 255)
    found = rec.pca_baseline(frames[:40], frames[40:], 5).reshape(20, -1)
    assert np.abs(found - want).mean() < 2  # randomized: close
    z = np.random.default_rng(0).normal(size=(60, 4))
    want = Ridge(1.0).fit(z[:40], flat[:40]).predict(z[40:]).clip(0, 255)
    assert np.allclose(rec.ridge_baseline(z[:40], frames[:40], z[40:]).reshape(20, -1), want)


# ------------------------------------------------------------------ components in the latent


def test_looks_are_principal_components_of_the_newest_scene(frames):
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    net = TinyEncoder(8, history=2, dim=20, hud_pca=4, scene_pca=6).eval()
    fit_pca(net, x)
    assert net.planned == 14
    stacks = torch.cat([torch.zeros_like(x), x], dim=1)
    z = net(stacks)
    assert z.shape == (60, 20) and net.features(stacks).shape == (60, 14)

    # against scikit-learn, of the frames and their mirrors, red weighted
    red = np.repeat([RED_WEIGHT, 1, 1], SCENE_VALUES // 3)
    both = torch.cat([x, x.flip(-1)])[:, :, :SCENE_H].flatten(1).double().numpy() * red
    want = PCA(6, whiten=True, svd_solver="full").fit_transform(both)[:60]
    assert np.abs(np.abs(z[:, -6:].detach().numpy()) - np.abs(want)).mean() < 0.05  # signs are free

    # the HUD, older frames and weights change nothing of them
    stacks[:, :3], stacks[:, :, SCENE_H:] = 77, 0
    assert torch.allclose(net(stacks)[:, -6:], z[:, -6:], atol=1e-4)
    twin = net.reinitialized().eval()
    assert torch.allclose(twin(stacks)[:, -6:], z[:, -6:], atol=1e-4)
    assert not torch.allclose(twin(stacks)[:, :10], net(stacks)[:, :10], atol=1e-2)


def test_the_decoders_image_is_a_ridge_regression_of_the_components(frames):
    torch.manual_seed(0)
    target = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    z = torch.randn(60, 9)
    decoder = TinyDecoder(9, channels=4, linear=5).eval()
    decoder.fit_image(z, target, ridge=1e-9)
    image = decoder.image(decoder.components(z)).view(60, 3, 64, 64)
    want = Ridge(1e-9).fit(z[:, -5:], target.flatten(1)).predict(z[:, -5:])
    assert np.allclose(image.detach().flatten(1), want, atol=1e-3)
    with torch.no_grad():
        decoder.out[-1].weight.zero_(), decoder.out[-1].bias.zero_()
    assert torch.allclose(decoder(z), image)  # the convolutions correct it


@pytest.mark.parametrize("linear", [0, 3])
def test_an_autoencoder_is_trained_with_any_decoder(frames, linear):
    torch.manual_seed(0)
    x = torch.from_numpy(frames[:8]).permute(0, 3, 1, 2)
    encoder = TinyEncoder(4, history=1, dim=9, scene_pca=3)
    decoder = TinyDecoder(9, channels=4, linear=linear)
    sizes = itertools.repeat(x[:, None]), 2, 1e-3, torch.device("cpu"), torch.float32
    pair = train_autoencoder(encoder, decoder, *sizes)
    assert pair[1](pair[0](x)).isfinite().all()
    for old, new in zip((encoder, decoder), pair):
        assert not torch.equal(next(old.parameters()), next(new.parameters()))


# ------------------------------------------------------------------ one frame over the epochs


def test_progress_grows_by_an_epoch_and_begins_anew_with_other_data(frames, tmp_path):
    gif, count = tmp_path / "progress.gif", lambda: Image.open(gif).n_frames
    drawn = frames.astype(np.float32)
    for epoch in (1, 2, 5):
        add_to_progress(frames, drawn * (1 - 0.1 * epoch), epoch, gif)
    assert count() == 3
    add_to_progress(frames, drawn, 2, gif)  # a run that began again
    assert count() == 2
    add_to_progress(frames[::-1], drawn, 3, gif)
    assert count() == 1
    gif.with_suffix(".npz").write_bytes(b"torn")
    add_to_progress(frames, drawn, 4, gif)
    assert count() == 1


def test_close_ups_show_kerbs(frames):
    kerbs = rec.regions(frames)["kerbs"].sum((1, 2))
    assert (kerbs[kerb_frames(frames)] >= np.median(kerbs)).all()
