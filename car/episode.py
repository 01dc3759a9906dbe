"""Recording an episode."""

import numpy as np

from car.telemetry import telemetry


class EpisodeRecorder:
    """Collects one episode step by step, and returns it as the arrays of a chunk."""

    def __init__(self):
        self.frames, self.states, self.actions, self.rewards = [], [], [], []

    def add(self, frame, state, action=None, reward=None):
        """Adds a frame (64, 64, 3) uint8 and its telemetry (K,).

        All frames but the first come with the action (3,) and the reward that led to them.
        """
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
    """Drives one whole episode of a fast env -> (arrays of a chunk, {"lap_finished": bool}).

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
    recorder.add(obs, telemetry(env))
    env.unwrapped.defer()  # frames drawn together cost half

    # one action a step
    t, limit, ended = 0, getattr(policy, "max_steps", float("inf")), False
    while not ended:
        if on_step:
            on_step(env, t)
        action, t = policy.act(env), t + 1
        _, reward, terminated, truncated, info = env.step(action)
        truncated = truncated or t >= limit
        ended = terminated or truncated
        recorder.add(None, telemetry(env), action, reward)

    recorder.frames[1:] = env.unwrapped.deferred_frames()
    end = {"lap_finished": bool(info.get("lap_finished", False))}
    return recorder.arrays(terminated, truncated), end
