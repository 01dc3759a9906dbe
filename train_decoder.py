"""Day 2, beside the encoder: a watcher that draws what each new checkpoint sees.

Waits for ROOT/models/encoder_mixed_ep{N}.pth, freezes it, and trains the decoder on it,
warm-started from the last one. Writes models/decoder_ep{N}.pth, models/decoder.jsonl,
visuals/decoder_curves.png, visuals/reconstruct_ep{N}.png (held-out frames of all sources above
their reconstructions, the same frames every time, and kerbs close up) and
visuals/reconstruct_progress.gif (one frame over the epochs). Prints PSNR by region, how red kerbs
are, and how well the lawn's squares are seen; beside it PCA with as many numbers, and ridge
regression. Ends after the encoder's last checkpoint. A checkpoint takes a minute on two CPU cores;
expect 31 dB.

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
from support import reconstruction as rec
from support.checkpoints import build, fingerprint, load_frozen, numbered, read, rotate
from support.cli import Refusal, command, fail
from support.device import autocast, on_device, set_up
from support.files import back_up
from support.latents import encode
from support.pictures import ornament
from support.progress import progress
from support.reconstruction_sheet import add_to_progress, draw_sheet
from support.run import Run, lock_stage, optimise, read_resume, refuse_nan
from support.run_log import RunLog

TRAINING_FRAMES = 3000  # that the linear image and the baselines are fitted to
HELD_OUT = 352  # frames of each source that are scored
CONTRAST = 1.0  # weight of a pixel's contrast in the loss, in units of its mean
OUTPUTS = ("decoder_ep*.pth", "decoder_resume.pth", "decoder.jsonl")  # --fresh moves them aside
POLL_S = 2.0  # seconds between two looks for new checkpoints


def arguments():
    p = cli.parser(__doc__, data=True)
    add = p.add_argument_group("watching").add_argument
    add("--once", action="store_true", help="draw what is there, do not wait for more")
    add("--newest", action="store_true", help="draw only the newest checkpoint")
    channels = "of the decoder's last map, times 4 in its first"
    autoencoder = "steps of an autoencoder of the same nets, scored too"
    cli.add_flags(
        p.add_argument_group("model and optimisation"),
        ("--channels", cli.Number(int, 2, 1024), 32, channels),
        ("--steps", cli.positive, 600, "on each checkpoint"),
        ("--batch_size", cli.batch_number, 64, "frames in a step"),
        ("--lr", cli.positive_float, 2e-3, "falls to a tenth over the steps"),
        ("--autoencoder_steps", cli.nonnegative_int, 0, autoencoder),
    )
    return p.parse_args()


def loss_fn(decoder, z, target):
    """Squared error plus a little absolute error, which keeps thin bars crisp.

    Pixels that differ from those around them weigh more: edges, kerbs, the lawn's squares.
    z (N, D), target (N, 3, 64, 64) in 0..1 -> (loss, logs)
    """
    error = decoder(z) - target
    light = target.mean(dim=1, keepdim=True)
    contrast = (light - F.avg_pool2d(light, 5, stride=1, padding=2)).abs()
    weight = (1 + CONTRAST * contrast / contrast.mean().clamp_min(1e-6)) / (1 + CONTRAST)
    loss = (weight * (error.square() + 0.1 * error.abs())).mean()
    return loss, {"mse": error.detach().square().mean()}


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
    found = numbered(models, "encoder_mixed_ep*.pth")[-1:]
    try:
        return any(read(p).get("done") and is_rendered(n, p, models, visuals) for n, p in found)
    except Refusal:
        return False


# ------------------------------------------------------------------ one checkpoint


class Frames:
    """Frame stacks of training and held-out tracks, the same for all checkpoints."""

    def __init__(self, sources, history, repeat):
        window = history, repeat
        chunks = [c for train, _ in sources.values() for c in train]
        self.window = window
        self.train = sample_frames(chunks, *window, TRAINING_FRAMES, 2, skip=ZOOM_STEPS)[0]
        held = {
            name: sample_frames(held, *window, HELD_OUT, 3, skip=ZOOM_STEPS)[0]
            for name, (_, held) in sources.items()
        }
        self.held, self.names = torch.cat(list(held.values())), [n for n in held for _ in held[n]]
        # the frames to reconstruct (N, 64, 64, 3) uint8
        self.fitted, self.real = (rec.channels_last(x[:, -1]) for x in (self.train, self.held))
        self.baselines = {}

    def pca(self, n):
        """SCORES of n principal components of the pixels."""
        if n not in self.baselines:
            self.baselines[n] = self.score(rec.pca_baseline(self.fitted, self.real, n))
        return self.baselines[n]

    def ridge(self, z_train, z):
        """SCORES of ridge regression from latents."""
        return self.score(rec.ridge_baseline(z_train.cpu(), self.fitted, z.cpu()))

    def score(self, decoded):
        """SCORES of decoded held-out frames (N, 64, 64, 3) in 0..255."""
        return rec.scores(*rec.frame_sums(self.real, decoded))


def warm_start(models, epoch, encoder, channels, frames, device, dtype):
    """The newest decoder of an earlier epoch, if it is whole and of this shape, or a fresh one."""
    earlier = [p for n, p in numbered(models, "decoder_ep*.pth") if n < epoch]
    fresh = TinyDecoder(encoder.dim, channels, encoder.hud_pca + encoder.scene_pca)
    with suppress(Refusal, IndexError):  # IndexError: there is none
        path = earlier[-1]
        decoder = build(read(path), "decoder", path)
        if decoder.args == fresh.args:
            return decoder
    z = encode(encoder, frames.train, device, dtype).cpu()
    fresh.fit_image(z, newest_frame(frames.train))
    return fresh


def train(args, epoch, encoder, sources, frames, device, dtype, log):
    """Trains a decoder on a frozen encoder -> its Run, which may have been stopped."""
    torch.manual_seed(args.seed)  # the result depends on files alone
    models = args.root / "models"
    decoder = warm_start(models, epoch, encoder, args.channels, frames, device, dtype)
    decoder = decoder.to(device, memory_format=torch.channels_last).train()
    optim = torch.optim.AdamW(decoder.parameters(), args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # frames of all sources
    loader = make_loader(args, sources, encoder, epoch, device)
    data = provenance(sources) | {"encoder_key": fingerprint(encoder)}
    shown = dict(zip(sources, loader.counts))

    resume = models / "decoder_resume.pth"
    if resume.is_file() and read_resume(resume).get("encoder_key") != data["encoder_key"]:
        resume.unlink()  # of another checkpoint
    nets = {"decoder": decoder}
    run = Run(args, "decoder", nets, optim, scaler, args.steps, (), shown, data, 1, log)
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


def make_loader(args, sources, encoder, epoch, device):
    """Single latents of the training tracks of all sources."""
    chunks, window = [s[0] for s in sources.values()], (1, encoder.history, encoder.repeat)
    seed, pinned = args.seed + epoch, device.type == "cuda"
    return Loader(chunks, args.batch_size, *window, args.shares, seed, pinned=pinned)


def train_autoencoder(encoder, decoder, batches, steps, lr, device, dtype):
    """Nets of both shapes, trained end to end on pixels -> (encoder, decoder).

    All of the latent may serve the picture. The linear image begins as the decoder's.
    batches: endless obs (B, history, 3, 64, 64) uint8 on the device.
    """
    old_encoder, old_decoder, encoder = encoder, decoder, encoder.reinitialized()
    encoder.mean.copy_(old_encoder.mean), encoder.std.copy_(old_encoder.std)
    decoder = TinyDecoder(**decoder.args).to(device)
    decoder.image.load_state_dict(old_decoder.image.state_dict())
    nets = [net.to(memory_format=torch.channels_last).train() for net in (encoder, decoder)]
    optim = torch.optim.AdamW([p for net in nets for p in net.parameters()], lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for step in progress(range(steps), desc="autoencoder", unit="step", leave=False):
        if cli.Stop.requested:
            break
        obs = next(batches)
        with autocast(device, dtype):
            z = encoder(stack_frames(obs, encoder.history))
            loss, _ = loss_fn(decoder, z, newest_frame(obs))
        optimise(loss, nets, optim, scaler, exponential(step, steps, lr), f"autoencoder, {step}")
    return encoder.eval(), decoder.eval()


@torch.no_grad()
def reconstruct(encoder, decoder, obs, device, dtype):
    """Frames (N, history, 3, 64, 64) -> (reconstructions (N, 64, 64, 3) in 0..255, z (N, D))."""
    z = encode(encoder, obs, device, dtype)
    with autocast(device, dtype):
        out = torch.cat([decoder(part).float().cpu() for part in z.split(256)])
    return rec.channels_last(out), z


def score_autoencoder(args, run, encoder, sources, frames, device, dtype):
    """SCORES of an autoencoder of --autoencoder_steps."""
    batches = on_device(make_loader(args, sources, encoder, 0, device).batches(), device)
    obs = (x for x, *_ in batches)
    sizes = obs, args.autoencoder_steps, args.lr, device, dtype
    pair = train_autoencoder(encoder, run.nets["decoder"], *sizes)
    batches.close()
    return frames.score(reconstruct(*pair, frames.held, device, dtype)[0])


def publish(args, run, epoch, encoder, sources, frames, device, dtype, found):
    """Writes decoder and sheet of a trained Run, dated as the encoder's checkpoint, `found`."""
    decoder, visuals = run.nets["decoder"].eval(), run.args.root / "visuals"
    painted, z = reconstruct(encoder, decoder, frames.held, device, dtype)
    refuse_nan(painted.sum(), f"step {run.steps} on epoch {epoch}, held out")
    path, sheet = run.models / f"decoder_ep{epoch}.pth", visuals / f"reconstruct_ep{epoch}.png"
    run.write(path, epoch=epoch)
    rotate(run.models, "decoder", {n for n, _ in numbered(run.models, "encoder_mixed_ep*.pth")})

    # pictures
    with ornament(sheet):
        draw_sheet(frames.real, painted, frames.names, epoch, sheet)
    for made in (path, sheet):  # a newer checkpoint of this name is then drawn too
        with suppress(OSError):
            os.utime(made, ns=(found, found))
    with ornament(gif := visuals / "reconstruct_progress.gif"):
        add_to_progress(frames.real, painted, epoch, gif)

    # scores beside those of other codes
    rows = {"this decoder": frames.score(painted)}
    own = dict(zip(rec.SCORES, rows["this decoder"]))
    logged = {"val_psnr": "frame, dB", "val_red_at_kerbs": "red at kerbs", "val_lawn_r": "lawn r"}
    run.log.log(epoch * run.steps, **{key: own[name] for key, name in logged.items()})
    with ornament(run.log.png):
        run.log.curves()
    run.path.unlink(missing_ok=True)
    n = min(encoder.dim, len(frames.train))
    rows[f"PCA of the pixels, {n} numbers"] = frames.pca(n)
    rows["ridge regression"] = frames.ridge(encode(encoder, frames.train, device, dtype), z)
    if args.autoencoder_steps:
        name = f"autoencoder, {args.autoencoder_steps} steps"
        rows[name] = score_autoencoder(args, run, encoder, sources, frames, device, dtype)
    print(rec.table(rows))
    print(f"{sheet}: {own['frame, dB']:.2f} dB on {len(painted)} held-out frames", flush=True)


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
        names = "reconstruct_ep*.png", "reconstruct_progress.gif", "reconstruct_progress.npz"
        back_up(visuals, [p for name in names for _, p in numbered(visuals, name)])
    log = RunLog(args, "decoder", resumed=True)  # one log for all checkpoints

    skipped, last, idle, frames = set(), None, False, None
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

        if frames is None or frames.window != (encoder.history, encoder.repeat):
            frames = Frames(sources, encoder.history, encoder.repeat)
        run = train(args, epoch, encoder, sources, frames, device, dtype, log)
        if run.step < run.steps:
            return run.stopped()
        publish(args, run, epoch, encoder, sources, frames, device, dtype, found)
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
