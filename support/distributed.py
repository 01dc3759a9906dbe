"""Several processes under torchrun."""

import os
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from support.cli import fail
from vicreg import gather

# ------------------------------------------------------------------ several processes (torchrun)


class _Loss(nn.Module):
    """What DistributedDataParallel wants to wrap: it averages gradients of `forward` only."""

    def __init__(self, loss_fn, nets):
        super().__init__()
        self.loss_fn, self.nets = loss_fn, nn.ModuleDict(nets)

    def forward(self, *batch):
        return self.loss_fn(self.nets, *batch)


def wrap_ddp(loss_fn, nets):
    """loss_fn(nets, *batch) as a function of the batch: the part of one rank, while gradients are
    those of the parts of all together, batch statistics included. Every net must be used.
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
    """The forward of a batch norm with the statistics of the batches of all ranks, x (N, C, ...):
    torch's SyncBatchNorm for CPUs, which it does not serve.
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    over = [d for d in range(x.dim()) if d != 1]
    wide = lambda v: v.view(1, -1, *[1] * (x.dim() - 2))
    of_all = lambda v: gather(v[None]).mean(dim=0)
    y = x.float()
    mean = of_all(y.mean(over))
    y = y - wide(mean)
    var = of_all(y.pow(2).mean(over))
    n = RANKS * x.numel() // x.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return (y * wide(norm.weight * (var + norm.eps).rsqrt()) + wide(norm.bias)).to(x.dtype)


RANK, LOCAL_RANK, RANKS = (  # which process this is of all, and on its machine; how many there are
    int(os.environ[k]) if dist.is_torchelastic_launched() else default
    for k, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
DIST_TIMEOUT = timedelta(hours=4)  # others wait while rank 0 encodes, evaluates and paints alone


def all_gather_numbers(*numbers):
    """The numbers of all ranks, a list each, in order of rank; all wait for the last one."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if RANKS == 1:
        return [mine.tolist()]
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return [numbers.tolist() for numbers in every]


def stopped_anywhere(stop):
    """True once a Stop came to any rank. All ranks ask together, between the same two steps."""
    return any(requested for (requested,) in all_gather_numbers(stop.requested))


def same_start(step, per_epoch):
    """Steps an epoch as rank 0 counts them; refuses ranks that would not start at the same step."""
    starts = all_gather_numbers(step, per_epoch)
    if len({step for step, _ in starts}) > 1:
        fail(
            f"the processes would start at steps {[int(step) for step, _ in starts]}: all "
            "machines need the same files under --root/models"
        )
    return int(starts[0][1])


@contextmanager
def rank_by_rank():
    """The block runs in one rank after the other: what the first one makes, the others find."""
    for _ in range(RANK):
        all_gather_numbers()
    yield
    for _ in range(RANKS - RANK):
        all_gather_numbers()
