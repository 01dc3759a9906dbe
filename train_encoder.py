"""Day 2, the eye: a ResNet-18 learns to see without labels.

Reads those of ROOT/data_race, data_recovery and data that are there; writes
ROOT/models/encoder_mixed_ep{N}.pth each epoch, models/encoder.jsonl and
visuals/encoder_curves.png. `--objective joint` (default) asks that latents
be predictable from actions, tell the action, tell linearly how a picture was bent, with --congeal
also how to bend it straight, and, as in VICReg, vary and be uncorrelated; `--objective vicreg` is
plain VICReg on two photometric views. Each epoch prints a linear probe of what the latents know:
after the laptop's 3 minutes on two CPU cores expect R² over 0.9 for speed and lateral offset.

    python train_encoder.py --epochs 50 --batch_size 256
    torchrun --nproc_per_node=2 train_encoder.py --epochs 50 --batch_size 256            two GPUs
    python train_encoder.py --channels 16 --dim 128 --strides 2 2 2 1 --epochs 4 \\
        --steps_per_epoch 150 --batch_size 96 --lr 2e-3 --shares 0.35 0.45 0.2       a laptop
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import itertools
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from buffer import Loader, load_sources, provenance, sample_frames, shares_of
from car import MAX_STEPS, ZOOM_STEPS
from car.telemetry import TELEMETRY
from networks import (
    HUD_VALUES,
    InverseModel,
    Predictor,
    Projector,
    TinyEncoder,
    WarpHead,
    normalize_action,
    stack_frames,
)
from support.augment import AHEAD, STRETCHES, congealing_loss, flip_batches, jitter_, warp_
from support.checkpoints import rotate, save
from support.cli import Number, Stop, fail, fraction, optimisation, parser, run, stopped, weight
from support.distributed import RANK, RANKS, rank_by_rank, same_start, stopped_anywhere, wrap_ddp
from support.latents import features_of
from support.pictures import ornament
from support.progress import progress
from support.resume import (
    already_trained,
    arithmetic_of,
    cosine,
    optimise,
    refuse_nan,
    reopen,
    resume_run,
    run_metadata,
    save_run,
)
from support.runlog import RunLog
from support.training import autocast, name_of, on_device, only_run, set_up
from vicreg import covariance, effective_rank, variance, vicreg_loss

PROBED = ("speed", "yaw_rate", "lateral_offset", "heading_error", "curvature_20")
COLLAPSED = 0.02  # mean standard deviation of a latent's dimensions; a healthy one has about 1
COLLAPSED_RANK = 2  # effective rank of a batch of latents; a healthy one has dozens
CHECK_EVERY = 50  # steps between two looks for collapse
MADE = ("encoder_mixed_ep*.pth", "encoder.jsonl", "decoder_ep*.pth")  # a fresh run sets it aside


def arguments(argv=None):
    p = parser(__doc__, data=True)
    g = p.add_argument_group("model")
    g.add_argument(
        "--channels",
        type=Number(int, 4, 512),
        default=64,
        help="of the first stage; ResNet-18 has 64, 16 learns ten times faster on a CPU",
    )
    g.add_argument(
        "--dim",
        type=Number(int, 3, 8192),
        default=512,
        help="size of a latent; 128 learns in fewer steps and plans faster",
    )
    g.add_argument(
        "--embedding", type=Number(int, 3, 16384), default=1024, help="vicreg: size of its expander"
    )
    g.add_argument(
        "--history",
        type=Number(int, 1, 16),
        default=3,
        help="frames a latent sees; one hides speed and yaw rate",
    )
    g.add_argument(
        "--strides",
        type=Number(int, 1, 8),
        nargs=4,
        default=[1, 2, 2, 2],
        help="of ResNet-18's stages, product 8; 2 2 2 1 is twice as fast",
    )
    g.add_argument(
        "--hud_pca",
        type=Number(int, 0, HUD_VALUES - 1),
        help="numbers of a latent that are principal components of the instruments' "
        "pixels, straight from the frame (joint 8, vicreg 0): what they hold needs "
        "no learning",
    )
    g.add_argument(
        "--repeat",
        type=Number(int, 1, 10),
        default=2,
        help="environment steps between frames, and between latents: 2 is 25 Hz; with "
        "more than 10 no episode of 1000 steps is long enough for the cost model",
    )
    g = p.add_argument_group("objective")
    g.add_argument(
        "--objective",
        choices=["joint", "vicreg"],
        default="joint",
        help="joint drives; vicreg is the plain two-view loss",
    )
    g.add_argument(
        "--targets",
        type=Number(int, 1, MAX_STEPS),
        nargs="+",
        default=[1, 3, 8],
        help="joint: steps of the dream that are compared with encoded frames; each "
        "costs as much as the window's first, the steps between nearly nothing",
    )
    g.add_argument("--pred", type=weight, default=25.0, help="joint: weight of the prediction")
    g.add_argument("--std", type=weight, help="weight of the variance hinge (joint 16, vicreg 25)")
    g.add_argument("--cov", type=weight, default=1.0, help="weight of the covariance term")
    g.add_argument("--inverse", type=weight, default=2.0, help="joint: weight of inverse dynamics")
    g.add_argument(
        "--warp",
        type=weight,
        default=15.0,
        help="joint: weight of telling how a picture was bent, which teaches where the "
        "road lies and where it leads; 0 leaves the bent pictures out",
    )
    g.add_argument(
        "--congeal",
        type=weight,
        default=0.0,
        help="joint: weight of telling how to bend a picture straight, so that all look "
        "alike: where the road lies, not only how far it was moved; needs --warp. "
        "The weights that come with the code have 25, with --pred 30 --cov 2",
    )
    g.add_argument(
        "--mirror",
        type=fraction,
        default=0.0,
        help="share of the windows with left and right exchanged, in pictures and "
        "steering: a lap has few bends to the right, 0.5 knows more of them",
    )
    g.add_argument("--sim", type=weight, default=25.0, help="vicreg: weight of the invariance")
    optimisation(p, batch_size=256)
    args = p.parse_args(argv)
    if args.targets != sorted(set(args.targets)) or args.targets[0] != 1:
        p.error(f"--targets {args.targets}: expected rising steps from 1 on, such as 1 3 8")
    if math.prod(args.strides) != 8:
        p.error(f"--strides {args.strides}: expected four numbers with product 8, such as 2 2 2 1")
    if args.congeal and not args.warp:
        p.error(
            f"--congeal {args.congeal:g} --warp 0: what straightens a picture is told by the head "
            "that tells how it was bent; add --congeal 0"
        )
    own = {"joint": {"std": 16.0, "hud_pca": 8}, "vicreg": {"std": 25.0, "hud_pca": 0}}
    for name, value in own[args.objective].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dim - args.hud_pca <= COLLAPSED_RANK:
        p.error(
            f"--dim {args.dim} --hud_pca {args.hud_pca}: leaves {args.dim - args.hud_pca} numbers "
            f"of a latent to learn, expected more than {COLLAPSED_RANK}, which a collapse has"
        )
    together = args.batch_size // RANKS * len(latents_of(args))
    if together <= COLLAPSED_RANK + 1:
        p.error(
            f"--batch_size {args.batch_size}: {together} latents of a step are compared with "
            f"one another, expected {COLLAPSED_RANK + 2} or more"
        )
    return args


def spread(z):
    """Mean standard deviation of the dimensions of latents (N, D): near 0 they have collapsed."""
    return z.std(dim=0).mean()


def refuse_collapse(z, when):
    """Refuses latents (N, D) that have become one point, or one line."""
    if spread(z) < COLLAPSED or effective_rank(z) < COLLAPSED_RANK:
        fail(
            f"{when}: the latents collapsed (spread {spread(z):.4f}, expected about 1, effective "
            f"rank {effective_rank(z):.1f}, expected over {COLLAPSED_RANK}); nothing was saved "
            "over the last good file; raise --std or --cov or lower --lr, with --fresh"
        )


def latents_of(args):
    """Which latents of a window are encoded: joint the first and a dream's targets."""
    return [0, *args.targets] if args.objective == "joint" else [0]


