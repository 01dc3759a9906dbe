"""The VICReg terms against their equations, written out in plain loops."""

import numpy as np
import pytest
import torch

import vicreg


@pytest.fixture
def views():
    torch.manual_seed(0)
    za = torch.randn(12, 5, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0])
    return za, za + 0.3 * torch.randn(12, 5, dtype=torch.float64)


def by_hand(z):
    """Variance and covariance terms of one view, eq. 1 and 4 of the paper."""
    z = z.numpy()
    N, D = z.shape
    v = np.mean(
        [
            max(0, 1 - np.sqrt(np.sum((z[:, j] - z[:, j].mean()) ** 2) / (N - 1) + 1e-4))
            for j in range(D)
        ]
    )
    c = 0.0
    for i in range(D):
        for j in range(D):
            if i != j:
                cij = np.sum((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())) / (N - 1)
                c += cij**2 / D
    return v, c


def test_terms_are_the_papers(views):
    for z in views:
        v, c = by_hand(z)
        assert float(vicreg.variance(z)) == pytest.approx(v, rel=1e-5)
        assert float(vicreg.covariance(z)) == pytest.approx(c, rel=1e-5)


def test_loss_weighs_and_averages_as_the_official_code(views):
    za, zb = views
    (va, ca), (vb, cb) = by_hand(za), by_hand(zb)
    s = float(((za - zb) ** 2).mean())
    loss, logs = vicreg.vicreg_loss(za, zb)
    assert float(loss) == pytest.approx(25 * s + 25 * (va + vb) / 2 + ca + cb, rel=1e-5)
    assert set(logs) == {"sim", "std", "cov"}
    assert float(vicreg.vicreg_loss(za, zb, sim=1, std=0, cov=0)[0]) == pytest.approx(s, rel=1e-5)


@pytest.mark.parametrize("term", [vicreg.variance, vicreg.covariance])
def test_statistics_stay_float32_under_autocast(views, term):
    z = views[0].float() + 3
    plain = term(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = term(z)
    assert cast.dtype == torch.float32 and float(cast) == pytest.approx(float(plain), rel=1e-6)


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match="equal"):
        vicreg.vicreg_loss(torch.zeros(4, 3), torch.zeros(4, 2))


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    flat = torch.randn(500, 1) @ torch.randn(1, 16)
    assert vicreg.effective_rank(flat) == pytest.approx(1, abs=0.01)
    assert vicreg.effective_rank(torch.randn(5000, 16)) > 15
