"""The noise of candidate plans: AR(1) and power-law, both of unit variance."""

import torch


def ar1_noise(white, rho):
    """White noise (N, H, 2) -> stationary AR(1) noise of unit variance: correlation rho ** lag."""
    H = white.shape[1]
    lag = (torch.arange(H)[:, None] - torch.arange(H)).abs()
    root = torch.linalg.cholesky(float(rho) ** lag.double()).float().to(white.device)
    return torch.einsum("ts,nsa->nta", root, white)


def powerlaw_noise(white, beta):
    """White noise (N, H, 2) -> noise of unit variance with power ~ frequency ** -beta (Timmer and
    Koenig 1995).

    Frequency 0, which a plan holds throughout, has the power of one period in H steps. The noise is
    periodic: the end of a plan is correlated with its beginning.
    """
    H = white.shape[1]
    periods = torch.fft.fftfreq(H, 1 / H, dtype=torch.float64).abs().clamp_min(1)
    gain = periods ** (-beta / 2)
    gain = (gain / gain.square().mean().sqrt())[: H // 2 + 1, None].float().to(white.device)
    return torch.fft.irfft(torch.fft.rfft(white, dim=1) * gain, n=H, dim=1)
