"""The planner on a problem whose answer is known, and the noise against its stated spectrum."""

import argparse

import numpy as np
import pytest
import torch

from drive_mpc import BRAKE, STEER, Futures, colored_noise, limited, plan, to_action
from networks import DISCOUNT, FORESIGHT, TROUBLE, CostModel, Predictor


def cart(z, act):
    """A point on a line, z (N, 2) its position and speed: pushed by the steering, slowed by the
    brake -> its future (N, H, 2)."""
    out = []
    for a in act.unbind(1):
        x, v = z.unbind(-1)
        v = v + 0.5 * a[:, 0] - a[:, 2] * v
        z = torch.stack([x + v, v], -1)
        out.append(z)
    return torch.stack(out, 1)


GOAL = 1.5  # where the point wants to stand


def futures(z, act):
    x, v = cart(z.expand(len(act), -1), act).unbind(-1)
    return ((x - GOAL) ** 2 + 0.1 * v**2).sum(1)


def config(planner, rounds=1, **kw):
    return argparse.Namespace(**{**dict(planner=planner, rounds=rounds, samples=512, elites=32,
                                        rho=0.8, noise=[0.4, 0.5], gas=1.0,
                                        energy="density"), **kw})


@pytest.mark.parametrize("planner,rounds", [("shooting", 1), ("icem", 3), ("mppi", 1), ("mppi", 2)])
def test_the_planner_reaches_a_known_goal(planner, rounds):
    generator = torch.Generator().manual_seed(0)
    z, u = torch.zeros(1, 2), torch.zeros(15, 2)
    for _ in range(40):
        u, energies = plan(z, futures, u, config(planner, rounds), generator)
        assert u.shape == (15, 2) and u.abs().max() <= 1
        z = cart(z, to_action(u[:1])[None])[:, 0]
    assert abs(float(z[0, 0]) - GOAL) < 0.25, z
    assert energies.shape == (512,)


def test_warm_start_pays():
    """With few samples, shifting the last plan finds lower energies than starting from nothing."""
    lows = []
    for warm in (True, False):
        generator, z, u, low = torch.Generator().manual_seed(1), torch.zeros(1, 2), torch.zeros(
            15, 2), 0.0
        for _ in range(25):
            u, e = plan(z, futures, u if warm else torch.zeros(15, 2), config("mppi", samples=48),
                        generator)
            z, low = cart(z, to_action(u[:1])[None])[:, 0], low + float(e.min())
        lows.append(low)
    assert lows[0] < lows[1]


