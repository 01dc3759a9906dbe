"""What goes into the encoder: stacked windows and photometric views, against plain references."""

import argparse
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import script

from car import SCENE_H
from car.sprites import hflip
from networks import InverseModel, Predictor, TinyEncoder, WarpHead, normalize_action, stack_frames
from support.augment import (
    CAR,
    JITTER,
    MAX_SHIFT,
    MEAN_EVERY,
    SCENE_AHEAD,
    TINT,
    congealing_loss,
    flip_batches,
    jitter_,
    unwarp,
    warp_,
    warp_rows,
)
from support.cli import Refusal
from support.pca import fit_pca
from train_encoder import Objective, loss_fn, refuse_collapse, views


@pytest.fixture
def obs():
    """Windows as the loader serves them: (B, L, 3, 64, 64) uint8 that lie (B, L, 64, 64, 3)."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 5, 64, 64, 3), dtype=torch.uint8, generator=g).permute(
        0, 1, 4, 2, 3
    )


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_stack_holds_its_frames_oldest_first(obs, history, packed):
    obs = obs if packed else obs.contiguous()
    x = stack_frames(obs, history)
    B, L = obs.shape[:2]
    T = L - history + 1
    assert x.shape == (B * T, 3 * history, 64, 64)
    assert x.is_contiguous(memory_format=torch.channels_last)  # no transposition in the net
    for b in range(B):
        for t in range(T):
            want = torch.cat([obs[b, t + i] for i in range(history)])
            assert torch.equal(x[b * T + t], want)
    some = x.view(B, T, *x.shape[1:])[:, [0, 2]].flatten(0, 1)
    assert torch.equal(stack_frames(obs, history, [0, 2]), some)


def test_a_view_changes_brightness_contrast_and_tint_of_the_scene_only(obs):
    x = stack_frames(obs, 2)
    view, N = x.clone(), len(x)
    g = torch.Generator().manual_seed(1)
    jitter_(view, g)
    g.manual_seed(1)
    tint = 1 + TINT * (2 * torch.rand(N, 1, 3, generator=g) - 1)
    b, c = 1 + JITTER * (2 * torch.rand(2, N, 1, 1, generator=g) - 1)
    scene = x[..., :SCENE_H, :].float()
    mean = scene[..., ::MEAN_EVERY, :].mean(dim=(1, 2, 3))
    for n in range(N):  # one draw a row, of all its frames
        for k in range(6):
            want = ((scene[n, k] - mean[n]) * c[n] + mean[n]) * b[n] * tint[n, 0, k % 3]
            assert (view[n, k, :SCENE_H] - want.clamp(0, 255)).abs().max() < 2.6
            gain = (64 * c[n] * b[n] * tint[n, 0, k % 3]).round()  # in steps of 1 / 64, which is
            more = 64 * (1 - c[n]) * b[n] * tint[n, 0, k % 3] * mean[n]  # all that is lost
            want = ((scene[n, k] * gain + more) / 64).clamp(0, 255)
            assert (view[n, k, :SCENE_H] - want).abs().max() < 0.53
    assert torch.equal(view[..., SCENE_H:, :], x[..., SCENE_H:, :])
    assert b.std() > 0.01 and c.std() > 0.01 and tint.std() > 0.01


def test_vicreg_sees_each_frame_twice_and_in_unlike_light(obs):
    plain = Objective("vicreg", {}, 2, ())
    x, how, scenes = views(obs, plain, torch.Generator().manual_seed(1))
    assert how is None and scenes is None and x.shape == (6, 6, 64, 64)
    frame = stack_frames(obs, 2, [0])[..., SCENE_H:, :]
    assert torch.equal(x[::2, :, SCENE_H:], frame) and torch.equal(x[1::2, :, SCENE_H:], frame)
    assert (x[::2] != x[1::2])[:, :, :SCENE_H].float().mean() > 0.5


def test_the_strongest_light_and_the_faintest_stay_in_range():
    x = (
        torch.randint(
            0, 2, (4000, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        * 255
    )
    x[::2, :, 3:] = 255
    x[1::2, :, 3:] = 0
    view = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    jitter_(view, torch.Generator().manual_seed(0))
    view = view.permute(0, 2, 3, 1)[:, :SCENE_H, :3]
    white, black = (view[x[:, :SCENE_H, :3] == v].float() for v in (255, 0))
    assert white.min() > 100 and black.max() < 130  # nothing wraps around


def test_a_bend_moves_a_road_as_it_says_and_neither_car_nor_instruments():
    """A straight road: each row moves by the columns of its bends, every frame alike."""
    x = torch.full((40, 64, 64, 6), 50, dtype=torch.uint8)
    x[:, :, 27:38] = 150
    x[:, 44:52, 30:34], x[:, SCENE_H:, 40:50] = 250, 200
    x = x.permute(0, 3, 1, 2)
    bent = x.clone()
    with torch.autocast("cpu", torch.bfloat16):  # which must not round columns
        how = warp_(bent, torch.Generator().manual_seed(0))
    assert how.shape == (40, 5)
    assert torch.equal(bent[:, :, SCENE_H:], x[:, :, SCENE_H:])
    on_road = (how @ warp_rows())[:, 47].abs() < 1  # there the car has the same grey under it
    car = lambda frames: frames[on_road][:, :, 46:50, 30:34]
    assert on_road.any() and torch.equal(car(bent), car(x))
    assert abs(how.mean()) < 0.2 and abs(how.std() - 1) < 0.1
    moved = (how @ warp_rows())[:, : CAR[0].start]  # the rows ahead of the car
    road = (bent[:, :, : CAR[0].start].float() - 50) / 100  # (N, C, rows, 64)
    middle = (road * torch.arange(64)).sum(3) / road.sum(3) - 32
    whole = moved.abs() < 25  # the road is in the picture
    assert whole.float().mean() > 0.8
    assert (middle - moved[:, None]).abs().amax(1)[whole].max() < 0.1


def test_no_bend_moves_a_row_out_of_reach():
    assert MAX_SHIFT - 2 < 3**0.5 * warp_rows().abs().sum(dim=0).max() < MAX_SHIFT


def test_curvature_of_a_stretch_bends_that_stretch_and_leaves_what_is_before_it():
    rows = warp_rows()[2:].flip(1)  # from the car on
    ahead = rows.diff(n=2, dim=1)
    for k, bends in enumerate(ahead):
        inside = bends.abs() > 1e-5
        where = inside.nonzero()[:, 0].float()
        assert 15 <= inside.sum() <= 18 and abs(where.mean() - (14.5 + 16 * k)) < 2  # of 16 rows


def roads(n):
    """Scenes (n, 3, SCENE_AHEAD, 64) uint8 of a warped road with soft edges, the warps, and the
    scene of the straight one."""
    edge = (torch.arange(64) - 31.5).abs()
    road = (60 + 20 * (edge - 4).clamp(0, 6)).byte().expand(n, 9, 64, 64)
    x = road.clone(memory_format=torch.channels_last)
    how = warp_(x, torch.Generator().manual_seed(2))
    return x[:, -3:, :SCENE_AHEAD], how, road[:, -3:, :SCENE_AHEAD].float()


def test_straightened_undoes_bends_where_the_frame_shows_it():
    scenes, how, road = roads(50)
    straight, inside = unwarp(scenes, how)
    whole = (inside == 1).expand_as(straight)
    assert 0.6 < whole.float().mean() < 1
    assert (straight - road)[whole].abs().mean() < 0.4  # of 120 between road and lawn
    assert (straight[(inside == 0).expand_as(straight)] == 0).all()


def test_unlikeness_is_least_for_the_true_bends_and_not_for_leaving_the_frame():
    scenes, how, _ = roads(200)
    true = float(congealing_loss(scenes, how))
    assert true < 0.2 and abs(float(congealing_loss(scenes, 0 * how)) - 1) < 0.05
    assert (
        true < float(congealing_loss(scenes, 0.5 * how)) < 1 < float(congealing_loss(scenes, -how))
    )
    aside = how.clone()
    aside[:, 0] += 40
    assert float(congealing_loss(scenes, aside)) > 1.2
    noise = torch.randn(how.shape, generator=torch.Generator().manual_seed(3))
    near = (how + 0.1 * noise).requires_grad_()
    congealing_loss(scenes, near).backward()  # its gradient leads back
    assert torch.cosine_similarity(near.grad.flatten(), (near - how).flatten(), dim=0) > 0.3


def test_each_latent_of_a_window_is_seen_in_a_light_of_its_own():
    obs = torch.randint(80, 120, (1, 1, 3, 64, 64), dtype=torch.uint8).expand(2, 6, 3, 64, 64)
    objective = Objective("joint", {"warp": 0}, 3, (1, 3))
    x, how, scenes = views(obs, objective, torch.Generator().manual_seed(1))
    assert how is None and scenes is None
    frames = x.float().view(2, 3, 3, 3, 64, 64)[..., :SCENE_H, :]  # (B, T, history, 3, 56, 64)
    assert torch.equal(frames[:, :, 0], frames[:, :, 2])  # its frames in the same
    means = frames.mean(dim=(2, 3, 4, 5)).flatten()
    assert len(means.unique()) == 6


def test_uint8_and_float_frames_are_the_same_to_the_encoder(obs):
    encoder = TinyEncoder(channels=8, history=3, dim=16).eval()
    x = stack_frames(obs, 3)
    as_float = x.float()
    kept = as_float.clone()
    assert torch.equal(encoder(x), encoder(as_float))
    assert torch.equal(as_float, kept)  # normalisation does not write into its input


def test_collapsed_latents_stop_the_training():
    torch.manual_seed(0)
    healthy = torch.randn(64, 32)
    refuse_collapse(healthy, "step 50")
    point, line = 3 + 1e-3 * healthy, healthy[:, :1] * torch.randn(32) + 1e-3 * healthy
    for z in (point, line):
        with pytest.raises(Refusal, match="step 50: the latents collapsed"):
            refuse_collapse(z, "step 50")


def test_joint_loss_compares_each_target_with_its_own_frames_and_actions(obs):
    """Terms of the joint objective with gaps between targets, against plain loops."""
    torch.manual_seed(0)
    weights = dict(pred=10.0, inverse=2.0, std=16.0, cov=1.0, warp=5.0, congeal=3.0)
    objective = Objective("joint", weights, 2, (1, 3, 4))
    nets = {
        "encoder": TinyEncoder(8, history=2, dim=16),
        "predictor": Predictor(16, 8),
        "inverse": InverseModel(16, 8),
        "warp": WarpHead(16, len(warp_rows()), True),
    }
    obs = obs.repeat(2, 2, 1, 1, 1)[:, :6]  # 4 steps and a frame of history
    act = torch.randn(6, 4, 3)
    seen = views(obs, objective, torch.Generator().manual_seed(1))
    loss, logs, flat = loss_fn(nets, *seen, act, objective)
    at, g = [0, 1, 3, 4], torch.Generator().manual_seed(1)
    x = torch.stack([obs[b, t : t + 2] for b in range(6) for t in at])
    x = x.flatten(1, 2).unflatten(0, (6, 4))
    x = torch.cat([x[:, :1], x], dim=1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    how = warp_(x[::5], g)
    scenes = x.view(6, 5, 6, 64, 64)[:, 1:, -3:, :SCENE_AHEAD].flatten(0, 1).clone()
    jitter_(x, g)
    assert all(map(torch.equal, (x, how, scenes), seen))
    z = nets["encoder"].features(x).view(6, 5, 16)  # one batch norm sees all
    bent, z = z[:, 0], z[:, 1:]
    told = (bent - z[:, 0]) @ nets["warp"].net.weight.T
    assert torch.allclose(logs["warp"], (told - how).pow(2).mean(), rtol=1e-3)
    lie = z.flatten(0, 1) @ nets["warp"].net.weight.T + nets["warp"].net.bias
    assert torch.allclose(logs["congeal"], congealing_loss(scenes, lie), rtol=1e-3)
    assert torch.allclose(flat, z.flatten(0, 1), atol=1e-5)
    z_hat, pred = nets["predictor"].rollout(z[:, 0], act), 0.0
    for t in range(4):
        if t + 1 in at:
            pred += (z_hat[:, t] - z[:, at.index(t + 1)]).pow(2).mean() / 3
    assert torch.allclose(logs["pred"], pred, rtol=1e-3)
    told = (nets["inverse"](z[:, 0], z[:, 1]) - normalize_action(act[:, 0])).pow(2).mean()
    assert torch.allclose(logs["inverse"], told, rtol=1e-3)
    assert list(logs) == ["pred", "inverse", "std", "cov", "warp", "congeal"]
    total = sum(weights[k] * term for k, term in logs.items())
    assert torch.allclose(loss, total, rtol=1e-4)


def test_gauges_are_the_principal_components_of_the_newest_instruments(obs):
    from sklearn.decomposition import PCA

    x = stack_frames(obs.repeat(4, 2, 1, 1, 1)[:, :9], 2)
    x[:, :, SCENE_H:] = torch.randint(0, 256, x[:, :, SCENE_H:].shape).byte()
    net = TinyEncoder(8, history=2, dim=16, hud_pca=4).eval()
    fit_pca(net, x)
    hud_pca = net.features(x)[:, -4:].detach()
    panel = x[:, -3:, SCENE_H:].flatten(1).double().numpy()
    want = torch.from_numpy(PCA(4, whiten=True, svd_solver="full").fit_transform(panel)).float()
    assert torch.allclose(hud_pca.abs(), want.abs(), atol=1e-2)  # signs are free
    seen = x.clone()
    warp_(seen, torch.Generator().manual_seed(0))
    jitter_(seen, torch.Generator().manual_seed(0))
    seen[:, :3] = 0  # an older frame
    assert torch.allclose(net.features(seen)[:, -4:], hud_pca, atol=1e-5)
    assert not torch.allclose(net.features(seen)[:, :-4], net.features(x)[:, :-4], atol=1e-2)
    twin = net.reinitialized().eval()
    assert torch.equal(twin.features(x)[:, -4:], hud_pca)
    assert not torch.allclose(twin.head.weight, net.head.weight)
    refused = script("train_encoder.py", "--dim", 8, "--hud_pca", 6)
    assert refused.returncode == 2 and "leaves 0 numbers" in refused.stderr


def test_strides_change_the_price_of_the_net_not_its_size(obs):
    x, sizes = stack_frames(obs, 3), []
    for strides in ((1, 2, 2, 2), (2, 2, 2, 1)):
        net = TinyEncoder(8, dim=16, strides=strides).eval()
        assert net.body(torch.zeros(1, 9, 64, 64)).shape == (1, 64, 4, 4)
        assert net(x).shape == (len(x), 16)
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert sizes[0] <= sizes[1] < 1.01 * sizes[0]  # a projection more, of 1x1
    refused = script("train_encoder.py", "--strides", 1, 1, 2, 2)
    assert refused.returncode == 2 and "product 8" in refused.stderr


def test_mirrored_windows_are_mirrored_as_a_whole_and_so_is_their_steering():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (7, 20, 5, 64, 64, 3), np.uint8)  # of 7 batches of 20 windows
    acts = rng.uniform(-1, 1, (7, 20, 4, 3)).astype(np.float32)

    def stream(start, share=0.3):
        batches = (
            (torch.from_numpy(f.copy()).permute(0, 1, 4, 2, 3), torch.from_numpy(a.copy()))
            for f, a in zip(frames[start:], acts[start:])
        )
        return list(flip_batches(batches, share, 5, start))

    count = 0
    for (obs, act), frame, a in zip(stream(0), frames, acts):
        obs = obs.permute(0, 1, 3, 4, 2).numpy()
        for window, steer, f, was in zip(obs, act.numpy(), frame, a):
            turned = (steer[:, 0] == -was[:, 0]).all()
            assert (window == (hflip(f) if turned else f)).all()
            assert turned or (steer == was).all()
            assert (steer[:, 1:] == was[:, 1:]).all()
            count += turned
    assert 20 < count < 70  # of 140
    for (obs, act), (o, a) in zip(stream(3), stream(0)[3:]):  # resumed
        assert torch.equal(obs, o) and torch.equal(act, a)
    assert all((a.numpy() == b).all() for (_, a), b in zip(stream(0, share=0.0), acts))


# ------------------------------------------------------------------ curves


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(rows) -> {panel: its axes} of a log of these rows, {step, values...}."""
    from support import run_log

    def draw(rows):
        args = argparse.Namespace(root=tmp_path, log_every=5)
        log = run_log.RunLog(args, "encoder")
        for row in rows:
            log.log(**row)
        kept = []
        with monkeypatch.context() as m:
            m.setattr(run_log, "save_figure", lambda fig, path: kept.append(fig))
            run_log.RunLog(args, "encoder", resumed=True).curves()  # as a resumed run draws it
        log.curves()
        assert cv2.imread(str(log.png)).std() > 5
        return {ax.get_title(): ax for ax in kept[0].axes}

    return draw


