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

import torch

from buffer import load_sources, provenance, shares_of
from car import FPS, MAX_STEPS
from networks import Predictor
from support.checkpoints import rotate, save
from support.cli import Number, Stop, optimisation, parser, run, stopped
from support.distributed import RANK, RANKS, rank_by_rank, same_start, stopped_anywhere, wrap_ddp
from support.dreams import animate_dream, draw_dream, dream, dream_windows, load_decoder
from support.latents import WindowSampler, load_latents
from support.pictures import ornament
from support.progress import progress
from support.resume import (
    already_trained,
    arithmetic_of,
    cosine,
    optimise,
    refuse_nan,
    resume_run,
    run_metadata,
    save_run,
)
from support.runlog import RunLog
from support.training import autocast, only_run, set_up

SWAPPED = "another episode's actions"


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


# ------------------------------------------------------------------ main


def main():
    args = arguments()
    began, stop = time.monotonic(), Stop()
    device, dtype = set_up(args, True, arithmetic_of("predictor_resume.pth", args))
    sources = load_sources(args)
    only_run(args, "predictor")
    latents, encoder, key = load_latents(args, device, dtype, sources, stop, "predictor_resume.pth")
    sampler = WindowSampler(
        latents, sources, 0, args.batch_size, args.horizon, args.shares, args.seed, RANK, RANKS
    )
    held = WindowSampler(latents, sources, 1, 512, args.horizon, seed=args.seed)
    *windows, names = dream_windows(sources, encoder, args.horizon)

    predictor = Predictor(encoder.dim, args.hidden, args.state, args.dropout).to(device)
    nets = {"predictor": predictor}
    optim = torch.optim.AdamW(predictor.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    models, visuals = args.root / "models", args.root / "visuals"
    data = provenance(sources) | {"encoder_key": key}
    with rank_by_rank():
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
    state = lambda: run_metadata(args, step, per_epoch, frames, **data)
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
    loss_of = wrap_ddp(loss_fn, nets)
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
