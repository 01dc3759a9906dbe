"""The report card: probes, rollouts, impossible futures and plans, each beside its nulls.

Part 1, probes: what a linear probe reads from the latents. Part 2, dreams: how long rollouts hold.
Part 3, futures: which futures are found impossible. Part 4, plans: whether the energy ranks plans
as the simulator does. Part 5, reconstructions: what the decoder draws of the present and of
rollouts. The files of `report/` describe each part. Part 6, long_dreams, whether dreams hold for
20 s, runs only where --parts names it; it needs a dream model.

It reads ROOT/models, or the weights that come with the code, and the training episodes of
ROOT/data_race, data_recovery and data, or drives some. Then it drives new episodes of the same
three kinds on tracks 200000 to 299999, which no net was trained on. It prints tables: a value ±
half its 95 % interval, bootstrapped over tracks. It writes ROOT/visuals/report.json (all figures,
with n and intervals), report.png, and where there is a decoder report_dreams.png, of part 6
dream_long.png. Some --parts make report_only_<parts>.json and .png.

The weights that come with the code take 4 to 7 minutes on two cores with bf16.
Same seed, same machine: same report.

    python evaluate.py
    python evaluate.py --models models/pretrained --parts probes
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import shlex
import sys
import time
from types import SimpleNamespace

from report import page
from report.dreams import FAR, evaluate_rollouts
from report.episodes import CHOOSING, POLICY_MAKERS, all_episodes, choose_samples
from report.futures import evaluate_violations
from report.long_dreams import evaluate_long_dreams
from report.models import Models
from report.plans import evaluate_plans
from report.probes import AHEAD, evaluate_probes
from report.reconstructions import evaluate_reconstructions
from support.cli import Number, fail, parser, run_main
from support.device import set_up
from support.files import git_commit, replace_atomically, versions, writable
from support.pictures import ornament
from support.plan_config import PlanConfig, planning, take_gas

PARTS = {  # part: the nets that it needs beside the encoder, and its tables
    "probes": ((), [page.probes_table]),
    "dreams": (("predictor",), [page.rollouts_table]),
    "futures": (("predictor",), [page.futures_table]),
    "plans": (("predictor", "cost"), [page.plans_table]),
    "reconstructions": (("predictor", "decoder"), [page.present_table, page.pixels_table]),
    "long_dreams": (
        ("predictor", "cost", "dream"),
        [
            page.long_dreams_table("physics", "R², latents ahead under the actions of real drives"),
            page.long_dreams_table("stable", "share as near to training latents as real ones"),
            page.long_dreams_table("roads", "distance of dreamt and real distributions"),
            page.long_dreams_table("samples", "differences of two from one state, over any two's"),
            page.long_dreams_table("drivers", "what drivers reach in 20 s"),
        ],
    ),
}
CARD = [part for part in PARTS if part != "long_dreams"]  # which takes as long as all the others

SIZES = {  # flag: least, most, default, help
    "--track_seed": (CHOOSING, CHOOSING + 90_000, CHOOSING, "first of the new tracks"),
    "--tracks": (2, 2500, 16, "new tracks of each kind of driving"),
    "--train_frames": (200, 10**7, 3000, "latents of each folder that probes are fitted to"),
    "--frames": (60, 10**7, 2400, "frames of each kind of driving that probes are tested on"),
    "--windows": (2, 10**6, 200, "windows of each kind that are rolled out and violated"),
    "--states": (1, 10**6, 12, "states of each kind from which plans are driven"),
    "--replayed_plans": (2, 10**6, 24, "plans of a state that are also rendered as driven"),
    "--supervised_steps": (0, 10**9, 600, "training steps of the rows that see labels; 0: no rows"),
    "--supervised_batch": (1, 10**6, 96, "frames in such a step"),
    "--autoencoder_steps": (0, 10**9, 300, "steps of the autoencoder of part 5; 0: no row"),
    "--dreams": (2, 10**4, 8, "states of each kind from which the planner drives in dreams"),
    "--bootstrap": (2, 10**5, 200, "resamples of the tracks behind each interval"),
    "--off_road": (0, 10**6, 17, "tiles that a second off the road costs; an expert makes 17"),
}


def arguments():
    p = parser(__doc__, models=True)
    text = "some of the card only, in report_only_<parts>.json and .png"
    p.add_argument("--parts", nargs="+", choices=PARTS, default=CARD, help=text)
    g = p.add_argument_group("sizes")
    for name, (low, high, default, text) in SIZES.items():
        g.add_argument(name, type=Number(int, low, high), default=default, help=text)
    planning(p)
    p.set_defaults(threads=0)  # it encodes more than it plans: all cores
    return p.parse_args()


def possible(models, asked):
    """The parts asked for whose nets are there; names the others and why."""
    out = []
    for part in [part for part in PARTS if part in asked]:
        lacking = [name for name in PARTS[part][0] if getattr(models, name) is None]
        if lacking:
            print(f"left out: {part}, which needs a {' and a '.join(lacking)} of {models.path}")
        else:
            out.append(part)
    if not out:
        fail(f"--parts {' '.join(asked)}: none is possible; train what is missing, or try probes")
    return out


def evaluate(models, parts, train, test, cfg, planner, sheet):
    """Runs the parts and prints each -> ({part: its figures}, tables).

    Rollouts are drawn to the file `sheet`.
    """
    H = max(AHEAD)
    behind, ahead = H + models.encoder.history, max(FAR, 2 * H)
    samples = choose_samples(test, cfg.windows, cfg.seed, behind, ahead)
    figures = {
        "probes": lambda: evaluate_probes(models, train, test, cfg),
        "dreams": lambda: evaluate_rollouts(models, samples, cfg, sheet),
        "futures": lambda: evaluate_violations(models, train, samples, cfg),
        "plans": lambda: evaluate_plans(models, train, samples, cfg, planner),
        "reconstructions": lambda: evaluate_reconstructions(models, train, test, samples, cfg),
        "long_dreams": lambda: evaluate_long_dreams(
            models, train, test, cfg, planner, sheet.with_name("dream_long.png")
        ),
    }
    found, tables = {}, []
    for part in parts:
        found[part] = figures[part]()
        for table in PARTS[part][1]:
            tables.append(table(found[part]))
            page.print_table(*tables[-1][:3])
    return found, tables


def main():
    args, began = arguments(), time.monotonic()
    device, dtype = set_up(args)
    models = Models(args.root, args.models, device, dtype, args.seed)
    if models.cost:
        take_gas(args, models.cost_payload)
    visuals, parts = writable(args.root / "visuals"), possible(models, args.parts)
    sizes = {name: getattr(args, name) for name in (flag[2:] for flag in SIZES)}
    cfg = SimpleNamespace(root=args.root, seed=args.seed, **sizes)

    # episodes and their latents
    train, test = all_episodes(cfg, models.encoder)
    models.standardize_untrained(choose_samples(train, 500, cfg.seed))
    models.encode_episodes(train + test)

    sheet = visuals / "report_dreams.png"
    found, tables = evaluate(models, parts, train, test, cfg, PlanConfig.of(args), sheet)
    minutes = (time.monotonic() - began) / 60

    # the files
    report = {
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "args": {k: str(v) for k, v in vars(args).items()},
        "checkpoint": str(models.path),
        "encoder": {"key": models.key, **models.encoder.args},
        "tracks": {s: [x.track for x in test if x.source == s] for s in POLICY_MAKERS},
        "minutes": round(minutes, 2),
        "parts": found,
    }
    body = json.dumps(report, indent=1, allow_nan=False).encode()
    name = "report" if parts == CARD else "report_only_" + "_".join(parts)
    replace_atomically(writable(visuals) / f"{name}.json", lambda f: f.write(body))
    with ornament(visuals / f"{name}.png"):
        title = f"{models.path}, tracks {test[0].track} to {test[-1].track}"
        page.draw_page(tables, title, visuals / f"{name}.png")
    print(f"\n{visuals}/{name}.json, {name}.png in {minutes:.1f} min")
    return 0


if __name__ == "__main__":
    run_main(main)