def test_axes_of_curves_do_not_turn_noise_into_learning(drawn):
    noise = np.random.default_rng(0).normal(0, 1e-4, 40)
    axes = drawn(
        [
            {
                "step": i,
                "val_r2_speed": 0.9976 + e,
                "val_r2_heading_error": 0.6 + i / 200,
                "val_auc_density": 0.9999,
                "val_auc_classifier": 0.4,
                "val_std": 0.5 + e,
                "loss": 2 - i / 30,
                "lr": 0.0,
                "val_rank": 40 + e,
            }
            for i, e in enumerate(noise)
        ]
    )
    ends = {name: ax.get_ylim() for name, ax in axes.items()}
    assert ends["r2_speed"] == (0.9, 1.0)
    assert 0.5 < ends["r2_heading_error"][0] < 0.6 and ends["r2_heading_error"][1] == 1
    assert ends["auc_density"] == (0.5, 1.0)
    assert 0.3 < ends["auc_classifier"][0] < 0.4 and ends["auc_classifier"][1] == 1
    for name, value in (("std", 0.5), ("rank", 40)):
        low, high = ends[name]
        assert high - low >= 0.0999 * value and low < value < high
    low, high = ends["loss"]
    assert 0.5 < low < 0.7 and 2 < high < 2.2  # what really moves fills its panel


