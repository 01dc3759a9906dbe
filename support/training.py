"""What every stage's run needs: device and precision, several processes, a log with curves."""

import ctypes
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from support.cli import cores, fail, optional
from support.distributed import DIST_TIMEOUT, LOCAL_RANK, RANK, RANKS, all_gather_numbers
from support.files import lock_file, writable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


def pick_device(args):
    """torch.device for --device, refused in one line when it is not there. Sets --threads."""
    threads = args.threads or min(torch.get_num_threads(), cores())
    if args.threads or threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # numpy's, and of what is loaded later:
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    name = args.device
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(
            f"--device {name}: no such GPU, torch sees {torch.cuda.device_count()}"
            f"{why_no_gpu() or f'; {torch_build()}; use --device cpu or auto'}"
        )
    return device


def torch_build():
    """Which torch is installed, in words."""
    kind = (
        f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "CPUs only"
    )
    return f"torch {torch.__version__} (built for {kind})"


def why_no_gpu(dev=Path("/dev")):
    """What keeps torch from a GPU that the machine has, and what mends it; "" where it has none or
    torch sees one."""
    amd, nvidia = dev / "kfd", dev / "nvidia0"
    if torch.cuda.is_available() or not (amd.exists() or nvidia.exists()):
        return ""
    makers = ("AMD", amd, "ROCm", torch.version.hip), ("NVIDIA", nvidia, "CUDA", torch.version.cuda)
    there = [m for m in makers if m[1].exists()]  # a processor's own graphics may be one
    maker, node, kind, built = next((m for m in there if m[3]), there[-1])
    found = f"; the machine has an {maker} GPU ({node}), but {torch_build()}"
    if not built:
        return (
            f"{found} cannot use it: `make install TORCH_INDEX=URL` with pytorch's index for "
            f"{kind}, see the README"
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return f"{found} may not open it: `sudo usermod -aG render,video $USER`, then log in again"
    return (
        f"{found} sees none: look at HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES and the "
        "driver's version"
    )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def name_of(dtype):
    """bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_precision(name, device, was=""):
    """(torch dtype for autocast, the reason in words) of --precision. `auto` takes what a run to be
    resumed had, `was`, where this hardware has it, and else the hardware's best."""
    if name != "auto":
        return DTYPES[name], "as --precision says"
    has, why = hardware_precisions(device)
    if was in has:
        return DTYPES[was], "as the run began"
    return DTYPES[has[0]], why


def hardware_precisions(device):
    """(names of the precisions that the device computes in hardware, the best for training first,
    the reason in words)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = about.gcnArchName.split(":")[0]
            has_bf16 = bool(re.match("gfx(908|90a|94|95|11|12)", arch))  # others emulate it
            has_fp16 = True
        else:
            arch, has_bf16 = f"compute capability {about.major}.{about.minor}", about.major >= 8
            has_fp16 = about.major >= 7  # before, fp16 is slower than fp32
        what = "bf16 in hardware" if has_bf16 else "no bf16 in hardware"
        return ["bf16"] * has_bf16 + ["fp16"] * has_fp16 + ["fp32"], f"{arch}: {what}"
    flags = Path("/proc/cpuinfo")
    flags = flags.read_text() if flags.exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return ["bf16", "fp32"], "bf16 in hardware"
    return ["fp32"], "no bf16 in hardware"


def describe_device(device, dtype, why):
    """The first line of every stage: where it computes, in what, and what keeps it from a GPU."""
    where = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        where = f"{device}, {about.name}, {about.total_memory / 2**30:.0f} GiB"
    print(
        f"device {where}; {name_of(dtype)} ({why}); {torch_build()}"
        f"{why_no_gpu() if device.type == 'cpu' else ''}",
        flush=True,
    )


def set_up(args, ranks=False, was=""):
    """(device, dtype of autocast) of a stage; seeds torch, sets its threads, and says in
    `args.arithmetic` all that decides the last digits. A stage that knows `ranks` joins the other
    processes of torchrun, of which only the first one speaks. `was` is the `arithmetic` of a run to
    be resumed, which keeps its precision."""
    if RANKS > 1 and not ranks:
        fail("this stage runs as one process: start it with python, not torchrun")
    if RANKS > 1 and args.batch_size % RANKS:
        fail(
            f"--batch_size {args.batch_size}: expected a multiple of the {RANKS} processes, which "
            "take equal parts of it"
        )
    if RANKS > 1 and args.compile:
        fail("--compile: for one process only; leave it out under torchrun")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    if getattr(args, "tensorboard", False):  # before anything is moved or trained
        optional("torch.utils.tensorboard", "tensorboard")
    device = pick_device(args)
    if RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo" + ",cuda:nccl" * (device.type == "cuda"), timeout=DIST_TIMEOUT
        )
    tune_malloc()
    dtype, why = pick_precision(args.precision, device, was.split(", ")[1] if was else "")
    if len({tuple(pick) for pick in all_gather_numbers(list(DTYPES).index(name_of(dtype)))}) > 1:
        dtype, why = torch.float32, "the processes have unlike hardware"
    describe_device(device, dtype, why)
    if getattr(args, "compile", False):
        try_compiler(device)
    args.arithmetic = (
        f"{device.type}, {name_of(dtype)}, threads {torch.get_num_threads()}, "
        f"processes {RANKS}" + ", compiled" * getattr(args, "compile", False)
    )
    torch.manual_seed(args.seed)
    return device, dtype


def try_compiler(device):
    """Refuses --compile in one line where torch finds no compiler for the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:  # of a dozen kinds, and a hundred lines
        line = next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)
        fail(
            f"--compile: torch cannot compile here ({line[:200]}); install a C++ compiler (on "
            "Debian g++), or leave it out"
        )


def tune_malloc():
    """Has glibc keep what is freed for the next step, not give it back to the kernel, which
    zeroes each page anew: a sixth of a training step on two cores. Elsewhere it does nothing."""
    with suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device, dtype):
    """The autocast context of this device and dtype; none in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def on_device(batches, device, work=lambda *batch: batch):
    """`work` of each batch on `device`; a GPU copies and does it while the one before is in use."""
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


def encode_batch_size(device):
    """How many pictures a frozen encoder is shown in one go: on a CPU few, whose maps stay in its
    caches, an eighth faster than 256 on two threads and a quarter to a third on one."""
    return 64 if device.type == "cpu" else 256


def only_run(args, stage):
    """Refuses a second run of a stage in one ROOT: logs and checkpoints of the two would mix. Of
    several ranks the first one holds the lock."""
    if RANK == 0:
        models = writable(args.root / "models")
        lock_file(
            models / f".{stage}.lock",
            f"{models}: another train_{stage}.py is at work "
            "there; wait until it has ended, or give this one another --root",
        )
