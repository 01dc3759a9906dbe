"""A training run that can be stopped anywhere and goes on to the bit."""

import math
import os
from contextlib import suppress

import torch
from torch import nn

from support.checkpoints import Damaged, _write, back_up, last_line, numbered, read, save
from support.cli import Refusal, fail, typed
from support.distributed import RANK

RUNTIME_ARGS = {
    "root",
    "device",
    "threads",
    "fresh",
    "precision",
    "compile",
    "tensorboard",
    "once",
    "newest",
    "save_every",
    "log_every",
    "arithmetic",
    "epochs",
}  # may change on resume


def run_metadata(args, step, per_epoch, per_step, **data):
    """What each checkpoint says of its training: arguments, step, epoch, and the frames that were
    seen of each source (`per_step`: in one step); `data` is buffer.provenance's."""
    return dict(
        args={k: str(v) for k, v in vars(args).items()},
        step=step,
        epoch=step // per_epoch,
        per_epoch=per_epoch,
        frames_seen={name: int(n) * step for name, n in per_step.items()},
        **data,
    )


def save_run(path, nets, optim, scaler, **state):
    """Saves all that an interrupted training needs to go on as if it had not been interrupted.

    torch has the only random states that last from step to step: numpy's generators are made
    anew from seed and step. The schedule follows from the step.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    save(
        path,
        nets,
        optim=optim.state_dict(),
        scaler=scaler.state_dict(),
        rng=torch.get_rng_state(),
        rng_cuda=cuda,
        **state,
    )


def read_run(path):
    """The payload of `save_run`'s file."""
    try:
        return read(path)
    except Refusal as e:
        fail(f"{e}; add --fresh to start again")


def arithmetic_of(name, args):
    """The arithmetic of the run that ROOT/models/`name` would resume, as set_up wants it; "" where
    there is none."""
    path = args.root / "models" / name
    with suppress(Refusal):
        if path.is_file() and not args.fresh:
            found = read(path).get("args", {}).get("arithmetic", "")
            return found if ", " in found else ""
    return ""


def check_inputs(path, payload, **must):
    """Refuses a payload with other values of `must`: of the nets, as x_key, it was trained on."""
    for key, now in must.items():
        if payload.get(key, now) != now:
            fail(
                f"{path}: was trained on another {key.removesuffix('_key')}; add --fresh to start "
                "again"
            )


def resume_run(path, nets, optim, scaler, args, made, data_key, **must):
    """Restores `save_run`'s file into nets and optimiser and returns its payload, or None.

    None: there is nothing to resume, or --fresh; then what an earlier run `made` (names beside
    path, its checkpoints first) is set aside. A run with other arguments, or other values of `must`
    (the nets it was trained on), is refused by name; of other data it says so and goes on, with
    epochs as long as they were. With other --epochs it goes on, on the schedule of so many.
    """
    checkpoints = numbered(path.parent, made[0])
    if checkpoints and not args.fresh and not path.is_file():
        fail(
            f"{checkpoints[-1][1]}: is there but {path.name} is not, so its training cannot go "
            "on; --fresh sets it aside and starts again"
        )
    if args.fresh:
        back_up(path.parent, (path.name, *made))
    if not path.is_file():
        return None
    payload = read_run(path)
    check_inputs(path, payload, **must)
    restore(path, payload, nets, optim, scaler, args)
    if payload["data_key"] != data_key:
        print(
            f"{path}: the data has changed since; epochs stay as long as they were, --fresh "
            "starts again"
        )
    step, steps = payload["step"], args.epochs * payload["per_epoch"]
    then = payload["args"].get("epochs")
    if then != str(args.epochs) and step < steps:
        print(
            f"{path}: goes on to {args.epochs} epochs instead of {then}; "
            f"the learning rate is a cosine over all {steps} steps, from step {step} on "
            f"{cosine(step, steps, args.lr):.2g}"
        )
    return payload


