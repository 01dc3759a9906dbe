"""VICReg (Bardes, Ponce, LeCun 2021, arXiv:2105.04906): the loss and its three terms.

Statistics are float32 whatever autocast says: in half precision the covariance overflows or
rounds. Under torchrun variance and covariance are those of the batches of all ranks together.
"""

import math
from functools import wraps

import torch
import torch.distributed as dist
import torch.nn.functional as F

STD_EPS = 1e-4  # the paper's epsilon, inside the square root


def in_float32(term):
    """Decorator: autocast would take matrix products back to half precision, `.float()` or not."""

    @wraps(term)
    def computed(*z):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return term(*(x.float() for x in z))

    return computed


class _Gather(torch.autograd.Function):
    """A row that all ranks saw has its gradient from all of them."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()  # do not change the caller's tensor
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """Rows (N, ...) of each of R ranks -> those of all, (R * N, ...), in order of rank.

    Each rank's gradient is that of the sum of all losses. DistributedDataParallel then averages
    over ranks, which gives the gradient of the mean loss. Without gradients (one rank evaluates
    alone) and in a single process z comes back unchanged.
    """
    return _Gather.apply(z) if dist.is_initialized() and torch.is_grad_enabled() else z


@in_float32
def invariance(za, zb):
    """Mean squared distance between two views, (N, D) x 2 -> scalar. Eq. 5, averaged over D too."""
    return F.mse_loss(za, zb)


@in_float32
def variance(z):
    """Hinge that asks a standard deviation of 1 in each dimension, (N, D) -> scalar. Eq. 1, 2."""
    return F.relu(1.0 - torch.sqrt(gather(z).var(dim=0) + STD_EPS)).mean()


@in_float32
def covariance(z):
    """Squared off-diagonal covariances, summed and divided by D, (N, D) -> scalar. Eq. 3, 4."""
    z = gather(z)
    N, D = z.shape
    z = z - z.mean(dim=0)
    cov = z.T @ z / (N - 1)  # (D, D)
    return (cov.pow(2).sum() - cov.diagonal().pow(2).sum()) / D


def vicreg_loss(za, zb, sim=25.0, std=25.0, cov=1.0):
    """VICReg of two batches of embeddings, both (N, D) -> (loss, logs).

    The convention is that of the paper and its official code: the variance terms of both views
    are averaged, their covariance terms are added. Raises ValueError on unlike or non-2-D shapes.
    """
    if za.shape != zb.shape or za.dim() != 2:
        raise ValueError(
            f"vicreg_loss wants two equal (N, D), found {tuple(za.shape)} and {tuple(zb.shape)}"
        )
    s = invariance(za, zb)
    v = (variance(za) + variance(zb)) / 2
    c = covariance(za) + covariance(zb)
    return sim * s + std * v + cov * c, {"sim": s.detach(), "std": v.detach(), "cov": c.detach()}


@torch.no_grad()
def effective_rank(z):
    """exp(entropy of the normalised singular values) of centred z, (N, D) -> float in [1, D].

    Roy and Vetterli 2007; the usual measure of dimensional collapse. Of what is not finite, NaN.
    """
    if not torch.isfinite(z).all():
        return math.nan
    s = torch.linalg.svdvals(z.float() - z.float().mean(dim=0))
    p = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * (p + 1e-12).log()).sum()))
