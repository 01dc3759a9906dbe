"""Several processes, precision, the latent cache and other programs: small, on a CPU.

Run by torchrun this file is what each of two processes does in the first test:

    torchrun --nproc_per_node=2 tests/test_scale.py OUT
"""

import argparse
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, script
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from buffer import index, read_chunk, write_chunk
from car.telemetry import TELEMETRY
from networks import (
    VALUE_HORIZON,
    CostModel,
    InverseModel,
    Predictor,
    Projector,
    TinyEncoder,
    WarpHead,
    stack_frames,
)
from support import training
from support.augment import AHEAD, STRETCHES
from support.checkpoints import fingerprint, load_frozen, save
from support.cli import Refusal, run
from support.distributed import RANK, RANKS, wrap_ddp
from support.latents import Latents
from support.training import hardware_precisions, pick_precision, set_up
from train_cost_model import Sampler
from train_encoder import loss_fn
from vicreg import covariance, variance

WINDOWS, AT = 8, (0, 1, 3)  # of the batch; the latents of each
BENDS = 2 + STRETCHES


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
    args = argparse.Namespace(
        objective=objective,
        targets=[1, 3],
        history=1,
        sim=25.0,
        pred=10.0,
        std=16.0,
        cov=1.0,
        inverse=2.0,
        bend=5.0,
        align=3.0,
    )
    nets = {"encoder": TinyEncoder(0.125, history=1, dim=16)}
    nets |= (
        {
            "predictor": Predictor(16, 8),
            "inverse": InverseModel(16, 8),
            "warp": WarpHead(16, BENDS, True),
        }
        if objective == "joint"
        else {"projector": Projector(16, 32)}
    )
    nets = {name: net.double() for name, net in nets.items()}
    x = torch.randint(0, 256, (WINDOWS, len(AT), 3, 64, 64))
    act, mine = torch.randn(WINDOWS, 3, 3).double(), slice(RANK, None, RANKS)
    how, bent = torch.randn(WINDOWS, BENDS).double(), torch.randint(0, 256, (WINDOWS, 3, 64, 64))
    if objective == "joint":
        scenes = x[mine, :, :, :AHEAD].flatten(0, 1).byte()
        x, how = torch.cat([bent[mine, None], x[mine]], dim=1).flatten(0, 1), how[mine]
    else:
        x, how, scenes = x[mine, :2].flatten(0, 1), None, None
    loss_of = wrap_ddp(loss_fn, nets)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        loss, *_ = loss_of(x, how, scenes, act[mine], args)
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A root with three sources of noise, each of ten short episodes, every third held out."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for s, source in enumerate(("data_race", "data_recovery", "data")):
        for i in range(10):
            episode(root / source, f"{source}{i}", 70 + i, rng, 10 * (10 * s + i) + (i % 3 > 0))
    return root


def episode(folder, uid, T, rng, track_seed):
    folder.mkdir(exist_ok=True)
    ends = np.zeros(T, bool)
    return write_chunk(
        folder,
        {
            "source": folder.name,
            "track_seed": track_seed,
            "uid": uid,
            "policy": {},
            "preprocess": 1,
        },
        obs=rng.integers(0, 256, (T + 1, 64, 64, 3), np.uint8),
        act=rng.uniform(-1, 1, (T, 3)).astype(np.float32),
        reward=np.ones(T, np.float32),
        terminated=ends,
        truncated=ends,
        telemetry=rng.uniform(-0.5, 0.5, (T + 1, len(TELEMETRY))).astype(np.float32),
    )


def copy_of(data, tmp_path):
    for source in data.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


def loaded(path):
    return torch.load(path, weights_only=True)


# ---- several processes ---------------------------------------------------------------------------


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    done = torchrun("tests/test_scale.py", tmp_path / "two.pt")
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
    encoder = TinyEncoder(0.125, dim=16)
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
    monkeypatch.setattr(training, "RANKS", 2)
    with pytest.raises(Refusal, match="runs as one process"):
        set_up(argparse.Namespace(batch_size=8))
    with pytest.raises(Refusal, match="--batch_size 9: expected a multiple of the 2"):
        set_up(argparse.Namespace(batch_size=9), ranks=True)
    with pytest.raises(Refusal, match="--compile: for one process only"):
        set_up(argparse.Namespace(batch_size=8, compile=True), ranks=True)
    monkeypatch.setattr(training, "everywhere", lambda *numbers: [[40.0, 10.0], [0.0, 10.0]])
    with pytest.raises(Refusal, match=r"start at steps \[40, 0\]"):
        training.same_start(40, 10)


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


