"""Recording an episode; saving and restoring the simulator's state."""

from typing import NamedTuple

import numpy as np

from car.env import observe
from car.telemetry import place_car, telemetry


def run_episode(env, policy, track_seed, rng):
    """One whole episode -> (arrays of a chunk, {"lap_finished"}); a policy may start elsewhere."""
    obs, _ = env.reset(seed=track_seed)
    policy.reset(env, rng)
    if hasattr(policy, "start") and policy.start(env, rng):
        obs, *_ = env.step(np.zeros(3, np.float32))  # the frame of the new place
    frames, acts, rewards, states = [observe(env, obs)], [], [], [telemetry(env)]
    later = hasattr(env.unwrapped, "defer")
    if later:
        env.unwrapped.defer()  # these policies read the simulator: their frames can wait
    limit = getattr(policy, "max_steps", 10**9)
    terminated = truncated = False
    while not (terminated or truncated):
        action = policy.act(env)
        obs, reward, terminated, truncated, info = env.step(action)
        truncated = truncated or len(acts) + 1 >= limit
        if not later:
            frames.append(observe(env, obs))
        acts.append(action)
        rewards.append(reward)
        states.append(telemetry(env))
    ends = np.zeros((2, len(acts)), bool)
    ends[:, -1] = terminated, truncated
    frames = np.stack(frames)
    if later:
        frames = np.concatenate((frames, env.unwrapped.painted()))
    return dict(
        obs=frames,
        act=np.stack(acts),
        reward=np.array(rewards, np.float32),
        terminated=ends[0],
        truncated=ends[1],
        telemetry=np.stack(states),
    ), {"lap_finished": bool(info.get("lap_finished", False))}


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
