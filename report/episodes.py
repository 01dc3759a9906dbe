"""Episodes of the report card at the rate of latents, and samples of their latents.

Probes and scales are fitted to training episodes: segments of the folders under ROOT, or of new
episodes where ROOT has none. Everything is measured on new episodes, on tracks that nothing was
fitted to. They also store the simulator's state, from which candidate plans are driven.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from buffer import chunk_files, load_sources, read_ahead
from car import ZOOM_STEPS
from car.env import make_env
from car.episode import run_episode
from car.telemetry import TELEMETRY
from collect_data import make_random
from collect_race_data import make_expert
from collect_recovery_data import RECOVERY_PACES, make_faulty
from report.simulator import save_state
from support.cli import fail
from support.progress import progress
from support.workers import FIRST_SEED

POLICY_MAKERS = {"data_race": make_expert, "data_recovery": make_faulty, "data": make_random}
JOBS = {  # as when the card began, so that its figures stay comparable
    "data_race": {"paces": [0.65], "max_offset": 1.5},
    "data_recovery": {"paces": RECOVERY_PACES},
    "data": {},
}
CHOOSING = 200_000  # first of the track seeds for choosing; 100000 to 100099 are for reporting
TRAINED, UNTRAINED = "this model", "untrained nets"
SEGMENT = 120  # latents of a training episode at most: many tracks tell more than many frames
BLOCK = 512  # stacks of frames that are in memory at a time


@dataclass
class Episode:
    """An episode, or a segment of one: row k is `repeat` steps after row k - 1."""

    source: str  # the folder, or the kind of driving
    track: int
    obs: np.ndarray  # (K, 64, 64, 3) uint8
    act: np.ndarray  # (K - 1, 3) mean action that leads from k to k + 1
    state: np.ndarray  # (K, len(TELEMETRY))
    first: int  # first latent after the zoom that has all its frames
    actions: np.ndarray = None  # (T, 3) of every step
    saved: list = field(default_factory=list)  # states of the simulator, one a latent
    z: dict = field(default_factory=dict)  # {TRAINED or UNTRAINED: latents (K, D)}


def at_latent_rate(source, track, arrays, repeat, saved=()):
    """The Episode of a chunk's arrays, which have a row for every step."""
    K = len(arrays["act"]) // repeat + 1
    return Episode(
        source,
        track,
        obs=np.ascontiguousarray(arrays["obs"][::repeat]),
        act=arrays["act"][: (K - 1) * repeat].reshape(K - 1, repeat, 3).mean(axis=1),
        state=arrays["telemetry"][::repeat],
        first=-(-ZOOM_STEPS // repeat),
        actions=arrays["act"],
        saved=list(saved),
    )


def random_segment(episode, rng, history):
    """Up to SEGMENT latents after the zoom, or None of an episode that ends before.

    The frames that the first latent sees come with it.
    """
    room = len(episode.obs) - SEGMENT - episode.first
    start = episode.first + (rng.integers(room + 1) if room > 0 else 0)
    if start >= len(episode.obs):
        return None
    rows = slice(max(0, start + 1 - history), start + SEGMENT)
    obs, state = episode.obs[rows].copy(), episode.state[rows]
    act = episode.act[rows.start : rows.stop - 1]
    return Episode(episode.source, episode.track, obs, act, state, start - rows.start)


def read_segments(sources, count, encoder, seed):
    """Segments of random training episodes: `count` latents of each folder, or a few more."""
    out = []
    for name, (chunks, _) in sources.items():
        rng, have = np.random.default_rng([seed, 1]), 0
        order = [chunks[i] for i in rng.permutation(len(chunks))]
        for chunk, arrays in read_ahead(order, "obs", "act", "telemetry"):
            if arrays is None:
                continue  # damaged
            episode = at_latent_rate(name, chunk.meta["track_seed"], arrays, encoder.repeat)
            if part := random_segment(episode, rng, encoder.history):
                out.append(part)
                have += len(part.obs)
            if have >= count:
                break
    return out


def drive_episodes(tracks, seed, repeat):
    """Yields a new Episode for each track; `tracks` is {kind of driving: track seeds}."""
    env = make_env("fast")
    todo = [(name, i, track) for name in tracks for i, track in enumerate(tracks[name])]
    for name, i, track in progress(todo, desc="drive", unit="episode", leave=False):
        saved = []

        def save(env, t):
            if t % repeat == 0:
                saved.append(save_state(env))

        policy, _ = POLICY_MAKERS[name](i, **JOBS[name])
        arrays, _ = run_episode(env, policy, track, np.random.default_rng([seed, track]), save)
        yield at_latent_rate(name, track, arrays, repeat, saved)


def track_seeds(first, count):
    """{kind of driving: `count` track seeds}, all different, from `first` on."""
    starts = range(first, first + count * len(POLICY_MAKERS), count)
    return {name: range(start, start + count) for name, start in zip(POLICY_MAKERS, starts)}


def all_episodes(cfg, encoder):
    """(segments of training episodes, new episodes on tracks that nothing was fitted to)."""
    if any(chunk_files(cfg.root / name) for name in JOBS):
        sources = load_sources(cfg.root, None, ZOOM_STEPS + 2, len(TELEMETRY))
        train = read_segments(sources, cfg.train_frames, encoder, cfg.seed)
    else:
        tracks = track_seeds(FIRST_SEED, -(-cfg.train_frames // SEGMENT))
        print(f"{cfg.root}: no episodes there to fit probes to; drives some")
        rng = np.random.default_rng([cfg.seed, 1])
        episodes = drive_episodes(tracks, cfg.seed, encoder.repeat)
        train = [x for e in episodes if (x := random_segment(e, rng, encoder.history))]
    return train, list(
        drive_episodes(track_seeds(cfg.track_seed, cfg.tracks), cfg.seed, encoder.repeat)
    )


def channels_first(frames):
    """(n, L, 64, 64, 3) uint8, an array -> (n, L, 3, 64, 64), a tensor of the same memory."""
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)


def blocks(n):
    """Slices of BLOCK rows."""
    return [slice(i, i + BLOCK) for i in range(0, n, BLOCK)]


class Samples:
    """Latents of episodes: row i is latent k[i] of episodes[e[i]]."""

    def __init__(self, episodes, e, k):
        self.episodes, self.e, self.k = episodes, e, k
        self.track = np.array([episodes[i].track for i in e])
        self.source = np.array([episodes[i].source for i in e])

    def __len__(self):
        return len(self.k)

    def __getitem__(self, rows):
        return Samples(self.episodes, self.e[rows], self.k[rows])

    def __iter__(self):
        """(episode, k) of each row."""
        return ((self.episodes[e], k) for e, k in zip(self.e.tolist(), self.k.tolist()))

    def frames(self, offsets):
        """obs (n, len(offsets), 3, 64, 64) uint8 at these offsets in latents.

        The episode's first frame stands for earlier ones.
        """
        return channels_first(np.stack([x.obs[np.maximum(k + offsets, 0)] for x, k in self]))

    def state(self, name, ahead=0):
        """(n,) of a telemetry value, `ahead` latents later."""
        column = list(TELEMETRY).index(name)
        return np.array([x.state[k + ahead, column] for x, k in self])

    def within(self, limits, ahead=0):
        """(n,) bool: offset (units) and heading error (rad) of the car are inside the limits."""
        offset, heading = self.state("lateral_offset", ahead), self.state("heading_error", ahead)
        return (np.abs(offset) < limits[0]) & (np.abs(heading) < limits[1])

    def z(self, first, last, nets=TRAINED):
        """Latents (n, last - first + 1, D) from k + first to k + last."""
        return torch.stack([x.z[nets][k + first : k + last + 1] for x, k in self])

    def act(self, steps):
        """Actions (n, steps, 3) from here on."""
        return torch.from_numpy(np.stack([x.act[k : k + steps] for x, k in self]))


def sources_of(samples):
    """The sources of the samples, in order, each once."""
    return list(dict.fromkeys(samples.source))


def rows_by_source(samples):
    """{"all" or source: its rows}."""
    rows = {s: np.flatnonzero(samples.source == s) for s in sources_of(samples)}
    return {"all": np.arange(len(samples))} | rows


def choose_samples(episodes, count, seed, behind=0, ahead=0):
    """Up to `count` random Samples of each source after the zoom.

    Each has `behind` latents before it and `ahead` latents after it in its episode.
    """
    parts = []
    for source in dict.fromkeys(x.source for x in episodes):
        every = [
            (e, k)
            for e, x in enumerate(episodes)
            if x.source == source
            for k in range(max(x.first, behind), len(x.obs) - ahead)
        ]
        if not every:
            fail(f"{source}: no episode lasts {behind + ahead} latents; collect more frames there")
        rng = np.random.default_rng([seed, 2])
        parts += [every[i] for i in np.sort(rng.permutation(len(every))[:count])]
    return Samples(episodes, *np.array(parts).T)


def other_episode(samples, seed):
    """(n,): for each sample a row of another episode, of the same source where it has several."""
    rng, out = np.random.default_rng([seed, 3]), []
    for e, source in zip(samples.e, samples.source):
        other = np.flatnonzero((samples.e != e) & (samples.source == source))
        out.append(rng.choice(other if len(other) else np.flatnonzero(samples.e != e)))
    return np.array(out)
