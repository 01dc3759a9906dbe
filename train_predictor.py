"""Day 3: the predictor. An autoregressive MLP learns to roll out 15 latents.

Reads ROOT/models/encoder_mixed_ep*.pth and the data, which it encodes once into a cache of latents.
Writes models/predictor_ep{N}.pth, models/predictor.jsonl, visuals/predictor_curves.png, and with a
decoder visuals/dream_ep{N}.png and visuals/output_dream.gif: real frames above decoded rollouts.
Prints the held-out error of each step beside copying the last latent, another episode's actions,
and an untrained predictor. Two minutes on two CPU cores give under 0.2 of copy-last's error at step
15 (the laptop line below).

    python train_predictor.py --epochs 50
    torchrun --nproc_per_node=2 train_predictor.py --epochs 50     # two GPUs
    python train_predictor.py --hidden 256 --state 128 --epochs 3 --steps_per_epoch 700 \\
        --batch_size 512 --lr 2e-3                                 # a laptop
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

from pathlib import Path

import torch
import torch.nn.functional as F

from buffer import load_sources, provenance, shares_of
from car import MAX_STEPS
from networks import Predictor
from support.checkpoints import fingerprint, latest, load_frozen, rotate
from support.cli import Number, Stop, add_flags, fail, optimisation, parser, run_main
from support.device import autocast, set_up
from support.distributed import RANK, RANKS, rank_by_rank, wrap_ddp
from support.dreams import draw_dreams, dream_windows, load_decoder
from support.latents import WindowSampler, load_latents
from support.run import Run, lock_stage, refuse_nan

LOOKS_EVERY = 4  # windows of a batch of which one trains the looks
SWAPPED = "another episode's actions"
OUTPUTS = ("predictor_ep*.pth", "predictor.jsonl")  # --fresh moves them aside


def arguments():
    p = parser(__doc__, data=True)
    size = Number(int, 1, 16384)
    add_flags(
        p.add_argument_group("model"),
        ("--hidden", size, 512, "width of a transition; plans take longer with it"),
        ("--state", size, 256, "size of the predictor's state; plans take longer with it"),
        ("--dropout", Number(float, 0, 0.99), 0.0, "in each transition, while training"),
        ("--horizon", Number(int, 1, MAX_STEPS), 15, "latents in a rollout"),
    )
    optimisation(p, batch_size=1024)
    weights = "begin with the weights of this predictor_ep{N}.pth, such as the shipped one"
    p.add_argument("--start", type=Path, help=weights)
    return p.parse_args()


def read_start(args, device):
    """The predictor of --start, or None. A run that is resumed does not need it any more.

    Refuses one of another encoder or of other sizes.
    """
    models = args.root / "models"
    if not args.start or (models / "predictor_resume.pth").is_file() and not args.fresh:
        return None
    with rank_by_rank():  # --fresh may move it aside
        start, payload = load_frozen(args.start, "predictor", device)
    newest = latest(models, "encoder_mixed")
    encoder, _ = load_frozen(newest, "encoder", device, "train_encoder.py")
    if payload.get("encoder_key") != fingerprint(encoder):
        what = f"was trained on another encoder than {newest}"
        fail(f"--start {args.start}: {what}; its own must be the newest in {models}")
    sizes = {name: start.args[name] for name in ("hidden", "state")}
    if sizes != {name: getattr(args, name) for name in sizes}:
        flags = " ".join(f"--{name} {size}" for name, size in sizes.items())
        fail(f"--start {args.start}: has other sizes; add {flags}")
    return start


def loss_fn(nets, z, act):
    """Mean squared error of the whole rollout: z (B, H + 1, D), act (B, H, 3) -> (loss, logs).

    The planned part in all windows, the looks in every LOOKS_EVERY-th.
    """
    predictor, dim = nets["predictor"], nets["predictor"].dim
    now, then = z[:, 0], z[:, 1:]
    h = predictor.states(now[:, :dim], act)
    steps = predictor.latents(h, now[:, :dim]).float() - then[..., :dim]
    steps = steps.pow(2).mean(dim=(0, 2))  # (H,)
    loss, logs = steps.mean(), {"first_step": steps[0], "last_step": steps[-1]}
    if predictor.looks:
        some = slice(None, None, LOOKS_EVERY)
        looks = predictor.future_looks(h[some], now[some, dim:]).float()
        logs["looks"] = F.mse_loss(looks, then[some, :, dim:])
        loss = loss + logs["looks"]
    return loss, {name: x.detach() for name, x in logs.items()}


@torch.no_grad()
def evaluate(predictor, sampler, device, dtype, batches=4):
    """{row: error per step (H,)} on held-out tracks: this predictor and its trivial baselines.

    Errors are those of the planned part.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = Predictor(**predictor.args).to(device).eval()
    rows = {}
    for i in range(batches):
        z, act = (x.to(device) for x in sampler(i))
        z = z[..., : predictor.dim]
        other = sampler.swapped(i).to(device)
        with autocast(device, dtype):
            rollouts = {
                "predictor": predictor.rollout(z[:, 0], act),
                "copy-last": z[:, :1].expand_as(z[:, 1:]),
                SWAPPED: predictor.rollout(z[:, 0], other),
                "untrained predictor": untrained.rollout(z[:, 0], act),
            }
        for name, z_hat in rollouts.items():
            error = (z_hat.float() - z[:, 1:]).pow(2).mean(dim=(0, 2)).cpu().numpy()
            rows[name] = rows.get(name, 0) + error / batches
    return rows


