"""The judge: which latents look like an expert's, learned without reward and without labels.

Reads the encoder, the predictor (for imagined latents) and the data; writes
ROOT/models/cost_model_final.pth, models/cost_model.jsonl, visuals/cost_model_curves.png and
visuals/energy_histogram.png. In the file stand the logit of a classifier, expert against random
(its sigmoid is the score: 0 expert, 1 random), the density of expert latents (half the squared
Mahalanobis distance, over D), which is what drives, and the value, which takes over in trouble:
what of that density is to come after a latent while an expert recovers. Beside them stands how much
gas a plan of these nets may give: nets of little training spin the car with full gas, so it is half
where the predictor's held-out error is more than 0.12 of copy-last's.

Two minutes on two CPU cores; expect a held-out AUC above 0.99 for both energies.

    python train_cost_model.py
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from buffer import DEFAULT, chunk_files, load_sources, made_by, provenance
from car import ZOOM_STEPS
from networks import CostModel
from support.checkpoints import fingerprint, latest, load_frozen, save
from support.cli import Number, Stop, fail, optimisation, parser, run, stopped
from support.latents import LatentSampler, WindowSampler, load_latents
from support.pictures import ornament, plain, pyplot, save_figure
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
from support.training import only_run, set_up
from train_predictor import evaluate as dream_errors

EXPERT, RANDOM = "data_race", "data"  # the classes; recovery is between and trains the value only
RECOVERY = "data_recovery"
DENSITY_SAMPLE = 200_000  # expert latents that the density is fitted to, at most
GOOD_DREAM, CAREFUL = 0.12, 0.5  # of copy-last's error, at most, for full gas; else the limit


def arguments():
    p = parser(__doc__, data=True, shares=False)
    g = p.add_argument_group("model")
    g.add_argument(
        "--hidden", type=Number(int, 1, 16384), default=256, help="width of classifier and value"
    )
    g.add_argument(
        "--shrinkage",
        type=Number(float, 1e-6, 0.99),
        default=0.05,
        help="density: fixed share of a round covariance mixed into the experts' own",
    )
    optimisation(p, batch_size=1024, epochs=8, steps_per_epoch=250, lr=2e-3, weight_decay=1e-2)
    return p.parse_args()


def loss_fn(cost, expert, random):
    """Binary cross-entropy on logits: expert (B, D) is 0, random (B, D) is 1 -> (loss, logs)."""
    e, c = cost.energy(expert, "classifier"), cost.energy(random, "classifier")
    loss = (F.softplus(e).mean() + F.softplus(-c).mean()) / 2
    return loss, {"expert": e.mean().detach(), "random": c.mean().detach()}


def value_loss(cost, z, to_come):
    """Mean squared error of the foretold share of the bound: z (B, D), to_come (B,)."""
    return F.mse_loss(cost.value(z).squeeze(-1), to_come)


@torch.no_grad()
def evaluate(cost, held, ahead, device, dtype, when="held out"):
    """Held-out energies {(kind, source): (N,)}, AUC of random over expert {kind: float}, and R² of
    what is foretold of held-out recoveries."""
    from sklearn.metrics import roc_auc_score  # 1 s, which a refusal need not take

    energies = {
        (kind, name): cost.energy(s.real(4000, 1).to(device), kind).cpu().numpy()
        for name, s in held.items()
        for kind in ("classifier", "density")
    }
    refuse_nan(sum(e.sum() for e in energies.values()), when)
    auc = {}
    for kind in ("classifier", "density"):
        e, c = energies[kind, EXPERT], energies[kind, RANDOM]
        auc[kind] = float(roc_auc_score(np.r_[np.zeros(len(e)), np.ones(len(c))], np.r_[e, c]))
    z, to_come = ahead.sample(4000, np.random.default_rng(1), device, dtype)
    return energies, auc, 1 - float(value_loss(cost, z, to_come) / to_come.var())


def max_gas(predictor, held, device, dtype):
    """How much gas a plan of these nets may give, 0..1: all of it where the predictor knows what it
    leads to, by its error at the last step of dreams of `held`-out windows."""
    rows = dream_errors(predictor, held, device, dtype)
    share = float(rows["predictor"][-1] / rows["copy-last"][-1])
    gas = 1.0 if share <= GOOD_DREAM else CAREFUL
    tqdm.write(
        f"gas up to {gas:g}: {len(rows['predictor'])} steps ahead the predictor's error is "
        f"{share:.3f} of copy-last's, {'over' if gas < 1 else 'at most'} {GOOD_DREAM}"
    )
    return gas


def draw_energies(energies, auc, path):
    """Histograms of both energies, a curve a source."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = {EXPERT: "expert", RANDOM: "random", "data_recovery": "recovery"}
    for ax, kind in zip(axes, ("classifier", "density")):
        rows = {name: e for (k, name), e in energies.items() if k == kind}
        if kind == "density":
            rows = {name: np.log10(e + 1e-6) for name, e in rows.items()}
        edges = np.linspace(
            min(e.min() for e in rows.values()), max(e.max() for e in rows.values()), 60
        )
        for name, e in rows.items():
            ax.hist(
                e,
                edges,
                histtype="stepfilled",
                alpha=0.45,
                density=True,
                label=plain(names.get(name, name)),
            )
        ax.set_title(f"{kind}: AUC {auc[kind]:.3f}, random over expert", fontsize=9)
        ax.set_xlabel("energy (logit)" if kind == "classifier" else "log10 of the energy")
        ax.set_ylabel("density of held-out frames")
        ax.legend(fontsize=8)
    save_figure(fig, path)


