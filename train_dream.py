"""Day 3, if you like: the dream model. It samples the latents to come, so that dreams hold.

Reads the newest encoder and predictor in ROOT/models, and the data, through the predictor's cache
of latents. Writes models/dream_ep{N}.pth, models/dream.jsonl, visuals/dream_curves.png. Prints the
held-out error of its mean, in units of what a linear map lacks, beside that map, another episode's
actions and copy-last; and that of its predictor's rollout, of latents. The planner does not use it;
`play.py` and `evaluate.py --parts long_dreams` do.

    python train_dream.py --epochs 20 --steps_per_epoch 5000
    python train_dream.py --epochs 8 --steps_per_epoch 1000 --batch_size 30    # 90 min on one core
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import torch

from buffer import load_sources, provenance, shares_of
from car import MAX_STEPS, ZOOM_STEPS
from dream import ANCHORS, DreamModel
from support.checkpoints import fingerprint, latest, load_frozen, rotate
from support.cli import Number, Stop, add_flags, optimisation, parser, run_main
from support.device import autocast, set_up
from support.distributed import RANK, RANKS, wrap_ddp
from support.latents import WindowSampler, load_latents
from support.run import Run, lock_stage, refuse_nan

OUTPUTS = ("dream_ep*.pth", "dream.jsonl")  # --fresh moves them aside
PAIRS = 20_000  # of neighbouring latents, to which the linear map is fitted


def arguments():
    p = parser(__doc__, data=True)
    size = Number(int, 1, 16384)
    add_flags(
        p.add_argument_group("model"),
        ("--hidden", size, 512, "size of the memory"),
        ("--width", size, 768, "of the flow's layers"),
        ("--depth", Number(int, 1, 64), 2, "blocks of the flow"),
        ("--horizon", Number(int, 1, MAX_STEPS), ANCHORS[-1], "latents in a window"),
    )
    optimisation(p, batch_size=64)
    return p.parse_args()


def loss_fn(nets, z, act):
    """Squared errors of flow and rollout: z (B, H + 1, D), act (B, H, 3) -> (loss, logs)."""
    # the rollout first: older torch keeps casts that were made without gradient
    rollout, flow = nets["dream"].rollout_error(z, act), nets["dream"].loss(z, act)
    logs = {"rollout": rollout, "last_rollout": rollout[:, -1]}
    return flow.mean() + rollout.mean(), {name: x.detach().mean() for name, x in logs.items()}


@torch.no_grad()
def evaluate(model, sampler, device, dtype, batches=2):
    """{row: held-out error}: of the flow; of the model's mean, with the true actions and another
    episode's, of the linear map, and of copy-last, all in the same units. Of the rollout: in those
    of latents.
    """
    rows = {}
    for i in range(batches):
        z, act = (x.to(device) for x in sampler(i))
        other = sampler.swapped(i).to(device)
        with torch.random.fork_rng(), autocast(device, dtype):
            torch.manual_seed(i)
            errors = {
                "val_loss": model.loss(z, act),
                "val_rollout": model.rollout_error(z, act),
                "val_mean": model.mean_error(z, act),
                "val_swapped": model.mean_error(z, other),
                "val_linear": ((z[:, 1:] - model.expect(z[:, :-1], act)) / model.scale).pow(2),
                "val_copy_last": ((z[:, 1:] - z[:, :-1]) / model.scale).pow(2),
            }
        for name, error in errors.items():
            rows[name] = rows.get(name, 0) + float(error.float().mean()) / batches
    return rows


def main():
    args = arguments()
    stop = Stop()  # encoding may take long
    device, dtype = set_up(args, "dream", ranks=True)
    sources = load_sources(args.root, args.data, 1, 0, args.shares, args.batch_size)
    args.data = list(sources)
    lock_stage(args.root, "dream")

    # data: windows of cached latents
    newest = latest(args.root / "models", "predictor")
    predictor, payload = load_frozen(newest, "predictor", device, "train_predictor.py")
    latents, _, key = load_latents(args, "dream", sources, device, dtype, stop, payload)
    of = dict(shares=args.shares, seed=args.seed)
    window = dict(horizon=args.horizon, skip=ZOOM_STEPS)
    sampler = WindowSampler(
        latents, sources, 0, args.batch_size, **window, **of, ranks=(RANK, RANKS)
    )
    held = WindowSampler(latents, sources, 1, 256, **window, seed=args.seed)

    model = DreamModel(predictor.args, args.hidden, args.width, args.depth).to(device)
    model.predictor.load_state_dict(predictor.state_dict())
    pairs = WindowSampler(latents, sources, 0, PAIRS, 1, **of, skip=ZOOM_STEPS)(0)
    z, act = (x.to(device) for x in pairs)
    model.fit(z[:, 0], act[:, 0], z[:, 1])
    nets, learned = {"dream": model}, [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(learned, args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    per_epoch = args.steps_per_epoch or sampler.steps_per_epoch
    frames = dict(zip(sources, sampler.K * shares_of(sources, args.batch_size, args.shares)))
    data = provenance(sources) | {"encoder_key": key, "predictor_key": fingerprint(predictor)}
    run = Run(args, "dream", nets, optim, scaler, per_epoch, OUTPUTS, frames, data)
    newest = lambda: run.models / f"dream_ep{run.epoch}.pth"

    if run.step >= run.steps:
        return run.already_trained(newest(), run.write)
    loss_of = wrap_ddp(loss_fn, nets)
    size = sum(p.numel() for p in learned) / 1e6
    run.begin(f"{size:.2f}M dream model, {len(latents.z):,} latents")

    while run.step < run.steps:
        model.train()
        z, act = (x.to(device, non_blocking=True) for x in sampler(run.step))
        torch.manual_seed((args.seed * run.steps + run.step) * RANKS + RANK)  # each rank its noise
        with autocast(device, dtype):
            loss, logs = loss_of(z, act)
        run.optimise(loss)
        run.advance(loss - logs["rollout"], logs)  # as the held-out loss: the flow's
        if run.at_epoch_end():
            rows = evaluate(model.eval(), held, device, dtype)
            refuse_nan(rows["val_loss"], f"step {run.step}, held out")
            run.log.log(run.step, **rows)
            run.write(newest())
            rotate(run.models, "dream")
        if run.save_or_stop():
            return run.stopped()
    if RANK == 0:
        words = ", ".join(f"{name[4:]} {error:.3f}" for name, error in rows.items())
        print(f"{newest()}: {run.summary(device)}; held-out error: {words}")
    return 0


if __name__ == "__main__":
    run_main(main)