@pytest.mark.parametrize("flags, has", [("avx2", ["fp32"]), ("avx512_bf16", ["bf16", "fp32"])])
def test_a_cpu_takes_bf16_where_it_has_it(monkeypatch, flags, has):
    monkeypatch.setattr(training.Path, "read_text", lambda self: f"flags: sse {flags}")
    assert hardware_precisions(torch.device("cpu"))[0] == has
    assert pick_precision("auto", torch.device("cpu"))[0] == training.DTYPES[has[0]]


def test_a_gpu_that_torch_does_not_see_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert training.why_no_gpu(tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert "NVIDIA" in training.why_no_gpu(tmp_path) and "CUDA" in training.why_no_gpu(tmp_path)
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # and a processor's own graphics
    assert "NVIDIA" in training.why_no_gpu(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "nvidia0").unlink()
    said = training.why_no_gpu(tmp_path)
    assert "AMD GPU" in said and "built for CPUs only" in said and "TORCH_INDEX=" in said
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "HIP_VISIBLE_DEVICES" in training.why_no_gpu(tmp_path)  # it may be opened, and sees none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.why_no_gpu(tmp_path) == ""


def test_threads_hold_for_all_libraries():
    with threadpool_limits(2):  # and puts back what it found
        training.pick_device(argparse.Namespace(device="cpu", threads=1))
        found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    assert found and set(found.values()) == {1}


def test_batch_statistics_are_float32_in_half_precision():
    torch.manual_seed(0)
    encoder = TinyEncoder(0.125, history=1, dim=16)
    x, seen = torch.randint(0, 256, (8, 3, 64, 64)), {}
    norm = encoder.body[1]
    norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder.features(x)
    assert seen["x"].dtype == torch.bfloat16 and z.dtype == torch.float32
    mean = seen["x"].double().mean(dim=(0, 2, 3))
    assert norm.running_mean.dtype == torch.float32
    assert torch.allclose(norm.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-6)


# ---- latent cache --------------------------------------------------------------------------------


def cache_of(root, encoder, chunks, encoded=None):
    def encode(obs):
        if encoded is not None:
            encoded.append(len(obs))
        with torch.no_grad():
            return encoder(stack_frames(obs, encoder.history))

    return Latents(
        root, fingerprint(encoder), encoder.dim, encoder.history, encoder.repeat, encode, chunks
    )


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    net = TinyEncoder(0.125, dim=16).eval()
    with torch.no_grad():
        net.fit_standardization(net.features(torch.randint(0, 256, (64, 9, 64, 64))))
    return net.requires_grad_(False)


def test_cached_latents_are_those_computed_anew(data, tmp_path, encoder):
    chunks = index(data / "data_race")[0] + index(data / "data")[0]
    cache = cache_of(tmp_path, encoder, chunks)
    assert isinstance(cache.z, np.memmap) and cache.z.dtype == np.float16
    rows = sum(c.frames + 1 for c in chunks)
    assert cache.path.stat().st_size == 2 * encoder.dim * rows
    assert 2 * 512 * 5.8e6 * 1.001 < 6e9  # so the whole plan fits, with a row more an episode
    rng, worst = np.random.default_rng(0), 0.0
    for chunk, n in zip(chunks, rng.multinomial(1000, [1 / len(chunks)] * len(chunks))):
        obs, t = read_chunk(chunk.path, "obs")["obs"], rng.integers(chunk.frames + 1, size=n)
        at = np.maximum(t[:, None] + encoder.repeat * np.arange(1 - encoder.history, 1), 0)
        z = encoder(stack_frames(torch.from_numpy(obs[at]).permute(0, 1, 4, 2, 3), encoder.history))
        cached = cache.z[cache.rows[chunk.meta["uid"]][0] + t].astype(np.float32)
        worst = max(worst, float((z - torch.from_numpy(cached)).abs().div(z.abs().clamp(1)).max()))
    assert 0 < worst < 1e-3


def test_an_episode_that_changed_under_its_name_is_encoded_again(tmp_path, encoder):
    rng, folder, encoded = np.random.default_rng(1), tmp_path / "data", []
    paths = [episode(folder, f"e{i}", 70, rng, i) for i in range(3)]
    old = np.array(cache_of(tmp_path, encoder, index(folder)[0], encoded).z)
    paths[1].unlink()
    episode(folder, "e1", 70, rng, 1)  # same name, length and track, other pixels
    chunks = index(folder)[0]
    cache = cache_of(tmp_path, encoder, chunks, encoded)
    assert sum(encoded) == 4 * 71
    fresh = cache_of(tmp_path / "else", encoder, chunks)
    for chunk in chunks:
        a, b = (c.starts([chunk], 1)[0] for c in (cache, fresh))
        assert np.array_equal(cache.z[a : a + 71], fresh.z[b : b + 71])
    assert np.array_equal(cache.z[: len(old)], old)  # nobody who reads them loses rows


@pytest.mark.parametrize("left", ["", "{", "[]", '{"rows": {"e0": [0, 70]}}', '{"rows": 3}'])
def test_an_index_that_cannot_be_understood_is_made_anew(tmp_path, encoder, left):
    folder = tmp_path / "data"
    episode(folder, "e0", 70, np.random.default_rng(2), 1)
    for _ in range(2):
        encoded = []
        cache = cache_of(tmp_path, encoder, index(folder)[0], encoded)
        assert sum(encoded) == 71
        cache.index_path.write_text(left)


def test_two_that_start_at_once_encode_once(data, tmp_path, encoder):
    chunks, encoded = index(data / "data_race")[0], []
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(cache_of, tmp_path, encoder, chunks, encoded) for _ in range(2)]
    a, b = (future.result() for future in both)
    assert sum(encoded) == sum(c.frames + 1 for c in chunks) == len(a.z) and a.rows == b.rows


