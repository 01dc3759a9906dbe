"""The dream model: its sampling against a process whose law is known, and what it remembers."""

import torch

from dream import DreamModel

CARRY, PUSH, NOISE = 0.9, 0.5, 0.3  # z[t+1] = CARRY z[t] + PUSH (steer, gas, brake) + NOISE e


def process(B, T):
    """z (B, T + 1, 3), act (B, T, 3) of the process."""
    act, z = torch.rand(B, T, 3), [torch.randn(B, 3)]
    for t in range(T):
        z.append(CARRY * z[-1] + PUSH * act[:, t] + NOISE * torch.randn(B, 3))
    return torch.stack(z, dim=1), act


def trained(steps=600):
    torch.manual_seed(0)
    model = DreamModel(dim=3, hidden=16, width=64, depth=1)
    z, _ = process(4096, 1)
    model.fit_changes(z[:, 1] - z[:, 0])
    optim = torch.optim.AdamW(model.parameters(), 3e-3)
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
    sample, _ = model.step(z, act, generator=torch.Generator().manual_seed(0))
    mean = CARRY * z[0] + PUSH * act[0]
    assert (sample.mean(0) - mean).abs().max() < 0.08
    assert torch.allclose(sample.std(0), torch.full((3,), NOISE), rtol=0.25)
    assert (torch.corrcoef(sample.T) - torch.eye(3)).abs().max() < 0.2
    calm, _ = model.step(z[:2], act[:2], temperature=0.0)
    assert torch.equal(calm[0], calm[1]) and (calm[0] - mean).abs().max() < 0.1


def test_a_dream_is_one_step_after_another_and_its_seed_decides():
    torch.manual_seed(0)
    model, act = DreamModel(dim=5, hidden=8, width=16).eval(), torch.rand(2, 4, 3)

    def dream(seed):
        z, h, generator = torch.ones(2, 5), None, torch.Generator().manual_seed(seed)
        for t in range(4):
            z, h = model.step(z, act[:, t], h, generator=generator)
        return z

    assert torch.equal(dream(1), dream(1)) and not torch.allclose(dream(1), dream(2))
    # the memory of T steps at once is that of one step after another
    z, noise = torch.randn(2, 4, 5), torch.zeros(2, 4, 1)
    whole, _ = model.remember(z, act, noise)
    h = None
    for t in range(4):
        part, h = model.remember(z[:, t : t + 1], act[:, t : t + 1], noise[:, t : t + 1], h)
    assert torch.allclose(part[:, 0], whole[:, -1], atol=1e-5)


def test_changes_are_whitened():
    torch.manual_seed(0)
    model = DreamModel(dim=4, hidden=8, width=8)
    change = torch.randn(5000, 4) @ torch.tensor(
        [[1.0, 0.5, 0, 0], [0, 0.2, 0, 0], [0, 0, 3, 1], [0, 0, 0, 0.5]]
    )
    model.fit_changes(change)
    assert torch.allclose(torch.cov((change @ model.whiten).T), torch.eye(4), atol=1e-3)
    assert torch.allclose(model.whiten @ model.color, torch.eye(4), atol=1e-4)
