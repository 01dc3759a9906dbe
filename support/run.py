"""A training run that can be stopped anywhere and goes on to the bit. The same in all stages.

run = Run(args, "predictor", nets, optim, scaler, per_epoch, outputs, frames, data)
while run.step < run.steps:
    loss, logs = loss_fn(...)
    run.optimise(loss)
    run.advance(loss, logs)
    if run.at_epoch_end():
        ...                            # evaluate, run.write(path), pictures
    if run.save_or_stop():
        return run.stopped()
"""

import math
import os
import time
from contextlib import suppress

import torch
from torch import nn

from support.checkpoints import Damaged, last_line, numbered, read, save, write_payload
from support.cli import Refusal, Stop, fail, typed
from support.distributed import RANK, RANKS, all_gather_numbers, rank_by_rank
from support.files import back_up, lock_file, writable
from support.pictures import ornament
from support.progress import progress
from support.run_log import RunLog

# arguments that may change when a run is resumed
RUNTIME_ARGS = {"root", "device", "threads", "fresh", "precision", "once", "newest"}
RUNTIME_ARGS |= {"save_every", "log_every", "arithmetic", "epochs", "autoencoder_steps"}
DATA_ARGS = ("data", "shares")  # these may, too: a run goes on with own drives, for example


def lock_stage(root, stage):
    """Refuses a second run of a stage in one ROOT: logs and checkpoints of the two would mix."""
    if RANK == 0:
        models = writable(root / "models")
        busy = f"{models}: another train_{stage}.py is at work there; wait, or use another --root"
        lock_file(models / f".{stage}.lock", busy)


