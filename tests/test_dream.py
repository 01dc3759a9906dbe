"""The dream model: its sampling against a process whose law is known, and what it remembers."""

import pytest
import torch

from dream import ANCHORS, SEEN_NOISE, DreamModel
from train_dream import loss_fn

CARRY, PUSH, NOISE = 0.9, 0.5, 0.3  # z[t+1] = CARRY z[t] + PUSH (steer, gas, brake) + NOISE e
LONG = ANCHORS[-1]  # latents
PREDICTOR = dict(dim=2, hidden=8, state=4, dropout=0.0, looks=1)


def process(B, T):
    """z (B, T + 1, 3), act (B, T, 3) of the process."""
    act, z = torch.rand(B, T, 3), [torch.randn(B, 3)]
    for t in range(T):
        z.append(CARRY * z[-1] + PUSH * act[:, t] + NOISE * torch.randn(B, 3))
    return torch.stack(z, dim=1), act


def trained(steps=2000):
    torch.manual_seed(0)
    model = DreamModel(PREDICTOR, hidden=16, width=64, depth=1)
    z, act = process(4096, 1)
    model.fit(z[:, 0], act[:, 0], z[:, 1])
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        loss = model.loss(*process(128, 6)).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    return model.eval()


def test_samples_have_the_mean_and_the_spread_of_the_process():
    model = trained()
    z, act = torch.tensor([0.5, -1.0, 0.0]).expand(4000, 3), torch.full((4000, 3), 0.5)
    of = dict(temperature=1.0, generator=torch.Generator().manual_seed(0))
    sample, _ = model.step(z, act, **of)
    mean = CARRY * z[0] + PUSH * act[0]
    assert (sample.mean(0) - mean).abs().max() < 0.08
    assert torch.allclose(sample.std(0), torch.full((3,), NOISE), rtol=0.15)
    assert (torch.corrcoef(sample.T) - torch.eye(3)).abs().max() < 0.2
    calm, _ = model.step(z[:2], act[:2], temperature=0.0)
    assert torch.allclose(calm[0], calm[1], atol=1e-5) and (calm[0] - mean).abs().max() < 0.1


def test_the_linear_map_and_its_scale_are_those_of_the_process():
    torch.manual_seed(0)
    model, (z, act) = DreamModel(PREDICTOR, hidden=8, width=8), process(8000, 1)
    model.fit(z[:, 0], act[:, 0], z[:, 1])
    wanted = CARRY * z[:, 0] + PUSH * act[:, 0]
    assert (model.expect(z[:, 0], act[:, 0]) - wanted).abs().max() < 0.05
    assert torch.allclose(model.scale, torch.full((3,), NOISE), rtol=0.05)


def test_a_dream_stays_within_the_range_of_real_latents():
    torch.manual_seed(0)
    model, (z, act) = DreamModel(PREDICTOR, hidden=8, width=8).eval(), process(4000, 1)
    model.fit(z[:, 0], act[:, 0], z[:, 1])
    outside = (z[:, 0] < model.bounds[0]) | (z[:, 0] > model.bounds[1])
    assert 0.002 < outside.float().mean() < 0.006
    far, _ = model.step(torch.full((2, 3), 1e4), torch.zeros(2, 3))
    assert torch.equal(far, model.bounds[1].expand(2, 3))


def test_the_predictor_learns_by_its_rollout_alone_and_drops_nothing():
    model = DreamModel(PREDICTOR | {"dropout": 0.5}, hidden=8, width=8).train()
    assert model.training and not model.predictor.training
    z, act = process(4, 3)
    model.loss(z, act).mean().backward()
    assert all(p.grad is None for p in model.predictor.parameters())
    assert all(p.grad is not None for p in model.memory.parameters())
    model.rollout_error(z, act).mean().backward()
    learned = {name for name, p in model.predictor.named_parameters() if p.grad is not None}
    looks = {name for name, _ in model.predictor.named_parameters() if name[:4] in ("look", "fade")}
    assert learned == {*dict(model.predictor.named_parameters())} - looks


def test_flow_and_predictor_both_learn_in_bf16():
    torch.manual_seed(0)
    model, (z, act) = DreamModel(PREDICTOR, hidden=8, width=8), process(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = loss_fn({"dream": model}, z, act)
    loss.backward()
    assert model.predictor.into.weight.grad.abs().sum() > 0
    assert model.memory.weight_ih_l0.grad.abs().sum() > 0
    assert 0 < logs["rollout"] < loss


@pytest.mark.parametrize("T", [1, 5])
def test_the_loss_is_of_every_second_latent(T):
    torch.manual_seed(0)
    model, (z, act) = DreamModel(PREDICTOR, hidden=8, width=8), process(4, T)
    sizes = {tuple(model.loss(z, act).shape) for _ in range(20)}
    assert sizes == ({(4, 1)} if T == 1 else {(4, 2), (4, 3)})
    level = torch.full((4, T, 1), 0.5)
    every = model.see(z[:, :-1], act, level)
    some = model.see(z[:, :-1], act, level, slice(0, None, 2))
    assert torch.equal(some[0], every[0][:, ::2])
    for x, y in zip(some[1], every[1]):
        assert torch.allclose(x, y[:, ::2], atol=1e-6)


def test_the_rollout_error_is_that_of_the_predictor():
    torch.manual_seed(0)
    model, (z, act) = DreamModel(PREDICTOR, hidden=8, width=8), process(4, LONG + 5)
    planned = z[..., : PREDICTOR["dim"]]
    z_hat = model.predictor.rollout(planned[:, 0], act[:, :LONG])
    wanted = (z_hat - planned[:, 1 : LONG + 1]).pow(2).mean(dim=2)
    assert torch.allclose(model.rollout_error(z, act), wanted)


def test_a_dream_is_what_training_saw_step_by_step_and_its_seed_decides():
    torch.manual_seed(0)
    model, T = DreamModel(PREDICTOR, hidden=8, width=16).eval(), LONG + 3
    act = torch.rand(2, T, 3)

    def dream(seed):
        z, memory, generator = torch.ones(2, 3), None, torch.Generator().manual_seed(seed)
        for t in range(T):
            z, memory = model.step(z, act[:, t], memory, generator=generator)
        return z

    assert torch.equal(dream(1), dream(1)) and not torch.equal(dream(1), dream(2))

    # its means are those of the whole window
    zs, memory = [torch.ones(2, 3)], None
    for t in range(T):
        z, memory = model.step(zs[-1], act[:, t], memory, temperature=0.0)
        zs.append(z)
    z = torch.stack(zs, dim=1)
    level = torch.full((2, T, 1), SEEN_NOISE)
    level[:, 0] = 0.0  # a dream begins at a real latent
    base, condition = model.see(z[:, :-1], act, level)
    y = model.denoise(torch.zeros_like(base), torch.zeros(2, T, 1), *condition)
    assert torch.allclose(base + y * model.scale, z[:, 1:], atol=1e-5)
