"""Day 2, beside the encoder: a watcher that paints what each new checkpoint sees.

Waits for ROOT/models/encoder_mixed_ep{N}.pth, freezes it, trains the transposed-convolution decoder
on it, warm-started from the last, and writes models/decoder_ep{N}.pth, models/decoder.jsonl,
visuals/decoder_curves.png and visuals/reconstruct_ep{N}.png: held-out frames of all sources above
their reconstructions, the same frames every time. Ends when the encoder's last checkpoint is drawn.
A checkpoint takes a minute on two CPU cores; expect an error of about 5 grey levels of 255.

    python train_decoder.py --device cuda:1       beside train_encoder.py, on the second GPU
    python train_decoder.py --once                what is there now, then ends
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import os
import time
from contextlib import suppress

import torch
import torch.nn.functional as F

from buffer import Loader, load_sources, provenance, sample_frames
from car import ZOOM_STEPS
from networks import TinyDecoder, stack_frames
from support.checkpoints import (
    back_up,
    build,
    epoch_of,
    fingerprint,
    hold,
    latest,
    load_frozen,
    numbered,
    read,
    rotate,
    save,
)
from support.cli import (
    Number,
    Refusal,
    Stop,
    batch_number,
    command,
    fail,
    parser,
    positive,
    rate,
    run,
    stopped,
)
from support.pictures import ornament, plain, pyplot, save_figure
from support.progress import progress
from support.resume import (
    arithmetic_of,
    optimise,
    read_run,
    refuse_nan,
    restore,
    run_metadata,
    save_run,
)
from support.runlog import RunLog
from support.training import autocast, on_device, only_run, set_up

PICTURES = 4  # held-out frames of each source on the sheet
MADE = ("decoder_ep*.pth", "decoder_resume.pth", "decoder.jsonl")  # --fresh sets them aside
POLL_S = 2.0  # seconds between two looks for new checkpoints


def arguments():
    p = parser(__doc__, data=True)
    g = p.add_argument_group("watching")
    g.add_argument("--once", action="store_true", help="draw what is there, do not wait for more")
    g.add_argument(
        "--newest", action="store_true", help="draw only the newest of the checkpoints there are"
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--channels",
        type=Number(int, 2, 1024),
        default=64,
        help="channels of the decoder's last but one map, times 4 in its first",
    )
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=positive, default=600, help="on each checkpoint")
    g.add_argument("--batch_size", type=batch_number, default=128, help="frames in a step")
    g.add_argument("--lr", type=rate, default=2e-3, help="falls to a tenth over the steps")
    return p.parse_args()


def newest_frame(obs):
    """(N, history, 3, 64, 64) uint8 -> the frame to paint, (N, 3, 64, 64) float 0..1."""
    return obs[:, -1].float() / 255


def loss_fn(decoder, z, target):
    """Squared error plus a little absolute error, which keeps thin bars crisp."""
    out = decoder(z)
    mse = F.mse_loss(out, target)
    return mse + 0.1 * F.l1_loss(out, target), {"mse": mse.detach()}


def stamp(path):
    """When a file was last written, in ns; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def version(path):
    """What changes with each replacement or rewriting of a file; None if it is gone."""
    try:
        s = path.stat()
    except FileNotFoundError:
        return None
    return s.st_mtime_ns, s.st_size, s.st_ino


def waiting(models, visuals, skipped, newest):
    """Encoder checkpoints that are not drawn yet, in numeric order: [(epoch, path)]."""
    found = numbered(models, "encoder_mixed_ep*.pth")
    return [
        (n, p)
        for n, p in found[-1 if newest else 0 :]
        if (n, version(p)) not in skipped and not drawn(n, p, models, visuals)
    ]


def drawn(epoch, path, models, visuals):
    """Whether decoder and sheet of this checkpoint exist and are not older than it."""
    made = (models / f"decoder_ep{epoch}.pth", visuals / f"reconstruct_ep{epoch}.png")
    return all(stamp(m) >= stamp(path) for m in made)


