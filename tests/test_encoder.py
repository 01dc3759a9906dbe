"""What goes into the encoder: stacked windows and photometric views, against plain references."""

import argparse

import pytest
import torch

from networks import InverseModel, Predictor, TinyEncoder, stack, unit_act
from runtime import Refusal
from train_encoder import HUD_ROW, JITTER, jitter, loss_fn, refuse_collapse


@pytest.fixture
def obs():
    """Windows as the loader serves them: (B, L, 3, 64, 64) uint8 that lie (B, L, 64, 64, 3)."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 5, 64, 64, 3), dtype=torch.uint8,
                         generator=g).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_stack_holds_its_frames_oldest_first(obs, history, packed):
    obs = obs if packed else obs.contiguous()
    x = stack(obs, history)
    B, L = obs.shape[:2]
    T = L - history + 1
    assert x.shape == (B * T, 3 * history, 64, 64)
    assert x.is_contiguous(memory_format=torch.channels_last)  # no transposition in the net
    for b in range(B):
        for t in range(T):
            want = torch.cat([obs[b, t + i] for i in range(history)])
            assert torch.equal(x[b * T + t], want)
    some = x.view(B, T, *x.shape[1:])[:, [0, 2]].flatten(0, 1)
    assert torch.equal(stack(obs, history, [0, 2]), some)


def test_a_view_changes_brightness_and_contrast_of_the_scene_only(obs):
    before = obs.clone()
    g = torch.Generator().manual_seed(1)
    view = jitter(obs, g)
    g.manual_seed(1)
    b, c = 1 + JITTER * (2 * torch.rand(2, len(obs), 1, 1, 1, 1, generator=g) - 1)
    assert torch.equal(obs, before)
    scene = obs[..., :HUD_ROW, :].float()
    mean = scene.mean(dim=(1, 2, 3, 4), keepdim=True)
    want = (((scene - mean) * c + mean) * b).clamp(0, 255)  # one draw a window, not a frame
    assert torch.allclose(view[..., :HUD_ROW, :], want, atol=1e-2)
    assert torch.equal(view[..., HUD_ROW:, :], obs[..., HUD_ROW:, :].float())
    assert b.std() > 0.01 and c.std() > 0.01


def test_uint8_and_float_frames_are_the_same_to_the_encoder(obs):
    encoder = TinyEncoder(width=0.125, history=3, dim=16).eval()
    x = stack(obs, 3)
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
    args = argparse.Namespace(objective="joint", targets=[1, 3, 4], history=2, pred=10.0, std=16.0,
                              cov=1.0, inverse=2.0, temporal=1.0)
    nets = {"encoder": TinyEncoder(0.125, history=2, dim=16), "predictor": Predictor(16, 8),
            "inverse": InverseModel(16, 8)}
    obs = obs.repeat(2, 2, 1, 1, 1)[:, :6]  # 4 steps and a frame of history
    act = torch.randn(6, 4, 3)
    loss, logs, flat = loss_fn(nets, (obs, act), args, torch.Generator().manual_seed(1))
    seen = jitter(obs, torch.Generator().manual_seed(1))
    at = [0, 1, 3, 4]
    x = torch.stack([torch.cat([seen[b, t], seen[b, t + 1]]) for b in range(6) for t in at])
    z = nets["encoder"].features(x).view(6, 4, 16)
    assert torch.allclose(flat, z.flatten(0, 1), atol=1e-5)
    z_hat, pred = z[:, 0], 0.0
    for t in range(4):
        z_hat = nets["predictor"](z_hat, act[:, t])
        if t + 1 in at:
            pred += (z_hat - z[:, at.index(t + 1)]).pow(2).mean() / 3
    assert torch.allclose(logs["pred"], pred, rtol=1e-3)
    told, same = 0.0, 0.0
    for a, b, t in ((0, 1, 0), (2, 3, 3)):  # steps 0 to 1 and 3 to 4 are neighbours, 1 and 3 not
        told += (nets["inverse"](z[:, a], z[:, b]) - unit_act(act[:, t])).pow(2).mean() / 2
        same += (z[:, a] - z[:, b]).pow(2).mean() / 2
    assert torch.allclose(logs["inverse"], told, rtol=1e-3)
    assert torch.allclose(logs["temporal"], same, rtol=1e-3)
    total = sum(getattr(args, k) * v for k, v in logs.items())
    assert torch.allclose(loss, total, rtol=1e-5)
