"""Episodes of the report card, and samples of them."""

from dataclasses import dataclass, field

import numpy as np
import torch

from buffer import chunk_files, load_sources, read_or_skip
from car import ZOOM_STEPS
from car.env import make_env
from car.episode import run_episode, save_state
from car.telemetry import TELEMETRY
from collect_data import make_random
from collect_race_data import PACES as RACE_PACES
from collect_race_data import make_expert
from collect_recovery_data import PACES as RECOVERY_PACES
from collect_recovery_data import make_faulty
from support.cli import fail
from support.progress import progress
from support.workers import FIRST_SEED

DRIVERS = {"data_race": make_expert, "data_recovery": make_faulty, "data": make_random}
JOBS = {"data_race": {"paces": RACE_PACES}, "data_recovery": {"paces": RECOVERY_PACES}, "data": {}}
CHOOSING = range(200_000, 300_000)  # track seeds; 100000 to 100099 are for reporting
TRAINING = range(FIRST_SEED, 2 * FIRST_SEED)
JUDGES = "this model", "untrained nets", "pixel error", "copy-last"
OWN, TWIN = JUDGES[:2]
SEGMENT = 120  # latents of a training episode, at most: many tracks tell more than many frames
BLOCK = 512  # stacks of frames that are in memory at a time


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
        rng, have = np.random.default_rng([seed, 1]), 0
        for i in rng.permutation(len(chunks)):
            arrays = read_or_skip(chunks[i], "obs", "act", "telemetry")
            if arrays is None:
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
        for key in ("pace", "max_offset")
    }
    paces = {"paces": found["pace"]} if found["pace"] else {}
    return (
        JOBS[name]
        | paces
        | ({"max_offset": found["max_offset"][-1]} if found["max_offset"] else {})
    )


def all_episodes(args, encoder):
    """(parts of training episodes, new episodes): those of the folders, or where ROOT has none,
    own ones on tracks that collectors may drive."""
    jobs = JOBS
    if any(chunk_files(args.root / name) for name in JOBS):
        sources = load_sources(args.root, args.data, ZOOM_STEPS + 2, len(TELEMETRY))
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


class Samples:
    """Places in episodes: row i is latent k[i] of episodes[e[i]]."""

    def __init__(self, episodes, e, k):
        self.episodes, self.e, self.k = episodes, e, k
        self.track = np.array([episodes[i].track for i in e])
        self.source = np.array([episodes[i].source for i in e])

    def __len__(self):
        return len(self.k)

    def __getitem__(self, rows):
        return Samples(self.episodes, self.e[rows], self.k[rows])

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


def choose_samples(episodes, count, seed, behind=0, ahead=0):
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
    return Samples(episodes, *np.array(parts).T)


def other_episode(spots, seed):
    """(n,): for each spot a row of another episode, of the same source where it has several."""
    rng, out = np.random.default_rng([seed, 3]), []
    for e, source in zip(spots.e, spots.source):
        other = np.flatnonzero((spots.e != e) & (spots.source == source))
        out.append(rng.choice(other if len(other) else np.flatnonzero(spots.e != e)))
    return np.array(out)
