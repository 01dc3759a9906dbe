"""The expert with injected mistakes: what leaving the line looks like, and the way back.

At random times (Poisson) a named mistake of 0.1 to 1.2 s bends the expert's action, or random
driving replaces it for 1 to 4 s; then the expert takes over and recovers. Half of the episodes also
start off the line, askew or on the grass. Every mistake is judged: recovered means that within 4 s
of its end the car has for 0.2 s had three wheels on the road, a heading within 0.5 rad of the
line's, and more than 15 units/s.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import math

import numpy as np

from car.telemetry import place_beside
from collect_data import RandomDriver
from collect_race_data import Expert, pace_of, pace_parser
from support.cli import run
from support.workers import collect

KINDS = ("understeer", "oversteer", "late_braking", "wrong_throttle", "swerve", "fumble", "stray")
PACES = [0.1, 0.3, 0.6, 1.0]  # of --pace, by default
FPS = 50  # steps a second
GAP = (1.0, 4.0)  # s, mean pause before a mistake, drawn once per episode
LENGTH = (0.1, 1.2)  # s, a mistake
STRAY = (1.0, 4.0)  # s, one of random driving, which leads to where a lost car is
DIST_TIMEOUT = 4.0  # s after a mistake to recover in
HELD = 0.2  # s that recovery must last
NOISE = 0.05  # standard deviation of steer and gas noise, always on
NOISE_MEMORY = 0.9  # AR(1) coefficient per step
NOISE_BURST = 5.0  # times as much noise, on brake too: as random as a planner's futures
BEND = 0.05  # radians of steering that show a bend
START_SHARE = 0.5  # of the episodes begin perturbed
OFFSET, ASKEW, SPIN = 10.0, 0.8, 2.0  # units, rad, rad/s: standard deviations of such a start


def perturb_action(kind, strength, sign, action):
    """The action (steer, gas, brake) bent as the mistake `kind` bends it; strength in 0..1."""
    steer, gas, brake = action
    if kind == "understeer":  # the nose runs wide, and nobody lifts
        steer, gas, brake = 0.4 * (1 - strength) * steer, max(gas, 0.3), 0.0
    elif kind == "oversteer":  # too much lock on too much gas
        steer, gas, brake = sign * (0.1 + 0.3 * strength), max(gas, 0.7 * strength), 0.0
    elif kind == "late_braking":
        gas, brake = 0.4 + 0.6 * strength, 0.0
    elif kind == "wrong_throttle" and sign > 0:
        gas, brake = 0.6 + 0.4 * strength, 0.0
    elif kind == "wrong_throttle":
        gas, brake = 0.0, strength
    elif kind == "swerve":
        steer, gas, brake = sign * (0.05 + 0.35 * strength), gas, 0.0
    return steer, gas, brake


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
        self.mean_gap = rng.uniform(*GAP) * FPS
        self.noise = (0.0, 0.0)
        self.mistakes = {kind: [0, 0] for kind in (*KINDS, "start")}
        self._drive_on()

    def start(self, env, rng):
        """Places the car off line, askew and moving, in START_SHARE of the episodes; True if so."""
        if rng.random() >= START_SHARE:
            return False
        tile = rng.integers(len(env.unwrapped.track))
        offset, askew, yaw_rate = rng.normal(0, (OFFSET, ASKEW, SPIN))
        place_beside(env, tile, offset, askew, speed=rng.uniform(0, 60), yaw_rate=yaw_rate)
        self.mistakes["start"][0] += 1
        self._judge("start")
        return True

    def act(self, env):
        """The action (3,) float32 for now, noise and mistakes included."""
        action = self.expert.controls(env)
        self._advance(env, action)
        if self.state == "erring" and self.kind == "stray":
            return self.explorer.act(env)
        if self.state == "erring":
            action = perturb_action(self.kind, self.strength, self.sign, action)
        fresh = self.rng.normal(0, NOISE * math.sqrt(1 - NOISE_MEMORY**2), 2).tolist()
        self.noise = [NOISE_MEMORY * old + new for old, new in zip(self.noise, fresh)]
        steer, gas, brake = action
        if self.state == "erring" and self.kind == "fumble":
            steer = steer + NOISE_BURST * self.noise[0]
            throttle = gas - brake + NOISE_BURST * self.noise[1]
            gas, brake = max(0.0, throttle), max(0.0, -throttle)
        else:
            steer = steer + self.noise[0]
            gas = gas + self.noise[1] if gas > 0 else 0.0
        steer = max(-1.0, min(1.0, steer))
        return np.array([steer, max(0.0, min(1.0, gas)), max(0.0, min(1.0, brake))], np.float32)

    def _advance(self, env, action):
        """driving -> armed -> erring -> judged -> driving; one of them a step."""
        self.clock -= 1
        if self.state == "driving" and self.clock <= 0:
            self.state, self.kind = "armed", KINDS[self.rng.integers(len(KINDS))]
            self.strength, self.sign = self.rng.random(), self.rng.choice((-1, 1))
        if self.state == "armed" and self._matters(action):
            length = STRAY if self.kind == "stray" else LENGTH
            self.state, self.clock = "erring", self.rng.uniform(*length) * FPS
            self.explorer.reset(env, self.rng)
            self.mistakes[self.kind][0] += 1
            self.sign = math.copysign(1, action[0]) if self.kind == "oversteer" else self.sign
        elif self.state == "erring" and self.clock <= 0:
            self._judge(self.kind)
        elif self.state == "judged":
            self.held = self.held + 1 if self._driving_well(env) else 0
            if self.held >= HELD * FPS or self.clock <= 0:
                self.mistakes[self.kind][1] += int(self.clock > 0)
                self._drive_on()

    def _matters(self, action):
        """Whether the mistake would change anything now: most wait for a bend."""
        if self.kind == "late_braking":
            return action[2] > 0
        return self.kind in ("swerve", "fumble", "stray") or abs(action[0]) > BEND

    def _drive_on(self):
        self.state, self.clock = "driving", self.rng.exponential(self.mean_gap)

    def _judge(self, kind):
        self.state, self.kind, self.clock, self.held = "judged", kind, DIST_TIMEOUT * FPS, 0

    def _driving_well(self, env):
        """On the road (three wheels), along the line (0.5 rad), and moving (15 units/s)."""
        car = env.unwrapped.car
        error = self.expert.heading_error(env)
        speed = car.hull.linearVelocity.length
        return sum([1 for w in car.wheels if w.tiles]) >= 3 and abs(error) < 0.5 and speed > 15


def make_faulty(job, number):
    pace = pace_of(job, number)
    return FaultyExpert(pace), {"name": "faulty expert", "pace": pace}


if __name__ == "__main__":
    p = pace_parser(
        __doc__, 2_400_000, PACES, "All of them: the predictor has to know what too fast leads to"
    )
    run(lambda: collect(p.parse_args(), "data_recovery", make_faulty))