@torch.no_grad()
def reconstruct(encoder, decoder, obs, device, dtype):
    """Frames (N, history, 3, 64, 64) -> their reconstructions (N, 3, 64, 64) float 0..1, CPU."""
    with autocast(device, dtype):
        return (
            decoder(encoder(stack_frames(obs.to(device), encoder.history)))
            .float()
            .clamp(0, 1)
            .cpu()
        )


def draw_sheet(real, painted, names, epoch, path):
    """The sheet: real above reconstructed, errors in grey levels; `names` says which source each
    frame is from, and each source has two rows, PICTURES columns wide."""
    plt = pyplot()
    error = (real - painted).abs().mean(dim=(1, 2, 3)) * 255
    sources = list(dict.fromkeys(names))
    n = len(sources)
    fig, axes = plt.subplots(
        2 * n, PICTURES, figsize=(1.75 * PICTURES, 3.7 * n), layout="constrained"
    )
    for i, name in enumerate(sources):
        own = [j for j, source in enumerate(names) if source == name]
        for ax in axes[2 * i : 2 * i + 2, len(own) :].flat:
            ax.axis("off")
        for k, j in enumerate(own[:PICTURES]):
            for row, frame in ((2 * i, real[j]), (2 * i + 1, painted[j])):
                axes[row, k].imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes[row, k].set(xticks=[], yticks=[])
            axes[2 * i + 1, k].set_xlabel(f"off by {error[j]:.1f} of 255", fontsize=7)
        axes[2 * i, 0].set_ylabel(f"{plain(name)}\nheld out", fontsize=8)
        axes[2 * i + 1, 0].set_ylabel("reconstructed", fontsize=8)
    fig.suptitle(f"encoder epoch {epoch}: mean error {error.mean():.2f} of 255", fontsize=9)
    save_figure(fig, path)


def set_up_anyway(args):
    """set_up, on the CPU where the GPU of --device is not there tonight; says so."""
    was = arithmetic_of("decoder_resume.pth", args)
    try:
        return set_up(args, was=was)
    except Refusal as e:
        if not args.device.startswith("cuda"):
            raise
        print(f"{e}; goes on on the CPU", flush=True)
        args.device = "cpu"
        return set_up(args, was=was)


