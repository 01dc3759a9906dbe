"""Several processes, precision, the latent cache and other programs: small, on a CPU.

Run by torchrun this file is what each of two processes does in the first test:

    torchrun --nproc_per_node=2 tests/test_training.py OUT
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import REPO, SMALL, copy_of, script
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from networks import InverseModel, Predictor, Projector, TinyEncoder, WarpHead
from support import device
from support import run as running
from support.augment import SCENE_AHEAD, WARPS
from support.checkpoints import save
from support.cli import Refusal, run_main
from support.device import hardware_precisions, pick_precision, set_up
from support.distributed import RANK, RANKS, wrap_ddp
from train_encoder import Objective, loss_fn
from vicreg import covariance, variance

WINDOWS, AT = 8, (0, 1, 3)  # of the batch; the latents of each


def gradient_of_terms():
    """Of VICReg's statistics with respect to a linear layer, in float32."""
    torch.manual_seed(1)
    nets, x = {"linear": nn.Linear(6, 5)}, torch.randn(16, 6)
    loss_of = wrap_ddp(
        lambda nets, x: sum(term(nets["linear"](x)) for term in (variance, covariance)), nets
    )
    loss_of(x[RANK::RANKS]).backward()
    return {"terms.weight": nets["linear"].weight.grad, "terms.bias": nets["linear"].bias.grad}


def gradients(objective):
    """{parameter or statistic: value} after one backward of the encoder's loss, the batch shared by
    all ranks. In float64: in float32 a rounding turns some ReLU around, in one process as in two,
    and moves single gradients by 1 %.
    """
    torch.manual_seed(0)
    weights = dict(sim=25.0, std=16.0, cov=1.0)
    if objective == "joint":
        weights = dict(pred=10.0, inverse=2.0, std=16.0, cov=1.0, warp=5.0, congeal=3.0)
    terms = Objective(objective, weights, 1, (1, 3))
    nets = {"encoder": TinyEncoder(8, history=1, dim=16)}
    nets |= (
        {
            "predictor": Predictor(16, 8),
            "inverse": InverseModel(16, 8),
            "warp": WarpHead(16, WARPS, True),
        }
        if objective == "joint"
        else {"projector": Projector(16, 32)}
    )
    nets = {name: net.double() for name, net in nets.items()}
    x = torch.randint(0, 256, (WINDOWS, len(AT), 3, 64, 64))
    act, mine = torch.randn(WINDOWS, 3, 3).double(), slice(RANK, None, RANKS)
    warp, warped = torch.randn(WINDOWS, WARPS).double(), torch.randint(0, 256, (WINDOWS, 3, 64, 64))
    if objective == "joint":
        scenes = x[mine, :, :, :SCENE_AHEAD].flatten(0, 1).byte()
        x, warp = torch.cat([warped[mine, None], x[mine]], dim=1).flatten(0, 1), warp[mine]
    else:
        x, warp, scenes = x[mine, :2].flatten(0, 1), None, None
    loss_of = wrap_ddp(loss_fn, nets)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        loss, *_ = loss_of(x, warp, scenes, act[mine], terms)
    loss.backward()
    return {
        f"{objective}.{name}.{k}": v
        for name, net in nets.items()
        for k, v in [*((k, p.grad) for k, p in net.named_parameters()), *net.named_buffers()]
    }


def everything():
    return gradient_of_terms() | gradients("joint") | gradients("vicreg")


def torchrun(name, *args, **kw):
    """Runs a script of the repo as two processes of this machine."""
    return script(
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        REPO / name,
        *args,
        **kw,
    )


def loaded(path):
    return torch.load(path, weights_only=True)


# ---- several processes ---------------------------------------------------------------------------


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    done = torchrun("tests/test_training.py", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = loaded(tmp_path / "two.pt"), everything()
    assert two.keys() == one.keys() and len(one) > 200
    for name, value in one.items():  # running statistics of batch norms too
        tolerance = 1e-5 if name.startswith("terms") else 1e-10
        assert torch.allclose(two[name], value, rtol=tolerance, atol=tolerance), name


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(data, tmp_path):
    root = copy_of(data, tmp_path)
    args = [
        *SMALL,
        "--threads",
        "1",
        "--strides",
        "2",
        "2",
        "2",
        "1",
        "--epochs",
        "1",
        "--steps_per_epoch",
        "24",
        "--root",
        root,
    ]
    command = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        REPO / "train_encoder.py",
        *args,
    ]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=said, stderr=said)
    log, deadline = root / "models" / "encoder.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    said = (tmp_path / "said").read_text()
    assert said.count("on 2 processes") == 1, said[-3000:]  # of two, one speaks
    step = loaded(root / "models" / "encoder_resume.pth")["step"]
    assert 0 < step < 24
    assert f"stopped at step {step} of 24" in said
    done = script("train_encoder.py", *args)
    assert done.returncode == 0 and f"24 steps from {step}" in done.stdout, done.stderr[-3000:]
    assert loaded(root / "models" / "encoder_mixed_ep1.pth")["done"]


@pytest.mark.slow
def test_two_processes_make_the_predictor_of_one(data, tmp_path):
    encoder = TinyEncoder(8, dim=16)
    made = {}
    for ranks, start in ((1, script), (2, torchrun)):
        (tmp_path / str(ranks)).mkdir()
        root = copy_of(data, tmp_path / str(ranks))
        (root / "models").mkdir()
        save(root / "models" / "encoder_mixed_ep1.pth", {"encoder": encoder}, done=True)
        args = [
            "--epochs",
            1,
            "--steps_per_epoch",
            10,
            "--batch_size",
            24,
            "--hidden",
            32,
            "--precision",
            "fp32",
            "--root",
            root,
        ]
        done = start("train_predictor.py", *args)
        assert done.returncode == 0, done.stderr[-3000:]
        again = script("train_predictor.py", *args)
        assert again.returncode == 0 and "already trained" in again.stdout
        made[ranks] = loaded(root / "models" / "predictor_ep1.pth")["nets"]["predictor"]["weights"]
    assert all(torch.allclose(made[1][k], made[2][k], atol=1e-5) for k in made[1])


