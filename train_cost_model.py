"""Day 3: the cost model. It learns which latents look like an expert's, without reward or labels.

Reads encoder, predictor and data; folders beyond the three only count for the gas limit and the
histogram. Writes ROOT/models/cost_model_final.pth,
models/cost_model.jsonl, visuals/cost_model_curves.png and visuals/energy_histogram.png.
The file holds four energies. classifier: the logit of random against expert. mistake: that of
recovery against expert, which tells mistakes early. density: half the squared Mahalanobis distance
to expert latents, over D. value, which the planner uses: the density and a little of the mistake's
logit; out of distribution, also the energy that a recovering expert still meets.
The file also holds a policy, which imitates the expert in the predictor's states and proposes
plans, and the most gas a plan may give: 0.5 if the predictor's held-out error is above 0.12 of
copy-last's, else 1. Nets of little training spin the car with full gas.

Nine minutes on one CPU core; expect a held-out AUC above 0.99 of classifier and density.

    python train_cost_model.py
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from buffer import DEFAULT_FOLDERS, chunk_files, load_sources, made_by, provenance
from car import ZOOM_STEPS
from networks import POLICY_STEPS, CostModel
from support.checkpoints import fingerprint, latest, load_frozen
from support.cli import Number, Stop, add_flags, fail, optimisation, parser, run_main
from support.device import set_up
from support.latents import LatentSampler, WindowSampler, load_latents
from support.pictures import ornament, plain, pyplot, save_figure
from support.plan_config import to_plan
from support.run import Run, lock_stage, refuse_nan
from train_predictor import evaluate as rollout_errors

EXPERT, RECOVERY, RANDOM = "data_race", "data_recovery", "data"
NAMES = {EXPERT: "expert", RECOVERY: "recovery", RANDOM: "random"}
KINDS = {"classifier": RANDOM, "density": RANDOM, "mistake": RECOVERY}  # told from the expert
OUTPUTS = ("cost_model_final.pth", "cost_model.jsonl")  # --fresh moves them aside
DENSITY_SAMPLE = 200_000  # expert latents that the density is fitted to, at most
GOOD_ROLLOUT, CAREFUL_GAS = 0.12, 0.5  # share of copy-last's error up to which full gas is allowed


def arguments():
    p = parser(__doc__, data=True, shares=False)
    shrinkage = "density: share of a round covariance in the experts' own"
    add_flags(
        p.add_argument_group("model"),
        ("--hidden", Number(int, 1, 16384), 256, "width of classifier, mistake, value and policy"),
        ("--shrinkage", Number(float, 1e-6, 0.99), 0.05, shrinkage),
    )
    optimisation(p, batch_size=1024, epochs=8, steps_per_epoch=250, lr=2e-3, weight_decay=1e-2)
    return p.parse_args()


def loss_fn(nets, expert, random, recovery, target, h, act):
    """Classifier, value and policy: latents (B, D) of three sources, target (B,) of the recoveries,
    states h (N, S) of the expert and its actions act (N, POLICY_STEPS, 3) from there on.

    -> (the sum of their errors, logs). The expert is 0 in the binary cross-entropy of the logits.
    """
    cost = nets["cost"]
    errors = {
        "classifier": cross_entropy(*(cost.energy(z, "classifier") for z in (expert, random))),
        "mistake": cross_entropy(*(cost.energy(z, "mistake") for z in (expert, recovery))),
        "value": value_loss(cost, recovery, target),
        "policy": policy_loss(cost, h, act),
    }
    return sum(errors.values()), {name: x.detach() for name, x in errors.items()}


def cross_entropy(zero, one):
    """Binary cross-entropy of logits: zero (N,) of class 0, one (M,) of class 1."""
    return (F.softplus(zero).mean() + F.softplus(-one).mean()) / 2


def policy_loss(cost, h, act):
    """Mean squared error of plans in states h (B, S) to actions act (B, POLICY_STEPS, 3)."""
    return F.mse_loss(cost.expert_plan(h), to_plan(act))


@torch.no_grad()
def expert_states(predictor, z, act):
    """Windows z (B, K, D), act (B, K - 1, 3) of an expert -> states (N, S) and the actions
    (N, POLICY_STEPS, 3) from there on.

    Half the states are real, half are imagined under the expert's actions.
    """
    device = predictor.decay_logit.device
    z, act = z[..., : predictor.dim].to(device), act.to(device)
    ahead = act.unfold(1, POLICY_STEPS, 1).mT  # (B, n, POLICY_STEPS, 3)
    n = ahead.shape[1]
    real, imagined = predictor.to_state(z[:, :n]), predictor.states(z[:, 0], act[:, : n - 1])
    return torch.cat([real, imagined]).flatten(0, 1), torch.cat([ahead, ahead]).flatten(0, 1)


def value_loss(cost, z, target):
    """Mean squared error of the value head: z (B, D), target (B,)."""
    return F.mse_loss(cost.predicted_value(z), target)


@torch.no_grad()
def evaluate(cost, predictor, held, recovery, driven, device, dtype, when="held out"):
    """Held-out energies {(kind, source): (N,)}, AUC {kind: float}, R² {"value", "policy": float}.

    held, recovery, driven: of `samplers`.
    """
    from sklearn.metrics import roc_auc_score  # 1 s, which a refusal need not take

    # energies of real latents, and how well they tell random driving from the expert's
    energies = {}
    for name, sampler in held.items():
        z = sampler.real(4000, 1).to(device)
        energies |= {(kind, name): cost.energy(z, kind).cpu().numpy() for kind in KINDS}
    refuse_nan(sum(e.sum() for e in energies.values()), when)
    auc = {}
    for kind, other in KINDS.items():
        e, r = energies[kind, EXPERT], energies[kind, other]
        labels = np.r_[np.zeros(len(e)), np.ones(len(r))]
        auc[kind] = float(roc_auc_score(labels, np.r_[e, r]))

    # value and policy
    z, target = recovery.sample(4000, np.random.default_rng(1), device, dtype)
    r2 = {"value": 1 - float(value_loss(cost, z, target) / target.var())}
    h, act = expert_states(predictor, *driven(0))
    r2["policy"] = 1 - float(policy_loss(cost, h, act) / to_plan(act).flatten(0, 1).var(0).mean())
    return energies, auc, r2


def gas_limit(predictor, held, device, dtype):
    """The most gas of a plan, 0..1, by the predictor's error at the last step of held-out rollouts.

    held: a WindowSampler.
    """
    rows = rollout_errors(predictor, held, device, dtype)
    share = float(rows["predictor"][-1] / rows["copy-last"][-1])
    gas = 1.0 if share <= GOOD_ROLLOUT else CAREFUL_GAS
    found = f"{len(rows['predictor'])} steps ahead the predictor's error is {share:.3f}"
    tqdm.write(f"gas up to {gas:g}: {found} of copy-last's; full gas needs {GOOD_ROLLOUT} or less")
    return gas


def draw_energies(energies, auc, path):
    """Histograms of the energies, a curve per source."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    for ax, (kind, other) in zip(axes, KINDS.items()):
        rows = {name: e for (k, name), e in energies.items() if k == kind}
        if kind == "density":
            rows = {name: np.log10(e + 1e-6) for name, e in rows.items()}
        low, high = min(e.min() for e in rows.values()), max(e.max() for e in rows.values())
        style = dict(histtype="stepfilled", alpha=0.45, density=True)
        for name, e in rows.items():
            label = plain(NAMES.get(name, name))
            ax.hist(e, np.linspace(low, high, 60), **style, label=label)
        ax.set_title(f"{kind}: AUC {auc[kind]:.3f}, {NAMES[other]} over expert", fontsize=9)
        ax.set_xlabel("log10 of the energy" if kind == "density" else "energy (logit)")
        ax.set_ylabel("density of held-out frames")
        ax.legend(fontsize=8)
    save_figure(fig, path)