def views(obs, args, generator):
    """Windows (B, L, 3, 64, 64) uint8 -> (what the encoder is shown of them, (B * K, 3 * history,
    64, 64) uint8, how the first of K was bent, (B, 2 + STRETCHES), or None, the newest scene ahead
    of the car of each of the others as it was, (B * (K - 1), 3, AHEAD, 64) uint8, or None).

    Joint the first latent again, bent, where --warp is not 0, and then those of `latents_of`;
    vicreg the same latent twice. Each is seen in a light of its own, which is noise to whoever
    foresees it.
    """
    at, how, scenes = latents_of(args), None, None
    bent = args.objective == "joint" and args.warp
    again = [0] if bent or args.objective == "vicreg" else []
    x = stack_frames(obs, args.history, again + at)
    if bent:
        how = warp_(x[:: 1 + len(at)], generator)
        if args.congeal:
            scenes = x.unflatten(0, (-1, 1 + len(at)))[:, 1:, -3:, :AHEAD].flatten(0, 1).clone()
    jitter_(x, generator)
    return x, how, scenes


def joint_loss(nets, x, how, scenes, act, args):
    """Prediction, inverse dynamics, bends, alignment, variance and covariance of `views`.

    x, how, scenes of `views`, act (B, H, 3), H the last of --targets -> (loss, logs, raw latents
    (N, D)), bent ones and gauges not among them.
    """
    seen = nets["encoder"].features(x).unflatten(0, (len(act), -1))
    z = seen[:, how is not None :]  # (B, 1 + len(targets), D)
    flat = z.flatten(0, 1)
    z_hat = nets["predictor"].rollout(z[:, 0], act)[:, [t - 1 for t in args.targets]]
    told = nets["inverse"](z[:, 0], z[:, 1])  # the first target is the next latent
    logs = {
        "pred": F.mse_loss(z_hat.float(), z[:, 1:]),
        "inverse": F.mse_loss(told.float(), normalize_action(act[:, 0])),
        "std": variance(flat),
        "cov": covariance(flat),
    }
    if how is not None:
        logs["warp"] = F.mse_loss(nets["warp"](z[:, 0], seen[:, 0]).float(), how)
    if scenes is not None:
        with torch.autocast(x.device.type, enabled=False):
            logs["congeal"] = congealing_loss(scenes, nets["warp"].predict_alignment(flat))
    loss = sum(getattr(args, name) * term for name, term in logs.items())
    learned = nets["encoder"].conv_dims(flat)
    return loss, {k: v.detach() for k, v in logs.items()}, learned.detach()