def test_what_came_is_that_of_the_same_latent_real_or_imagined(tmp_path, encoder):
    rng, H = np.random.default_rng(0), 4
    episode(tmp_path / "data_recovery", "long", 280, rng, 11)
    chunks = index(tmp_path / "data_recovery")[0]
    cache = cache_of(tmp_path, encoder, chunks)
    cost, noise = CostModel(encoder.dim), torch.randn(200, encoder.dim)
    cost.fit_density(noise, 2 * noise)
    sampler = Sampler(cache, chunks, Predictor(encoder.dim, 8, 8), H, cost)
    z, came = sampler.sample(64, rng, torch.device("cpu"), torch.float32)
    z, came = z.view(4, 2, -1, encoder.dim), came.view(4, 2, -1)  # pick, real or imagined, window
    assert torch.equal(came[:, 0], came[:, 1]) and not torch.equal(z[:, 0], z[:, 1])
    for latent, terminal_value in zip(z[:, 0].flatten(0, 1), came[:, 0].flatten()):
        row = int((torch.from_numpy(cache.z.astype(np.float32)) - latent).abs().sum(1).argmin())
        after = cost.value_target(cache.windows([row], 1 + VALUE_HORIZON)[0])[0, 0]
        assert float(terminal_value) == pytest.approx(float(after), rel=1e-4)
    with pytest.raises(
        Refusal, match="lasts 288 steps, 50 of zoom and 238 more, the longest has 280"
    ):
        Sampler(cache, chunks, Predictor(encoder.dim, 8, 8), H + 40, cost)


# ---- other programs ------------------------------------------------------------------------------


def test_tensorboard_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = argparse.Namespace(root=tmp_path, tensorboard=True, log_every=0)
    for first in (0, 5):  # stopped and resumed
        log = training.RunLog(args, "encoder", resumed=bool(first))
        for step in range(first, first + 5):
            log.log(step, loss=torch.tensor(10.0 - step))
        log.board.close()
    board = EventAccumulator(str(tmp_path / "models" / "tensorboard" / "encoder")).Reload()
    shown = [(e.step, e.value) for e in board.Scalars("loss")]
    assert shown == [(r["step"], r["loss"]) for r in log.rows()] and len(shown) == 10


def test_compiled_nets_have_the_names_of_plain_ones(data, tmp_path):
    net = Predictor(16, 8)
    net.rollout = torch.compile(net.rollout, backend="eager")
    save(tmp_path / "a.pth", {"predictor": net})
    loaded_net, _ = load_frozen(tmp_path / "a.pth", "predictor", torch.device("cpu"))
    z, act = torch.randn(2, 16), torch.randn(2, 3, 3)
    assert torch.allclose(loaded_net.rollout(z, act), net.eval().rollout(z, act))


if __name__ == "__main__":

    def main():
        set_up(
            argparse.Namespace(
                device="cpu", threads=1, precision="fp32", seed=0, batch_size=8, compile=False
            ),
            ranks=True,
        )
        found = everything()
        if RANK == 0:
            torch.save(found, sys.argv[1])
        return 0

    run(main)
