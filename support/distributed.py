"""Several processes under torchrun."""

import os
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from vicreg import gather


def _number(key, default):
    return int(os.environ[key]) if dist.is_torchelastic_launched() else default


RANK = _number("RANK", 0)  # which process this is
LOCAL_RANK = _number("LOCAL_RANK", 0)  # which one on its machine
RANKS = _number("WORLD_SIZE", 1)  # how many there are
DIST_TIMEOUT = timedelta(hours=4)  # others wait while rank 0 encodes, evaluates and draws alone


def all_gather_numbers(*numbers):
    """The numbers of all ranks, a list each, in order of rank. All wait for the last one."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if RANKS == 1:
        return [mine.tolist()]
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return [numbers.tolist() for numbers in every]


@contextmanager
def rank_by_rank():
    """The block runs in one rank after the other: the others find what the first one made."""
    for _ in range(RANK):
        all_gather_numbers()
    yield
    for _ in range(RANKS - RANK):
        all_gather_numbers()


class _Loss(nn.Module):
    """DistributedDataParallel wraps a module, and averages the gradients of its `forward`."""

    def __init__(self, loss_fn, nets):
        super().__init__()
        self.loss_fn, self.nets = loss_fn, nn.ModuleDict(nets)

    def forward(self, *batch):
        return self.loss_fn(self.nets, *batch)


def wrap_ddp(loss_fn, nets):
    """loss_fn(nets, *batch) as a function of this rank's part of the batch.

    Gradients are those of the whole batch, and batch norms see all of it. Every net must be used.
    """
    if RANKS == 1:
        return partial(loss_fn, nets)
    for name, net in nets.items():
        if next(net.parameters()).is_cuda:
            nets[name] = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for norm in net.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norm.forward = partial(sync_batch_norm, norm)
    return nn.parallel.DistributedDataParallel(_Loss(loss_fn, nets))


def sync_batch_norm(norm, x):
    """The forward of a batch norm with the statistics of all ranks, x (N, C, ...).

    torch's SyncBatchNorm has no version for CPUs.
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    over = [d for d in range(x.dim()) if d != 1]
    wide = lambda v: v.view(1, -1, *[1] * (x.dim() - 2))
    mean_of_ranks = lambda v: gather(v[None]).mean(dim=0)
    y = x.float()
    mean = mean_of_ranks(y.mean(over))
    y = y - wide(mean)
    var = mean_of_ranks(y.pow(2).mean(over))
    n = RANKS * x.numel() // x.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return (y * wide(norm.weight * (var + norm.eps).rsqrt()) + wide(norm.bias)).to(x.dtype)