def plain_loss(nets, x, how, scenes, act, args):
    """VICReg on two views of the same frames: the objective of the seeds, to the letter."""
    embed = lambda x: nets["projector"](nets["encoder"].features(x)).float()
    za, zb = embed(x[::2]), embed(x[1::2])
    loss, logs = vicreg_loss(za, zb, args.sim, args.std, args.cov)
    return loss, logs, za.detach()


def loss_fn(nets, x, how, scenes, act, args):
    """(loss, logs of detached tensors, what must not collapse (N, D)) of `views` and actions."""
    objective = joint_loss if args.objective == "joint" else plain_loss
    return objective(nets, x, how, scenes, act, args)


def make_nets(args, device, dtype):
    """(the encoder and the heads that its objective needs, their optimiser, its scaler)."""
    torch.backends.cudnn.benchmark = True  # steps are alike: it tries which convolution is fastest
    nets = {
        "encoder": TinyEncoder(
            args.channels, args.history, args.repeat, args.dim, args.strides, args.hud_pca
        )
    }
    if args.objective == "joint":
        nets |= {"predictor": Predictor(args.dim), "inverse": InverseModel(args.dim)}
        if args.warp:
            nets["warp"] = WarpHead(args.dim, 2 + STRETCHES, bool(args.congeal))
    else:
        nets["projector"] = Projector(args.dim, args.embedding)
    nets = {k: n.to(device, memory_format=torch.channels_last) for k, n in nets.items()}
    optim = torch.optim.AdamW(
        [p for n in nets.values() for p in n.parameters()], args.lr, weight_decay=args.weight_decay
    )
    return nets, optim, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def make_loader(args, sources, part, batch_size, seed, rank=0, ranks=1, pinned=False):
    """Windows of one part of the sources, 0 to train, 1 held out; of several ranks each has its own
    episodes, so that each file is read by one."""
    chunks = [s[part][rank::ranks] for s in sources.values()]
    if not all(chunks):
        fail(f"--data: a folder has fewer episodes than the {ranks} processes; collect more")
    return Loader(
        chunks,
        batch_size,
        seed=seed,
        latents=latents_of(args)[-1] + 1,
        history=args.history,
        repeat=args.repeat,
        shares=args.shares,
        pinned=pinned,
    )