def load_inputs(args, device, dtype, stop):
    """(sources, Latents, {key: fingerprint}, predictor, horizon). Refuses what does not fit."""
    args.data = args.data or list(DEFAULT_FOLDERS)
    needed = (EXPERT, RANDOM, RECOVERY)
    there = [name for name in args.data if chunk_files(args.root / name)]
    if missing := [name for name in needed if name not in there]:
        lacking, how = " and ".join(missing), "; ".join(made_by(args.root / n) for n in missing)
        given = f"--data {' '.join(args.data)}"
        need = f"the cost model needs {EXPERT}, {RANDOM} and {RECOVERY}"
        fail(f"{given}: {need}, and there is no episode of {lacking}; {how}")
    sources = load_sources(args.root, args.data, ZOOM_STEPS + 2)
    lock_stage(args.root, "cost_model")
    models = args.root / "models"
    newest = latest(models, "predictor")
    predictor, payload = load_frozen(newest, "predictor", device, "train_predictor.py")
    latents, _, key = load_latents(args, "cost_model", sources, device, dtype, stop, payload)
    keys = {"encoder_key": key, "predictor_key": fingerprint(predictor)}
    return sources, latents, keys, predictor, payload["horizon"]


def samplers(args, latents, sources, predictor, horizon, cost, part):
    """Of one part, 0 to train or 1 held out: ({source: LatentSampler}, recoveries, windows).

    recoveries: with the value target of each; windows: a WindowSampler of the expert's.
    """
    of = predictor, horizon
    single = {name: LatentSampler(latents, s[part], *of) for name, s in sources.items()}
    recoveries = LatentSampler(latents, sources[RECOVERY][part], *of, cost)
    expert, size = {EXPERT: sources[EXPERT]}, max(1, args.batch_size // 8)
    H = max(horizon, POLICY_STEPS)
    windows = WindowSampler(latents, expert, part, size, H, seed=args.seed, skip=ZOOM_STEPS)
    return single, recoveries, windows


def main():
    args = arguments()
    stop = Stop()  # encoding may take long
    device, dtype = set_up(args, "cost_model")
    sources, latents, keys, predictor, horizon = load_inputs(args, device, dtype, stop)

    cost = CostModel(predictor.dim, args.hidden, predictor.state).to(device)
    of = args, latents, sources, predictor, horizon, cost
    (train, recovery, driven), held = samplers(*of, part=0), samplers(*of, part=1)

    # run, or the rest of one that was stopped
    optim = torch.optim.AdamW(cost.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # small and in fp32
    per_epoch = args.steps_per_epoch or max(1, len(train[EXPERT].starts) // args.batch_size)
    frames = dict.fromkeys((EXPERT, RANDOM, RECOVERY), args.batch_size)
    data, nets = provenance(sources) | keys, {"cost": cost}
    run = Run(args, "cost_model", nets, optim, scaler, per_epoch, OUTPUTS, frames, data)
    final = run.models / "cost_model_final.pth"

    def check():
        return evaluate(cost, predictor, *held, device, dtype, f"step {run.step}, held out")

    def write(path, auc, r2):
        windows = WindowSampler(latents, sources, 1, 512, horizon)
        limit = gas_limit(predictor, windows, device, dtype)
        run.write(path, auc=auc, **{f"r2_{k}": r for k, r in r2.items()}, max_gas=limit)

    if run.step >= run.steps:
        return run.already_trained(final, lambda path: write(path, *check()[1:]))
    if not run.resumed:  # else the file has it, and the value that was learned rests on it
        fit = [train[k].real(DENSITY_SAMPLE).to(device) for k in (EXPERT, RANDOM)]
        fit_density(cost, *fit, args.shrinkage)
    run.begin(f"cost model, {len(latents.z):,} latents")

    while run.step < run.steps:
        rng, size = np.random.default_rng([args.seed, run.step]), args.batch_size
        expert, random = (train[k].sample(size, rng, device, dtype) for k in (EXPERT, RANDOM))
        recoveries = recovery.sample(size, rng, device, dtype)
        states = expert_states(predictor, *driven(run.step))
        loss, logs = loss_fn(nets, expert, random, *recoveries, *states)
        run.optimise(loss)
        run.advance(loss, logs)
        if run.at_epoch_end():
            energies, auc, r2 = check()
            scores = {f"val_r2_{k}": r for k, r in r2.items()}
            run.log.log(run.step, **scores, **{f"val_auc_{k}": a for k, a in auc.items()})
            if run.step == run.steps:
                write(final, auc, r2)
        if run.save_or_stop():
            return run.stopped()

    with ornament(histogram := args.root / "visuals" / "energy_histogram.png"):
        draw_energies(energies, auc, histogram)
    scores = ", ".join(f"{k} {a:.3f} ({NAMES[KINDS[k]]})" for k, a in auc.items())
    r2 = f"R² of the value on recoveries {r2['value']:.3f}, of the policy {r2['policy']:.3f}"
    print(f"{final}: {run.summary(device)}; held-out AUC over expert: {scores}; {r2}")
    return 0


def fit_density(cost, expert, random, shrinkage=0.05):
    """Fits the density to expert latents (N, D), random_energy to random ones (M, D).

    The share `shrinkage` of the covariance is a round one of the same trace. Refuses latents that
    are all alike.
    """
    from sklearn.covariance import ShrunkCovariance  # 1 s, which a refusal need not take

    z = cost.seen(expert).double().cpu().numpy()
    if not z.var(axis=0).sum() > 0:
        why = f"the {len(z)} latents of the expert are all alike"
        fail(f"the density: {why}; collect more frames that differ")
    fit = ShrunkCovariance(shrinkage=shrinkage).fit(z)
    cost.mu.copy_(torch.from_numpy(fit.location_))
    cost.whiten.copy_(torch.linalg.cholesky(torch.from_numpy(fit.precision_)))
    cost.random_energy.copy_(cost.energy(random).median())


if __name__ == "__main__":
    run_main(main)