def restore(path, payload, nets, optim, scaler, args):
    """Puts `save_run`'s payload into nets, optimiser, scaler and random states; refused by name if
    the arguments are others."""
    if "per_epoch" not in payload:
        fail(f"{path}: was written by an older version of this code; add --fresh to start again")
    then = {"hud_pca": "0", "mirror": "0.0", "align": "0.0", **payload["args"]}  # once had none
    others = [
        f"--{key} {typed(then.get(key))}, this command has {typed(now)}"
        for key, now in vars(args).items()
        if key not in RUNTIME_ARGS and then.get(key) != str(now)
    ]
    if others:
        fail(
            f"{path}: the run to resume had {'; '.join(others)}; repeat its arguments, or add "
            "--fresh to start again"
        )
    if then.get("arithmetic") != args.arithmetic:
        print(
            f"{path}: goes on with {args.arithmetic} instead of {then.get('arithmetic')}, so its "
            "losses may differ in their last digits"
        )
    try:
        for name, net in nets.items():
            net.load_state_dict(payload["nets"][name]["weights"])
        optim.load_state_dict(payload["optim"])
        if payload["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(payload["scaler"])
        torch.set_rng_state(payload["rng"])
        for i, state in enumerate(payload["rng_cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
    except Exception as e:  # a foreign file may hold anything
        fail(f"{path}: does not fit this run ({last_line(e)}); add --fresh to start again")


def already_trained(path, epochs, args, write):
    """Says so of a run that has ended after so many epochs; where its last file is gone or damaged,
    writes it anew: the nets were restored from the run's own file."""
    if RANK:
        return 0
    try:
        read(path)
    except Damaged as e:
        write()
        print(f"{e}; written anew")
    asked = f", {args.epochs} were asked for" if args.epochs < epochs else ""
    print(
        f"already trained: {path}, {epochs} epochs{asked}; a larger --epochs goes on, --fresh "
        "starts again"
    )
    return 0


def reopen(path):
    """Says in the last checkpoint of a run that goes on that it is not the last one any more, which
    the decoder's watcher ends with. Its date stays, so that nothing is drawn anew."""
    with suppress(Damaged):
        payload, then = read(path), path.stat()
        if payload.get("done"):
            _write(path, payload | {"done": False})
            os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


def cosine(step, steps, peak, warmup=0.05):
    """Learning rate: a linear rise over the first `warmup` of all steps, then half a cosine."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def refuse_nan(loss, when):
    """Refuses a loss (or whatever number) that is not finite."""
    if not math.isfinite(loss):
        fail(
            f"{when}: the loss is {float(loss)}; nothing was saved over the last good file; use "
            "--precision fp32, or a lower --lr with --fresh"
        )


def optimise(loss, nets, optim, scaler, lr, when="a step", clip=1.0):
    """One step of the optimiser, gradients clipped to norm `clip`.

    Refuses a loss, or gradients, that are not finite before they reach a weight (fp16's scaler
    skips such gradients); `when` says where that was. A GPU is not waited for: it says so a step
    later, and until then, or at the end, `save` refuses the weights.
    """
    for group in optim.param_groups:
        group["lr"] = lr
    optim.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optim)
    norm = nn.utils.clip_grad_norm_([p for net in nets for p in net.parameters()], clip)
    seen = torch.stack([loss.detach().double(), norm.double()])
    now = seen.to("cpu", non_blocking=True), torch.cuda.Event() if seen.is_cuda else None, when
    if seen.is_cuda:
        now[1].record()
        now, optim.unchecked = getattr(optim, "unchecked", None), now
    if now:
        _refuse_infinite(*now, scaler)
    scaler.step(optim)
    scaler.update()


def _refuse_infinite(seen, arrived, when, scaler):
    """Refuses a loss, or norm of gradients that no scaler looks at, that is not finite."""
    if arrived:
        arrived.synchronize()
    loss, norm = seen.tolist()
    refuse_nan(loss, when)
    if not scaler.is_enabled() and not math.isfinite(norm):
        fail(
            f"{when}: the gradient's norm is {norm}; nothing was saved over the last good file; "
            "use --precision fp32, or a lower --lr with --fresh"
        )
