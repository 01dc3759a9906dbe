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
            A plan is worth more, or less, than its 0.6 s: from where --lived of them end an expert
            drives on for a second, and that counts too. Rank correlations are means of those within
            a state, but for the last two rows: there the plans of all states stand in one order,
            and a judge of states alone does well.

About 4 minutes for the weights that come with the code, on two cores with bf16.
Same seed, same machine: same report.

    python evaluate.py
    python evaluate.py --checkpoint models/encoder_mixed_ep2.pth --parts knows
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import math
import shlex
import sys
import time
import warnings
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor
from torch import nn

from buffer import Damage, chunk_files, load_sources, read_chunk
from car_env import FPS, TELEMETRY, ZOOM_STEPS, centre_line, is_tile, make_env, place_car
from collect_data import FIRST_SEED, make_random, run_episode
from collect_race_data import PACES as RACE_PACES
from collect_race_data import Expert, make_expert
from collect_recovery_data import PACES as RECOVERY_PACES
from collect_recovery_data import make_faulty
from demo_energy import MIN_JUMP, Elsewhere
from drive_mpc import Futures, Plan, draw_plans, plan, planning, take_gas, to_action
from networks import (
    Predictor,
    cosine,
    fingerprint,
    latest,
    load_frozen,
    meanwhile,
    models_of,
    optimise,
    some_root,
    stack,
    unit_act,
)
from support.cli import Number, Refusal, batch_number, command, fail, natural, parser, run
from support.files import git_commit, replace_atomically, versions, writable
from support.pictures import ornament, plain, pyplot, save_figure
from support.progress import progress
from support.training import autocast, set_up
from train_encoder import features_of, jitter_
from train_predictor import draw_dream, dream, load_decoder

DRIVERS = {"data_race": make_expert, "data_recovery": make_faulty, "data": make_random}
JOBS = {"data_race": {"paces": RACE_PACES}, "data_recovery": {"paces": RECOVERY_PACES}, "data": {}}
CHOOSING = range(200_000, 300_000)  # track seeds; 100000 to 100099 are for reporting
TRAINING = range(FIRST_SEED, 2 * FIRST_SEED)
PROBED = ("speed", "yaw_rate", "lateral_offset", "heading_error", "curvature_20", "side_speed")
OFF_ROAD = "off road (AUC)"
JUDGES = "this model", "untrained nets", "pixel error", "copy-last"
OWN, TWIN = JUDGES[:2]
AHEAD = (1, 5, 15)  # latents ahead at which imagination is probed and futures are judged
FAR = 30  # latents ahead to which dreams are followed
IN_VIEW = 7.0, 1.0  # units off the centre line, rad off its direction: the road is in view
IN_SIGHT = 20.0, math.pi / 2  # the same, where a plan can still find the road
MOVING = 5.0  # units/s, from which a film shows which way and how fast it runs
UNLIKE = 0.5  # of two action sequences, mean distance in units of their usual size
STEERED = 0.03  # mean |steer| from which a mirrored one is another
FALSE_ALARMS = 0.01
LEAP = 2  # tiles in a step that nobody drives: another part of the track is nearer now
AFTER, PACE = 1, 0.5  # seconds that an expert goes on from where a plan ended, and its pace
STILL = 0.01  # of the squares of errors: smaller ones count as large as that quantile
WARM_UP = 5  # plans made before the judged one, as the driver would have
SEGMENT = 120  # latents of a training episode, at most: many tracks tell more than many frames
BLOCK = 512  # stacks of frames that are in memory at a time


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
        "--lived",
        type=Number(int, 2, 10**6),
        default=24,
        help="of a state's plans, how many are also filmed as they are driven (the "
        "energy of what came tells a bad energy from a bad dream), and from how "
        "many an expert drives on",
    )
    g.add_argument(
        "--ceiling_steps",
        type=natural,
        default=600,
        help="training steps of the row that sees the labels; 0 leaves it out, and the "
        "judge of plans that saw them",
    )
    g.add_argument("--ceiling_batch", type=batch_number, default=96, help="frames in such a step")
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


# ------------------------------------------------------------------ episodes on the grid of latents


@dataclass
class Episode:
    """An episode, or a part of one, at the rate of latents: row k is `repeat` steps after k - 1."""

    source: str
    track: int
    obs: np.ndarray  # (K, 64, 64, 3) uint8
    act: np.ndarray  # (K - 1, 3) mean action that leads from k to k + 1
    state: np.ndarray  # (K, len(TELEMETRY))
    first: int  # latent from which on the zoom is over and all frames are there
    actions: np.ndarray = None  # (T, 3) of every step
    saved: list = field(default_factory=list)  # states of the simulator, one a latent
    z: dict = field(default_factory=dict)  # {judge: its latents (K, D)}

    def part(self, start, length, history):
        """The latents from `start` on, with the frames that the first of them sees."""
        rows = slice(max(0, start + 1 - history), start + length)
        return Episode(
            self.source,
            self.track,
            self.obs[rows].copy(),
            self.act[rows.start : rows.stop - 1],
            self.state[rows],
            start - rows.start,
        )


