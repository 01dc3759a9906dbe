"""The report card: what the latents know, how long dreams hold, which futures are found impossible,
and whether the energy's judgement matches the world. Every figure stands beside its null.

Reads ROOT/models, or the weights that come with the code, and the training episodes of
ROOT/data_race, data_recovery and data, or drives some; then drives new episodes of the same three
kinds on tracks 200000 to 299999, which nothing was fitted to. Prints tables (a value ± half its
95 % interval, bootstrapped over tracks), writes ROOT/visuals/report.json (all figures, with n and
intervals), report.png, and report_dreams.png where there is a decoder; of some --parts
report_only_<parts>.json and .png.

1. knows    R² of ridge and small-MLP probes where the road is in view (|offset| < 7 units, |heading
            error| < 1 rad), AUC of any wheel off the road in all frames; from imagined latents too.
            Half of the variance of side speed lies in a hundredth of the frames, slides: its R² is
            of a few frames, as its interval shows.
2. dreams   squared error of each imagined step over that of copy-last.
3. futures  surprise, the distance between imagined and actual latents in units of the dream's usual
            errors at such a moment, of true and violated futures, films of 1, 5 and 15 latents. One
            counts where its violation shows: teleports with the road in view, frozen, reversed and
            double speed on a moving car, swapped and mirrored on unlike actions. Two controls
            should not alarm: the light changes, or another light throughout.
4. plans    candidates drawn as the planner draws them, dreamt and then driven in the simulator. The
            outcome is the tiles made along the track, shortcuts to another part of it not counted,
            less --off_road tiles a second of four wheels off the road. A state is restored on a new
            car from position, angle and speeds of all five bodies, pedals, wheel spin and touched
            tiles: 30 steps later positions agree to about 1e-4 units (only the joints' warm start
            is lost). Beside the energy a judge that saw the labels: what these latents could tell.
            A plan is worth more, or less, than its 0.6 s: from where --replayed_plans of them end
            an expert drives on for a second, which counts too. Rank correlations are means within a
            state, but for the last two rows: there the plans of all states stand in one order,
            and a judge of states alone does well.

About 4 minutes for the weights that come with the code, on two cores with bf16.
Same seed, same machine: same report.

    python evaluate.py
    python evaluate.py --checkpoint models/encoder_mixed_ep2.pth --parts knows
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import shlex
import sys
import time
from pathlib import Path

from drive_mpc import planning
from report.dreams import FAR, draw_dreams, dreams
from report.episodes import CHOOSING, DRIVERS, all_episodes, choose_samples
from report.futures import futures
from report.models import Models
from report.page import (
    draw_page,
    page_dreams,
    page_futures,
    page_knows,
    page_plans,
    show_dreams,
    show_futures,
    show_knows,
    show_plans,
)
from report.plans import plans
from report.probes import AHEAD, knows
from support.cli import Number, batch_number, fail, nonnegative_int, parser, run
from support.dreams import load_decoder
from support.files import git_commit, replace_atomically, versions, writable
from support.latents import features_of
from support.pictures import ornament


def arguments():
    p = parser(__doc__, models=True)
    g = p.add_argument_group("what is judged")
    g.add_argument(
        "--checkpoint",
        type=Path,
        help="any encoder checkpoint (default: the newest of ROOT/models, or the one "
        "that comes with the code); what needs "
        "a predictor or cost model trained on it is left out if there is none",
    )
    g.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="some of the card only, in report_only_<parts>.json and .png",
    )
    g = p.add_argument_group("sizes")
    g.add_argument(
        "--track_seed",
        type=Number(int, CHOOSING[0], CHOOSING[-1]),
        default=CHOOSING[0],
        help="first of the tracks to drive anew, 200000 to 299999: those for choosing",
    )
    g.add_argument(
        "--tracks",
        type=Number(int, 2, len(CHOOSING) // len(DRIVERS)),
        default=16,
        help="tracks of each kind of driving; intervals shrink with their number",
    )
    g.add_argument(
        "--train_frames",
        type=Number(int, 200, 10**7),
        default=3000,
        help="latents of each folder that probes are fitted to, from many episodes",
    )
    g.add_argument(
        "--frames",
        type=Number(int, 60, 10**7),
        default=2400,
        help="frames of each kind of driving that probes are judged on",
    )
    g.add_argument(
        "--windows",
        type=Number(int, 2, 10**6),
        default=200,
        help="windows of each kind of driving that are dreamt and violated",
    )
    g.add_argument(
        "--states",
        type=Number(int, 1, 10**6),
        default=12,
        help="states of each kind of driving from which plans are driven, a second each",
    )
    g.add_argument(
        "--replayed_plans",
        type=Number(int, 2, 10**6),
        default=24,
        help="of a state's plans, how many are also filmed as they are driven (the "
        "energy of what came tells a bad energy from a bad dream), and from how "
        "many an expert drives on",
    )
    g.add_argument(
        "--supervised_steps",
        type=nonnegative_int,
        default=600,
        help="training steps of the row that sees the labels; 0 leaves it out, and the "
        "judge of plans that saw them",
    )
    g.add_argument(
        "--supervised_batch", type=batch_number, default=96, help="frames in such a step"
    )
    g.add_argument(
        "--bootstrap",
        type=Number(int, 2, 10**5),
        default=200,
        help="resamples of the tracks behind each interval",
    )
    g.add_argument(
        "--off_road",
        type=Number(float, 0, 1e6),
        default=17.0,
        help="tiles that a second with all wheels off the road costs a plan; 17 is what "
        "the expert makes in a second",
    )
    planning(p)
    p.set_defaults(samples=256, data=None)  # the folders that are there
    return p.parse_args()


# ------------------------------------------------------------------ main

PARTS = {
    "knows": (),
    "dreams": ("predictor",),
    "futures": ("predictor",),
    "plans": ("predictor", "cost"),
}  # part: the nets it needs beside the encoder


def possible(subject, args):
    """The parts asked for whose nets are there; names the others and why."""
    out = []
    for part in args.parts:
        lacking = [n for n in PARTS[part] if getattr(subject, n) is None]
        if lacking:
            print(f"left out: {part}, which needs a {' and a '.join(lacking)} of {subject.path}")
        else:
            out.append(part)
    if not out:
        fail(
            f"--parts {' '.join(args.parts)}: none of them can be judged; train what is missing, "
            "or ask for --parts knows"
        )
    return out


def prepare(subject, args):
    """(training episodes, new episodes, windows of the new ones), encoded."""
    train, test = all_episodes(args, subject.encoder)
    some = choose_samples(train, 500, args.seed)
    subject.twin.fit_standardization(
        features_of(subject.twin, some.frames(subject.newest()), subject.device, subject.dtype)
    )
    subject.encode_episodes(train + test)
    H = max(AHEAD)
    spots = choose_samples(
        test, args.windows, args.seed, behind=H + subject.encoder.history, ahead=max(FAR, 2 * H)
    )
    return train, test, spots


def evaluate(subject, parts, train, test, spots, args):
    """Runs the parts and prints each: ({part: its figures}, {part: how to draw it})."""
    found, pages = {}, {}
    if "knows" in parts:
        rows = found["knows"] = knows(subject, train, test, args)
        show_knows(rows)
        pages["knows"] = lambda ax: page_knows(ax, rows)
    if "dreams" in parts:
        curves, error = dreams(subject, train, spots, args)
        found["dreams"] = curves
        show_dreams(curves)
        pages["dreams"] = lambda ax: page_dreams(ax, curves)
        if subject.decoder:
            with ornament(sheet := args.root / "visuals" / "report_dreams.png"):
                draw_dreams(subject, spots, error["this predictor"], sheet)
    if "futures" in parts:
        violations = found["futures"] = futures(subject, train, spots, args)
        show_futures(violations)
        pages["futures"] = lambda ax: page_futures(ax, violations)
    if "plans" in parts:
        figures, energy, true, states = plans(subject, train, spots, args)
        found["plans"] = figures
        show_plans(figures)
        pages["plans"] = lambda ax: page_plans(ax, figures, energy, true, states)
    return found, pages


def main():
    args, began = arguments(), time.monotonic()
    subject = Models(args)
    visuals = writable(args.root / "visuals")
    parts = possible(subject, args)
    train, test, spots = prepare(subject, args)
    if "dreams" in parts:
        subject.decoder = load_decoder(subject.models, subject.key, subject.device)
    found, pages = evaluate(subject, parts, train, test, spots, args)
    minutes = (time.monotonic() - began) / 60
    report = {
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "args": {k: str(v) for k, v in vars(args).items()},
        "checkpoint": str(subject.path),
        "encoder": {"key": subject.key, **subject.encoder.args},
        "tracks": {s: [x.track for x in test if x.source == s] for s in DRIVERS},
        "latents": {
            "fitted": sum(len(x.obs) for x in train),
            "judged": sum(len(x.obs) for x in test),
        },
        "minutes": round(minutes, 2),
        "parts": found,
    }
    body = json.dumps(report, indent=1, allow_nan=False).encode()
    ran = [part for part in PARTS if part in parts]
    name = "report" if len(ran) == len(PARTS) else "report_only_" + "_".join(ran)
    replace_atomically(writable(visuals) / f"{name}.json", lambda f: f.write(body))
    with ornament(visuals / f"{name}.png"):
        draw_page(
            pages,
            f"{subject.path}, tracks {test[0].track} to {test[-1].track}",
            visuals / f"{name}.png",
        )
    sheet = ", report_dreams.png" if subject.decoder else ""
    print(f"\n{visuals}/{name}.json, {name}.png{sheet} in {minutes:.1f} min")
    return 0


if __name__ == "__main__":
    run(main)
