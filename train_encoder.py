"""Day 2: the encoder. A ResNet-18 learns latents from pixels, without labels.

Reads ROOT/data_race, data_recovery and data, those that exist. Each epoch it writes
models/encoder_mixed_ep{N}.pth, models/encoder.jsonl and visuals/encoder_curves.png, and prints a
ridge probe of what the latents know. Three minutes on two CPU cores give R² over 0.9 for speed and
lateral offset (the laptop line below).

--objective joint (default): latents predict the next ones from actions, tell the action, tell
linearly how a frame was warped, and, as in VICReg, vary and are uncorrelated. --congeal adds
the warp that aligns a frame with all others. --objective vicreg: plain VICReg on two views.

    python train_encoder.py --epochs 50 --batch_size 256
    torchrun --nproc_per_node=2 train_encoder.py --epochs 50 --batch_size 256       # two GPUs
    python train_encoder.py --channels 16 --dim 256 --scene_pca 128 --strides 2 2 2 1 --epochs 4 \\
        --steps_per_epoch 150 --batch_size 96 --lr 2e-3 --shares 0.35 0.45 0.2      # a laptop
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from buffer import Loader, load_sources, provenance, sample_frames, shares_of
from car import MAX_STEPS, ZOOM_STEPS
from car.telemetry import IN_VIEW, TELEMETRY
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
from support.augment import SCENE_AHEAD, WARPS, congealing_loss, flip_batches, jitter_, warp_
from support.checkpoints import rotate
from support.cli import Number, add_flags, fail, fraction, optimisation, parser, run_main, weight
from support.device import autocast, on_device, set_up
from support.distributed import RANK, RANKS, wrap_ddp
from support.latents import encode, ridge
from support.pca import fit_pca
from support.run import Run, lock_stage, refuse_nan
from vicreg import covariance, effective_rank, variance, vicreg_loss

PROBED = ("speed", "yaw_rate", "lateral_offset", "heading_error", "curvature_20")
COLLAPSED = 0.02  # mean standard deviation of a latent's dimensions; a healthy one has about 1
COLLAPSED_RANK = 2  # effective rank of a batch of latents; a healthy one has dozens
PCA_FRAMES = 6000  # that the principal components are fitted to
CHECK_EVERY = 50  # steps between two checks for collapse
OUTPUTS = ("encoder_mixed_ep*.pth", "encoder.jsonl", "decoder_ep*.pth")  # --fresh moves them aside
DEFAULTS = {  # of the flags that depend on --objective
    "joint": {"std": 16.0, "hud_pca": 8},
    "vicreg": {"std": 25.0, "hud_pca": 0, "scene_pca": 0},
}


# ------------------------------------------------------------------ arguments


def arguments(argv=None):
    p = parser(__doc__, data=True)
    model, objective = (p.add_argument_group(name) for name in ("model", "objective"))
    strides = "of ResNet-18's stages, product 8; 2 2 2 1 is twice as fast"
    stride = Number(int, 1, 8)
    model.add_argument("--strides", type=stride, nargs=4, default=[1, 2, 2, 2], help=strides)
    hud = "numbers of a latent that are principal components of the HUD's pixels (8; vicreg 0)"
    scene = "numbers of a latent that are those of the scene's (a quarter; vicreg 0)"
    add_flags(
        model,
        ("--channels", Number(int, 4, 512), 64, "of the first stage; 16 is ten times faster"),
        ("--dim", Number(int, 3, 8192), 512, "size of a latent, all parts together"),
        ("--embedding", Number(int, 3, 16384), 1024, "vicreg: size of the expander"),
        ("--history", Number(int, 1, 16), 3, "frames in a latent; one hides speed and yaw rate"),
        ("--hud_pca", Number(int, 0, HUD_VALUES - 1), None, hud),
        ("--scene_pca", Number(int, 0, 2048), None, scene),
        ("--repeat", Number(int, 1, 10), 2, "steps between frames, and latents; 2 is 25 Hz"),
    )

    # the loss
    kinds = "joint drives; vicreg is the plain two-view loss"
    objective.add_argument("--objective", choices=[*DEFAULTS], default="joint", help=kinds)
    targets = "joint: rollout steps compared with encoded frames; each costs as much as the first"
    step = Number(int, 1, MAX_STEPS)
    objective.add_argument("--targets", type=step, nargs="+", default=[1, 3, 8], help=targets)
    warp = "joint: weight of telling how a frame was warped, which teaches where the road leads"
    mirror = "share of windows with left and right exchanged: a lap has few bends to the right"
    add_flags(
        objective,
        ("--pred", weight, 25.0, "joint: weight of the prediction"),
        ("--std", weight, None, "weight of the variance hinge (joint 16, vicreg 25)"),
        ("--cov", weight, 1.0, "weight of the covariance term"),
        ("--inverse", weight, 2.0, "joint: weight of inverse dynamics"),
        ("--warp", weight, 15.0, warp),
        ("--congeal", weight, 0.0, "joint: weight of aligning all frames by warps; needs --warp"),
        ("--mirror", fraction, 0.0, mirror),
        ("--sim", weight, 25.0, "vicreg: weight of the invariance"),
    )
    optimisation(p, batch_size=256)

    args = p.parse_args(argv)
    for name, value in DEFAULTS[args.objective].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.scene_pca is None:
        args.scene_pca = args.dim // 4
    if error := mistake(args):
        p.error(error)
    return args


def mistake(args):
    """What is wrong with a combination of arguments, or None."""
    if args.targets != sorted(set(args.targets)) or args.targets[0] != 1:
        return f"--targets {args.targets}: expected rising steps from 1 on, such as 1 3 8"
    if math.prod(args.strides) != 8:
        return f"--strides {args.strides}: expected four numbers with product 8, such as 2 2 2 1"
    if args.congeal and not args.warp:
        return f"--congeal {args.congeal:g} --warp 0: the head of --warp aligns; add --congeal 0"
    flags = f"--dim {args.dim} --hud_pca {args.hud_pca} --scene_pca {args.scene_pca}"
    learned = args.dim - args.hud_pca - args.scene_pca
    if learned <= COLLAPSED_RANK:
        return f"{flags}: leaves {learned} numbers to learn, expected more than {COLLAPSED_RANK}"
    latents = args.batch_size // RANKS * len(Objective.of(args).offsets)
    if latents <= COLLAPSED_RANK + 1:
        words = f"a step compares {latents} latents, expected {COLLAPSED_RANK + 2} or more"
        return f"--batch_size {args.batch_size}: {words}"


# ------------------------------------------------------------------ objective


@dataclass(frozen=True)
class Objective:
    """What the encoder learns from windows of frames and actions."""

    kind: str  # joint or vicreg
    weights: dict  # {term of the loss: weight}
    history: int  # frames in a latent
    targets: tuple  # joint: rollout steps that are compared with encoded frames

    @staticmethod
    def of(args):
        joint, plain = ("pred", "inverse", "std", "cov", "warp", "congeal"), ("sim", "std", "cov")
        names = joint if args.objective == "joint" else plain
        weights = {name: getattr(args, name) for name in names}
        return Objective(args.objective, weights, args.history, tuple(args.targets))

    @property
    def offsets(self):
        """The latents of a window that are encoded: joint, the first and the targets."""
        return [0, *self.targets] if self.kind == "joint" else [0]

    @property
    def warps(self):
        """Whether the first latent is encoded once more, warped."""
        return bool(self.weights.get("warp"))


def views(obs, objective, generator):
    """Windows (B, L, 3, 64, 64) uint8 -> (x, warp, scenes).

    x (B * K, 3 * history, 64, 64) uint8: encoder inputs. Joint: the first latent warped, then
    those of `offsets`. vicreg: the same latent twice. Each is seen in a light of its own.
    warp (B, WARPS) or None: how the first was warped.
    scenes (B * (K - 1), 3, SCENE_AHEAD, 64) uint8 or None: the newest scene ahead of the car of
    each other one, unchanged.
    """
    offsets, warp, scenes = objective.offsets, None, None
    again = [0] if objective.warps or objective.kind == "vicreg" else []
    x = stack_frames(obs, objective.history, again + offsets)
    if objective.warps:
        K = 1 + len(offsets)
        warp = warp_(x[::K], generator)
        if objective.weights["congeal"]:
            scenes = x.unflatten(0, (-1, K))[:, 1:, -3:, :SCENE_AHEAD].flatten(0, 1).clone()
    jitter_(x, generator)
    return x, warp, scenes


def joint_loss(nets, x, warp, scenes, act, objective):
    """Prediction, inverse dynamics, warps, alignment, variance and covariance of `views`.

    act (B, H, 3), H the last target -> (loss, logs, latents (N, D) without warped ones and HUD).
    """
    raw = nets["encoder"].features(x).unflatten(0, (len(act), -1))
    z = raw[:, warp is not None :]  # (B, 1 + targets, D)
    flat = z.flatten(0, 1)
    targets = [t - 1 for t in objective.targets]
    z_hat = nets["predictor"].rollout(z[:, 0], act)[:, targets]
    act_hat = nets["inverse"](z[:, 0], z[:, 1])  # the first target is the next latent
    logs = {
        "pred": F.mse_loss(z_hat.float(), z[:, 1:]),
        "inverse": F.mse_loss(act_hat.float(), normalize_action(act[:, 0])),
        "std": variance(flat),
        "cov": covariance(flat),
    }
    if warp is not None:
        logs["warp"] = F.mse_loss(nets["warp"](z[:, 0], raw[:, 0]).float(), warp)
    if scenes is not None:
        with torch.autocast(x.device.type, enabled=False):
            logs["congeal"] = congealing_loss(scenes, nets["warp"].predict_alignment(flat))
    loss = sum(objective.weights[name] * term for name, term in logs.items())
    logs = {name: term.detach() for name, term in logs.items()}
    return loss, logs, nets["encoder"].conv_dims(flat).detach()


def plain_loss(nets, x, warp, scenes, act, objective):
    """VICReg on two views of the same frames."""
    embed = lambda x: nets["projector"](nets["encoder"].features(x)).float()
    za, zb = embed(x[::2]), embed(x[1::2])
    loss, logs = vicreg_loss(za, zb, **objective.weights)
    return loss, logs, za.detach()


def loss_fn(nets, x, warp, scenes, act, objective):
    """(loss, logs of detached tensors, what must not collapse (N, D)) of `views` and actions."""
    kinds = {"joint": joint_loss, "vicreg": plain_loss}
    return kinds[objective.kind](nets, x, warp, scenes, act, objective)


def spread(z):
    """Mean standard deviation of the dimensions of latents (N, D): near 0 they have collapsed."""
    return z.std(dim=0).mean()


def refuse_collapse(z, when):
    """Refuses latents (N, D) that have become one point, or one line."""
    if spread(z) < COLLAPSED or effective_rank(z) < COLLAPSED_RANK:
        found = f"spread {spread(z):.4f}, expected about 1, effective rank {effective_rank(z):.1f}"
        saved = "nothing was saved over the last good file"
        retry = "raise --std or --cov or lower --lr, with --fresh"
        fail(f"{when}: the latents collapsed ({found}); {saved}; {retry}")


# ------------------------------------------------------------------ nets and data


def make_nets(args, device, dtype):
    """(the encoder and the heads of its objective, their optimiser, its scaler)."""
    torch.backends.cudnn.benchmark = True  # steps are alike: it finds the fastest convolution
    shape = args.channels, args.history, args.repeat, args.dim, args.strides
    encoder = TinyEncoder(*shape, args.hud_pca, args.scene_pca)
    nets, dim = {"encoder": encoder}, encoder.planned
    if args.objective == "joint":
        nets |= {"predictor": Predictor(dim), "inverse": InverseModel(dim)}
        if args.warp:
            nets["warp"] = WarpHead(dim, WARPS, bool(args.congeal))
    else:
        nets["projector"] = Projector(dim, args.embedding)
    nets = {k: n.to(device, memory_format=torch.channels_last) for k, n in nets.items()}
    parameters = [p for n in nets.values() for p in n.parameters()]
    optim = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay)
    return nets, optim, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def make_loader(args, sources, part, batch_size, seed, rank=0, ranks=1, pinned=False):
    """Windows of one part of the sources, 0 to train, 1 held out.

    Each of several ranks has episodes of its own: each file is read by one.
    """
    chunks = [s[part][rank::ranks] for s in sources.values()]
    if not all(chunks):
        fail(f"--data: a folder has fewer episodes than the {ranks} processes; collect more")
    latents = Objective.of(args).offsets[-1] + 1
    window = dict(latents=latents, history=args.history, repeat=args.repeat)
    return Loader(chunks, batch_size, **window, shares=args.shares, seed=seed, pinned=pinned)


def training_batches(loader, args, device, start=0):
    """Endless (*views, act) on the device, from step `start` on."""
    objective, steps = Objective.of(args), itertools.count(start)

    def seen(obs, act):
        seed = args.seed * 1_000_003 + next(steps) + (RANK << 40)
        return *views(obs, objective, torch.Generator(device).manual_seed(seed)), act

    batches = flip_batches(loader.batches(start), args.mirror, args.seed, start)
    return on_device(batches, device, seen)


# ------------------------------------------------------------------ evaluation


class Probe:
    """Ridge regression from latents to telemetry: fitted on training tracks, R² on held-out ones.

    The labels never train the encoder. Frames without the road in view are left out.
    """

    def __init__(self, sources, args, count=3000):
        self.parts = []
        column = list(TELEMETRY).index
        for part in (0, 1):
            chunks = [c for split in sources.values() for c in split[part]]
            window = args.history, args.repeat, count, args.seed
            obs, state = sample_frames(chunks, *window, skip=ZOOM_STEPS)
            off, askew = (abs(state[:, column(k)]) for k in ("lateral_offset", "heading_error"))
            in_view = (off < IN_VIEW[0]) & (askew < IN_VIEW[1])
            self.parts.append((obs, in_view, state[:, [column(k) for k in PROBED]]))

    def __call__(self, encoder, device, dtype):
        """Sets the encoder's standardization -> {quantity: R²}, rank and spread of the latents."""
        encoder.eval()
        (za, ma, ya), (zb, mb, yb) = [
            (encode(encoder, obs, device, dtype, raw=True).float().cpu(), in_view, y)
            for obs, in_view, y in self.parts
        ]
        refuse_nan(za.sum() + zb.sum(), "the probe")
        encoder.fit_standardization(za.to(device))
        r2 = np.full(len(PROBED), np.nan)  # a few random drives may never see the road
        if ma.any() and mb.any():
            from sklearn.metrics import r2_score  # 1 s, which a refusal need not take

            y_pred = ridge(za[ma], ya[ma]).predict(zb[mb])
            r2 = r2_score(yb[mb], y_pred, multioutput="raw_values", force_finite=False)
        conv = encoder.conv_dims(zb)
        scores = {"val_r2_" + name: value for name, value in zip(PROBED, r2)}
        return scores | {"val_rank": effective_rank(conv), "val_spread": float(spread(conv))}


