"""Day 2, beside the encoder: a watcher that draws what each new checkpoint sees.

Waits for ROOT/models/encoder_mixed_ep{N}.pth, freezes it, and trains the transposed-convolution
decoder on it, warm-started from the last one. Writes models/decoder_ep{N}.pth,
models/decoder.jsonl, visuals/decoder_curves.png and visuals/reconstruct_ep{N}.png: held-out frames
of all sources above their reconstructions, the same frames every time. Ends after the encoder's
last checkpoint. A checkpoint takes a minute on two CPU cores; expect an error of about 5 grey
levels of 255.

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
from support import cli
from support.checkpoints import (
    build,
    epoch_of,
    fingerprint,
    latest,
    load_frozen,
    numbered,
    read,
    rotate,
)
from support.cli import Refusal, command, fail
from support.device import autocast, on_device, set_up
from support.files import back_up
from support.latents import encode
from support.pictures import ornament, plain, pyplot, save_figure
from support.run import Run, lock_stage, read_resume, refuse_nan
from support.run_log import RunLog

PICTURES = 4  # held-out frames of each source on the sheet
OUTPUTS = ("decoder_ep*.pth", "decoder_resume.pth", "decoder.jsonl")  # --fresh moves them aside
POLL_S = 2.0  # seconds between two looks for new checkpoints


def arguments():
    p = cli.parser(__doc__, data=True)
    add = p.add_argument_group("watching").add_argument
    add("--once", action="store_true", help="draw what is there, do not wait for more")
    add("--newest", action="store_true", help="draw only the newest checkpoint")
    channels = "of the decoder's last but one map, times 4 in its first"
    cli.add_flags(
        p.add_argument_group("model and optimisation"),
        ("--channels", cli.Number(int, 2, 1024), 64, channels),
        ("--steps", cli.positive, 600, "on each checkpoint"),
        ("--batch_size", cli.batch_number, 128, "frames in a step"),
        ("--lr", cli.positive_float, 2e-3, "falls to a tenth over the steps"),
    )
    return p.parse_args()


def loss_fn(decoder, z, target):
    """Squared error plus a little absolute error, which keeps thin bars crisp.

    z (N, D), target (N, 3, 64, 64) in 0..1 -> (loss, logs)
    """
    out = decoder(z)
    mse = F.mse_loss(out, target)
    return mse + 0.1 * F.l1_loss(out, target), {"mse": mse.detach()}


def newest_frame(obs):
    """(N, history, 3, 64, 64) uint8 -> the frame to reconstruct, (N, 3, 64, 64) float in 0..1."""
    return obs[:, -1].float() / 255


def exponential(step, steps, peak):
    """Learning rate: falls from `peak` to a tenth."""
    return peak * 0.1 ** (step / steps)


# ------------------------------------------------------------------ which checkpoints


def modified(path):
    """When a file was last written, in ns; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_rendered(epoch, path, models, visuals):
    """Whether decoder and sheet of this checkpoint exist and are not older than it."""
    made = (models / f"decoder_ep{epoch}.pth", visuals / f"reconstruct_ep{epoch}.png")
    return all(modified(m) >= modified(path) for m in made)


def pending(models, visuals, skipped, newest):
    """Encoder checkpoints that are not drawn yet, in numeric order: [(epoch, path)]."""
    found = numbered(models, "encoder_mixed_ep*.pth")[-1 if newest else 0 :]
    new = [(n, p) for n, p in found if (n, modified(p)) not in skipped]
    return [(n, p) for n, p in new if not is_rendered(n, p, models, visuals)]


def finished(models, visuals):
    """Whether the encoder's training has ended and its last checkpoint is drawn."""
    path = latest(models, "encoder_mixed")
    try:
        return read(path).get("done") and is_rendered(epoch_of(path), path, models, visuals)
    except Refusal:
        return False


# ------------------------------------------------------------------ one checkpoint


def warm_start(models, epoch, dim, channels):
    """The newest decoder of an earlier epoch, if it is whole and of this shape, or a fresh one."""
    earlier = [p for n, p in numbered(models, "decoder_ep*.pth") if n < epoch]
    with suppress(Refusal, IndexError):  # IndexError: there is none
        path = earlier[-1]
        decoder = build(read(path), "decoder", path)
        if decoder.args == dict(dim=dim, channels=channels):
            return decoder
    return TinyDecoder(dim, channels)


