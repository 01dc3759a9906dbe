"""Day 3, the brain: an autoregressive MLP learns to imagine 15 latents ahead.

Reads ROOT/models/encoder_mixed_ep*.pth and the data, encodes the data once into a latent cache;
writes models/predictor_ep{N}.pth, models/predictor.jsonl, visuals/predictor_curves.png,
visuals/dream_ep{N}.png and visuals/output_dream.gif (real above dreamt, by the decoder). Prints the
held-out error of each step beside copy-last, another episode's actions and an untrained predictor:
after the laptop's 2 minutes on two CPU cores expect under 0.2 of copy-last's at step 15.

    python train_predictor.py --epochs 50
    torchrun --nproc_per_node=2 train_predictor.py --epochs 50     # two GPUs
    # a laptop:
    python train_predictor.py --hidden 256 --state 128 --epochs 3 --steps_per_epoch 700 \\
        --batch_size 512 --lr 2e-3
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import time
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from buffer import Loader, load_sources, provenance, shares_of
from car_env import FPS, MAX_STEPS
from networks import (
    Predictor,
    already_trained,
    arithmetic_of,
    build,
    cosine,
    fingerprint,
    latest,
    load_frozen,
    numbered,
    of_these,
    optimise,
    over_ranks,
    read,
    read_run,
    refuse_nan,
    resume_run,
    rotate,
    save,
    save_run,
    so_far,
    stack,
)
from support.cli import Number, Refusal, Stop, command, fail, optimisation, parser, run, stopped
from support.latents import Latents
from support.pictures import ornament, plain, pyplot, save_figure, save_gif
from support.progress import progress
from support.training import (
    DTYPES,
    RANK,
    RANKS,
    RunLog,
    autocast,
    in_turn,
    name_of,
    only_run,
    same_start,
    set_up,
    stopped_anywhere,
)
from support.window import GRID, INK, PAPER, write

SHOWN = (0, 1, 5, 10, 15)  # steps of a dream that the picture shows
SWAPPED = "another episode's actions"
GIF_SCALE = 3  # screen pixels a pixel
GIF_GAP = 8  # screen pixels between two windows
GIF_FPS = 8


def arguments():
    p = parser(__doc__, data=True)
    g = p.add_argument_group("model")
    g.add_argument(
        "--hidden", type=Number(int, 1, 16384), default=512, help="width; plans take longer with it"
    )
    g.add_argument(
        "--state",
        type=Number(int, 1, 16384),
        default=256,
        help="coordinates in which it dreams; plans take longer with them",
    )
    g.add_argument(
        "--dropout", type=Number(float, 0, 0.99), default=0.0, help="in each step, while training"
    )
    g.add_argument(
        "--horizon", type=Number(int, 1, MAX_STEPS), default=15, help="steps that are imagined"
    )
    optimisation(p, batch_size=1024)
    return p.parse_args()


def load_latents(args, device, dtype, sources, stop, resume, predictor=None):
    """(latents of all chunks, frozen encoder, its key): encodes what the cache lacks, unless the
    `predictor`'s payload, or ROOT/models/`resume`, the run to go on, is of another encoder."""
    encoder, _ = load_frozen(
        latest(args.root / "models", "encoder_mixed"), "encoder", device, "train_encoder.py"
    )
    key = fingerprint(encoder)
    models = args.root / "models"
    if predictor and predictor["encoder_key"] != key:
        fail(
            f"{latest(models, 'predictor')}: was trained on another encoder than "
            f"{latest(models, 'encoder_mixed')}; run "
            f"{command('train_predictor.py', args.root, '--fresh')}"
        )
    if (models / resume).is_file() and not args.fresh:
        of_these(models / resume, read_run(models / resume), encoder_key=key)

    def encode(obs):
        with torch.no_grad(), autocast(device, dtype):
            return encoder(stack(obs.to(device), encoder.history))

    chunks = [c for split in sources.values() for part in split for c in part]
    bar = lambda items: progress(items, desc="encode", unit="episode", disable=RANK > 0)
    stem = f"{key}-p{chunks[0].meta['preprocess']}"
    with in_turn():
        there = [
            name
            for name in (name_of(dtype), *DTYPES)  # whatever they were encoded in
            if (models / f"latents_{stem}-{name}.json").is_file()
        ]
        encoded_in = (there or [name_of(dtype)])[0]
        if encoded_in != name_of(dtype):
            print(f"takes the latents that are there, encoded in {encoded_in}")
        latents = Latents(
            args.root,
            f"{stem}-{encoded_in}",
            encoder.dim,
            encoder.history,
            encoder.repeat,
            encode,
            chunks,
            bar,
            stop,
            device,
        )
    return latents, encoder, key


