"""The nets on problems whose answers are known."""

import numpy as np
import pytest
import torch
from sklearn.covariance import shrunk_covariance

from networks import DISCOUNT, MISTAKE_WEIGHT, VALUE_HORIZON, CostModel, Predictor
from support.cli import Refusal
from train_cost_model import fit_density


def test_density_is_the_mahalanobis_distance():
    torch.manual_seed(0)
    z = torch.randn(4000, 6) @ torch.randn(6, 6) + 3
    cost = CostModel(6)
    fit_density(cost, z, 3 * z, shrinkage=0.0)
    mu, inverse = z.double().mean(0), torch.linalg.inv(torch.cov(z.T.double()))
    d = z[:50].double() - mu
    expected = torch.einsum("ni,ij,nj->n", d, inverse, d) / 2 / 6
    assert torch.allclose(cost.energy(z[:50]).double(), expected, rtol=1e-3)
    assert cost.energy(z).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dim", [1, 2, 6])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_the_densitys_covariance_is_shrunk_by_a_fixed_share(dim, shrinkage):
    torch.manual_seed(0)
    z, cost = torch.randn(60, dim) @ torch.randn(dim, dim), CostModel(dim, 4)
    fit_density(cost, z, 3 * z, shrinkage)
    cov = shrunk_covariance(np.cov(z.numpy().T, bias=True).reshape(dim, dim), shrinkage)
    d = z.double().numpy() - z.double().numpy().mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", d, np.linalg.inv(cov), d) / 2 / dim
    assert np.allclose(cost.energy(z), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("z", [torch.ones(9, 3), torch.randn(1, 3)])
def test_a_density_of_latents_that_are_all_alike_is_refused(z):
    with pytest.raises(Refusal, match="all alike"):
        fit_density(CostModel(3), z, z)


def test_looks_change_nothing_of_what_is_planned_with():
    torch.manual_seed(0)
    predictor, z, act = Predictor(8, 16, 6, looks=3), torch.randn(5, 11), torch.randn(5, 7, 3)
    z_hat = predictor.rollout(z, act)
    assert z_hat.shape == (5, 7, 11)
    assert torch.equal(z_hat[..., :8], predictor.rollout(z[:, :8], act))
    z_hat[..., 8:].pow(2).sum().backward()
    graded = {n: p.grad for n, p in predictor.named_parameters() if p.grad is not None}
    trained = {name for name, grad in graded.items() if grad.any()}
    assert trained == {"fade_logit", *(f"look.{i}.{k}" for i in (0, 2) for k in ("weight", "bias"))}

    # they fade: without the head, by the same share each step
    with torch.no_grad():
        for p in predictor.look.parameters():
            p.zero_()
    faded = predictor.rollout(z, act)[..., 8:] / z[:, None, 8:]
    assert torch.allclose(faded, 0.5 ** torch.arange(1.0, 8)[None, :, None].expand_as(faded))


def test_energies_do_not_see_looks():
    torch.manual_seed(0)
    cost, z = CostModel(6), torch.randn(300, 9)
    fit_density(cost, z, 3 * z)
    other = torch.cat([z[:, :6], torch.randn(300, 3)], dim=1)
    for value in (cost.energy, lambda z: cost.energy(z, "classifier"), cost.terminal_value):
        assert torch.equal(value(z), value(other)) and value(z).shape == (300,)


@pytest.fixture
def nets():
    return random_nets()


def random_nets():
    """A predictor and a cost model that nobody trained."""
    torch.manual_seed(0)
    predictor, cost = Predictor(dim=8, hidden=16, state=6), CostModel(8)
    with torch.no_grad():
        for p in predictor.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z = torch.randn(400, 8) @ torch.randn(8, 8)
    fit_density(cost, z, 3 * z)
    return {
        k: net.eval().requires_grad_(False)
        for k, net in {"predictor": predictor, "cost": cost}.items()
    }


def test_rollout_eats_its_own_output(nets):
    """The definition, term by term; and a shorter rollout is the beginning of a longer one."""
    net = nets["predictor"]
    z, act = torch.randn(3, 8), torch.randn(3, 4, 3)
    h, rest, expected = net.to_state(z), z - net.to_latent(net.to_state(z)), []
    for t in range(4):
        h = net.transition(h, act[:, t])
        rest = rest * net.decay_logit.sigmoid()
        expected.append(net.to_latent(h) + rest)
    z_hat = net.rollout(z, act)
    assert torch.allclose(z_hat, torch.stack(expected, 1), atol=1e-5)
    assert torch.allclose(net.rollout(z, act[:, :2]), z_hat[:, :2], atol=1e-6)


def test_value_adds_mistakes_on_the_road_and_what_comes_out_of_distribution(nets):
    cost, z_hat = nets["cost"], torch.randn(32, 15, 8)
    near, far = cost.mu[None], cost.mu[None] + 100
    every_third = 3 * cost.energy(z_hat[:, 2::3]).sum(1)
    odds = cost.energy(z_hat[:, 2::3], "mistake").exp()
    mistakes = 3 * MISTAKE_WEIGHT * cost.random_energy * (1 + odds).log().sum(1)
    on_road = cost.rollout_cost(near, z_hat, "value")
    assert torch.allclose(on_road, every_third + mistakes, rtol=1e-5) and mistakes.min() > 0
    assert torch.allclose(cost.rollout_cost(far, z_hat, "density"), every_third, rtol=1e-5)
    beyond = cost.rollout_cost(far, z_hat, "value") - 3 * cost.saturate(
        cost.energy(z_hat[:, 2::3])
    ).sum(1)
    assert torch.allclose(beyond, DISCOUNT**15 * cost.terminal_value(z_hat[:, -1]), atol=1e-3)
    assert torch.allclose(
        cost.saturate(cost.random_energy * torch.tensor([0, 1, 1e9])),
        cost.random_energy * torch.tensor([0, 0.5, 1]),
    )
    assert float(cost.saturate(torch.tensor(1e-3))) == pytest.approx(1e-3, rel=0.01)


def test_what_comes_is_the_discounted_sum_of_the_energies_after(nets):
    cost, z = nets["cost"], torch.randn(2, 4 + VALUE_HORIZON, 8)
    cost.value[-1].bias.fill_(1.0)  # what is foretold is never below nothing
    worth = [
        [
            sum(
                DISCOUNT**j * float(cost.saturate(cost.energy(z[b, t + 1 + j])))
                for j in range(VALUE_HORIZON)
            )
            for t in range(4)
        ]
        for b in range(2)
    ]
    scale = sum(DISCOUNT**j for j in range(VALUE_HORIZON)) * float(cost.random_energy)
    assert torch.allclose(cost.value_target(cost.energy(z)) * scale, torch.tensor(worth), rtol=1e-4)
    assert torch.allclose(
        cost.terminal_value(z), cost.value(z)[..., 0].clamp_min(0) * scale, rtol=1e-4
    )
