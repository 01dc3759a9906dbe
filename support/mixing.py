"""Which windows a training batch holds: exact shares of sources, a decorrelated order of each."""

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from support.cli import fail


def shares_of(sources, batch_size, shares=None):
    """Windows of each source in a batch: exact, adding up to batch_size (largest remainders).

    Refusal for bad shares, and for a batch too small to hold a window of each source with a share.
    """
    names = list(sources) if isinstance(sources, dict) else range(len(sources))
    shares = np.ones(len(names)) if shares is None else np.array(shares, float)
    if len(shares) != len(names) or (shares < 0).any() or shares.sum() == 0:
        given, those = " ".join(f"{s:g}" for s in shares), " ".join(map(str, names))
        fail(f"--shares {given}: expected {len(names)} numbers >= 0 ({those}), and not all 0")
    exact = batch_size * shares / shares.sum()
    count = np.floor(exact).astype(int)
    count[np.argsort(count - exact, kind="stable")[: batch_size - count.sum()]] += 1
    for name, n, share in zip(names, count, shares):
        if share and not n:
            fail(f"--batch_size {batch_size}: too small for the share of {name}; raise it")
    return count


def decorrelated_order(n, rng):
    """A random order of 0..n-1 in which neighbours are far apart, where n is large enough.

    One residue class modulo about sqrt(n) follows the other, consecutive ones never in a row.
    """
    modulus = math.isqrt(n)
    steps = [a for a in range(2, modulus - 1) if math.gcd(a, modulus) == 1]
    if not steps:
        return rng.permutation(n)
    rank = np.empty(modulus, int)
    step, first = rng.choice(steps), rng.integers(modulus)
    rank[(step * np.arange(modulus) + first) % modulus] = np.arange(modulus)
    return np.lexsort((rng.random(n), rank[np.arange(n) % modulus]))


@dataclass(eq=False)
class OpenEpisode:
    """An episode that gives windows to batches: `used` of `order` so far."""

    number: int  # among the chunks of its source
    order: np.ndarray
    weight: int  # its share among the open episodes
    used: int = 0
    file: Future = None  # its chunk and arrays, once the loader wants them

    @property
    def left(self):
        return len(self.order) - self.used


class Stream:
    """The order of one source's windows: `size` a batch, each once per pass, from many episodes.

    `windows` holds their number in each episode. `width` episodes are open at a time, and a used-up
    one makes room for the next. They give unequal numbers of windows, so that few end at once. When
    no episode is left to open, each gives in proportion to its rest: all end together.
    """

    def __init__(self, windows, size, width, key):
        self.windows, self.size, self.width, self.key = windows, size, width, key
        self.total = sum(windows)

    def batches(self, start=0):
        """Endless lists of (OpenEpisode, its windows) from batch `start` on."""
        at = start * self.size // self.total * self.total  # the pass in which the batch begins
        batch, skip = [], start * self.size - at  # windows of that pass before the batch
        while True:
            for episode, windows in self._one_pass(at):
                at += len(windows)
                windows, skip = windows[skip:], max(0, skip - len(windows))
                if len(windows):
                    batch.append((episode, windows))
                if at % self.size == 0 and batch:
                    yield batch
                    batch = []

    def _one_pass(self, at):
        n_pass, end = at // self.total, at + self.total
        rng = np.random.default_rng([*self.key, n_pass])
        pending = deque(e for e in rng.permutation(len(self.windows)).tolist() if self.windows[e])
        opened, count = [], 0
        while at < end:
            # open the next episodes; weights 4 to 15 let them end at different times, and multiples
            # of the golden ratio spread these evenly
            while pending and len(opened) < self.width:
                number, weight = pending.popleft(), 4 + int(12 * (count * 0.6180339887498949 % 1))
                order = decorrelated_order(self.windows[number], rng)
                opened.append(OpenEpisode(number, order, weight))
                count += 1

            # share the rest of this batch among the open episodes, in a random order
            want = min(self.size - at % self.size, end - at)
            left = np.array([x.left for x in opened])
            weights = np.array([x.weight for x in opened]) if pending else left
            mixed, give = rng.permutation(len(left)), np.empty_like(left)
            give[mixed] = np.diff(weights[mixed].cumsum() * want // weights.sum(), prepend=0)

            for episode, n in zip(opened, np.minimum(give, left).tolist()):
                if n:
                    episode.used += n
                    yield episode, episode.order[episode.used - n : episode.used]
                    at += n
            opened = [x for x in opened if x.left]