class Sampler:
    """Balanced windows of cached latents: a pure function of seed and step. Of several ranks each
    reads every so-manieth window of the same batch."""

    def __init__(
        self, latents, sources, part, batch_size, horizon, shares=None, seed=0, rank=0, ranks=1
    ):
        self.latents, self.sources, self.K, self.seed = latents, sources, horizon + 1, seed
        self.part = slice(rank, None, ranks)
        self.starts = [latents.starts(split[part], self.K) for split in sources.values()]
        for split, starts in zip(sources.values(), self.starts):
            if len(starts) == 0:
                latents.refuse_short(
                    split[part],
                    horizon * latents.repeat,
                    f" ({horizon} latents, {latents.repeat} steps each)",
                )
        self.counts = shares_of(self.starts, batch_size, shares)
        self.steps_per_epoch = max(1, sum(map(len, self.starts)) // batch_size)

    def __call__(self, step):
        """(z (B, K, D), act (B, K - 1, 3)) of this step; sources, in each episodes, in order."""
        return self.latents.windows(np.concatenate(self._starts(step))[self.part], self.K)

    def _starts(self, step):
        """The rows at which the windows of this step begin, an array a source."""
        rng = np.random.default_rng([self.seed, step])
        return [np.sort(s[rng.integers(len(s), size=n)]) for s, n in zip(self.starts, self.counts)]

    @cached_property
    def _every(self):
        """The rows at which windows of both parts can begin, in order, an array a source."""
        return [
            np.sort(self.latents.starts(train + held, self.K))
            for train, held in self.sources.values()
        ]

    def swapped(self, step):
        """act (B, K - 1, 3) for the windows of this step: of another episode of the same source,
        which may be one to train on, for a source may have a single held-out episode."""
        rng = np.random.default_rng([self.seed, step, 1])
        begins = np.sort([a for a, *_ in self.latents.rows.values()] + [len(self.latents.z)])
        others = []
        for starts, every in zip(self._starts(step), self._every):
            after = np.searchsorted(begins, starts, "right")  # the episode behind each window's
            first, end = (np.searchsorted(every, begins[k]) for k in (after - 1, after))
            pick = rng.integers(len(every) - (end - first))  # of the windows before and behind it
            others.append(every[np.where(pick < first, pick, pick + end - first)])
        return self.latents.windows(np.concatenate(others)[self.part], self.K)[1]


def loss_fn(nets, z, act):
    """Mean squared error of the whole dream: z (B, H + 1, D), act (B, H, 3) -> (loss, logs)."""
    z_hat = nets["predictor"].rollout(z[:, 0], act).float()
    steps = (z_hat - z[:, 1:]).pow(2).mean(dim=(0, 2))  # (H,)
    return steps.mean(), {"first_step": steps[0].detach(), "last_step": steps[-1].detach()}


@torch.no_grad()
def evaluate(predictor, sampler, device, dtype, batches=4):
    """{row: error per step (H,)} on held-out tracks: this predictor and its trivial baselines."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = Predictor(**predictor.args).to(device).eval()
    rows = {}
    for i in range(batches):
        z, act = (x.to(device) for x in sampler(i))
        other = sampler.swapped(i).to(device)
        with autocast(device, dtype):
            dreams = {
                "predictor": predictor.rollout(z[:, 0], act),
                "copy-last": z[:, :1].expand_as(z[:, 1:]),
                SWAPPED: predictor.rollout(z[:, 0], other),
                "untrained predictor": untrained.rollout(z[:, 0], act),
            }
        for name, z_hat in dreams.items():
            error = (z_hat.float() - z[:, 1:]).pow(2).mean(dim=(0, 2)).cpu().numpy()
            rows[name] = rows.get(name, 0) + error / batches
    return rows


def table(rows):
    """The errors as text, one column a step."""
    H = len(rows["predictor"])
    lines = [f"{'held-out error at step':26}" + "".join(f"{t:6}" for t in range(1, H + 1))]
    return "\n".join(
        lines + [f"{name:26}" + "".join(f"{e:6.3f}" for e in row) for name, row in rows.items()]
    )


# ------------------------------------------------------------------ pictures


def load_decoder(models, key, device):
    """The newest decoder of a folder that was trained on this encoder, or None, and says so."""
    for _, path in reversed(numbered(models, "decoder_ep*.pth")):
        try:
            payload = read(path, "train_decoder.py")
            if payload.get("encoder_key") == key:
                return build(payload, "decoder", path).to(device).eval().requires_grad_(False)
        except (Refusal, OSError) as e:  # pictures are for the eye: nothing stops for one
            tqdm.write(f"skipped: {e}")
    tqdm.write(
        f"no decoder of this encoder, so no picture of dreams; "
        f"{command('train_decoder.py', models.parent, '--once')} makes it, this command "
        "again then draws them"
    )
    return None


def dream_windows(sources, encoder, horizon, seed=0):
    """Held-out windows to dream, the same every time: obs (n, H + history, 3, 64, 64), act, and the
    name of the source that each is from; two of each source, in order of the sources."""
    held = [s[1] for s in sources.values()]
    stream = Loader(
        held, 2 * len(held), horizon + 1, encoder.history, encoder.repeat, seed=seed + 5
    ).batches(labels=True)
    obs, act, labels = next(stream)
    stream.close()
    order = sorted(range(len(labels)), key=lambda i: labels[i][0])
    return obs[order], act[order], [list(sources)[labels[i][0]] for i in order]


@torch.no_grad()
def dream(encoder, predictor, decoder, obs, act, device):
    """Real frames, decoded dreams, both (n, H + 1, 64, 64, 3) uint8; step 0 is reconstructed."""
    n, h = len(obs), encoder.history
    z0 = encoder(stack(obs[:, :h].to(device), h))
    z = torch.cat([z0[:, None], predictor.rollout(z0, act.to(device))], dim=1)  # (n, H + 1, D)
    frames = decoder(z.flatten(0, 1)).clamp(0, 1).mul(255).byte().cpu()
    frames = frames.view(n, -1, 3, 64, 64)
    return obs[:, h - 1 :].permute(0, 1, 3, 4, 2).numpy(), frames.permute(0, 1, 3, 4, 2).numpy()


def draw_dream(real, dreamt, names, path, seconds):
    """The sheet: for each window a row of real frames above its dream; `seconds` between steps."""
    shown = [t for t in SHOWN if t < real.shape[1]]
    plt = pyplot()
    fig, axes = plt.subplots(
        2 * len(names),
        len(shown),
        layout="constrained",
        squeeze=False,
        figsize=(1.5 * len(shown) + 0.6, 3.0 * len(names)),
    )
    for i, name in enumerate(names):
        for row, frames, what in ((2 * i, real, "real"), (2 * i + 1, dreamt, "dreamt")):
            for ax, t in zip(axes[row], shown):
                ax.imshow(frames[i, t], interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                if row == 0:
                    ax.set_title(f"step {t} ({t * seconds:.2f} s)", fontsize=8)
            axes[row, 0].set_ylabel(f"{plain(name)}\n{what}", fontsize=8)
    save_figure(fig, path)


def animate_dream(real, dreamt, names, path, seconds):
    """The GIF: real above dreamt, all windows side by side, each under the name of its folder; a
    bar counts the steps, so many `seconds` each."""
    n, steps, side = len(real), real.shape[1], 64 * GIF_SCALE
    left, pitch, head, bar = 76, side + GIF_GAP, 30, 30  # px
    frames = []
    for t in range(steps):
        canvas = np.full((head + bar + 2 * side, left + n * pitch, 3), PAPER, np.uint8)
        for row, word, pictures in ((head, "real", real), (head + side + bar, "dreamt", dreamt)):
            write(canvas, word, 8, row + side // 2 - 8)
            for i in range(n):
                x = left + i * pitch
                canvas[row : row + side, x : x + side] = (
                    pictures[i, t].repeat(GIF_SCALE, 0).repeat(GIF_SCALE, 1)
                )
        for i, name in enumerate(names):
            write(canvas, name, left + i * pitch, 8)
        y, width, done = head + side, n * pitch - GIF_GAP, t / max(1, steps - 1)
        write(canvas, f"{t * seconds:.2f} s", 8, y + 7)
        canvas[y + 11 : y + 19, left : left + width] = GRID
        canvas[y + 11 : y + 19, left : left + round(width * done)] = INK
        frames.append(canvas)
    save_gif(path, [frames[0]] * 4 + frames, GIF_FPS, last_s=0.7)


# ------------------------------------------------------------------ main


def main():
    args = arguments()
    began, stop = time.monotonic(), Stop()
    device, dtype = set_up(args, True, arithmetic_of("predictor_resume.pth", args))
    sources = load_sources(args)
    only_run(args, "predictor")
    latents, encoder, key = load_latents(args, device, dtype, sources, stop, "predictor_resume.pth")
    sampler = Sampler(
        latents, sources, 0, args.batch_size, args.horizon, args.shares, args.seed, RANK, RANKS
    )
    held = Sampler(latents, sources, 1, 512, args.horizon, seed=args.seed)
    *windows, names = dream_windows(sources, encoder, args.horizon)

    predictor = Predictor(encoder.dim, args.hidden, args.state, args.dropout).to(device)
    nets = {"predictor": predictor}
    optim = torch.optim.AdamW(predictor.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    models, visuals = args.root / "models", args.root / "visuals"
    data = provenance(sources) | {"encoder_key": key}
    with in_turn():
        saved = resume_run(
            models / "predictor_resume.pth",
            nets,
            optim,
            scaler,
            args,
            ("predictor_ep*.pth", "predictor.jsonl"),
            **data,
        )
    step = saved["step"] if saved else 0
    per_epoch = saved["per_epoch"] if saved else args.steps_per_epoch or sampler.steps_per_epoch
    per_epoch = same_start(step, per_epoch)
    steps = args.epochs * per_epoch
    frames = dict(zip(sources, sampler.K * shares_of(sources, args.batch_size, args.shares)))
    state = lambda: so_far(args, step, per_epoch, frames, **data)
    keep = lambda: save_run(models / "predictor_resume.pth", nets, optim, scaler, **state())

    newest = lambda: models / f"predictor_ep{step // per_epoch}.pth"
    sheet = lambda: visuals / f"dream_ep{step // per_epoch}.png"

    def paint():  # the decoder may come later than the first epochs
        decoder = load_decoder(models, key, device)
        if decoder is not None:
            real, dreamt = dream(encoder, predictor.eval(), decoder, *windows, device)
            some = [names.index(name) for name in sources]  # of each source the first
            with ornament(sheet()):
                draw_dream(real[some], dreamt[some], list(sources), sheet(), encoder.repeat / FPS)
            with ornament(visuals / "output_dream.gif"):
                animate_dream(
                    real, dreamt, names, visuals / "output_dream.gif", encoder.repeat / FPS
                )

    def write():
        save(
            newest(),
            nets,
            **state(),
            epochs=max(args.epochs, step // per_epoch),
            horizon=args.horizon,
            done=step >= steps,
        )

    if step >= steps:
        done = already_trained(newest(), step // per_epoch, args, write)
        if RANK == 0 and not sheet().exists():
            paint()
        return done
    log = RunLog(args, "predictor", resumed=bool(saved))
    print(
        f"{sum(p.numel() for p in predictor.parameters()) / 1e6:.2f}M predictor on {device}, "
        f"{len(latents.z):,} latents, {steps} steps from {step}"
        + f" on {RANKS} processes"
        * (RANKS > 1)
    )
    loss_of = over_ranks(loss_fn, nets)
    if args.compile:
        predictor.rollout = torch.compile(predictor.rollout)  # what is called; not `forward`

    if not saved and RANK == 0:
        keep()  # no epoch's file is ever there without it
    last_save = time.monotonic()
    bar = progress(total=steps, initial=step, desc="predictor", unit="step", disable=RANK > 0)
    while step < steps:
        predictor.train()
        z, act = (x.to(device, non_blocking=True) for x in sampler(step))
        with autocast(device, dtype):
            loss, logs = loss_of(z, act)
        lr = cosine(step, steps, args.lr)
        optimise(loss, nets.values(), optim, scaler, lr, f"step {step}")
        if log.due(step, steps):
            bar.set_postfix(loss=f"{log.log(step, loss=loss, lr=lr, **logs)['loss']:.3f}")
        step += 1
        bar.update()
        stopping = stopped_anywhere(stop)
        if step % per_epoch == 0 and RANK == 0:
            predictor.eval()
            rows = evaluate(predictor, held, device, dtype)
            own = rows["predictor"]
            refuse_nan(own.mean(), f"step {step}, held out")
            log.log(
                step,
                val_loss=own.mean(),
                val_first_step=own[0],
                val_last_step=own[-1],
                val_last_over_copy_last=own[-1] / rows["copy-last"][-1],
                val_last_over_swapped=own[-1] / rows[SWAPPED][-1],
            )
            write()
            rotate(models, "predictor")
        late = time.monotonic() - last_save > 60 * args.save_every
        if RANK == 0 and (step % per_epoch == 0 or stopping or late):
            keep()
            last_save = time.monotonic()
        if step % per_epoch == 0 and RANK == 0:
            with ornament(log.png):
                log.curves()
            paint()
        if stopping:
            bar.close()
            return stopped(args, f"at step {step} of {steps}")
    bar.close()
    if RANK:
        return 0
    print(table(rows))
    H = args.horizon
    print(
        f"{newest()}: {steps} steps in "
        f"{(time.monotonic() - began) / 60:.1f} min; at step {H} the error is "
        f"{own[-1] / rows['copy-last'][-1]:.3f} of copy-last's and "
        f"{own[-1] / rows[SWAPPED][-1]:.3f} of that with swapped actions"
    )
    return 0


if __name__ == "__main__":
    run(main)
