"""Device, precision and threads of a run."""

import ctypes
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch import nn

from support.checkpoints import read
from support.cli import Refusal, cores, fail
from support.distributed import DIST_TIMEOUT, LOCAL_RANK, RANK, RANKS, all_gather_numbers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16_GPUS = "gfx(908|90a|94|95|11|12)"  # AMD architectures with bf16; RDNA2, gfx10, emulates it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def set_up(args, stage="", ranks=False):
    """(device, dtype for autocast) of a script; sets seed and threads, prints the first line.

    `args.arithmetic` gets all that decides the last digits. A resumed run of `stage` keeps its
    precision. A stage that knows `ranks` joins the other processes of torchrun; rank 0 prints.
    """
    if RANKS > 1 and not ranks:
        fail("this stage runs as one process: start it with python, not torchrun")
    if RANKS > 1 and args.batch_size % RANKS:
        fail(f"--batch_size {args.batch_size}: expected a multiple of the {RANKS} processes")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    device = pick_device(args.device, args.threads)
    if RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
        dist.init_process_group(backend, timeout=DIST_TIMEOUT)
    tune_malloc()

    was = resumed_precision(args, stage) if stage else ""
    dtype, why = pick_precision(args.precision, device, was)
    if len(set(map(tuple, all_gather_numbers(list(DTYPES).index(name_of(dtype)))))) > 1:
        dtype, why = torch.float32, "the processes have unlike hardware"
    print(describe_device(device, dtype, why), flush=True)
    threads = f"threads {torch.get_num_threads()}, processes {RANKS}"
    args.arithmetic = f"{device.type}, {name_of(dtype)}, {threads}"
    torch.manual_seed(args.seed)
    return device, dtype


# ------------------------------------------------------------------ device


def pick_device(name, threads=0):
    """torch.device for --device; refuses one that does not exist. Sets --threads."""
    limit = threads or min(torch.get_num_threads(), cores())
    if threads or limit < torch.get_num_threads():
        torch.set_num_threads(limit)
        threadpool_limits(limit)  # numpy's; the environment limits what is loaded later
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(limit))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        fail(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        why = why_no_gpu() or f"; {torch_build()}; use --device cpu or auto"
        fail(f"--device {name}: no such GPU, torch sees {count}{why}")
    return device


def torch_build():
    """Which torch is installed, in words."""
    kind = "CPUs only"
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        kind = f"CUDA {torch.version.cuda}"
    return f"torch {torch.__version__} (built for {kind})"


def why_no_gpu(dev=Path("/dev")):
    """Why torch cannot use the machine's GPU, and what helps; "" if it can or there is none."""
    makers = (
        ("AMD", dev / "kfd", "ROCm", torch.version.hip),
        ("NVIDIA", dev / "nvidia0", "CUDA", torch.version.cuda),
    )
    there = [m for m in makers if m[1].exists()]  # a processor's own graphics may be one
    if torch.cuda.is_available() or not there:
        return ""
    maker, node, kind, built = next((m for m in there if m[3]), there[-1])
    found = f"; the machine has an {maker} GPU ({node}), but {torch_build()}"
    if not built:
        index = f"pytorch's index for {kind}, see the README"
        return f"{found} cannot use it: `make install TORCH_INDEX=URL` with {index}"
    if not os.access(node, os.R_OK | os.W_OK):
        return f"{found} may not open it: `sudo usermod -aG render,video $USER`, then log in again"
    look = "HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES and the driver's version"
    return f"{found} sees none: look at {look}"


def describe_device(device, dtype, why):
    """The first line of every stage: device, precision, and what keeps it from a GPU."""
    where = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        where = f"{device}, {about.name}, {about.total_memory / 2**30:.0f} GiB"
    lacking = why_no_gpu() if device.type == "cpu" else ""
    return f"device {where}; {name_of(dtype)} ({why}); {torch_build()}{lacking}"


# ------------------------------------------------------------------ precision


def name_of(dtype):
    """bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_precision(name, device, was=""):
    """(torch dtype for autocast, the reason) of --precision.

    `auto` takes the precision of the run to resume, `was`, if this hardware has it, else the best.
    """
    if name != "auto":
        return DTYPES[name], "as --precision says"
    has, why = hardware_precisions(device)
    if was in has:
        return DTYPES[was], "as the run began"
    return DTYPES[has[0]], why


def hardware_precisions(device):
    """(precisions that the device computes in hardware, the best first, the reason)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = about.gcnArchName.split(":")[0]
            has_bf16, has_fp16 = bool(re.match(BF16_GPUS, arch)), True
        else:
            arch = f"compute capability {about.major}.{about.minor}"
            has_bf16, has_fp16 = about.major >= 8, about.major >= 7  # before 7 fp16 is slow
        names = (["bf16"] if has_bf16 else []) + (["fp16"] if has_fp16 else []) + ["fp32"]
        return names, f"{arch}: {'bf16' if has_bf16 else 'no bf16'} in hardware"
    flags = Path("/proc/cpuinfo")
    flags = flags.read_text() if flags.exists() else ""
    if "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags):
        return ["bf16", "fp32"], "bf16 in hardware"
    if "avx512_bf16" in flags:  # Intel's without AMX: half as fast as fp32, AMD's 1.4 times
        return ["fp32", "bf16"], "slow bf16 in hardware"
    return ["fp32"], "no bf16 in hardware"


def resumed_precision(args, stage):
    """The precision of the run of `stage` that would be resumed, or ""."""
    path = args.root / "models" / f"{stage}_resume.pth"
    with suppress(Refusal):
        if path.is_file() and not args.fresh:
            arithmetic = read(path).get("args", {}).get("arithmetic", "")
            return arithmetic.split(", ")[1] if ", " in arithmetic else ""
    return ""


def autocast(device, dtype):
    """The autocast context of this device and dtype; none in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def cast_weights(net, dtype):
    """A copy of a frozen net, its weights cast once: autocast does it in each call (1 ms of 5)."""
    net = deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)
    return net.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------ memory and batches


def tune_malloc():
    """glibc keeps freed memory for the next step: a sixth of a training step on two cores.

    Otherwise the kernel takes it back and zeroes each page anew. Without glibc nothing happens.
    """
    with suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def encode_batch_size(device):
    """Frame stacks that a frozen encoder sees at once.

    On a CPU 64 stay in the caches: an eighth faster than 256 on two threads, a quarter on one.
    """
    return 64 if device.type == "cpu" else 256


def on_device(batches, device, work=lambda *batch: batch):
    """`work` of each batch on `device`. A GPU copies the next batch while it uses this one."""
    if device.type != "cuda":
        yield from (work(*[x.to(device) for x in batch]) for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def fetch():
        with torch.cuda.stream(side):
            done = work(*[x.to(device, non_blocking=True) for x in next(batches)])
            return done, side.record_event()

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch)
        while True:
            batch, finished = ahead.result()
            ahead = pool.submit(fetch)
            now = torch.cuda.current_stream(device)
            now.wait_event(finished)
            for x in batch:
                if x is not None:
                    x.record_stream(now)
            yield batch