def train(args, epoch, encoder, sources, device, dtype, log):
    """Trains a decoder on a frozen encoder -> its Run, which may have been stopped."""
    torch.manual_seed(args.seed)  # the result depends on files alone
    models = args.root / "models"
    decoder = warm_start(models, epoch, encoder.dim, args.channels)
    decoder = decoder.to(device, memory_format=torch.channels_last).train()
    optim = torch.optim.AdamW(decoder.parameters(), args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # frames of all sources
    chunks, pinned = [s[0] for s in sources.values()], device.type == "cuda"
    window = 1, encoder.history, encoder.repeat
    seed = args.seed + epoch
    loader = Loader(chunks, args.batch_size, *window, args.shares, seed, pinned=pinned)
    data = provenance(sources) | {"encoder_key": fingerprint(encoder)}
    frames = dict(zip(sources, loader.counts))

    resume = models / "decoder_resume.pth"
    if resume.is_file() and read_resume(resume).get("encoder_key") != data["encoder_key"]:
        resume.unlink()  # of another checkpoint
    nets = {"decoder": decoder}
    run = Run(args, "decoder", nets, optim, scaler, args.steps, (), frames, data, 1, log)
    run.schedule, run.first = exponential, (epoch - 1) * args.steps
    run.begin(f"decoder on encoder epoch {epoch}")
    batches = on_device(loader.batches(run.step), device)
    while run.step < run.steps:
        obs = next(batches)[0]
        with torch.no_grad(), autocast(device, dtype):
            z = encoder(stack_frames(obs, encoder.history))
        with autocast(device, dtype):
            loss, logs = loss_fn(decoder, z, newest_frame(obs))
        run.optimise(loss)
        run.advance(loss, logs)
        if run.save_or_stop():
            break
    batches.close()
    run.bar.close()
    return run


@torch.no_grad()
def reconstruct(encoder, decoder, obs, device, dtype):
    """Frames (N, history, 3, 64, 64) -> reconstructions (N, 3, 64, 64) in 0..1, on the CPU."""
    z = encode(encoder, obs, device, dtype)
    with autocast(device, dtype):
        return decoder(z).float().clamp(0, 1).cpu()


def held_out_frames(sources, encoder):
    """PICTURES frames of each source: obs (N, history, 3, 64, 64), and the source of each."""
    window = encoder.history, encoder.repeat, PICTURES, 3
    shown = {name: sample_frames(s[1], *window, skip=ZOOM_STEPS)[0] for name, s in sources.items()}
    return torch.cat(list(shown.values())), [name for name, own in shown.items() for _ in own]


def draw_sheet(real, painted, names, epoch, path):
    """PNG: real frames above reconstructed ones, two rows per source, errors in grey levels.

    real, painted (N, 3, 64, 64) in 0..1; names: the source of each frame.
    """
    plt = pyplot()
    error = (real - painted).abs().mean(dim=(1, 2, 3)) * 255
    sources = list(dict.fromkeys(names))
    n = len(sources)
    figsize = 1.75 * PICTURES, 3.7 * n
    fig, axes = plt.subplots(2 * n, PICTURES, figsize=figsize, layout="constrained")
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


def publish(run, epoch, encoder, sources, device, dtype, found):
    """Writes decoder and sheet of a trained Run, dated as the encoder's checkpoint, `found`."""
    decoder, visuals = run.nets["decoder"].eval(), run.args.root / "visuals"
    obs, names = held_out_frames(sources, encoder)
    painted = reconstruct(encoder, decoder, obs, device, dtype)
    refuse_nan(painted.sum(), f"step {run.steps} on epoch {epoch}, held out")
    path, sheet = run.models / f"decoder_ep{epoch}.pth", visuals / f"reconstruct_ep{epoch}.png"
    run.write(path, epoch=epoch)
    run.path.unlink(missing_ok=True)
    rotate(run.models, "decoder", {n for n, _ in numbered(run.models, "encoder_mixed_ep*.pth")})

    real = newest_frame(obs)
    error = float((real - painted).abs().mean() * 255)
    run.log.log(epoch * run.steps, val_error=error)
    with ornament(sheet):
        draw_sheet(real, painted, names, epoch, sheet)
    for made in (path, sheet):  # a newer checkpoint of this name is then drawn too
        with suppress(OSError):
            os.utime(made, ns=(found, found))
    with ornament(run.log.png):
        run.log.curves()
    print(f"{sheet}: mean error {error:.2f} of 255", flush=True)


# ------------------------------------------------------------------ main


def set_up_anyway(args):
    """set_up, on the CPU if the GPU of --device does not exist; says so."""
    try:
        return set_up(args, "decoder")
    except Refusal as e:
        if not args.device.startswith("cuda"):
            raise
        print(f"{e}; goes on on the CPU", flush=True)
        args.device = "cpu"
        return set_up(args, "decoder")


def main():
    args = arguments()
    began, stop = time.monotonic(), cli.Stop()
    device, dtype = set_up_anyway(args)
    models, visuals = args.root / "models", args.root / "visuals"
    batch = args.shares, args.batch_size
    sources = load_sources(args.root, args.data, ZOOM_STEPS + 2, 0, *batch)
    args.data = list(sources)
    if args.once and not numbered(models, "encoder_mixed_ep*.pth"):
        how = command("train_encoder.py", args.root)
        fail(f"{models}/encoder_mixed_ep1.pth: not found; {how} makes it")
    lock_stage(args.root, "decoder")
    if args.fresh:
        back_up(models, [p for name in OUTPUTS for _, p in numbered(models, name)])
        back_up(visuals, [p for _, p in numbered(visuals, "reconstruct_ep*.png")])
    log = RunLog(args, "decoder", resumed=True)  # one log for all checkpoints

    skipped, last, idle = set(), None, False
    while not stop:
        todo = pending(models, visuals, skipped, args.newest)
        if not todo:
            if args.once or last and last.get("done") or not idle and finished(models, visuals):
                break
            if not idle:
                print(f"waiting for {models}/encoder_mixed_ep*.pth; Ctrl-C ends", flush=True)
            idle = True
            time.sleep(POLL_S)
            continue
        (epoch, path), idle = todo[0], False

        # read a checkpoint that nobody replaces meanwhile
        found, bad = modified(path), None
        try:
            encoder, payload = load_frozen(path, "encoder", device, "train_encoder.py")
        except Refusal as e:
            bad = e
        if modified(path) != found:
            continue
        skipped.add((epoch, found))  # drawn or bad: this version of the file once only
        if bad:
            print(f"skipped: {bad}", flush=True)
            continue

        run = train(args, epoch, encoder, sources, device, dtype, log)
        if run.step < run.steps:
            return run.stopped()
        publish(run, epoch, encoder, sources, device, dtype, found)
        last = payload

    minutes = f"{(time.monotonic() - began) / 60:.1f} min"
    if stop:
        print(f"stopped after {minutes}; the same command goes on")
        return 130
    whole = f"nothing to draw: each checkpoint in {models} has its decoder and its sheet"
    print(f"done in {minutes}" if last else f"{whole} in {visuals}; --fresh draws them anew")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