def on_grid(source, track, arrays, repeat, saved=()):
    """The Episode of the arrays of a chunk."""
    K = len(arrays["act"]) // repeat + 1
    act = arrays["act"][: (K - 1) * repeat].reshape(K - 1, repeat, 3).mean(axis=1)
    return Episode(
        source,
        track,
        np.ascontiguousarray(arrays["obs"][::repeat]),
        act,
        arrays["telemetry"][::repeat],
        -(-ZOOM_STEPS // repeat),
        arrays["act"],
        list(saved),
    )


def segment(episode, rng, history):
    """A part of the episode after the zoom, drawn at random, or None of one that ends before."""
    room = len(episode.obs) - SEGMENT - episode.first
    start = episode.first + (rng.integers(room + 1) if room > 0 else 0)
    return episode.part(start, SEGMENT, history) if start < len(episode.obs) else None


def read_episodes(sources, count, encoder, seed):
    """Parts of training episodes of each folder, drawn at random: `count` latents or a few more."""
    out = []
    for name, (chunks, _) in sources.items():
        rng, damage, have = np.random.default_rng([seed, 1]), Damage.of(chunks), 0
        for i in rng.permutation(len(chunks)):
            try:
                arrays = read_chunk(chunks[i].path, "obs", "act", "telemetry")
            except Refusal as e:
                damage.add(e)
                continue
            x = on_grid(name, chunks[i].meta["track_seed"], arrays, encoder.repeat)
            if part := segment(x, rng, encoder.history):
                out.append(part)
                have += len(part.obs)
            if have >= count:
                break
    return out


class Recorder:
    """A policy that also saves the simulator's state at every latent."""

    def __init__(self, policy, repeat):
        self.policy, self.repeat, self.t, self.saved = policy, repeat, 0, []
        self.max_steps = getattr(policy, "max_steps", 10**9)
        self.reset = policy.reset

    def start(self, env, rng):
        return hasattr(self.policy, "start") and self.policy.start(env, rng)

    def act(self, env):
        if self.t % self.repeat == 0:
            self.saved.append(save_state(env))
        self.t += 1
        return self.policy.act(env)


def drive(tracks, jobs, args, repeat):
    """Drives new episodes, one by one: of each kind, as its job says, one on each of its tracks."""
    env = make_env("fast")
    bar = progress(total=sum(map(len, tracks.values())), desc="drive", unit="episode", leave=False)
    for name, seeds in tracks.items():
        for i, track in enumerate(seeds):
            policy = Recorder(DRIVERS[name](jobs[name], i)[0], repeat)
            arrays, _ = run_episode(env, policy, track, np.random.default_rng([args.seed, track]))
            bar.update()
            yield on_grid(name, track, arrays, repeat, policy.saved)
    bar.close()


def numbered(first, count, within):
    """{kind of driving: `count` track seeds}, no two alike, from `first` on and around."""
    seeds = iter(range(first - within[0], first - within[0] + count * len(DRIVERS)))
    return {name: [within[next(seeds) % len(within)] for _ in range(count)] for name in DRIVERS}


def job_of(name, chunks):
    """How the expert of these chunks drove: its paces, and the width (the widest) of its line; as
    JOBS has it where they do not say."""
    found = {
        key: sorted(
            {
                c.meta["policy"][key]
                for c in chunks
                if isinstance(c.meta["policy"].get(key), (int, float))
            }
        )
        for key in ("pace", "width")
    }
    paces = {"paces": found["pace"]} if found["pace"] else {}
    return JOBS[name] | paces | ({"width": found["width"][-1]} if found["width"] else {})


def all_episodes(args, encoder):
    """(parts of training episodes, new episodes): those of the folders, or where ROOT has none,
    own ones on tracks that collectors may drive."""
    jobs = JOBS
    if any(chunk_files(args.root / name) for name in JOBS):
        sources = load_sources(args, ZOOM_STEPS + 2, len(TELEMETRY))
        jobs = jobs | {name: job_of(name, chunks) for name, (chunks, _) in sources.items()}
        train = read_episodes(sources, args.train_frames, encoder, args.seed)
    else:
        tracks = numbered(FIRST_SEED, -(-args.train_frames // SEGMENT), TRAINING)
        print(
            f"{args.root}: no episodes there to fit probes to; drives "
            f"{len(tracks['data'])} of each kind on tracks from {FIRST_SEED} on"
        )
        rng = np.random.default_rng([args.seed, 1])
        parts = [
            segment(x, rng, encoder.history) for x in drive(tracks, jobs, args, encoder.repeat)
        ]
        train = [x for x in parts if x]
    tracks = numbered(args.track_seed, args.tracks, CHOOSING)
    return train, list(drive({name: tracks[name] for name in jobs}, jobs, args, encoder.repeat))


def planes(frames):
    """(n, L, 64, 64, 3) uint8, an array -> (n, L, 3, 64, 64), a tensor of the same memory."""
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)


def blocks(n):
    """Slices of BLOCK rows."""
    return [slice(i, i + BLOCK) for i in range(0, n, BLOCK)]


class Spots:
    """Places in episodes: row i is latent k[i] of episodes[e[i]]."""

    def __init__(self, episodes, e, k):
        self.episodes, self.e, self.k = episodes, e, k
        self.track = np.array([episodes[i].track for i in e])
        self.source = np.array([episodes[i].source for i in e])

    def __len__(self):
        return len(self.k)

    def __getitem__(self, rows):
        return Spots(self.episodes, self.e[rows], self.k[rows])

    def frames(self, offsets):
        """obs (n, len(offsets), 3, 64, 64) uint8: frames so many latents later, or the first."""
        return planes(
            np.stack(
                [self.episodes[e].obs[np.maximum(k + offsets, 0)] for e, k in zip(self.e, self.k)]
            )
        )

    def state(self, name, ahead=0):
        """(n,) of telemetry, so many latents later."""
        column = list(TELEMETRY).index(name)
        return np.array([self.episodes[e].state[k + ahead, column] for e, k in zip(self.e, self.k)])

    def within(self, limits, ahead=0):
        """(n,) bool: the car is no further from the centre line, in units and rad, than this."""
        return (np.abs(self.state("lateral_offset", ahead)) < limits[0]) & (
            np.abs(self.state("heading_error", ahead)) < limits[1]
        )

    def z(self, first, last, judge=OWN):
        """(n, last - first + 1, D): the judge's latents from k + first to k + last."""
        return torch.stack(
            [self.episodes[e].z[judge][k + first : k + last + 1] for e, k in zip(self.e, self.k)]
        )

    def act(self, steps):
        """(n, steps, 3): the actions from here on."""
        return torch.from_numpy(
            np.stack([self.episodes[e].act[k : k + steps] for e, k in zip(self.e, self.k)])
        )


def choose_spots(episodes, count, seed, behind=0, ahead=0):
    """At most `count` Spots of each source after the zoom, so many latents from either end."""
    parts = []
    for source in dict.fromkeys(x.source for x in episodes):
        every = [
            (e, k)
            for e, x in enumerate(episodes)
            if x.source == source
            for k in range(max(x.first, behind), len(x.obs) - ahead)
        ]
        if not every:
            fail(
                f"{source}: no episode lasts {behind + ahead} latents after the zoom; collect "
                "more frames there, or raise --tracks"
            )
        rng = np.random.default_rng([seed, 2])
        parts += [every[i] for i in np.sort(rng.permutation(len(every))[:count])]
    return Spots(episodes, *np.array(parts).T)


def partners(spots, seed):
    """(n,): for each spot a row of another episode, of the same source where it has several."""
    rng, out = np.random.default_rng([seed, 3]), []
    for e, source in zip(spots.e, spots.source):
        other = np.flatnonzero((spots.e != e) & (spots.source == source))
        out.append(rng.choice(other if len(other) else np.flatnonzero(spots.e != e)))
    return np.array(out)


# ------------------------------------------------------------------ nets


class Subject:
    """What is judged: the nets, their untrained twins, and the device they live on."""

    def __init__(self, args):
        self.device, self.dtype = set_up(args)
        some_root(args.root)
        self.models = args.models or args.root / "models"
        if not args.checkpoint:
            self.models = models_of(args.root, args.models)
        self.path = args.checkpoint or latest(self.models, "encoder_mixed")
        self.encoder, _ = load_frozen(self.path, "encoder", self.device, "train_encoder.py")
        self.key = fingerprint(self.encoder)
        self.payloads = {}
        self.predictor = self._matching(
            args,
            latest(self.models, "predictor"),
            "predictor",
            "train_predictor.py",
            encoder=self.key,
        )
        keys = {"predictor": fingerprint(self.predictor)} if self.predictor else {}
        self.cost = self._matching(
            args,
            self.models / "cost_model_final.pth",
            "cost",
            "train_cost_model.py",
            encoder=self.key,
            **keys,
        )
        if self.cost:
            take_gas(args, self.payloads["cost"])
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.twin = self.encoder.untrained().eval()
            self.blank = self.predictor and Predictor(**self.predictor.args).to(self.device).eval()
        self.decoder = None

    def _matching(self, args, path, name, script, **keys):
        """The net if it was trained on the nets of these keys, or None and a line that says why."""
        mend = f"{command(script, args.root)} makes it{meanwhile(self.models)}"
        if not path.exists():
            print(f"no {name}: {path} is not there; {mend}")
            return None
        net, payload = load_frozen(path, name, self.device, script)
        for on, key in keys.items():
            if payload.get(f"{on}_key") != key:
                print(
                    f"no {name}: {path} was trained on another {on} than "
                    f"{self.path if on == 'encoder' else latest(self.models, on)}"
                )
                return None
        self.payloads[name] = payload
        return net

    def encode(self, encoder, obs):
        """obs (n, history, 3, 64, 64) -> z (n, D), standardised, on the CPU."""
        raw = features_of(encoder, obs, self.device, self.dtype)
        return (raw - encoder.mean.cpu()) / encoder.std.cpu()

    def encode_now(self, encoder, spots, what="encode", change=lambda obs: obs):
        """z (n, D) of the spots' frames, changed if need be, block by block."""
        bar = progress(
            blocks(len(spots)), desc=what, unit="block", leave=False, disable=what is None
        )
        return torch.cat(
            [self.encode(encoder, change(spots[rows].frames(self.newest()))) for rows in bar]
        )

    def newest(self):
        """Offsets, in latents, of the frames that a latent sees."""
        return np.arange(1 - self.encoder.history, 1)

    def encode_episodes(self, episodes):
        """Fills in each episode's z, of both encoders."""
        for x in progress(episodes, desc="encode", unit="episode", leave=False):
            every = Spots([x], np.zeros(len(x.obs), int), np.arange(len(x.obs)))
            x.z = {
                judge: self.encode_now(encoder, every, what=None)
                for judge, (encoder, _) in self.pairs().items()
            }

    def pairs(self):
        """{judge: (encoder, predictor)}: those under test, and their untrained twins."""
        return {OWN: (self.encoder, self.predictor), TWIN: (self.twin, self.blank)}

    @torch.no_grad()
    def imagine(self, predictor, z, act):
        """z (n, D), act (n, H, 3) -> z_hat (n, H, D) on the CPU."""
        with autocast(self.device, self.dtype):
            return predictor.rollout(z.to(self.device), act.to(self.device)).float().cpu()


# ------------------------------------------------------------------ statistics


def auc(positive, negative):
    """P(positive > negative), ties half: the area under the ROC curve (Mann-Whitney)."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return np.nan
    ranks = rankdata(np.r_[positive, negative])
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def r2(truth, told, seen):
    """1 - squared error over variance, of each column, in the rows seen."""
    truth, told = truth[seen], told[seen]
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return 1 - ((truth - told) ** 2).sum(axis=0) / np.where(spread > 0, spread, np.nan)


def spearman(a, b):
    """Rank correlation; 0 where either is constant: a judge that says nothing is not right. nan
    where either has one: a judge that was left out."""
    if np.isnan(a).any() or np.isnan(b).any():
        return np.nan
    a, b = rankdata(a), rankdata(b)
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def cells(statistic, tracks, arrays, args, n=None):
    """[{value, low, high, n, tracks}] of a statistic of rows, its 95 % interval over tracks.

    statistic(*arrays) -> a number or (c,); the arrays' rows belong to `tracks` (n,), which are
    drawn anew, with replacement, --bootstrap times.
    """
    rows = [np.flatnonzero(tracks == t) for t in np.unique(tracks)]
    rng, draws = np.random.default_rng([args.seed, 4]), []
    values = np.atleast_1d(statistic(*arrays))
    for _ in range(args.bootstrap if len(rows) > 1 else 0):  # one track says nothing of others
        pick = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(np.atleast_1d(statistic(*(a[pick] for a in arrays))))
    draws = draws or [np.full(len(values), np.nan)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all draws may be nan: so is the interval
        low, high = np.nanpercentile(np.array(draws, float), [2.5, 97.5], axis=0)
    number = lambda x: float(x) if np.isfinite(x) else None
    return [
        {
            "value": number(v),
            "low": number(a),
            "high": number(b),
            "n": int(len(tracks) if n is None else n),
            "tracks": len(rows),
        }
        for v, a, b in zip(values, low, high)
    ]


# ------------------------------------------------------------------ 1. what the latent knows


class Labels(NamedTuple):
    """What the simulator says at some spots."""

    y: np.ndarray  # (n, len(PROBED))
    seen: np.ndarray  # (n,) the road is in view
    off: np.ndarray  # (n,) a wheel is off the road
    track: np.ndarray  # (n,)


def labels_of(spots, ahead=0):
    return Labels(
        np.stack([spots.state(name, ahead) for name in PROBED], axis=1),
        spots.within(IN_VIEW, ahead),
        spots.state("wheels_off_road", ahead) > 0,
        spots.track,
    )


def regressor(kind, seed, hidden=(64,)):
    """A fresh probe: linear, or with hidden layers."""
    if kind == "ridge":
        return Ridge(alpha=1.0)
    return MLPRegressor(
        hidden_layer_sizes=hidden,
        batch_size=128,
        alpha=1e-3,
        max_iter=40,
        learning_rate_init=2e-3,
        early_stopping=True,
        n_iter_no_change=5,
        random_state=seed,
    )


def fit_standardised(net, x, y):
    """A regressor fitted to standardised x (n, D) and y -> told(x)."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its passes are what it gets
        net.fit((x - mean) / scale, y)
    return lambda x: net.predict((x - mean) / scale)


def probe(kind, train, labels, seed):
    """Fits to latents (n, D) and their labels -> told(z) = (quantities (m, 6), off road (m,))."""
    y, seen = labels.y, labels.seen
    if seen.sum() < 30:
        fail(
            f"only {seen.sum()} training frames have the road in view, too few for a probe; "
            "raise --train_frames, or collect more"
        )
    center, size = y[seen].mean(axis=0), y[seen].std(axis=0) + 1e-6
    state = fit_standardised(regressor(kind, seed), train[seen], (y[seen] - center) / size)
    off = fit_standardised(regressor(kind, seed), train, labels.off.astype(np.float32))
    return lambda z: (state(z) * size + center, off(z))


def mark(told, z, labels, args):
    """{quantity: cell} of a fitted probe on evaluation latents."""
    y, off = told(z)
    found = cells(r2, labels.track, (labels.y, y, labels.seen), args, labels.seen.sum())
    found += cells(
        lambda truth, score: auc(score[truth], score[~truth]), labels.track, (labels.off, off), args
    )
    return dict(zip((*PROBED, OFF_ROAD), found))


def pixels(spots, offsets):
    """(n, pixels) float32 of the stacked frames."""
    return spots.frames(offsets).permute(0, 1, 3, 4, 2).reshape(len(spots), -1).float().numpy()


def principal(train, test, subject, seed, fit_on=1500):
    """Principal components of the pixels, as many as a latent has numbers: z of both Spots."""
    rows = np.random.default_rng([seed, 5]).permutation(len(train))[:fit_on]
    offsets, dim = subject.newest(), min(subject.encoder.dim, len(rows))
    pca = PCA(dim, svd_solver="randomized", iterated_power=2, random_state=seed)
    pca.fit(pixels(train[np.sort(rows)], offsets))
    return [
        np.concatenate([pca.transform(pixels(s[rows], offsets)) for rows in blocks(len(s))])
        for s in (train, test)
    ]


def ceiling(subject, spots, labels, args):
    """The same net trained with the labels, in --ceiling_steps: what this size could know."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        net = subject.encoder.untrained()
        head = nn.Linear(net.dim, len(PROBED) + 1).to(subject.device)
    params = [*net.parameters(), *head.parameters()]
    optim = torch.optim.AdamW(params, 2e-3, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(subject.device.type, enabled=subject.dtype == torch.float16)
    y = (labels.y - labels.y[labels.seen].mean(0)) / (labels.y[labels.seen].std(0) + 1e-6)
    rng, offsets = np.random.default_rng([args.seed, 6]), subject.newest()
    light = torch.Generator(subject.device).manual_seed(args.seed)
    for step in progress(range(args.ceiling_steps), desc="ceiling, with labels", leave=False):
        rows = rng.integers(len(spots), size=args.ceiling_batch)
        x = stack(spots[rows].frames(offsets).to(subject.device), net.history)
        jitter_(x, light)
        target, seen, off = (
            torch.from_numpy(a[rows]).to(subject.device).float()
            for a in (y, labels.seen, labels.off)
        )
        with autocast(subject.device, subject.dtype):
            out = head(net.features(x))
        error = F.smooth_l1_loss(out[:, :-1].float(), target, reduction="none").mean(dim=1)
        loss = (error * seen).sum() / seen.sum().clamp_min(1)
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(out[:, -1].float(), off)
        optimise(loss, [net, head], optim, scaler, cosine(step, args.ceiling_steps, 2e-3))
    return net.eval().requires_grad_(False)


def knows(subject, train, test, args):
    """Part 1: {row: {saw_labels, probe, cells of each quantity}}."""
    sampled = (
        choose_spots(train, args.train_frames, args.seed),
        choose_spots(test, args.frames, args.seed),
    )
    labels = [labels_of(s) for s in sampled]
    rows = {}

    def add(name, latents, saw_labels=False, kinds=("ridge", "mlp")):
        for kind in progress(kinds, desc=f"probe: {name}", leave=False):
            told = probe(kind, latents[0], labels[0], args.seed)
            rows[f"{name}, {kind}"] = {
                "saw_labels": saw_labels,
                "probe": kind,
                "cells": mark(told, latents[1], labels[1], args),
            }

    add("this encoder", [s.z(0, 0)[:, 0].numpy() for s in sampled])
    add("untrained encoder", [s.z(0, 0, TWIN)[:, 0].numpy() for s in sampled])
    add("PCA of the pixels", principal(*sampled, subject, args.seed))
    if args.ceiling_steps:
        net = ceiling(subject, sampled[0], labels[0], args)
        add(
            "ceiling, saw the labels",
            [subject.encode_now(net, s, "ceiling").numpy() for s in sampled],
            saw_labels=True,
        )
    if subject.predictor:
        rows |= imagined(subject, train, test, args)
    return rows


def imagined(subject, train, test, args):
    """Rows of part 1 for latents AHEAD: {row: ...} of ridge probes.

    Of what is imagined, read by the probe of real latents and by one fitted to imagined ones; and
    of the present latent, by a probe fitted to what comes: what is to be had without imagining.
    """
    H, rows = max(AHEAD), {}
    spots = [
        choose_spots(train, args.train_frames // 2, args.seed, ahead=H),
        choose_spots(test, args.frames // 2, args.seed, ahead=H),
    ]
    real = [s.z(0, H) for s in spots]
    z_hat = [subject.imagine(subject.predictor, z[:, 0], s.act(H)) for z, s in zip(real, spots)]
    for h in progress(AHEAD, desc="probe: imagined", leave=False):
        truth = [labels_of(s, h) for s in spots]
        came, now = real[0][:, h].numpy(), [z[:, 0].numpy() for z in real]
        dreamt = [z[:, h - 1].numpy() for z in z_hat]
        for name, fitted, asked in (
            (f"imagined +{h}, probe of real", came, dreamt[1]),
            (f"imagined +{h}, probe of imagined", *dreamt),
            (f"not imagined +{h}, from z now", *now),
        ):
            told = probe("ridge", fitted, truth[0], args.seed)
            rows[name] = {
                "saw_labels": False,
                "probe": "ridge",
                "cells": mark(told, asked, truth[1], args),
            }
    return rows


# ------------------------------------------------------------------ 2. how long dreams hold


def linear_dream(train, z0, act, far):
    """z_hat (n, far, D) of a ridge regression, one a step, from z and the actions up to there."""
    z, told = train.z(0, far).numpy(), train.act(far)
    told, act, out = unit_act(told).numpy(), unit_act(act).numpy(), []
    for k in range(1, far + 1):
        x = np.concatenate([z[:, 0], told[:, :k].reshape(len(z), -1)], axis=1)
        fit = Ridge(alpha=10.0).fit(x, z[:, k] - z[:, 0])
        x = np.concatenate([z0.numpy(), act[:, :k].reshape(len(act), -1)], axis=1)
        out.append(z0 + torch.from_numpy(fit.predict(x)).float())
    return torch.stack(out, dim=1)


def dreams(subject, train, spots, args):
    """Part 2: {"all" or source: {row: [cell of each step 1..FAR]}}, and errors (n, FAR) by row."""
    z, act = spots.z(0, FAR), spots.act(FAR)
    other = act[partners(spots, args.seed)]
    fitted = choose_spots(train, args.train_frames // 2, args.seed, ahead=FAR)
    z_hat = {
        "this predictor": subject.imagine(subject.predictor, z[:, 0], act),
        "copy-last": z[:, :1].expand_as(z[:, 1:]),
        "swapped actions": subject.imagine(subject.predictor, z[:, 0], other),
        "untrained predictor": subject.imagine(subject.blank, z[:, 0], act),
        "linear predictor": linear_dream(fitted, z[:, 0], act, FAR),
    }
    error = {k: (v - z[:, 1:]).pow(2).mean(dim=2).numpy() for k, v in z_hat.items()}
    ratio = lambda own, copy: own.mean(axis=0) / copy.mean(axis=0)
    out = {}
    for source in ("all", *dict.fromkeys(spots.source)):
        rows = np.flatnonzero((spots.source == source) | (source == "all"))
        out[source] = {
            name: cells(ratio, spots.track[rows], (own[rows], error["copy-last"][rows]), args)
            for name, own in progress(error.items(), desc=f"dreams: {source}", leave=False)
        }
    return out, error


def telling_rows(spots, error, H):
    """Of each source the window with the sharpest bend among moving ones (where it has some) whose
    `error` (n,) after H latents is about the median, in the middle fifth."""
    rows, moving = [], spots.state("speed") > MOVING
    bend = np.abs([spots.state("curvature_20", k) for k in (0, H // 2, H)]).mean(axis=0)
    for source in dict.fromkeys(spots.source):
        own = np.flatnonzero(spots.source == source)
        own = own[moving[own]] if moving[own].any() else own
        own = own[np.argsort(error[own])]
        near = own[len(own) * 2 // 5 : len(own) * 3 // 5 + 1]
        rows.append(near[np.argmax(bend[near])])
    return np.array(rows)


def draw_dreams(subject, spots, error, path):
    """The sheet: a window of each source."""
    H = max(AHEAD)
    some = spots[telling_rows(spots, error[:, H - 1], H)]
    obs = some.frames(np.arange(1 - subject.encoder.history, H + 1))
    real, dreamt = dream(
        subject.encoder, subject.predictor, subject.decoder, obs, some.act(H), subject.device
    )
    draw_dream(real, dreamt, list(some.source), path, subject.encoder.repeat / FPS)


# ------------------------------------------------------------------ 3. impossible futures

FILMS = {  # what a film shows, j latents after the present, as latents after the present
    "true": lambda j: j,
    "frozen": lambda j: np.minimum(j, 0),
    "time reversed": lambda j: -np.abs(j),
    "double speed": lambda j: j + np.maximum(j, 0),
}
TELEPORTS = "teleport, same track", "teleport, other track"
TOLD = "swapped actions", "mirrored steering"  # the film is true, the actions told are not
THROUGHOUT = "colour throughout (control)"  # the present is seen in that light too
COLOURS = "colour changes (control)", THROUGHOUT
VIOLATIONS = (*TELEPORTS, *list(FILMS)[1:], *TOLD, *COLOURS)


def teleported(subject, spots, args):
    """{violation: frames (n, len(AHEAD), history, 64, 64, 3)}: the car is put elsewhere once, its
    pose and speed kept, and seen there as far along as it was here, on its own track or on the
    next episode's."""
    e, rng = subject.encoder, np.random.default_rng([args.seed, 7])
    need = (e.history - 1) * e.repeat + 1
    out = {t: np.zeros((len(spots), len(AHEAD), e.history, 64, 64, 3), np.uint8) for t in TELEPORTS}
    places = list(dict.fromkeys(spots.e))
    for i, place in enumerate(progress(places, desc="teleport", unit="track", leave=False)):
        twin = Elsewhere(spots.episodes[place].track, rng)
        for name, guest in zip(TELEPORTS, (place, places[i - 1])):
            for row in np.flatnonzero(spots.e == guest):
                x, jump = spots.episodes[guest], twin.jump(MIN_JUMP if guest == place else 0)
                for a, h in enumerate(AHEAD):
                    k = spots.k[row] + h
                    state = dict(zip(TELEMETRY, x.state[k].tolist()))
                    last = x.actions[max(0, k * e.repeat - 2 * need) : k * e.repeat]
                    frames = twin.frames(state, last, need, jump)
                    out[name][row, a] = frames[::-1][:: e.repeat][: e.history][::-1]
        twin.env.close()
    return out


def relit(obs, generator):
    """obs (n, history, 3, 64, 64) in another light, one draw a row."""
    x = obs.flatten(1, 2).clone(memory_format=torch.channels_last)
    jitter_(x, generator)
    return x.unflatten(1, (-1, 3))


def shows(spots, other):
    """{violation: (n, len(AHEAD)) bool}: where it makes another future of this one."""
    act, every = spots.act(max(AHEAD)), np.ones((len(spots), len(AHEAD)), bool)
    moving = every & (spots.state("speed") > MOVING)[:, None]
    apart = (unit_act(act) - unit_act(act[other])).norm(dim=2).numpy()
    mean = lambda x: np.stack([x[:, :h].mean(axis=1) for h in AHEAD], axis=1)
    in_view = np.stack([spots.within(IN_VIEW, h) for h in AHEAD], axis=1)
    return {
        **dict.fromkeys(TELEPORTS, in_view),
        **dict.fromkeys(list(FILMS)[1:], moving),
        "swapped actions": mean(apart) > UNLIKE,
        "mirrored steering": mean(np.abs(act[..., 0].numpy())) > STEERED,
        **dict.fromkeys(COLOURS, every),
    }


def expectations(subject, spots, other, seed):
    """{judge: {premise: (z now (n, D), z_hat (n, len(AHEAD), D))}} of both pairs of nets; premises
    are the true ones, the actions of the TOLD violations, or a present in another light."""
    act, steps, out = spots.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    told = {
        "true": act,
        "swapped actions": act[other],
        "mirrored steering": act * torch.tensor([-1.0, 1, 1]),
        THROUGHOUT: act,
    }
    for judge, (encoder, predictor) in subject.pairs().items():
        light = torch.Generator().manual_seed(seed)
        now = spots.z(0, 0, judge)[:, 0]
        lit = subject.encode_now(encoder, spots, change=lambda obs: relit(obs, light))
        z = {k: lit if k == THROUGHOUT else now for k in told}
        out[judge] = {
            k: (z[k], subject.imagine(predictor, z[k], a)[:, steps]) for k, a in told.items()
        }
    return out


class Scale:
    """The unit of a judge's surprise: its usual errors at the steps AHEAD, on training episodes.

    A dream knows some directions of the latent better than others, and all of them less the
    further ahead it looks: an error is measured in standard deviations, in every direction
    (Mahalanobis, covariance shrunk after Ledoit and Wolf 2004). It also knows less of a slide than
    of a straight: a line through present and dream tells the logarithm of what such a square
    usually is, by which it is divided (multiplicative heteroscedasticity, Harvey 1976).
    """

    def __init__(self, now, z_hat, came):
        """now (n, D), z_hat, came (n, len(AHEAD), D) of true futures."""
        self.whiten, self.usual = [], []
        for a in range(came.shape[1]):
            error = (came - z_hat)[:, a]
            cov = torch.from_numpy(ledoit_wolf(error.double().numpy(), assume_centered=True)[0])
            self.whiten.append(torch.linalg.cholesky(torch.linalg.inv(cov)).float())
            squares = self.squares(error, a)
            logs = np.log(squares.clip(max(np.quantile(squares, STILL), 1e-9)))  # of a still car 0
            told = fit_standardised(Ridge(alpha=10.0), self.moment(now, z_hat[:, a]), logs)
            self.usual.append((told, logs.min(), logs.max()))

    @staticmethod
    def moment(now, z_hat):
        """What is known of a moment before it comes, (n, 2 D)."""
        return torch.cat([now, z_hat], dim=1).numpy()

    def squares(self, error, a):
        """(n,): squared errors (n, D) in units of the usual, without regard to the moment."""
        return (error @ self.whiten[a]).pow(2).mean(dim=1).numpy()

    def __call__(self, z, now, z_hat, a):
        """(n,): about 1 where latents z (n, D) are as far from z_hat, dreamt of `now`, as is usual
        for such a moment, AHEAD[a] ahead."""
        told, least, most = self.usual[a]
        usual = told(self.moment(now, z_hat)).clip(least, most)  # of those seen
        return self.squares(z - z_hat, a) / np.exp(usual)


def scales(subject, train, args):
    """{judge: Scale} of the judges that look at latents, from windows of training episodes."""
    spots = choose_spots(train, args.train_frames, args.seed, ahead=max(AHEAD))
    act, steps, out = spots.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    for judge, (_, predictor) in subject.pairs().items():
        z = spots.z(0, max(AHEAD), judge)
        now, came = z[:, 0], z[:, list(AHEAD)]
        z_hat = subject.imagine(predictor, now, act)[:, steps]
        out[judge] = Scale(now, z_hat, came)
        if judge == OWN:
            out["copy-last"] = Scale(now, now[:, None].expand_as(came), came)
    return out


def surprises(subject, spots, other, scale, args):
    """{judge: {"true" or violation: (n, len(AHEAD))}}: how far each future is from the expected.

    A future is the film up to a step, seen at those of AHEAD that it has: its worst look counts.
    """
    expected = expectations(subject, spots, other, args.seed)
    elsewhere = teleported(subject, spots, args)
    kinds = ("true", *VIOLATIONS)
    out = {j: {v: np.zeros((len(spots), len(AHEAD))) for v in kinds} for j in JUDGES}
    filmed = [(a, h, v) for a, h in enumerate(AHEAD) for v in kinds if v not in TOLD]
    for a, h, v in progress(filmed, desc="surprise", unit="film", leave=False):
        light, same = (torch.Generator().manual_seed(args.seed) for _ in range(2))
        for rows in blocks(len(spots)):
            film = FILMS.get(v, FILMS["true"])(h + subject.newest())
            obs = planes(elsewhere[v][rows, a]) if v in TELEPORTS else spots[rows].frames(film)
            was = spots[rows].frames(subject.newest())
            obs = relit(obs, light) if v in COLOURS else obs
            was = relit(was, same) if v == THROUGHOUT else was
            change = obs[:, -1].float() - was[:, -1].float()
            out["pixel error"][v][rows, a] = change.abs().mean(dim=(1, 2, 3))
            premises = ("true", *TOLD) if v == "true" else (v if v == THROUGHOUT else "true",)
            for judge, (encoder, _) in subject.pairs().items():
                z = subject.encode(encoder, obs)
                for premise in premises:
                    now, z_hat = (x[rows] for x in expected[judge][premise])
                    row = premise if premise in TOLD else v
                    out[judge][row][rows, a] = scale[judge](z, now, z_hat[:, a], a)
                    if judge == OWN:  # its copy-last, which knows no actions
                        out["copy-last"][row][rows, a] = scale["copy-last"](z, now, now, a)
    out["pixel error"] |= dict.fromkeys(TOLD, out["pixel error"]["true"])
    return {
        judge: {v: np.maximum.accumulate(s, axis=1) for v, s in rows.items()}
        for judge, rows in out.items()
    }


def separated(true, violated):
    """(AUROC, share of violations found at 1 % false alarms, share of pairs told apart)."""
    alarm = np.quantile(true, 1 - FALSE_ALARMS, method="higher") if len(true) else np.nan
    pairs = (violated > true).mean() + (violated == true).mean() / 2 if len(true) else np.nan
    found = (violated > alarm).mean() if len(true) else np.nan
    return np.array([auc(violated, true), found, pairs])


def futures(subject, train, spots, args):
    """Part 3: {violation: {judge: {h: {auroc, tpr_at_1pct, pairs: cells}}}}."""
    other = partners(spots, args.seed)
    surprise = surprises(subject, spots, other, scales(subject, train, args), args)
    where, out = shows(spots, other), {}
    for violation in progress(VIOLATIONS, desc="futures", leave=False):
        out[violation] = {j: {} for j in JUDGES}
        for a, h in enumerate(AHEAD):
            rows = np.flatnonzero(where[violation][:, a])
            for judge in JUDGES:
                pair = [surprise[judge][v][rows, a] for v in ("true", violation)]
                found = (
                    cells(separated, spots.track[rows], pair, args)
                    if len(rows)
                    else [{"value": None, "low": None, "high": None, "n": 0, "tracks": 0}] * 3
                )
                out[violation][judge][h] = dict(zip(("auroc", "tpr_at_1pct", "pairs"), found))
    return out


# ------------------------------------------------------------------ 4. plans, dreamt and driven


class Saved(NamedTuple):
    """All of a simulator's state that its next steps depend on, the track apart."""

    bodies: list  # of hull and wheels: (x, y, angle, vx, vy, angular velocity)
    wheels: list  # (gas, brake, steer, spin, phase, indices of the tiles touched)


def save_state(env):
    """The Saved state of any kind of env."""
    car = env.unwrapped.car
    bodies = [
        (*b.position, b.angle, *b.linearVelocity, b.angularVelocity)
        for b in (car.hull, *car.wheels)
    ]
    return Saved(
        bodies,
        [(w.gas, w.brake, w.steer, w.omega, w.phase, [t.idx for t in w.tiles]) for w in car.wheels],
    )


def restore_state(env, saved):
    """Puts a new car into env, on the same track, in the Saved state. Use `play` from there."""
    env = env.unwrapped
    place_car(env, *saved.bodies[0][:3])
    for body, (x, y, angle, vx, vy, turn) in zip((env.car.hull, *env.car.wheels), saved.bodies):
        body.transform = (x, y), angle
        body.linearVelocity, body.angularVelocity = (vx, vy), turn
    for w, (gas, brake, steer, spin, phase, tiles) in zip(env.car.wheels, saved.wheels):
        w.gas, w.brake, w.steer, w.omega, w.phase = gas, brake, steer, spin, phase
        w.tiles = {env.road[i] for i in tiles}


def play(env, actions):
    """Steps env (T, 3) from a state just restored -> yields its car after each step."""
    env = env.unwrapped
    for t, action in enumerate(actions):
        env.step(action)
        if t == 0:  # of the tiles restored, the new car's contacts never end: ask Box2D
            for w in env.car.wheels:
                w.tiles = {
                    c.other.userData
                    for c in w.contacts
                    if c.contact.touching and is_tile(c.other.userData)
                }
        yield env.car


def along(env):
    """How far along the track the car is, in tiles, and the track's number of tiles."""
    line, at = centre_line(env.unwrapped), env.unwrapped.car.hull.position
    return line.along(at.x, at.y), len(line.x)


def way(before, now, n):
    """Tiles from one place along a track of n tiles to another, where that is no leap."""
    step = (now - before + n / 2) % n - n / 2
    return step * (abs(step) < LEAP)


def outcome(env, saved, actions, off_road, expert=None):
    """Tiles made by actions (T, 3) less `off_road` a second of all four wheels off the road; with
    an `expert` also what it makes of it in AFTER seconds more."""
    if expert:
        expert.nearest.last = None  # it comes from where another plan ended
        actions = chain(actions, (expert.act(env) for _ in range(AFTER * FPS)))
    restore_state(env, saved)
    before, n = along(env)
    made = off = 0
    for car in play(env, actions):
        off += sum(not w.tiles for w in car.wheels) / 4 / FPS
        now, _ = along(env)
        made, before = made + way(before, now, n), now
    return made - off_road * off


def lived_frames(env, episode, k, act, repeat):
    """What really comes of plans act (n, H, 3) from latent k on, in a fast env on the episode's
    track: (n, H, 64, 64, 3), one frame a latent."""
    env.unwrapped.t = math.inf  # the zoom is over
    env.unwrapped.defer()
    for actions in act.repeat(repeat, axis=1):
        restore_state(env, episode.saved[k])
        for _ in play(env, actions):
            pass
    frames = env.unwrapped.painted()  # of each plan the car as it is placed, then every step
    return frames.reshape(len(act), -1, *frames.shape[1:])[:, repeat::repeat]


def lived_latents(subject, env, episode, k, act):
    """The latents (n, H, D) to which plans act (n, H, 3) really lead."""
    h, (n, H, _) = subject.encoder.history, act.shape
    came = lived_frames(env, episode, k, act, subject.encoder.repeat)
    past = np.broadcast_to(episode.obs[k + 2 - h : k + 1], (n, h - 1, *came.shape[2:]))
    film = np.concatenate([past, came], axis=1)  # (n, h - 1 + H, 64, 64, 3)
    obs = np.stack([film[:, t : t + h] for t in range(H)], axis=1).reshape(n * H, h, 64, 64, 3)
    return subject.encode(subject.encoder, planes(obs)).view(n, H, -1)


def tiles_made(spots, env):
    """(n,): how far along its track the car came in the latent before each spot."""
    out = np.zeros(len(spots))
    x, y = (list(TELEMETRY).index(name) for name in "xy")
    for e in np.unique(spots.e):
        env.reset(seed=spots.episodes[e].track)
        line = centre_line(env.unwrapped)
        for row in np.flatnonzero(spots.e == e):
            state = spots.episodes[e].state[spots.k[row] - 1 : spots.k[row] + 1]
            out[row] = way(*(line.along(s[x], s[y]) for s in state), len(line.x))
    return out


def taught_outcome(subject, train, env, args):
    """A judge that saw the labels: told(z (n, H, D)) -> outcomes (n,) of plans, by the word of an
    MLP on the tiles just made and the wheels off the road that each latent tells. env lends its
    tracks. Where --ceiling_steps is 0: nans.
    """
    if not args.ceiling_steps:
        return lambda z: np.full(len(z), np.nan)
    spots = choose_spots(train, args.train_frames, args.seed, behind=1)
    z = spots.z(0, 0)[:, 0].numpy()
    off = args.off_road * subject.encoder.repeat / FPS * spots.state("wheels_off_road") / 4
    y = np.stack([tiles_made(spots, env), -off], axis=1)
    size = y.std(axis=0) + 1e-6
    net = fit_standardised(regressor("mlp", args.seed, (256, 128)), z, y / size)
    worth = lambda z: net(z.flatten(0, 1).cpu().numpy()) @ size
    return lambda z: worth(z).reshape(z.shape[:2]).sum(axis=1)


def candidates(previous, cfg, generator):
    """Plans u (N, H, 2) around those of the last Plan, shifted: as in the planner's first round."""
    mean = previous.shifted().mean
    u = draw_plans(cfg.samples, mean, mean.new_tensor(cfg.noise), cfg, generator)
    u[0] = mean
    return u


@torch.inference_mode()
def judge_plans(subject, episode, k, seed, cfg):
    """(actions (N, H, 3), {judge: energies (N,)}, the planner's own plan (H, 3)) at latent k."""
    device, generator = subject.device, torch.Generator(subject.device)
    futures, blank = (
        Futures(p, subject.cost, cfg.energy) for p in (subject.predictor, subject.blank)
    )
    z = episode.z[OWN].to(device)
    last = Plan.none(cfg.horizon, device)
    for i in range(max(0, k - WARM_UP), k):
        last = plan(z[i : i + 1], futures, last, cfg, generator.manual_seed(seed + i))[0]
    act = to_action(candidates(last, cfg, generator.manual_seed(seed + k)))
    chosen = plan(z[k : k + 1], futures, last, cfg, generator.manual_seed(seed + k))[0].u
    energies = {
        name: judge(z[k : k + 1], act).cpu().numpy()
        for name, judge in (("this model", futures), ("untrained", blank))
    }
    return act.cpu().numpy(), energies, to_action(chosen).cpu().numpy()


def states_of(spots, args):
    """At most --states spots of each source at which the road is in sight."""
    rng, rows = np.random.default_rng([args.seed, 8]), []
    for source in dict.fromkeys(spots.source):
        own = np.flatnonzero((spots.source == source) & spots.within(IN_SIGHT))
        if not len(own):
            print(
                f"{source}: no window has the road in sight, so no plans are judged from there; "
                "raise --windows or --tracks"
            )
        rows += np.sort(rng.permutation(own)[: args.states]).tolist()
    if not rows:
        fail("no window has the road in sight to judge plans from; raise --windows or --tracks")
    return spots[np.array(sorted(rows))]


FIGURES = (
    "spearman",
    "spearman, untrained predictor",
    "spearman, saw the labels",
    "of what came: spearman",
    "of what came: saw the labels",
    f"then {AFTER} s of an expert: spearman",
    f"then {AFTER} s of an expert: of what came",
    f"then {AFTER} s: of what came, saw the labels",
    "regret of the lowest energy",
    "regret of the planner's plan",
    "regret, untrained predictor",
    "regret of a random plan",
    "regret of the simulator's best",
    "spread of the outcomes",
)
POOLED = ("plans of all states: spearman", "the same, untrained predictor")


def drive_plans(subject, told, envs, expert, episode, k, args):
    """(a figure each of FIGURES, energies (N,), those of an untrained predictor, true outcomes
    (N,)) of the plans at latent k; `told` of taught_outcome."""
    physics, fast = envs
    act, energies, own = judge_plans(subject, episode, k, args.seed + 1000 * episode.track, args)
    value = lambda a, expert=None: outcome(
        physics, episode.saved[k], a.repeat(subject.encoder.repeat, axis=0), args.off_road, expert
    )
    made = np.array([value(a) for a in act])
    some, n = act[: args.lived], args.lived
    later = np.array([value(a, expert) for a in some])
    dreamt = subject.imagine(
        subject.predictor, episode.z[OWN][k : k + 1].expand(len(act), -1), torch.from_numpy(act)
    )
    came = lived_latents(subject, fast, episode, k, some)
    now = episode.z[OWN][k : k + 1].to(subject.device)
    lived = subject.cost.judge(now, came.to(subject.device), args.energy).cpu().numpy()
    taught = told(came)
    e, blank = energies["this model"], energies["untrained"]
    driven = (made[e.argmin()], value(own), made[blank.argmin()], made.mean(), made.max())
    figures = [
        spearman(-e, made),
        spearman(-blank, made),
        spearman(told(dreamt), made),
        spearman(-lived, made[:n]),
        spearman(taught, made[:n]),
        spearman(-e[:n], later),
        spearman(-lived, later),
        spearman(taught, later),
        *(made.max() - x for x in driven),
        made.std(),
    ]
    return figures, e, blank, made


def plans(subject, train, spots, args):
    """Part 4: ({"all" or source: {figure: cell}}, energies (n, N), outcomes (n, N), states)."""
    spots, envs = states_of(spots, args), (make_env("physics"), make_env("fast"))
    told, expert = taught_outcome(subject, train, envs[0], args), Expert(PACE)
    track, rows = None, []
    for e, k in progress(
        list(zip(spots.e.tolist(), spots.k.tolist())), desc="plans", unit="state", leave=False
    ):
        episode = spots.episodes[e]
        if episode.track != track:
            track = episode.track
            for env in envs:
                env.reset(seed=track)
            expert.reset(envs[0])
        rows.append(drive_plans(subject, told, envs, expert, episode, k, args))
    for env in envs:
        env.close()
    figures, energy, blank, true = (np.array(x) for x in zip(*rows))
    return summarise(figures, energy, blank, true, spots, args), energy, true, spots


def summarise(figures, energy, blank, true, spots, args):
    """{"all" or source: {figure: cell}} of a row of figures for each state, and of the energies and
    outcomes (n, N) of all states together."""
    out = {}
    for source in ("all", *dict.fromkeys(spots.source)):
        own = np.flatnonzero((spots.source == source) | (source == "all"))
        found = cells(
            lambda r, e, b, t: [
                *r.mean(axis=0),
                spearman(-e.ravel(), t.ravel()),
                spearman(-b.ravel(), t.ravel()),
            ],
            spots.track[own],
            [x[own] for x in (figures, energy, blank, true)],
            args,
        )
        out[source] = dict(zip((*FIGURES, *POOLED), found))
    return out


# ------------------------------------------------------------------ tables


def text(cell):
    """A cell as "value ± half its interval"."""
    if cell["value"] is None:
        return "-"
    if cell["low"] is None:
        return f"{cell['value']:.3f} ±   ?"
    return f"{cell['value']:.3f} ±{(cell['high'] - cell['low']) / 2:.2f}"


def table(title, columns, rows, first, wide=15):
    """Prints rows {name: [cell or text]} below their columns."""
    print(f"\n{title}\n{'':{first}}" + "".join(f"{c:>{wide}}" for c in columns))
    for name, row in rows.items():
        print(
            f"{name:{first}}"
            + "".join(f"{c if isinstance(c, str) else text(c):>{wide}}" for c in row),
            flush=True,
        )


def show_knows(rows):
    names, n = (*PROBED, OFF_ROAD), rows["this encoder, ridge"]["cells"]
    table(
        f"1. What the latent knows: R² where the road is in view (n = {n['speed']['n']}), AUC of "
        f"a wheel off the road (n = {n[OFF_ROAD]['n']})",
        names,
        {name: [row["cells"][q] for q in names] for name, row in rows.items()},
        34,
    )


def show_dreams(found):
    steps = (1, 2, 3, 5, 10, 15, 20, FAR)
    for source, rows in found.items():
        n = rows["copy-last"][0]["n"]
        table(
            f"2. How long dreams hold: squared error over copy-last's, {source} (n = {n})",
            [f"+{k}" for k in steps],
            {name: [row[k - 1] for k in steps] for name, row in rows.items()},
            22,
            13,
        )


def show_futures(found):
    for judge in JUDGES:
        table(
            f"3. Impossible futures: AUROC against true ones, {judge}",
            [f"+{h}" for h in AHEAD],
            {v: [by[judge][h]["auroc"] for h in AHEAD] for v, by in found.items()},
            28,
        )
    own = {v: by[OWN] for v, by in found.items()}
    figures = [(what, h) for what in ("tpr_at_1pct", "pairs") for h in AHEAD]
    table(
        "3. This model: share found at 1 % false alarms (f), share of pairs told apart (p)",
        [*(f"{what[0].replace('t', 'f')} +{h}" for what, h in figures), f"n +{max(AHEAD)}"],
        {
            v: [*(by[h][what] for what, h in figures), str(by[max(AHEAD)]["auroc"]["n"])]
            for v, by in own.items()
        },
        28,
        13,
    )


def show_plans(found):
    table(
        "4. Does its judgement match the world: rank correlation of low energy and true outcome "
        "within a state, regrets in tiles",
        list(found),
        {figure: [found[source][figure] for source in found] for figure in (*FIGURES, *POOLED)}
        | {"states": [str(found[source]["spearman"]["n"]) for source in found]},
        38,
    )


# ------------------------------------------------------------------ the page


def heat(ax, values, shade, rows, columns, title):
    """A table of numbers (n, m), nan blank, in colours: a shade of 1 is good, 0 is bad."""
    ax.imshow(np.clip(shade, 0, 1), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    for (i, j), v in np.ndenumerate(values):
        if np.isfinite(v):
            ax.text(
                j, i, f"{v:.2f}" if v > -9.95 else "< -9.9", ha="center", va="center", fontsize=7
            )
    ax.set_xticks(range(len(columns)), columns, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9, loc="left")


def number(cell, which="value"):
    return math.nan if cell[which] is None else cell[which]


def page_knows(ax, rows):
    values = np.array(
        [[number(row["cells"][q]) for q in (*PROBED, OFF_ROAD)] for row in rows.values()]
    )
    columns = [q.replace("_", "\n") for q in PROBED] + ["off road\n(AUC)"]
    heat(
        ax,
        values,
        values,
        list(rows),
        columns,
        "1. What the latent knows: R² where the road is in view",
    )
    real = sum("imagined" not in name for name in rows)
    for y in range(real, len(rows), max(1, (len(rows) - real) // len(AHEAD))):
        ax.axhline(y - 0.5, color="white", lw=3)


def page_dreams(ax, found):
    steps = np.arange(1, FAR + 1)
    for i, (name, row) in enumerate(found["all"].items()):
        ax.plot(steps, [c["value"] for c in row], color=f"C{i}", lw=2, label=name)
        if name != "copy-last":
            low, high = ([number(c, which) for c in row] for which in ("low", "high"))
            ax.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
    for (source, rows), style in zip(list(found.items())[1:], ("--", ":", "-.")):
        ax.plot(
            steps,
            [c["value"] for c in rows["this predictor"]],
            color="C0",
            lw=0.9,
            ls=style,
            label=f"this predictor, {source}",
        )
    ax.set(yscale="log", xlim=(1, FAR))
    ax.set_xlabel("latents ahead", fontsize=8)
    ax.set_ylabel("squared error over copy-last's", fontsize=8)
    ticks = [
        t
        for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        if ax.get_ylim()[0] < t < ax.get_ylim()[1]
    ]
    ax.set_yticks(ticks, map(str, ticks))
    ax.set_yticks([], minor=True)
    ax.set_title("2. How long dreams hold", fontsize=9, loc="left")
    ax.grid(alpha=0.3)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=6.5, ncol=2)


def page_futures(ax, found):
    values = np.array(
        [[number(by[j][h]["auroc"]) for j in JUDGES for h in AHEAD] for by in found.values()]
    )
    columns = [f"+{h}" + (f"\n{j}" if h == AHEAD[1] else "") for j in JUDGES for h in AHEAD]
    control = np.array([v in COLOURS for v in found])[:, None]
    heat(
        ax,
        values,
        np.where(control, 1 - 2 * np.abs(values - 0.5), values),
        list(found),
        columns,
        "3. Impossible futures: AUROC against true ones (0.5: chance, and the control's place)",
    )
    for x in range(1, len(JUDGES)):
        ax.axvline(len(AHEAD) * x - 0.5, color="white", lw=3)
    ax.axhline(len(found) - len(COLOURS) - 0.5, color="white", lw=3)


def page_plans(ax, found, energy, true, spots, bins=8):
    """Mean true outcome, over a random plan's, by rank of dreamt energy within its state."""
    rank = (np.argsort(np.argsort(energy, axis=1), axis=1) + 0.5) / energy.shape[1]
    gain = true - true.mean(axis=1, keepdims=True)
    ax.scatter(rank.ravel(), gain.ravel(), s=4, alpha=0.25, color="grey", lw=0)
    edges = np.linspace(0, 1, bins + 1)
    for i, source in enumerate(dict.fromkeys(spots.source)):
        own = spots.source == source
        which = np.digitize(rank[own], edges[1:-1])
        mean = [gain[own][which == b].mean() if (which == b).any() else np.nan for b in range(bins)]
        r = found[source]["spearman"]["value"]
        ax.plot(
            (edges[1:] + edges[:-1]) / 2,
            mean,
            "o-",
            ms=3,
            color=f"C{i}",
            label=f"{source}: rank correlation {r:.2f}",
        )
    best = gain.max(axis=1).mean()
    ax.axhline(best, color="black", lw=0.9, ls="--", label="the simulator's best")
    ax.axhline(0, color="black", lw=0.9, label="a random plan")
    low, high = np.quantile(gain, [0.005, 0.995])
    ax.set(xlim=(0, 1), ylim=(low, 1.1 * max(high, best)))
    ax.set_xlabel("rank of the dreamt energy among a state's plans (0: lowest)", fontsize=8)
    ax.set_ylabel("true outcome, tiles over a random plan's", fontsize=8)
    ax.set_title("4. Plans: dreamt energy against true outcome", fontsize=9, loc="left")
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=6.5, loc="lower left")


def draw_page(pages, title, path):
    """All that there is on one page: `pages` is {part: draw(ax)}."""
    plt = pyplot()
    fig, axes = plt.subplot_mosaic(
        [["knows", "futures"], ["dreams", "plans"]],
        figsize=(15, 10),
        layout="constrained",
        height_ratios=[1.15, 1],
    )
    for name, ax in axes.items():
        if name in pages:
            pages[name](ax)
        else:
            ax.axis("off")
            ax.text(0.5, 0.5, f"{name}: left out", ha="center", color="grey")
    fig.suptitle(plain(title), fontsize=10)
    save_figure(fig, path)


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
    some = choose_spots(train, 500, args.seed)
    subject.twin.calibrate(
        features_of(subject.twin, some.frames(subject.newest()), subject.device, subject.dtype)
    )
    subject.encode_episodes(train + test)
    H = max(AHEAD)
    spots = choose_spots(
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
    subject = Subject(args)
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
