"""Random exploration: temporally correlated steering, gas and brake.

Half of the episodes start at random places on the track: grass, spins and odd headings. The script
writes ROOT/data/*.npz, one episode a file. Started again, it goes on to the target.

    python collect_data.py                      1.5 million frames
    python collect_data.py --frames 20000       seconds on a laptop
    python collect_data.py --frames 1900000 --steps 1000    then longer ones, for the dream model
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

from functools import partial

import numpy as np

from car import MAX_STEPS
from car.telemetry import place_beside
from support.cli import Number, run_main
from support.workers import collect, collector_parser

RANDOM_STEPS = 300  # a car lost in the grass shows little more that is new


class RandomDriver:
    """Holds random targets for 0.2 to 1.2 s each and approaches them through AR(1) noise."""

    def __init__(self, max_steps=RANDOM_STEPS):
        self.max_steps = max_steps

    def start(self, env, rng):
        """Places the car anywhere on the track, askew, at up to 60 units/s, in half of the
        episodes -> whether it did."""
        if rng.random() < 0.5:
            return False
        tile = rng.integers(len(env.unwrapped.track))
        offset = rng.uniform(-8, 8)  # units beside the centre line; the road's half width is 6.67
        place_beside(env, tile, offset, askew=rng.normal(0, 0.6), speed=rng.uniform(0, 60))
        return True

    def reset(self, env, rng):
        self.rng, self.left = rng, 0
        self.target, self.action = (0, 0, 0), (0, 0, 0)

    def act(self, env):
        r = self.rng
        if self.left <= 0:
            self.left = r.integers(10, 60)
            steer = r.uniform(-1, 1) if r.random() < 0.3 else r.normal(0, 0.2)
            gas = r.uniform(0, 1) * (r.random() < 0.7)
            brake = r.uniform(0, 1) ** 2 * (r.random() < 0.2)
            self.target = float(steer), gas, brake
        self.left -= 1
        noise = r.normal(0, 0.03, 3).tolist()
        self.action = [0.85 * a + 0.15 * b + e for a, b, e in zip(self.action, self.target, noise)]
        return np.clip(self.action, (-1, 0, 0), 1).astype(np.float32)


def make_random(number, steps=RANDOM_STEPS):
    return RandomDriver(steps), {"name": "random", "steps": steps}


def main():
    p = collector_parser(__doc__, 1_500_000)
    steps, text = Number(int, 1, MAX_STEPS), "steps of the longest episode"
    p.add_argument("--steps", type=steps, default=RANDOM_STEPS, help=text)
    args = p.parse_args()
    return collect(args, "data", partial(make_random, steps=args.steps))


if __name__ == "__main__":
    run_main(main)