def main():
    args = arguments()
    began, stop = time.monotonic(), Stop()
    device, dtype = set_up(args, was=arithmetic_of("cost_model_resume.pth", args))
    args.data = args.data or list(DEFAULT)
    if missing := [
        name
        for name in (EXPERT, RANDOM, RECOVERY)
        if name not in args.data or not chunk_files(args.root / name)
    ]:
        how = "; ".join(made_by(args.root / name) for name in missing)
        fail(
            f"--data {' '.join(args.data)}: the cost model needs {EXPERT}, {RANDOM} and "
            f"{RECOVERY} to tell experts from random driving, and there is no episode of "
            f"{' and '.join(missing)}; {how}"
        )
    sources = load_sources(args, ZOOM_STEPS + 2)
    only_run(args, "cost_model")
    models = args.root / "models"
    predictor, payload = load_frozen(
        latest(models, "predictor"), "predictor", device, "train_predictor.py"
    )
    latents, encoder, key = load_latents(
        args, device, dtype, sources, stop, "cost_model_resume.pth", payload
    )
    parts = [
        {
            name: LatentSampler(latents, split[part], predictor, payload["horizon"])
            for name, split in sources.items()
        }
        for part in (0, 1)
    ]
    train, held = parts
    cost = CostModel(encoder.dim, args.hidden).to(device)
    recovery, held_recovery = (
        LatentSampler(latents, part, predictor, payload["horizon"], cost)
        for part in sources[RECOVERY]
    )
    if args.compile:
        cost.classifier.compile()
        cost.value.compile()
    optim = torch.optim.AdamW(cost.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # small and in fp32
    data = provenance(sources) | dict(encoder_key=key, predictor_key=fingerprint(predictor))
    resume = models / "cost_model_resume.pth"
    saved = resume_run(
        resume,
        {"cost": cost},
        optim,
        scaler,
        args,
        ("cost_model_final.pth", "cost_model.jsonl"),
        **data,
    )
    step = saved["step"] if saved else 0
    per_epoch = (
        saved["per_epoch"]
        if saved
        else args.steps_per_epoch or max(1, len(train[EXPERT].starts) // args.batch_size)
    )
    steps, final = args.epochs * per_epoch, models / "cost_model_final.pth"
    frames = dict.fromkeys((EXPERT, RANDOM, RECOVERY), args.batch_size)  # of a step
    state = lambda step: run_metadata(args, step, per_epoch, frames, **data)
    evaluate_at = lambda step: evaluate(
        cost, held, held_recovery, device, dtype, f"step {step}, held out"
    )
    gas_of = lambda: max_gas(
        predictor, WindowSampler(latents, sources, 1, 512, payload["horizon"]), device, dtype
    )
    write = lambda step, auc, r2: save(
        final, {"cost": cost}, **state(step), auc=auc, r2_value=r2, max_gas=gas_of()
    )
    if step >= steps:
        return already_trained(
            final, step // per_epoch, args, lambda: write(step, *evaluate_at(step)[1:])
        )
    log = RunLog(args, "cost_model", resumed=bool(saved))
    keep = lambda step: save_run(resume, {"cost": cost}, optim, scaler, **state(step))
    if not saved:  # else it is in the file, and what the value has learned so far rests on it
        cost.fit_density(
            *(train[k].real(DENSITY_SAMPLE).to(device) for k in (EXPERT, RANDOM)), args.shrinkage
        )
        keep(step)  # the last file is never there without it
    last_save = time.monotonic()
    for step in progress(
        range(step, steps), initial=step, total=steps, desc="cost model", unit="step"
    ):
        rng = np.random.default_rng([args.seed, step])
        expert, random = (
            train[k].sample(args.batch_size, rng, device, dtype) for k in (EXPERT, RANDOM)
        )
        loss, logs = loss_fn(cost, expert, random)
        ahead = value_loss(cost, *recovery.sample(args.batch_size, rng, device, dtype))
        loss, logs["value"] = loss + ahead, ahead.detach()
        lr = cosine(step, steps, args.lr)
        optimise(loss, [cost], optim, scaler, lr, f"step {step}")
        if log.due(step, steps):
            log.log(step, loss=loss, lr=lr, **logs)
        if (step + 1) % per_epoch == 0:
            energies, auc, r2 = evaluate_at(step + 1)
            log.log(step + 1, val_r2_value=r2, **{f"val_auc_{k}": a for k, a in auc.items()})
        if step + 1 == steps:
            write(steps, auc, r2)
        late = time.monotonic() - last_save > 60 * args.save_every
        if stop or late or (step + 1) % per_epoch == 0:
            keep(step + 1)
            last_save = time.monotonic()
        if (step + 1) % per_epoch == 0:
            with ornament(log.png):
                log.curves()
        if step + 1 == steps:
            with ornament(histogram := args.root / "visuals" / "energy_histogram.png"):
                draw_energies(energies, auc, histogram)
        if stop and step + 1 < steps:
            return stopped(args, f"at step {step + 1} of {steps}")
    print(
        f"{final} in {(time.monotonic() - began) / 60:.1f} min; held-out AUC of "
        f"random over expert: classifier {auc['classifier']:.3f}, density {auc['density']:.3f}; "
        f"R² of the energy to come of recoveries {r2:.3f}"
    )
    return 0


if __name__ == "__main__":
    run(main)