def test_the_untrained_net_is_a_dashed_line_with_its_name(drawn):
    axes = drawn(
        [
            {"step": 0, "untrained_r2_speed": 0.98, "untrained_rank": 80.0},
            {"step": 0, "loss": 3.0},
            *({"step": i, "loss": 3 - i, "val_r2_speed": 0.99, "val_rank": 50.0} for i in (1, 2)),
        ]
    )
    assert set(axes) == {"r2_speed", "rank", "loss"}
    for name, value in (("r2_speed", 0.98), ("rank", 80)):
        (line,) = [line for line in axes[name].lines if line.get_linestyle() == "--"]
        assert list(line.get_ydata()) == [value] * 2 and line.get_label() == "untrained"
        low, high = axes[name].get_ylim()
        assert low < value < high
    assert not [line for line in axes["loss"].lines if line.get_linestyle() == "--"]
    assert "untrained" in [t.get_text() for t in axes["loss"].figure.legends[0].get_texts()]


def test_the_probe_of_the_untrained_net_is_logged_once(chain):
    rows = [json.loads(x) for x in (chain[0] / "models" / "encoder.jsonl").read_text().splitlines()]
    first = [row for row in rows if any(k.startswith("untrained_") for k in row)]
    assert len(first) == 1 and first[0]["step"] == 0
    last = next(row for row in reversed(rows) if "val_r2_speed" in row)
    assert {k.removeprefix("untrained_") for k in first[0]} - {"step", "seconds"} == {
        k.removeprefix("val_") for k in last if k.startswith(("val_r2", "val_rank", "val_spread"))
    }
    said = next(x for x in chain[1]["train_encoder.py"].splitlines() if x.startswith("untrained:"))
    assert f"R² speed {first[0]['untrained_r2_speed']:.3f}" in said
