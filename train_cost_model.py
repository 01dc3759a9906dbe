"""The judge: which latents look like an expert's, learned without reward and without labels.

Reads the encoder, the predictor (for imagined latents) and the data; writes
ROOT/models/cost_model_final.pth, models/cost_model.jsonl, visuals/cost_model_curves.png and
visuals/energy_histogram.png. Three energies stand in the file: the logit of a classifier, expert
against random (its sigmoid is the score: 0 expert, 1 random); the density of expert latents (half
the squared Mahalanobis distance, over D); and what drives, their contrast with near misses: the
density and a classifier of the expert's latents against what the predictor imagines of the same
situations when the actions are bent as the planner bends them, and against all other driving.

Half a minute an epoch on two CPU cores.

    python train_cost_model.py
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from buffer import data_key, load_sources
from car_env import ZOOM_STEPS
from drive_mpc import BRAKE, GAS, NOISE, RHO, STEER, colored_noise, to_action
from networks import (CostModel, already_trained, cosine, fingerprint, latest, load_frozen,
                      optimise, resume_run, save, save_run)
from runtime import (RunLog, Stop, autocast, fail, optimisation, parser, positive, pyplot, run,
                     save_figure, set_up)
from train_predictor import load_latents

EXPERT, RANDOM = "data_race", "data"  # the classes of the first classifier
BENT = 2.0  # times the planner's noise: near misses are between 0 and this far from the expert
DENSITY_SAMPLE = 200_000  # expert latents that the density is fitted to, at most


def arguments():
    p = parser(__doc__, data=True, shares=False)
    g = p.add_argument_group("model")
    g.add_argument("--hidden", type=positive, default=256, help="width of the classifiers")
    g.add_argument("--shrinkage", type=float, default=0.05,
                   help="density: share of a round covariance mixed into the experts' own")
    optimisation(p, batch_size=1024, epochs=4, steps_per_epoch=250, weight_decay=1e-2)
    return p.parse_args()


def loss_fn(cost, expert, chaos, hits, misses):
    """Binary cross-entropy of two classifiers, latents (N, D) of any number each: expert 0 and
    chaos 1 for the one, hits 0 and misses 1 for the other -> (loss, logs)."""
    logits = {"expert": cost.classify(expert), "random": cost.classify(chaos),
              "hits": cost.miss(hits), "misses": cost.miss(misses)}
    loss = sum(F.softplus(-x if name in ("random", "misses") else x).mean() / 2
               for name, x in logits.items())
    return loss, {name: x.mean().detach() for name, x in logits.items()}


def bend(act, size, generator):
    """Actions (B, H, 3) as a planner could try them around these: its limits, and `size` (B, 1, 1)
    times its noise; with size 0 the same actions within its limits."""
    B, H, _ = act.shape
    steer, gas, brake = act.unbind(-1)
    u = torch.stack([steer / STEER, gas / GAS - brake / BRAKE], dim=-1)  # (B, H, 2)
    noise = size * torch.tensor(NOISE) * colored_noise(B, H, RHO, generator)
    return to_action((u + noise.to(u)).clamp(-1, 1))


class Sampler:
    """Latents of one source and part, real ones and ones imagined from them.

    Frames of the zoom are left out: they would tell the classes apart without any driving.
    """

    def __init__(self, latents, chunks, predictor, horizon):
        self.latents, self.predictor, self.K = latents, predictor, horizon + 1
        self.starts = latents.starts(chunks, self.K, skip=ZOOM_STEPS)
        if len(self.starts) == 0:
            fail(f"{chunks[0].path.parent}: no episode lasts {ZOOM_STEPS} steps of zoom and "
                 f"{horizon * latents.repeat} more; collect more frames")

    def real(self, count, seed=0):
        """(N, D): at most `count` of the latents, chosen at random."""
        rng = np.random.default_rng(seed)
        starts = np.sort(rng.permutation(self.starts)[:count])
        return self.latents.windows(starts, 1)[0][:, 0]

    @torch.no_grad()
    def mixed(self, count, rng, device, dtype):
        """About (count, D) on the device: half real, half imagined up to the whole horizon."""
        z, act = (x.to(device) for x in self.latents.windows(
            rng.choice(self.starts, max(1, count // 8)), self.K))
        with autocast(device, dtype):
            dreamt = self.predictor.rollout(z[:, 0], act).float()
        pick = torch.from_numpy(rng.integers(self.K - 1, size=(4, len(z)))).to(device)
        rows = torch.arange(len(z), device=device)
        return torch.cat([x[rows, k] for k in pick for x in (z[:, 1:], dreamt)])

    @torch.no_grad()
    def near_misses(self, count, rng, device, dtype):
        """Latents from the third step of windows on, about (count, D) each, on the device: as they
        came, as imagined under the actions taken, and as imagined under bent ones."""
        z, act = self.latents.windows(rng.choice(self.starts, max(1, count // 2)), self.K)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        size = BENT * torch.rand(len(z), 1, 1, generator=generator)
        act = torch.cat([bend(act, s, generator) for s in (0 * size, size)]).to(device)
        z = z.to(device)
        with autocast(device, dtype):
            same, other = self.predictor.rollout(z[:, 0].repeat(2, 1), act).float().chunk(2)
        pick = torch.from_numpy(rng.integers(min(2, self.K - 2), self.K - 1, size=(2, len(z))))
        rows = torch.arange(len(z), device=device)
        return [torch.cat([x[rows, k] for k in pick.to(device)]) for x in (z[:, 1:], same, other)]


def draw(samplers, count, rng, device, dtype):
    """Latents on the device: expert, chaos (count, D); hits and misses, the expert's situations
    under its own and under bent actions, the other driving with the latter."""
    expert, chaos = (samplers[k].mixed(count, rng, device, dtype) for k in (EXPERT, RANDOM))
    others = [s.mixed(count // 2, rng, device, dtype)
              for name, s in samplers.items() if name not in (EXPERT, RANDOM)]
    came, same, bent = samplers[EXPERT].near_misses(count, rng, device, dtype)
    return expert, chaos, torch.cat([came, same]), torch.cat([bent, chaos[:count // 2], *others])


@torch.no_grad()
def evaluate(cost, held, device, dtype):
    """Held-out energies {(kind, source): (N,)} and {kind: AUC of random over expert}, with "near
    misses" that of what is imagined under bent actions over what is under those taken."""
    energies = {(kind, name): cost.energy(s.real(4000, 1).to(device), kind).cpu().numpy()
                for name, s in held.items() for kind in cost.KINDS}
    over = lambda c, e: roc_auc_score(np.r_[np.zeros(len(e)), np.ones(len(c))], np.r_[e, c])
    auc = {kind: over(energies[kind, RANDOM], energies[kind, EXPERT]) for kind in cost.KINDS}
    _, *pair = held[EXPERT].near_misses(4000, np.random.default_rng(1), device, dtype)
    same, bent = (cost.energy(z).cpu().numpy() for z in pair)
    return energies, auc | {"near misses": over(bent, same)}