def training_batches(loader, args, device, start=0):
    """Endless (*views, act) on the device, from step `start` on."""
    steps = itertools.count(start)

    def seen(obs, act):
        generator = torch.Generator(device).manual_seed(
            args.seed * 1_000_003 + next(steps) + (RANK << 40)
        )
        return *views(obs, args, generator), act

    batches = flip_batches(loader.batches(start), args.mirror, args.seed, start)
    return on_device(batches, device, seen)


class Probe:
    """Ridge regression from latents to telemetry: fitted on training tracks, R² on held-out ones.

    The labels judge, they never train the encoder. Only frames with the road in view count.
    """

    def __init__(self, sources, args, count=3000):
        self.parts = []
        for part in (0, 1):
            chunks = [c for split in sources.values() for c in split[part]]
            obs, rows = sample_frames(
                chunks, args.history, args.repeat, count, args.seed, skip=ZOOM_STEPS
            )
            col = lambda name: rows["telemetry"][:, list(TELEMETRY).index(name)]
            seen = (abs(col("lateral_offset")) < 7) & (abs(col("heading_error")) < 1)
            self.parts.append((obs, seen, np.stack([col(k) for k in PROBED], 1)))

    def __call__(self, encoder, device, dtype):
        """Sets the encoder's standardisation; returns {quantity: R²}, rank, spread of what is
        learned of the latents."""
        encoder.eval()
        (za, ma, ya), (zb, mb, yb) = [
            (features_of(encoder, obs, device, dtype), seen, y) for obs, seen, y in self.parts
        ]
        refuse_nan(za.sum() + zb.sum(), "the probe")
        encoder.fit_standardization(za.to(device))
        learned = encoder.conv_dims(zb)
        error = np.full(len(PROBED), np.nan)  # a few random drives may never see the road
        if ma.any() and mb.any():
            from sklearn.linear_model import Ridge  # 1 s, which a refusal need not take

            mean, std = ya[ma].mean(0), ya[ma].std(0) + 1e-6
            scale = za.std(0) + 1e-6
            fit = Ridge(alpha=1.0).fit((za / scale)[ma], (ya[ma] - mean) / std)
            y = (yb[mb] - mean) / std
            spread_of = ((y - y.mean(0)) ** 2).sum(0)
            error = ((fit.predict((zb / scale)[mb]) - y) ** 2).sum(0) / np.where(
                spread_of > 0, spread_of, np.nan
            )
        return {"val_r2_" + k: 1 - e for k, e in zip(PROBED, error)} | {
            "val_rank": effective_rank(learned),
            "val_spread": float(spread(learned)),
        }


@torch.no_grad()
def evaluate(nets, loader, device, dtype, args, batches=8):
    """Mean of each term of the loss on held-out tracks, {val_name: float}; nets in eval mode."""
    total = {}
    stream = loader.batches()
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(batches):
        obs, act = (x.to(device) for x in next(stream))
        seen = views(obs, args, generator)
        with autocast(device, dtype):
            loss, logs, _ = loss_fn(nets, *seen, act, args)
        for k, v in {"loss": loss, **logs}.items():
            total["val_" + k] = total.get("val_" + k, 0) + float(v) / batches
    stream.close()
    return total


def table(values):
    """One line of the probe."""
    return "  ".join(
        f"{k.removeprefix('val_').replace('r2_', 'R² ')} {v:.3f}" for k, v in values.items()
    )