def table(rows):
    """The errors as text, one column a step."""
    numbers = lambda row: "".join(f"{e:6.3f}" for e in row)
    steps = "".join(f"{t:6}" for t in range(1, len(rows["predictor"]) + 1))
    lines = [f"{name:26}{numbers(row)}" for name, row in rows.items()]
    return "\n".join([f"{'held-out error at step':26}{steps}", *lines])


def main():
    args = arguments()
    stop = Stop()  # encoding may take long
    device, dtype = set_up(args, "predictor", ranks=True)
    sources = load_sources(args.root, args.data, 1, 0, args.shares, args.batch_size)
    args.data = list(sources)
    lock_stage(args.root, "predictor")

    start = read_start(args, device)

    # data: windows of cached latents; frames of a few windows for pictures
    latents, encoder, key = load_latents(args, "predictor", sources, device, dtype, stop)
    batches = args.batch_size, args.horizon, args.shares, args.seed
    sampler = WindowSampler(latents, sources, 0, *batches, (RANK, RANKS))
    held = WindowSampler(latents, sources, 1, 512, args.horizon, seed=args.seed)
    windows = dream_windows(sources, encoder, args.horizon)

    sizes = args.hidden, args.state, args.dropout
    predictor = Predictor(encoder.planned, *sizes, encoder.scene_pca).to(device)
    if start:
        predictor.load_state_dict(start.state_dict())
    nets = {"predictor": predictor}
    optim = torch.optim.AdamW(predictor.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    per_epoch = args.steps_per_epoch or sampler.steps_per_epoch
    frames = dict(zip(sources, sampler.K * shares_of(sources, args.batch_size, args.shares)))
    data = provenance(sources) | {"encoder_key": key}
    run = Run(args, "predictor", nets, optim, scaler, per_epoch, OUTPUTS, frames, data)
    newest = lambda: run.models / f"predictor_ep{run.epoch}.pth"
    write = lambda path: run.write(path, horizon=args.horizon)
    sheet = lambda: args.root / "visuals" / f"dream_ep{run.epoch}.png"

    def paint():  # the decoder may come later than the first epochs
        if decoder := load_decoder(run.models, key, device):
            draw_dreams(encoder, predictor.eval(), decoder, windows, list(sources), sheet(), device)

    if run.step >= run.steps:
        done = run.already_trained(newest(), write)
        if RANK == 0 and not sheet().exists():
            paint()
        return done
    loss_of = wrap_ddp(loss_fn, nets)
    size = sum(p.numel() for p in predictor.parameters()) / 1e6
    run.begin(f"{size:.2f}M predictor, {len(latents.z):,} latents")

    while run.step < run.steps:
        predictor.train()
        z, act = (x.to(device, non_blocking=True) for x in sampler(run.step))
        with autocast(device, dtype):
            loss, logs = loss_of(z, act)
        run.optimise(loss)
        run.advance(loss - logs.get("looks", 0), logs)  # as the held-out loss: the planned part
        if run.at_epoch_end():
            rows = evaluate(predictor.eval(), held, device, dtype)
            log_errors(run, rows)
            write(newest())
            rotate(run.models, "predictor")
        if run.save_or_stop():
            return run.stopped()
        if run.at_epoch_end():
            paint()
    if RANK == 0:
        print(table(rows))
        last = {name: f"{rows['predictor'][-1] / row[-1]:.3f}" for name, row in rows.items()}
        of = f"{last['copy-last']} of copy-last's and {last[SWAPPED]} of that with swapped actions"
        print(f"{newest()}: {run.summary(device)}; at step {args.horizon} the error is {of}")
    return 0


def log_errors(run, rows):
    """Logs the held-out errors of `evaluate`."""
    own = rows["predictor"]
    refuse_nan(own.mean(), f"step {run.step}, held out")
    shares = {
        "val_last_over_copy_last": own[-1] / rows["copy-last"][-1],
        "val_last_over_swapped": own[-1] / rows[SWAPPED][-1],
    }
    first_last = {"val_first_step": own[0], "val_last_step": own[-1]}
    run.log.log(run.step, val_loss=own.mean(), **first_last, **shares)


if __name__ == "__main__":
    run_main(main)