@pytest.mark.parametrize("planner", ["shooting", "icem", "mppi"])
def test_when_all_futures_cost_the_same_the_last_plan_goes_on(planner):
    last = torch.linspace(-1, 1, 30).view(15, 2)
    u, energies = plan(torch.zeros(1, 2), lambda z, act: torch.ones(len(act)), last,
                       config(planner))
    assert torch.equal(u[:-1], last[1:]) and energies.std() == 0


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95])
def test_colored_noise_keeps_variance_and_has_its_spectrum(rho):
    H = 15
    x = colored_noise(20_000, H, rho, torch.Generator().manual_seed(0)).double()
    assert x.std(dim=0).sub(1).abs().max() < 0.03  # at each step: nothing is lost at either end
    for lag in (1, 3, 7):
        assert float((x[:, lag:] * x[:, :-lag]).mean()) == pytest.approx(rho**lag, abs=0.02)
    power = torch.fft.rfft(x[..., 0], dim=1).abs().pow(2).mean(dim=0) / H
    k = np.arange(H)
    lag = k[:, None] - k
    expected = [(rho ** abs(lag) * np.cos(2 * np.pi * f * lag / H)).sum() / H
                for f in range(H // 2 + 1)]
    assert np.allclose(power.numpy(), expected, rtol=0.05)


def test_actions_cover_full_lock_and_braking():
    u = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert torch.allclose(to_action(u), torch.tensor([[STEER, 1.0, 0.0], [-STEER, 0.0, BRAKE],
                                                      [0.0, 0.0, 0.0]]))
    assert STEER >= 0.4 and BRAKE >= 0.3  # the joint's stop; enough to lock up at speed


def test_no_plan_has_more_gas_than_it_may():
    u = 3 * torch.randn(1000, 5, 2, generator=torch.Generator().manual_seed(0))
    kept = limited(u, 0.4)
    assert kept[..., 1].max() == 0.4 and kept.min() == -1 and kept[..., 0].max() == 1
    inside = (u[..., 0].abs() <= 1) & (u[..., 1] <= 0.4) & (u[..., 1] >= -1)
    assert torch.equal(kept[inside], u[inside])
    z, seen = torch.zeros(1, 2), []
    told = lambda z, act: (seen.append(act), futures(z, act))[1]
    for _ in range(5):
        plan(z, told, torch.zeros(12, 2), config("mppi", gas=0.4), torch.Generator().manual_seed(0))
    assert 0.39 < max(act[..., 1].max() for act in seen) <= 0.4


def test_density_is_the_mahalanobis_distance():
    torch.manual_seed(0)
    z = torch.randn(4000, 6) @ torch.randn(6, 6) + 3
    cost = CostModel(6)
    cost.fit_density(z, 3 * z, shrinkage=0.0)
    mu, inverse = z.double().mean(0), torch.linalg.inv(torch.cov(z.T.double()))
    d = z[:50].double() - mu
    expected = torch.einsum("ni,ij,nj->n", d, inverse, d) / 2 / 6
    assert torch.allclose(cost.energy(z[:50]).double(), expected, rtol=1e-3)
    assert cost.energy(z).mean() == pytest.approx(0.5, abs=0.01)


@pytest.fixture
def nets():
    torch.manual_seed(0)
    predictor, cost = Predictor(dim=8, hidden=16, state=6), CostModel(8)
    with torch.no_grad():
        for p in predictor.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z = torch.randn(400, 8) @ torch.randn(8, 8)
    cost.fit_density(z, 3 * z)
    return {k: net.eval().requires_grad_(False) for k, net in
            {"predictor": predictor, "cost": cost}.items()}


def test_rollout_eats_its_own_output(nets):
    """The definition, term by term; and a shorter dream is the beginning of a longer one."""
    net = nets["predictor"]
    z, act = torch.randn(3, 8), torch.randn(3, 4, 3)
    h, rest, expected = net.lift(z), z - net.read(net.lift(z)), []
    for t in range(4):
        h = net.step(h, act[:, t])
        rest = rest * net.fade.sigmoid()
        expected.append(net.read(h) + rest)
    z_hat = net.rollout(z, act)
    assert torch.allclose(z_hat, torch.stack(expected, 1), atol=1e-5)
    assert torch.allclose(net.rollout(z, act[:, :2]), z_hat[:, :2], atol=1e-6)


@pytest.mark.parametrize("kind", ["value", "density", "classifier"])
@pytest.mark.parametrize("H", [15, 4, 1])
@pytest.mark.parametrize("far", [0.9, 1.1])
def test_futures_cost_what_their_dreams_cost(nets, kind, H, far):
    """Dreamt and judged in one pass of folded weights: the same as a rollout, judged after it."""
    cost, act = nets["cost"], torch.randn(32, H, 3)
    away = torch.randn(1, 8)
    reach = (TROUBLE * cost.chaos / cost.energy(cost.mu + away)).sqrt()  # as far as trouble begins
    z = cost.mu + far * reach * away
    assert cost.in_trouble(z) == (far > 1)
    expected = cost.judge(z, nets["predictor"].rollout(z.expand(32, -1), act), kind)
    futures = Futures(**nets, kind=kind)
    for _ in range(2):  # nothing is left of the first
        assert torch.allclose(futures(z, act), expected, rtol=1e-4, atol=1e-4)


def test_value_is_the_density_on_the_road_and_looks_further_in_trouble(nets):
    cost, z_hat = nets["cost"], torch.randn(32, 15, 8)
    near, far = cost.mu[None], cost.mu[None] + 10
    every_third = 3 * cost.energy(z_hat[:, 2::3]).sum(1)
    assert torch.allclose(cost.judge(near, z_hat, "value"), every_third, rtol=1e-5)
    assert torch.allclose(cost.judge(far, z_hat, "density"), every_third, rtol=1e-5)
    beyond = cost.judge(far, z_hat, "value") - 3 * cost.bounded(cost.energy(z_hat[:, 2::3])).sum(1)
    assert torch.allclose(beyond, DISCOUNT**15 * cost.foretold(z_hat[:, -1]), atol=1e-3)
    assert torch.allclose(cost.bounded(cost.chaos * torch.tensor([0, 1, 1e9])),
                          cost.chaos * torch.tensor([0, 0.5, 1]))
    assert float(cost.bounded(torch.tensor(1e-3))) == pytest.approx(1e-3, rel=0.01)


def test_what_comes_is_the_discounted_sum_of_the_energies_after(nets):
    cost, z = nets["cost"], torch.randn(2, 4 + FORESIGHT, 8)
    cost.value[-1].bias.fill_(1.0)  # what is foretold is never below nothing
    worth = [[sum(DISCOUNT**j * float(cost.bounded(cost.energy(z[b, t + 1 + j])))
                  for j in range(FORESIGHT)) for t in range(4)] for b in range(2)]
    scale = sum(DISCOUNT**j for j in range(FORESIGHT)) * float(cost.chaos)
    assert torch.allclose(cost.came(z) * scale, torch.tensor(worth), rtol=1e-4)
    assert torch.allclose(cost.foretold(z), cost.value(z)[..., 0].clamp_min(0) * scale, rtol=1e-4)