@torch.no_grad()
def evaluate(nets, loader, device, dtype, objective, batches=8):
    """Mean of each term of the loss on held-out tracks, {val_name: float}; nets in eval mode."""
    total = {}
    stream = loader.batches()
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(batches):
        obs, act = (x.to(device) for x in next(stream))
        seen = views(obs, objective, generator)
        with autocast(device, dtype):
            loss, logs, _ = loss_fn(nets, *seen, act, objective)
        for k, v in {"loss": loss, **logs}.items():
            total["val_" + k] = total.get("val_" + k, 0) + float(v) / batches
    stream.close()
    return total


def table(values):
    """One line of the probe."""
    names = {k: k.removeprefix("val_").replace("r2_", "R² ") for k in values}
    return "  ".join(f"{names[k]} {v:.3f}" for k, v in values.items())


# ------------------------------------------------------------------ main


def main():
    args = arguments()
    device, dtype = set_up(args, "encoder", ranks=True)
    objective, size = Objective.of(args), args.batch_size // RANKS
    steps = max(ZOOM_STEPS + 2, args.targets[-1] * args.repeat)
    batch = args.shares, args.batch_size
    sources = load_sources(args.root, args.data, steps, len(TELEMETRY), *batch)
    args.data = list(sources)
    lock_stage(args.root, "encoder")

    # data and nets
    pinned = device.type == "cuda"
    loader = make_loader(args, sources, 0, size, args.seed, RANK, RANKS, pinned)
    held = make_loader(args, sources, 1, min(args.batch_size, 96), 1)
    nets, optim, scaler = make_nets(args, device, dtype)
    encoder, images = nets["encoder"], args.batch_size * len(objective.offsets)
    per_epoch = args.steps_per_epoch or max(1, RANKS * loader.windows // images)
    counts = shares_of(sources, size, args.shares)
    frames = dict(zip(sources, RANKS * len(objective.offsets) * counts))
    data = provenance(sources)
    run = Run(args, "encoder", nets, optim, scaler, per_epoch, OUTPUTS, frames, data)
    newest = lambda: run.models / f"encoder_mixed_ep{run.epoch}.pth"
    write = lambda path: run.write(path, objective=args.objective)
    if run.step >= run.steps:
        return run.already_trained(newest(), write)
    run.reopen(newest())

    # the untrained encoder is the line to beat
    probe = Probe(sources, args) if RANK == 0 else None
    if not run.resumed and RANK == 0:
        chunks = [c for train, _ in sources.values() for c in train]
        frames = sample_frames(chunks, 1, 1, PCA_FRAMES, args.seed, skip=ZOOM_STEPS)[0]
        fit_pca(encoder, frames[:, 0])
        values = probe(encoder, device, dtype)
        print("untrained:", table(values))
        run.log.log(0, **{k.replace("val_", "untrained_"): v for k, v in values.items()})
    loss_of = wrap_ddp(loss_fn, nets)
    run.begin(f"{parameters(encoder):.2f}M encoder, {args.batch_size} windows a step")

    batches = training_batches(loader, args, device, run.step)
    while run.step < run.steps:
        for net in nets.values():
            net.train()
        seen = next(batches)
        with autocast(device, dtype):
            loss, logs, z = loss_of(*seen, objective)
        run.optimise(loss)
        if run.step % CHECK_EVERY == 0 and run.step > 0:
            refuse_collapse(z, f"step {run.step}")
        if run.due():
            logs |= {"spread": spread(z), "rank": effective_rank(z)}
        run.advance(loss, logs)
        if run.at_epoch_end():
            for net in nets.values():
                net.eval()
            values = evaluate(nets, held, device, dtype, objective)
            refuse_nan(values["val_loss"], f"step {run.step}, held out")
            values = probe(encoder, device, dtype) | values
            run.log.log(run.step, **values)
            tqdm.write(f"epoch {run.epoch}, held out: {table(values)}")
            write(newest())
            rotate(run.models, "encoder_mixed")
        if run.save_or_stop():
            return run.stopped()
    if RANK == 0:
        print(f"{newest()}: {run.summary(device)}; {table(values)}")
    return 0


def parameters(net):
    """Parameters of a net, in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6


if __name__ == "__main__":
    run_main(main)
