"""The expert with injected mistakes: how leaving the line looks, and the way back.

At random times (Poisson) a named mistake of 0.1 to 1.2 s changes the expert's action, or random
driving replaces it for 1 to 4 s. Then the expert takes over. Half of the episodes also start off
the line, askew or on the grass. Each mistake is evaluated: did the car recover within 4 s of its
end, by `is_recovered`? It writes ROOT/data_recovery/*.npz, one episode a file. Started again, it
goes on to the target.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import math
from functools import partial

import numpy as np

from car import FPS
from car.telemetry import RECOVERY_HOLD, is_recovered, place_beside
from collect_data import RandomDriver
from collect_race_data import Expert, pace_of
from support.cli import run_main
from support.workers import collect, collector_parser

ANYWHERE = ("swerve", "noise_burst", "random_burst")  # the others wait for a bend
MISTAKES = ("understeer", "oversteer", "late_braking", "wrong_throttle", *ANYWHERE)
RECOVERY_PACES = [0.1, 0.3, 0.6, 1.0]  # of --pace: the predictor learns what too fast leads to
PAUSE = (1.0, 4.0)  # s, mean pause before a mistake, drawn once per episode
LENGTH = (0.1, 1.2)  # s, a mistake
RANDOM_BURST = (1.0, 4.0)  # s, one of random driving, which leads to where a lost car is
RECOVERY_TIME = 4.0  # s after a mistake to recover in
ACTION_NOISE = 0.05  # standard deviation of steer and gas noise, always on
NOISE_MEMORY = 0.9  # AR(1) coefficient per step
NOISE_BURST = 5.0  # times as much noise, on brake too: as random as a planner's candidate plans
BEND_STEER = 0.05  # radians of steering that show a bend
START_SHARE = 0.5  # of the episodes begin perturbed
OFFSET, ASKEW, SPIN = 10.0, 0.8, 2.0  # units, rad, rad/s: standard deviations of such a start


def perturb_action(kind, strength, sign, action):
    """The action (steer, gas, brake) as the mistake `kind` changes it; strength in 0..1."""
    steer, gas, brake = action
    if kind == "understeer":  # the nose runs wide, and nobody lifts
        return 0.4 * (1 - strength) * steer, max(gas, 0.3), 0.0
    if kind == "oversteer":  # too much lock on too much gas
        return sign * (0.1 + 0.3 * strength), max(gas, 0.7 * strength), 0.0
    if kind == "late_braking":
        return steer, 0.4 + 0.6 * strength, 0.0
    if kind == "wrong_throttle":
        return (steer, 0.6 + 0.4 * strength, 0.0) if sign > 0 else (steer, 0.0, strength)
    if kind == "swerve":
        return sign * (0.05 + 0.35 * strength), gas, 0.0
    return action


class FaultyExpert:
    """Drives as `Expert(pace)`, errs, recovers; `mistakes` counts kind -> [made, recovered].

    `rng` given to `reset` decides everything random. Call `start` after `reset`, or not at all.
    """

    def __init__(self, pace=1.0):
        self.expert, self.explorer = Expert(pace), RandomDriver()

    def reset(self, env, rng):
        """Plans the line; draws this episode's rate of mistakes and the first pause."""
        self.expert.reset(env, rng)
        self.rng, self.noise = rng, (0.0, 0.0)
        self.mean_pause = rng.uniform(*PAUSE) * FPS
        self.pause = rng.exponential(self.mean_pause) - 1  # steps until the next mistake
        self.mistakes = {kind: [0, 0] for kind in (*MISTAKES, "start")}
        self.phases = self._phases(env)

    def start(self, env, rng):
        """Places the car off line, askew and moving, in START_SHARE of the episodes; True if so."""
        if rng.random() >= START_SHARE:
            return False
        tile = rng.integers(len(env.unwrapped.track))
        offset, askew, yaw_rate = rng.normal(0, (OFFSET, ASKEW, SPIN))
        place_beside(env, tile, offset, askew, speed=rng.uniform(0, 60), yaw_rate=yaw_rate)
        self.mistakes["start"][0] += 1
        self.phases = self._phases(env, "start")
        return True

    def act(self, env):
        """The action (3,) float32 for now, noise and mistakes included."""
        self.action = self.expert.controls(env)
        kind = next(self.phases)
        if kind == "random_burst":
            return self.explorer.act(env)
        steer, gas, brake = self.action
        if kind:
            steer, gas, brake = perturb_action(kind, self.strength, self.sign, self.action)

        # AR(1) noise, louder and on both pedals in a burst
        fresh = self.rng.normal(0, ACTION_NOISE * math.sqrt(1 - NOISE_MEMORY**2), 2).tolist()
        self.noise = [NOISE_MEMORY * old + new for old, new in zip(self.noise, fresh)]
        if kind == "noise_burst":
            steer = steer + NOISE_BURST * self.noise[0]
            throttle = gas - brake + NOISE_BURST * self.noise[1]
            gas, brake = max(0.0, throttle), max(0.0, -throttle)
        else:
            steer = steer + self.noise[0]
            gas = gas + self.noise[1] if gas > 0 else 0.0
        return np.clip((steer, gas, brake), (-1, 0, 0), 1).astype(np.float32)

    def _phases(self, env, kind=None):
        """Yields the mistake of each step, or None, endlessly; `kind` was made before the first."""
        while True:
            if kind:
                yield from self._recover(env, kind)
            for _ in range(math.ceil(self.pause)):
                yield None
            kind = yield from self._err(env)

    def _err(self, env):
        """Draws a mistake; yields None until it matters, then its name in each of its steps."""
        rng, kind = self.rng, MISTAKES[self.rng.integers(len(MISTAKES))]
        self.strength, self.sign = rng.random(), rng.choice((-1, 1))
        while not self._matters(kind):
            yield None
        length = RANDOM_BURST if kind == "random_burst" else LENGTH
        steps = math.ceil(rng.uniform(*length) * FPS)
        if kind == "oversteer":
            self.sign = math.copysign(1, self.action[0])
        self.explorer.reset(env, rng)
        self.mistakes[kind][0] += 1
        for _ in range(steps):
            yield kind
        yield None  # `_recover` looks from the next step on
        return kind

    def _recover(self, env, kind):
        """Yields None until the car has recovered or time is over; draws the next pause."""
        held = 0
        for left in reversed(range(int(RECOVERY_TIME * FPS))):
            car = env.unwrapped.car
            wheels = sum([1 for w in car.wheels if w.tiles])
            error, speed = self.expert.heading_error(env), car.hull.linearVelocity.length
            held = held + 1 if is_recovered(wheels, error, speed) else 0
            if held >= RECOVERY_HOLD * FPS or left == 0:
                break
            yield None
        self.mistakes[kind][1] += int(left > 0)
        self.pause = self.rng.exponential(self.mean_pause)

    def _matters(self, kind):
        """Whether a mistake would change anything now: most wait for a bend."""
        steer, _, brake = self.action
        return brake > 0 if kind == "late_braking" else kind in ANYWHERE or abs(steer) > BEND_STEER


def make_faulty(number, paces=RECOVERY_PACES):
    pace = pace_of(paces, number)
    return FaultyExpert(pace), {"name": "faulty expert", "pace": pace}


def main():
    args = collector_parser(__doc__, 2_400_000, RECOVERY_PACES).parse_args()
    return collect(args, "data_recovery", partial(make_faulty, paces=args.pace))


if __name__ == "__main__":
    run_main(main)
