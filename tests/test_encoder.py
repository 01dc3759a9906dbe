"""What goes into the encoder: stacked windows and photometric views, against plain references."""

import pytest
import torch

from networks import TinyEncoder, stack
from train_encoder import HUD_ROW, JITTER, jitter


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