def draw_energies(energies, auc, path):
    """Histograms of the energies, a curve a source."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    names = {EXPERT: "expert", RANDOM: "random", "data_recovery": "recovery"}
    for ax, kind in zip(axes, CostModel.KINDS):
        rows = {name: e if kind == "classifier" else np.log10(e + 1e-6)
                for (k, name), e in energies.items() if k == kind}
        edges = np.linspace(min(e.min() for e in rows.values()),
                            max(e.max() for e in rows.values()), 60)
        for name, e in rows.items():
            ax.hist(e, edges, histtype="stepfilled", alpha=0.45, density=True,
                    label=names.get(name, name))
        ax.set_title(f"{kind}: AUC {auc[kind]:.3f}, random over expert", fontsize=9)
        ax.set_xlabel("energy (logit)" if kind == "classifier" else "log10 of the energy")
        ax.set_ylabel("density of held-out frames")
        ax.legend(fontsize=8)
    save_figure(fig, path)


def main():
    args = arguments()
    began, stop = time.time(), Stop()
    device, dtype = set_up(args)
    for name in (EXPERT, RANDOM):
        if name not in args.data:
            fail(f"--data {' '.join(args.data)}: the cost model needs {EXPERT} and {RANDOM}")
    sources = load_sources(args)
    models = args.root / "models"
    predictor, payload = load_frozen(latest(models, "predictor"), "predictor", device,
                                     "python train_predictor.py")
    latents, encoder, key = load_latents(args, device, dtype, sources, stop)
    if payload["encoder_key"] != key:
        fail(f"{latest(models, 'predictor')}: was trained on another encoder than "
             f"{latest(models, 'encoder_mixed')}; run `python train_predictor.py --fresh`")
    parts = [{name: Sampler(latents, split[part], predictor, payload["horizon"])
              for name, split in sources.items()} for part in (0, 1)]
    train, held = parts

    cost = CostModel(encoder.dim, args.hidden).to(device)
    optim = torch.optim.AdamW(cost.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # small and in fp32
    keys = dict(encoder_key=key, predictor_key=fingerprint(predictor))
    data = data_key(sources)
    saved = resume_run(models / "cost_model_resume.pth", {"cost": cost}, optim, scaler, args,
                       ("cost_model_final.pth", "cost_model.jsonl"), data, **keys)
    step = saved["step"] if saved else 0
    per_epoch = saved["per_epoch"] if saved else args.steps_per_epoch or max(
        1, len(train[EXPERT].starts) // args.batch_size)
    steps = args.epochs * per_epoch
    if step >= steps:
        return already_trained(models / "cost_model_final.pth")
    log = RunLog(args, "cost_model", resumed=bool(saved))
    cost.fit_density(train[EXPERT].real(DENSITY_SAMPLE).to(device), args.shrinkage)
    for step in tqdm(range(step, steps), initial=step, total=steps, desc="cost model", unit="step",
                     mininterval=1):
        rng = np.random.default_rng([args.seed, step])
        loss, logs = loss_fn(cost, *draw(train, args.batch_size, rng, device, dtype))
        if not torch.isfinite(loss):
            fail(f"step {step}: the loss is {loss.item()}; nothing was saved; lower --lr")
        lr = cosine(step, steps, args.lr)
        if step % 20 == 0:
            log.log(step, loss=loss, lr=lr, **logs)
        optimise(loss, [cost], optim, scaler, lr)
        if (step + 1) % per_epoch == 0:
            energies, auc = evaluate(cost, held, device, dtype)
            log.log(step, **{f"val_auc_{k.replace(' ', '_')}": a for k, a in auc.items()})
            log.curves()
        if step + 1 == steps:
            save(models / "cost_model_final.pth", {"cost": cost}, **keys, auc=auc)
            draw_energies(energies, auc, args.root / "visuals" / "energy_histogram.png")
        if stop or (step + 1) % per_epoch == 0:
            save_run(models / "cost_model_resume.pth", {"cost": cost}, optim, scaler, args,
                     step + 1, data_key=data, per_epoch=per_epoch, **keys)
        if stop and step + 1 < steps:
            print(f"stopped at step {step + 1} of {steps}; the same command goes on")
            return 130
    print(f"{models}/cost_model_final.pth in {(time.time() - began) / 60:.1f} min; held-out AUC of "
          "random over expert: " + ", ".join(f"{k} {auc[k]:.3f}" for k in cost.KINDS)
          + f"; of near misses {auc['near misses']:.3f}")
    return 0


if __name__ == "__main__":
    run(main)
