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

import numpy as np

from car import FPS
from car.telemetry import RECOVERY_HOLD, is_recovered, place_beside
from collect_data import RandomDriver
from collect_race_data import Expert, pace_of
from support.cli import run
from support.workers import collect, collector_parser

IN_BENDS = ("understeer", "oversteer", "late_braking", "wrong_throttle")
ANYWHERE = ("swerve", "noise_burst", "random_burst")
MISTAKES = IN_BENDS + ANYWHERE
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

    def __init__(self, pace=1.0, **changes):
        self.expert = Expert(pace, **changes)
        self.explorer = RandomDriver()

    def reset(self, env, rng):
        """Plans the line; draws this episode's rate of mistakes and the first pause."""
        self.expert.reset(env, rng)
        self.rng = rng
        self.mean_pause = rng.uniform(*PAUSE) * FPS
        self.noise = (0.0, 0.0)
        self.mistakes = {kind: [0, 0] for kind in (*MISTAKES, "start")}
        self._drive_on()

    def start(self, env, rng):
        """Places the car off line, askew and moving, in START_SHARE of the episodes; True if so."""
        if rng.random() >= START_SHARE:
            return False
        tile = rng.integers(len(env.unwrapped.track))
        offset, askew, yaw_rate = rng.normal(0, (OFFSET, ASKEW, SPIN))
        place_beside(env, tile, offset, askew, speed=rng.uniform(0, 60), yaw_rate=yaw_rate)
        self.mistakes["start"][0] += 1
        self._evaluate("start")
        return True

    def act(self, env):
        """The action (3,) float32 for now, noise and mistakes included."""
        action = self.expert.controls(env)
        self._advance(env, action)
        kind = self.kind if self.state == "active" else None
        if kind == "random_burst":
            return self.explorer.act(env)
        if kind:
            action = perturb_action(kind, self.strength, self.sign, action)

        # AR(1) noise, louder and on both pedals in a burst
        fresh = self.rng.normal(0, ACTION_NOISE * math.sqrt(1 - NOISE_MEMORY**2), 2).tolist()
        self.noise = [NOISE_MEMORY * old + new for old, new in zip(self.noise, fresh)]
        steer, gas, brake = action
        if kind == "noise_burst":
            steer = steer + NOISE_BURST * self.noise[0]
            throttle = gas - brake + NOISE_BURST * self.noise[1]
            gas, brake = max(0.0, throttle), max(0.0, -throttle)
        else:
            steer = steer + self.noise[0]
            gas = gas + self.noise[1] if gas > 0 else 0.0
        return np.clip((steer, gas, brake), (-1, 0, 0), 1).astype(np.float32)

    def _advance(self, env, action):
        """driving -> pending -> active -> evaluating -> driving; one of them a step."""
        self.clock -= 1
        if self.state == "driving" and self.clock <= 0:
            self.state, self.kind = "pending", MISTAKES[self.rng.integers(len(MISTAKES))]
            self.strength, self.sign = self.rng.random(), self.rng.choice((-1, 1))
        if self.state == "pending" and self._matters(action):
            length = RANDOM_BURST if self.kind == "random_burst" else LENGTH
            self.state, self.clock = "active", self.rng.uniform(*length) * FPS
            self.explorer.reset(env, self.rng)
            self.mistakes[self.kind][0] += 1
            self.sign = math.copysign(1, action[0]) if self.kind == "oversteer" else self.sign
        elif self.state == "active" and self.clock <= 0:
            self._evaluate(self.kind)
        elif self.state == "evaluating":
            car = env.unwrapped.car
            wheels = sum([1 for w in car.wheels if w.tiles])
            error, speed = self.expert.heading_error(env), car.hull.linearVelocity.length
            self.held = self.held + 1 if is_recovered(wheels, error, speed) else 0
            if self.held >= RECOVERY_HOLD * FPS or self.clock <= 0:
                self.mistakes[self.kind][1] += int(self.clock > 0)
                self._drive_on()

    def _matters(self, action):
        """Whether the mistake would change anything now: most wait for a bend."""
        if self.kind == "late_braking":
            return action[2] > 0
        return self.kind in ANYWHERE or abs(action[0]) > BEND_STEER

    def _drive_on(self):
        self.state, self.clock = "driving", self.rng.exponential(self.mean_pause)

    def _evaluate(self, kind):
        self.state, self.kind, self.clock, self.held = "evaluating", kind, RECOVERY_TIME * FPS, 0


def make_faulty(job, number):
    pace = pace_of(job, number)
    return FaultyExpert(pace), {"name": "faulty expert", "pace": pace}


def main():
    args = collector_parser(__doc__, 2_400_000, RECOVERY_PACES).parse_args()
    return collect(args, "data_recovery", make_faulty)


if __name__ == "__main__":
    run(main)