def main():
    args = arguments()
    began, stop = time.monotonic(), Stop()
    device, dtype = set_up_anyway(args)
    models, visuals = args.root / "models", args.root / "visuals"
    resume = models / "decoder_resume.pth"
    sources = load_sources(args, ZOOM_STEPS + 2)
    if args.once and not numbered(models, "encoder_mixed_ep*.pth"):
        fail(
            f"{models}/encoder_mixed_ep1.pth: not found; {command('train_encoder.py', args.root)} "
            "makes it"
        )
    only_run(args, "decoder")
    if args.fresh:
        back_up(models, MADE)
        back_up(visuals, ("reconstruct_ep*.png",))
    log = RunLog(args, "decoder", resumed=True)  # one log for all checkpoints, the present one last
    skipped, last, idle, locks = set(), None, False, []
    while not stop:
        todo = waiting(models, visuals, skipped, args.newest)
        locks[:] = [hold(path) for _, path in todo]  # until the next look no rotation deletes them
        if not todo:
            if args.once or last and last.get("done") or not idle and finished(models, visuals):
                break
            if not idle:
                print(f"waiting for {models}/encoder_mixed_ep*.pth; Ctrl-C ends", flush=True)
            idle = True
            time.sleep(POLL_S)
            continue
        (epoch, path), idle = todo[0], False
        found, bad = version(path), None
        try:
            encoder, payload = load_frozen(path, "encoder", device, "train_encoder.py")
        except Refusal as e:
            bad = e
        if version(path) != found:
            continue  # replaced while it was read: looks again
        skipped.add((epoch, found))  # drawn or bad: this version of the file once only
        if bad:
            print(f"skipped: {bad}", flush=True)
            continue
        torch.manual_seed(args.seed)  # what is learned of a checkpoint depends on files alone
        nets = {
            "decoder": warm_start(models, epoch, encoder.dim, args.channels).to(
                device, memory_format=torch.channels_last
            )
        }
        decoder = nets["decoder"].train()
        optim = torch.optim.AdamW(decoder.parameters(), args.lr)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if args.compile:
            decoder.compile()
        loader = Loader(
            [s[0] for s in sources.values()],
            args.batch_size,
            1,
            encoder.history,
            encoder.repeat,
            args.shares,
            args.seed + epoch,
            pinned=device.type == "cuda",
        )
        data = provenance(sources) | {"encoder_key": fingerprint(encoder)}
        frames = dict(zip(sources, loader.counts))  # of a step
        state = lambda step: run_metadata(args, step, args.steps, frames, **data) | {"epoch": epoch}
        half, i, last_save = read_run(resume) if resume.is_file() else None, 0, time.monotonic()
        if half and half.get("encoder_key") == data["encoder_key"]:  # stopped in this one
            restore(resume, half, nets, optim, scaler, args)
            i = half["step"]
        batches = on_device(loader.batches(i), device)
        for i in progress(
            range(i, args.steps),
            desc=f"decoder, epoch {epoch}",
            unit="step",
            initial=i,
            total=args.steps,
        ):
            obs = next(batches)[0]
            with autocast(device, dtype):
                with torch.no_grad():
                    z = encoder(stack_frames(obs, encoder.history))
                loss, logs = loss_fn(decoder, z, newest_frame(obs))
            lr = args.lr * 0.1 ** (i / args.steps)
            optimise(loss, [decoder], optim, scaler, lr, f"step {i} on epoch {epoch}")
            if log.due(i, args.steps):
                log.log((epoch - 1) * args.steps + i, loss=loss, lr=lr, **logs)
            if stop or time.monotonic() - last_save > 60 * args.save_every:
                save_run(resume, nets, optim, scaler, **state(i + 1))
                last_save = time.monotonic()
            if stop:
                break
        batches.close()
        if i + 1 < args.steps:
            break  # stopped and saved: the same command goes on here
        decoder.eval()
        shown = {
            name: sample_frames(
                s[1], encoder.history, encoder.repeat, PICTURES, 3, fields=(), skip=ZOOM_STEPS
            )[0]
            for name, s in sources.items()
        }
        obs, names = torch.cat(list(shown.values())), [n for n, own in shown.items() for _ in own]
        painted = reconstruct(encoder, decoder, obs, device, dtype)
        refuse_nan(painted.sum(), f"step {args.steps} on epoch {epoch}, held out")
        made = models / f"decoder_ep{epoch}.pth"
        save(made, nets, **state(args.steps))
        resume.unlink(missing_ok=True)
        rotate(models, "decoder", {n for n, _ in numbered(models, "encoder_mixed_ep*.pth")})
        real, sheet = newest_frame(obs), visuals / f"reconstruct_ep{epoch}.png"
        error = float((real - painted).abs().mean() * 255)
        log.log(epoch * args.steps, val_error=error)
        with ornament(sheet):
            draw_sheet(real, painted, names, epoch, sheet)
        for path in (made, sheet):  # what came to the checkpoint's name meanwhile is drawn too
            with suppress(OSError):
                os.utime(path, ns=(found[0], found[0]))
        with ornament(log.png):
            log.curves()
        print(f"{sheet}: mean error {error:.2f} of 255", flush=True)
        last = payload
    minutes = f"{(time.monotonic() - began) / 60:.1f} min"
    if stop:
        return stopped(args, f"after {minutes}")
    print(
        f"done in {minutes}"
        if last
        else f"nothing to draw: what is whole in {models} has its "
        f"decoder and its sheet in {visuals}; --fresh draws them anew"
    )
    return 0


def finished(models, visuals):
    """Whether the encoder's training has ended and all that it wrote is drawn."""
    path = latest(models, "encoder_mixed")
    try:
        return read(path).get("done") and drawn(epoch_of(path), path, models, visuals)
    except Refusal:
        return False


def warm_start(models, epoch, dim, channels):
    """The newest decoder of an earlier epoch, if it is whole and of this shape, or a fresh one."""
    earlier = [p for n, p in numbered(models, "decoder_ep*.pth") if n < epoch]
    with suppress(Refusal, IndexError):  # IndexError: there is none
        path = earlier[-1]
        decoder = build(read(path), "decoder", path)
        if decoder.args == dict(dim=dim, channels=channels):
            return decoder
    return TinyDecoder(dim, channels)


if __name__ == "__main__":
    run(main)
