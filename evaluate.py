"""The report card: probes, rollouts, impossible futures and plans, each beside its nulls.

Part 1, probes: what a linear probe reads from the latents. Part 2, dreams: how long rollouts hold.
Part 3, futures: which futures are found impossible. Part 4, plans: whether the energy ranks plans
as the simulator does. The files of `report/` describe each part.

It reads ROOT/models, or the weights that come with the code, and the training episodes of
ROOT/data_race, data_recovery and data, or drives some. Then it drives new episodes of the same
three kinds on tracks 200000 to 299999, which nothing was fitted to. It prints tables: a value ±
half its 95 % interval, bootstrapped over tracks. It writes ROOT/visuals/report.json (all figures,
with n and intervals), report.png, and report_dreams.png where there is a decoder. Some --parts
make report_only_<parts>.json and .png.

About 4 minutes for the weights that come with the code, on two cores with bf16.
Same seed, same machine: same report.

    python evaluate.py
    python evaluate.py --checkpoint models/encoder_mixed_ep2.pth --parts probes
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import shlex
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from drive_mpc import planning, take_gas
from report.dreams import FAR, draw_rollouts, evaluate_rollouts
from report.episodes import CHOOSING, DRIVERS, all_episodes, choose_samples
from report.futures import evaluate_violations
from report.models import Models
from report.page import draw_page, print_futures, print_plans, print_probes, print_rollouts
from report.plans import evaluate_plans
from report.probes import AHEAD, evaluate_probes
from support.cli import Number, batch_number, fail, nonnegative_int, parser, run
from support.device import set_up
from support.dreams import load_decoder
from support.files import git_commit, replace_atomically, versions, writable
from support.pictures import ornament

PARTS = {  # part: the nets that it needs beside the encoder
    "probes": (),
    "dreams": ("predictor",),
    "futures": ("predictor",),
    "plans": ("predictor", "cost"),
}


@dataclass
class CardConfig:
    """The flags of the same names, without the planner's."""

    root: Path
    seed: int
    track_seed: int
    tracks: int
    train_frames: int
    frames: int
    windows: int
    states: int
    replayed_plans: int
    supervised_steps: int
    supervised_batch: int
    bootstrap: int
    off_road: float


def arguments():
    p = parser(__doc__, models=True)
    g = p.add_argument_group("what is tested")
    text = (
        "any encoder checkpoint (default: the newest); parts without nets that fit it are left out"
    )
    g.add_argument("--checkpoint", type=Path, help=text)
    text = "some of the card only, in report_only_<parts>.json and .png"
    g.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help=text)

    g = p.add_argument_group("sizes")
    number = lambda name, low, high, default, text, kind=int: g.add_argument(
        name, type=Number(kind, low, high), default=default, help=text
    )
    number("--track_seed", CHOOSING, CHOOSING + 90_000, CHOOSING, "first of the new tracks")
    number("--tracks", 2, 3333, 16, "new tracks of each kind of driving")
    number("--train_frames", 200, 10**7, 3000, "latents of each folder that probes are fitted to")
    number("--frames", 60, 10**7, 2400, "frames of each kind of driving that probes are tested on")
    number("--windows", 2, 10**6, 200, "windows of each kind that are rolled out and violated")
    number("--states", 1, 10**6, 12, "states of each kind from which plans are driven")
    number("--replayed_plans", 2, 10**6, 24, "plans of a state that are also rendered as driven")
    text = "training steps of the rows that see the labels; 0 leaves these rows out"
    g.add_argument("--supervised_steps", type=nonnegative_int, default=600, help=text)
    g.add_argument(
        "--supervised_batch", type=batch_number, default=96, help="frames in such a step"
    )
    number("--bootstrap", 2, 10**5, 200, "resamples of the tracks behind each interval")
    text = "tiles that a second off the road costs a plan; an expert makes 17 in a second"
    number("--off_road", 0, 1e6, 17.0, text, float)
    planning(p)
    p.set_defaults(samples=256)
    return p.parse_args()


def possible(models, asked):
    """The parts asked for whose nets are there; names the others and why."""
    out = []
    for part in asked:
        if lacking := [name for name in PARTS[part] if getattr(models, name) is None]:
            print(f"left out: {part}, which needs a {' and a '.join(lacking)} of {models.path}")
        else:
            out.append(part)
    if not out:
        fail(f"--parts {' '.join(asked)}: none is possible; train what is missing, or try probes")
    return out


def evaluate(models, parts, train, test, cfg, planner, sheet):
    """Runs the parts and prints each: {part: its figures}.

    `sheet` is the file that the rollouts are drawn to, where there is a decoder.
    """
    found, H = {}, max(AHEAD)
    behind, ahead = H + models.encoder.history, max(FAR, 2 * H)
    samples = choose_samples(test, cfg.windows, cfg.seed, behind, ahead)
    if "probes" in parts:
        found["probes"] = evaluate_probes(models, train, test, cfg)
        print_probes(found["probes"])
    if "dreams" in parts:
        found["dreams"], error = evaluate_rollouts(models, samples, cfg)
        print_rollouts(found["dreams"])
        if decoder := load_decoder(models.folder, models.key, models.device):
            with ornament(sheet):
                draw_rollouts(models, decoder, samples, error["this predictor"], sheet)
                print(f"drawn: {sheet}")
    if "futures" in parts:
        found["futures"] = evaluate_violations(models, train, samples, cfg)
        print_futures(found["futures"])
    if "plans" in parts:
        found["plans"] = evaluate_plans(models, train, samples, cfg, planner)
        print_plans(found["plans"])
    return found


def main():
    args, began = arguments(), time.monotonic()
    device, dtype = set_up(args)
    models = Models(args.root, args.models, args.checkpoint, device, dtype, args.seed)
    if models.cost:
        take_gas(args, models.cost_payload)
    visuals, parts = writable(args.root / "visuals"), possible(models, args.parts)
    cfg = CardConfig(*(getattr(args, f.name) for f in fields(CardConfig)))

    # episodes and their latents
    train, test = all_episodes(cfg, models.encoder)
    models.standardize_untrained(choose_samples(train, 500, cfg.seed))
    models.encode_episodes(train + test)

    found = evaluate(models, parts, train, test, cfg, args, visuals / "report_dreams.png")
    minutes = (time.monotonic() - began) / 60

    # the files
    report = {
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "args": {k: str(v) for k, v in vars(args).items()},
        "checkpoint": str(models.path),
        "encoder": {"key": models.key, **models.encoder.args},
        "tracks": {s: [x.track for x in test if x.source == s] for s in DRIVERS},
        "latents": {n: sum(len(x.obs) for x in e) for n, e in (("train", train), ("test", test))},
        "minutes": round(minutes, 2),
        "parts": found,
    }
    body = json.dumps(report, indent=1, allow_nan=False).encode()
    ran = [part for part in PARTS if part in parts]
    name = "report" if len(ran) == len(PARTS) else "report_only_" + "_".join(ran)
    replace_atomically(writable(visuals) / f"{name}.json", lambda f: f.write(body))
    with ornament(visuals / f"{name}.png"):
        title = f"{models.path}, tracks {test[0].track} to {test[-1].track}"
        draw_page(found, title, visuals / f"{name}.png")
    print(f"\n{visuals}/{name}.json, {name}.png in {minutes:.1f} min")
    return 0


if __name__ == "__main__":
    run(main)
