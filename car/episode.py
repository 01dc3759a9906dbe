"""Recording an episode; saving and restoring the simulator's state."""

from typing import NamedTuple

import numpy as np

from car.env import observe
from car.telemetry import place_car, telemetry


class EpisodeRecorder:
    """Collects one episode step by step, and returns it as the arrays of a chunk."""

    def __init__(self):
        self.frames, self.states, self.actions, self.rewards = [], [], [], []
        self.ends = False, False  # terminated, truncated

    def add(self, frame, state, action=None, reward=None):
        """Adds a frame (64, 64, 3) uint8 and its telemetry (K,), and unless it is the first frame
        the action (3,) and the reward that led to it."""
        self.frames.append(frame)
        self.states.append(state)
        if action is not None:
            self.actions.append(action)
            self.rewards.append(reward)

    def arrays(self, terminated, truncated):
        """{name: array} as `buffer.write_chunk` takes them, of T steps that ended so."""
        ends = np.zeros((2, len(self.actions)), bool)
        ends[:, -1] = terminated, truncated
        return dict(
            obs=np.stack(self.frames),
            act=np.stack(self.actions),
            reward=np.array(self.rewards, np.float32),
            terminated=ends[0],
            truncated=ends[1],
            telemetry=np.stack(self.states),
        )


def run_episode(env, policy, track_seed, rng, on_step=None):
    """Drives one whole episode -> (arrays of a chunk, {"lap_finished": bool}).

    policy: `reset(env, rng)` and `act(env)`, which read the simulator and no frames; optionally
    `start(env, rng)`, which may place the car elsewhere and then returns True, and `max_steps`.
    on_step(env, t) is called before step t, for t from 0 on.
    """
    # the first frame
    obs, _ = env.reset(seed=track_seed)
    policy.reset(env, rng)
    if hasattr(policy, "start") and policy.start(env, rng):
        obs, *_ = env.step(np.zeros(3, np.float32))  # the frame of the new place
    recorder = EpisodeRecorder()
    recorder.add(observe(env, obs), telemetry(env))
    deferred = hasattr(env.unwrapped, "defer")
    if deferred:
        env.unwrapped.defer()  # frames drawn together cost half

    # one action a step
    t, limit, ended = 0, getattr(policy, "max_steps", float("inf")), False
    while not ended:
        if on_step:
            on_step(env, t)
        action, t = policy.act(env), t + 1
        obs, reward, terminated, truncated, info = env.step(action)
        truncated = truncated or t >= limit
        ended = terminated or truncated
        frame = None if deferred else observe(env, obs)
        recorder.add(frame, telemetry(env), action, reward)

    if deferred:
        recorder.frames[1:] = env.unwrapped.deferred_frames()
    end = {"lap_finished": bool(info.get("lap_finished", False))}
    return recorder.arrays(terminated, truncated), end


class SimulatorState(NamedTuple):
    """All of a simulator's state that its next steps depend on, the track apart."""

    bodies: list  # of hull and wheels: (x, y, angle, vx, vy, angular velocity)
    wheels: list  # (gas, brake, steer, spin, phase, indices of the tiles touched)


def save_state(env):
    """The SimulatorState of any kind of env."""
    car = env.unwrapped.car
    bodies = [
        (*b.position, b.angle, *b.linearVelocity, b.angularVelocity)
        for b in (car.hull, *car.wheels)
    ]
    wheels = [
        (w.gas, w.brake, w.steer, w.omega, w.phase, [t.idx for t in w.tiles]) for w in car.wheels
    ]
    return SimulatorState(bodies, wheels)


def restore_state(env, state):
    """Puts a new car into env, on the same track, in a SimulatorState.

    Box2D never reports the end of the contacts restored: after the first step the caller sets the
    wheels' `tiles` to those that they touch.
    """
    env = env.unwrapped
    place_car(env, *state.bodies[0][:3])
    for body, (x, y, angle, vx, vy, yaw_rate) in zip((env.car.hull, *env.car.wheels), state.bodies):
        body.transform = (x, y), angle
        body.linearVelocity, body.angularVelocity = (vx, vy), yaw_rate
    for w, (gas, brake, steer, spin, phase, tiles) in zip(env.car.wheels, state.wheels):
        w.gas, w.brake, w.steer, w.omega, w.phase = gas, brake, steer, spin, phase
        w.tiles = {env.road[i] for i in tiles}