def main():
    args = arguments()
    began = time.monotonic()
    device, dtype = set_up(args, True, arithmetic_of("encoder_resume.pth", args))
    sources = load_sources(
        args, max(ZOOM_STEPS + 2, args.targets[-1] * args.repeat), len(TELEMETRY)
    )
    only_run(args, "encoder")
    loader = make_loader(
        args, sources, 0, args.batch_size // RANKS, args.seed, RANK, RANKS, device.type == "cuda"
    )
    held = make_loader(args, sources, 1, min(args.batch_size, 96), 1)

    nets, optim, scaler = make_nets(args, device, dtype)
    models = args.root / "models"
    data = provenance(sources)
    with rank_by_rank():
        saved = resume_run(models / "encoder_resume.pth", nets, optim, scaler, args, MADE, **data)
    step = saved["step"] if saved else 0
    per_epoch = (
        saved["per_epoch"]
        if saved
        else args.steps_per_epoch
        or max(1, RANKS * loader.windows // (args.batch_size * len(latents_of(args))))
    )
    per_epoch = same_start(step, per_epoch)
    steps = args.epochs * per_epoch

    frames = dict(
        zip(
            sources,
            RANKS
            * len(latents_of(args))
            * shares_of(sources, args.batch_size // RANKS, args.shares, each=True),
        )
    )  # of a step
    state = lambda: run_metadata(args, step, per_epoch, frames, **data)
    keep = lambda: save_run(models / "encoder_resume.pth", nets, optim, scaler, **state())

    newest = lambda: models / f"encoder_mixed_ep{step // per_epoch}.pth"

    def write():
        save(
            newest(),
            nets,
            **state(),
            epochs=max(args.epochs, step // per_epoch),
            objective=args.objective,
            done=step >= steps,
        )

    if step >= steps:
        return already_trained(newest(), step // per_epoch, args, write)
    if saved and RANK == 0:
        reopen(newest())
    log = RunLog(args, "encoder", resumed=bool(saved))
    probe = Probe(sources, args) if RANK == 0 else None
    size = sum(p.numel() for p in nets["encoder"].parameters()) / 1e6
    print(
        f"{size:.2f}M encoder on {device} in {name_of(dtype)}, {steps} steps "
        f"from {step}, {args.batch_size} windows" + f" on {RANKS} processes" * (RANKS > 1)
    )
    if not saved and RANK == 0:
        if args.hud_pca:
            nets["encoder"].fit_hud_pca(stack_frames(probe.parts[0][0], args.history))
        untrained = probe(nets["encoder"], device, dtype)
        print("untrained:", table(untrained))
        log.log(0, **{k.replace("val_", "untrained_"): v for k, v in untrained.items()})
    loss_of = wrap_ddp(loss_fn, nets)
    if args.compile:
        nets["encoder"].body.compile()
    if not saved and RANK == 0:
        keep()  # no epoch's file is ever there without it
    stop = Stop()  # until here a signal ends it at once: there is nothing to save
    batches, last_save = training_batches(loader, args, device, step), time.monotonic()
    bar = progress(total=steps, initial=step, desc="encoder", unit="step", disable=RANK > 0)
    while step < steps:
        for net in nets.values():
            net.train()
        seen = next(batches)
        with autocast(device, dtype):
            loss, logs, z = loss_of(*seen, args)
        lr = cosine(step, steps, args.lr)
        optimise(loss, nets.values(), optim, scaler, lr, f"step {step}")
        if step % CHECK_EVERY == 0 and step > 0:
            refuse_collapse(z, f"step {step}")
        if log.due(step, steps):
            shown = log.log(
                step, loss=loss, lr=lr, spread=spread(z), rank=effective_rank(z), **logs
            )
            bar.set_postfix(loss=f"{shown['loss']:.3f}", rank=f"{shown['rank']:.0f}")
        step += 1
        bar.update()
        stopping = stopped_anywhere(stop)
        if step % per_epoch == 0 and RANK == 0:
            epoch = step // per_epoch
            for net in nets.values():
                net.eval()
            values = evaluate(nets, held, device, dtype, args)
            refuse_nan(values["val_loss"], f"step {step}, held out")
            values = probe(nets["encoder"], device, dtype) | values
            log.log(step, **values)
            tqdm.write(f"epoch {epoch}, held out: " + table(values))
            write()
            rotate(models, "encoder_mixed")
        late = time.monotonic() - last_save > 60 * args.save_every
        if RANK == 0 and (step % per_epoch == 0 or stopping or late):
            keep()
            last_save = time.monotonic()
        if step % per_epoch == 0 and RANK == 0:
            with ornament(log.png):
                log.curves()
        if stopping:
            bar.close()
            return stopped(args, f"at step {step} of {steps}")
    bar.close()
    if RANK:
        return 0
    peak = (
        f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        if device.type == "cuda"
        else ""
    )
    print(
        f"{newest()}: {steps} steps in "
        f"{(time.monotonic() - began) / 60:.1f} min{peak}; {table(values)}"
    )
    return 0


if __name__ == "__main__":
    run(main)