def test_what_several_processes_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(device, "RANKS", 2)
    with pytest.raises(Refusal, match="runs as one process"):
        set_up(argparse.Namespace(batch_size=8))
    with pytest.raises(Refusal, match="--batch_size 9: expected a multiple of the 2"):
        set_up(argparse.Namespace(batch_size=9), ranks=True)


def test_ranks_that_start_at_unlike_steps_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "all_gather_numbers", lambda *n: [[40.0, 10.0], [0.0, 10.0]])
    args = argparse.Namespace(root=tmp_path, fresh=False, epochs=1)
    with pytest.raises(Refusal, match=r"start at steps \[40, 0\]"):
        running.Run(args, "encoder", {}, None, None, 10, (), {}, {})


# ---- precision -----------------------------------------------------------------------------------


CARDS = {  # what torch reports: (hip, name, arch or capability), has bf16 in hardware
    "RX 6800": (("6.2", "AMD Radeon RX 6800", "gfx1030"), False),
    "RX 6600": (("6.2", "AMD Radeon RX 6600", "gfx1032:xnack-"), False),
    "RX 5700": (("6.2", "AMD Radeon RX 5700", "gfx1010"), False),
    "RX 7900": (("6.2", "AMD Radeon RX 7900 XTX", "gfx1100"), True),
    "MI210": (("6.2", "AMD Instinct MI210", "gfx90a:sramecc+:xnack-"), True),
    "RTX 2080": ((None, "NVIDIA GeForce RTX 2080", (7, 5)), False),
    "H100": ((None, "NVIDIA H100", (9, 0)), True),
}


def pretend(monkeypatch, hip, name, arch):
    major, minor = arch if hip is None else (10, 3)
    about = SimpleNamespace(name=name, gcnArchName=arch if hip else name, major=major, minor=minor)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **kw: True)  # RDNA2 lies too


@pytest.mark.parametrize("card", CARDS)
def test_auto_follows_from_the_card_alone(monkeypatch, card):
    about, has_bf16 = CARDS[card]
    pretend(monkeypatch, *about)
    dtype, why = pick_precision("auto", torch.device("cuda"))
    assert dtype == (torch.bfloat16 if has_bf16 else torch.float16)
    assert ("no bf16" in why) != has_bf16
    was, why = pick_precision("auto", torch.device("cuda"), "fp32")
    assert was == torch.float32 and why == "as the run began"
    moved, _ = pick_precision("auto", torch.device("cuda"), "bf16")  # from a card that has it
    assert moved == dtype


def test_what_is_asked_for_is_taken():
    assert pick_precision("bf16", torch.device("cpu"))[0] == torch.bfloat16
    assert pick_precision("fp16", torch.device("cuda"), "fp32")[0] == torch.float16


@pytest.mark.parametrize(
    "cpu, has",
    [
        ("GenuineIntel avx2", ["fp32"]),
        ("GenuineIntel avx512_bf16", ["fp32", "bf16"]),
        ("GenuineIntel avx512_bf16 amx_bf16", ["bf16", "fp32"]),
        ("AuthenticAMD avx512_bf16", ["bf16", "fp32"]),
    ],
)
def test_a_cpu_takes_bf16_where_it_is_fast(monkeypatch, cpu, has):
    monkeypatch.setattr(device.Path, "read_text", lambda self: cpu)
    assert hardware_precisions(torch.device("cpu"))[0] == has
    assert pick_precision("auto", torch.device("cpu"))[0] == device.DTYPES[has[0]]


def test_a_gpu_that_torch_does_not_see_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert device.why_no_gpu(tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert "NVIDIA" in device.why_no_gpu(tmp_path) and "CUDA" in device.why_no_gpu(tmp_path)
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # and a processor's own graphics
    assert "NVIDIA" in device.why_no_gpu(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "nvidia0").unlink()
    said = device.why_no_gpu(tmp_path)
    assert "AMD GPU" in said and "built for CPUs only" in said and "TORCH_INDEX=" in said
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "HIP_VISIBLE_DEVICES" in device.why_no_gpu(tmp_path)  # it may be opened, and sees none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.why_no_gpu(tmp_path) == ""


def test_threads_hold_for_all_libraries():
    with threadpool_limits(2):  # and puts back what it found
        device.pick_device("cpu", threads=1)
        found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    assert found and set(found.values()) == {1}


def test_batch_statistics_are_float32_in_half_precision():
    torch.manual_seed(0)
    encoder = TinyEncoder(8, history=1, dim=16)
    x, seen = torch.randint(0, 256, (8, 3, 64, 64)), {}
    norm = encoder.body[1]
    norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder.features(x)
    assert seen["x"].dtype == torch.bfloat16 and z.dtype == torch.float32
    mean = seen["x"].double().mean(dim=(0, 2, 3))
    assert norm.running_mean.dtype == torch.float32
    assert torch.allclose(norm.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":

    def main():
        set_up(
            argparse.Namespace(device="cpu", threads=1, precision="fp32", seed=0, batch_size=8),
            ranks=True,
        )
        found = everything()
        if RANK == 0:
            torch.save(found, sys.argv[1])
        return 0

    run_main(main)