class Run:
    """Owns step counter, schedule, log, resume file, and stopping of one training run.

    Rank 0 writes. All ranks stop at the same step.
    """

    def __init__(
        self, args, stage, nets, optim, scaler, per_epoch, outputs, frames, data, epochs=0, log=None
    ):
        """Restores ROOT/models/<stage>_resume.pth if it exists, else starts at step 0.

        outputs: names (`numbered`) that --fresh moves aside, checkpoints first.
        frames: {source: frames in a step}. data: what it trains on, as `buffer.provenance`, and
        the keys of the nets below. Refuses a run with other arguments or other nets.
        epochs: instead of --epochs. log: a RunLog to append to.
        """
        self.args, self.stage, self.data, self.frames = args, stage, data, frames
        self.epochs, self.schedule, self.first = epochs or args.epochs, cosine, 0
        self.nets, self.optim, self.scaler = nets, optim, scaler
        self.models = args.root / "models"
        self.path = self.models / f"{stage}_resume.pth"
        self.stop = self.bar = None
        with rank_by_rank():
            saved = self._resume(outputs)
        self.resumed = saved is not None
        self.step = self.first_step = saved["step"] if saved else 0
        self.seen = saved["frames_seen"] if saved else {}
        self.per_epoch = self._agree(saved["per_epoch"] if saved else per_epoch)
        self.steps = self.epochs * self.per_epoch
        self.log = log
        if not log and self.step < self.steps:
            self.log = RunLog(args, stage, self.resumed)

    @property
    def epoch(self):
        """Epochs that are complete."""
        return self.step // self.per_epoch

    @property
    def lr(self):
        """The learning rate of the present step."""
        return self.schedule(self.step, self.steps, self.args.lr)

    def begin(self, text):
        """Prints the line `text` of a run that starts, and saves it once before the first step."""
        where = f"{self.steps} steps from {self.step}"
        print(f"{text}, {where}" + (f" on {RANKS} processes" if RANKS > 1 else ""))
        if not self.resumed:
            self.save()  # no checkpoint of an epoch exists without it
        self.began = self.saved_at = time.monotonic()
        self.stop = Stop()  # in most stages a signal ends it at once until here
        words = dict(desc=self.stage.replace("_", " "), unit="step", disable=RANK > 0)
        self.bar = progress(total=self.steps, initial=self.step, **words)

    # -------------------------------------------------------------- the loop

    def optimise(self, loss):
        """One step of the optimiser on a scalar loss."""
        optimise(loss, self.nets.values(), self.optim, self.scaler, self.lr, f"step {self.step}")

    def due(self):
        """Whether the present step is logged."""
        return self.log.due(self.step, self.steps)

    def advance(self, loss, logs):
        """Counts the step. Logs loss, learning rate and {name: scalar} if a line is due."""
        if self.due():
            shown = self.log.log(self.first + self.step, loss=loss, lr=self.lr, **logs)
            self.bar.set_postfix(loss=f"{shown['loss']:.3f}")
        self.step += 1
        self.bar.update()

    def at_epoch_end(self):
        """Whether this rank evaluates and writes now."""
        return self.step % self.per_epoch == 0 and RANK == 0

    def save_or_stop(self):
        """Saves at the end of an epoch, every --save_every minutes and for a stop -> stop now?"""
        requests = all_gather_numbers(self.stop.requested)
        stopping = any(requested for (requested,) in requests)
        late = time.monotonic() - self.saved_at > 60 * self.args.save_every
        if self.at_epoch_end() or RANK == 0 and (stopping or late):
            self.save()
            self.saved_at = time.monotonic()
        if self.at_epoch_end():
            with ornament(self.log.png):
                self.log.curves()
        if stopping and self.step < self.steps:
            self.bar.close()
            return True
        return False

    def stopped(self):
        """Says that the run was stopped and saved -> its exit code."""
        again = "the same command " + ("without --fresh " if self.args.fresh else "") + "goes on"
        print(f"stopped at step {self.step} of {self.steps}; {again}")
        return 130

    def summary(self, device):
        """Steps, minutes and GPU memory of a run that has ended, in words."""
        self.bar.close()
        text = f"{self.steps} steps in {(time.monotonic() - self.began) / 60:.1f} min"
        if device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return text

    # -------------------------------------------------------------- files

    def metadata(self):
        """What each checkpoint says of its training."""
        return dict(
            args={k: str(v) for k, v in vars(self.args).items()},
            step=self.step,
            epoch=self.epoch,
            per_epoch=self.per_epoch,
            frames_seen=self.frames_seen(),
            **self.data,
        )

    def frames_seen(self):
        """{source: frames in all steps so far}"""
        steps, names = self.step - self.first_step, {*self.seen, *self.frames}
        return {n: self.seen.get(n, 0) + int(self.frames.get(n, 0)) * steps for n in sorted(names)}

    def write(self, path, **more):
        """Writes the nets as a checkpoint; `more` is what the stage adds."""
        more |= dict(epochs=max(self.epochs, self.epoch), done=self.step >= self.steps)
        save(path, self.nets, **(self.metadata() | more))

    def save(self):
        """Writes the resume file: all that the run needs to go on as if it had never stopped.

        torch holds the only random states that last from step to step: numpy's generators are
        made anew from seed and step.
        """
        if RANK:
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        states = dict(optim=self.optim.state_dict(), scaler=self.scaler.state_dict())
        states |= dict(rng=torch.get_rng_state(), rng_cuda=cuda)
        save(self.path, self.nets, **states, **self.metadata())

    def already_trained(self, path, write):
        """Says that the run has ended. Calls write(path) if its last checkpoint is not whole."""
        if RANK:
            return 0
        try:
            read(path)
        except Damaged as e:
            write(path)
            print(f"{e}; written anew")
        asked = f", {self.epochs} were asked for" if self.epochs < self.epoch else ""
        more = "a larger --epochs goes on, --fresh starts again"
        print(f"already trained: {path}, {self.epoch} epochs{asked}; {more}")
        return 0

    def reopen(self, path):
        """Marks a run's last checkpoint as no longer the last: the decoder's watcher goes on.

        Its date stays, so that the watcher does not draw it anew.
        """
        if RANK or not self.resumed:
            return
        with suppress(Damaged):
            payload, then = read(path), path.stat()
            if payload.get("done"):
                write_payload(path, payload | {"done": False})
                os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))

    # -------------------------------------------------------------- resuming

    def _resume(self, outputs):
        """The payload of the resume file, restored, or None."""
        checkpoints = numbered(self.models, outputs[0]) if outputs else []
        if self.args.fresh and outputs:
            names = (self.path.name, *outputs)
            back_up(self.models, [p for name in names for _, p in numbered(self.models, name)])
        elif checkpoints and not self.path.is_file():
            last = checkpoints[-1][1]
            fail(f"{last}: exists without {self.path.name}, so it cannot go on; use --fresh")
        if not self.path.is_file():
            return None
        payload = read_resume(self.path)
        for key, now in self.data.items():
            if key.endswith("_key") and key != "data_key":
                check_input(self.path, payload, key, now)
        self.restore(payload)

        if payload["data_key"] != self.data["data_key"]:
            same = "epochs stay as long as they were"
            print(f"{self.path}: the data has changed since; {same}, --fresh starts again")
        step, steps = payload["step"], self.epochs * payload["per_epoch"]
        then = payload["args"].get("epochs", str(self.epochs))
        if then != str(self.epochs) and step < steps:
            rate = f"a cosine over all {steps} steps, {cosine(step, steps, self.args.lr):.2g} now"
            print(f"{self.path}: {self.epochs} epochs instead of {then}; learning rate {rate}")
        return payload

    def restore(self, payload):
        """Restores nets, optimiser, scaler and random states. Refuses other arguments.

        A run of older code lacks some arguments; then its nets have to fit.
        """
        # arguments
        then = payload.get("args", {})
        others = {
            key: f"--{key} {typed(then.get(key))}, this command has {typed(now)}"
            for key, now in vars(self.args).items()
            if key not in RUNTIME_ARGS and then.get(key, str(now)) != str(now)
        }
        data = [others.pop(key) for key in DATA_ARGS if key in others]
        if others:
            again = "repeat its arguments, or add --fresh to start again"
            fail(f"{self.path}: the run to resume had {'; '.join(others.values())}; {again}")
        if data:
            print(f"{self.path}: the run so far had {'; '.join(data)}")
        if then.get("arithmetic") != self.args.arithmetic:
            was = f"{self.args.arithmetic} instead of {then.get('arithmetic')}"
            print(f"{self.path}: goes on with {was}, so its losses may differ in their last digits")

        # state
        try:
            for name, net in self.nets.items():
                net.load_state_dict(payload["nets"][name]["weights"])
            self.optim.load_state_dict(payload["optim"])
            if payload["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(payload["scaler"])
            torch.set_rng_state(payload["rng"])
            for i, state in enumerate(payload["rng_cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, i)
        except Exception as e:  # a foreign file may hold anything
            again = "add --fresh to start again"
            fail(f"{self.path}: does not fit this run ({last_line(e)}); {again}")

    def _agree(self, per_epoch):
        """Steps in an epoch as rank 0 counts them. Refuses ranks that start at other steps."""
        starts = all_gather_numbers(self.step, per_epoch)
        if len({step for step, _ in starts}) > 1:
            steps = [int(step) for step, _ in starts]
            fail(f"the processes would start at steps {steps}: copy ROOT/models to all machines")
        return int(starts[0][1])


def read_resume(path):
    """The payload of a resume file."""
    try:
        return read(path)
    except Refusal as e:
        fail(f"{e}; add --fresh to start again")


def check_input(path, payload, key, now):
    """Refuses a run that was trained on another net, as the fingerprint `key` tells."""
    if payload.get(key, now) != now:
        other = key.removesuffix("_key")
        fail(f"{path}: was trained on another {other}; add --fresh to start again")


# ------------------------------------------------------------------ one step


def cosine(step, steps, peak, warmup=0.05):
    """Learning rate: a linear rise over the first `warmup` of all steps, then half a cosine."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def optimise(loss, nets, optim, scaler, lr, when="a step", clip=1.0):
    """One step of the optimiser, gradients clipped to norm `clip`.

    Refuses a loss or a gradient that is not finite before it reaches a weight; fp16's scaler skips
    such gradients. `when` says where that was. A GPU is not waited for: its numbers arrive one step
    later, and until then `save` refuses the weights.
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
    """Refuses a loss, or a norm that no scaler checks, that is not finite."""
    if arrived:
        arrived.synchronize()
    loss, norm = seen.tolist()
    refuse_nan(loss, when)
    if not scaler.is_enabled():
        refuse_nan(norm, when, "the gradient's norm")


def refuse_nan(value, when, name="the loss"):
    """Refuses a number that is not finite."""
    if not math.isfinite(value):
        saved = "nothing was saved over the last good file"
        retry = "use --precision fp32, or a lower --lr with --fresh"
        fail(f"{when}: {name} is {float(value)}; {saved}; {retry}")
