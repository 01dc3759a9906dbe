"""The environments: official CarRacing, a fast equivalent, and `preprocess` for both.

    env = make_env("fast")  # physics, rewards and seeds of the official env, obs (64, 64, 3) uint8
    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(np.array((steer, gas, brake), np.float32))
    state = telemetry(env)  # (K,) float32, named and explained in TELEMETRY

steer -1..1, + to the right; gas and brake 0..1. The fast env returns `preprocess(official frame)`
without drawing the 1000x800 window: see `car.renderer`. `python benchmark.py env fidelity` measures
its speed and its error.
"""

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d import car_racing as cr
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from car import ENV_ID, MAX_STEPS, OBS_SIZE, SCENE_H
from car.renderer import FastCarRacing

DIGIT_COLS = 8  # the score covers 12 of 96 columns: 8 of 64

cv2.setNumThreads(0)  # pictures this small gain nothing from threads, which spin while they wait


def make_env(kind="fast", **kw):
    """CarRacing, 1000 steps an episode; `kw` goes to the env (render_mode, domain_randomize...).

    kind: "official" (obs (96, 96, 3)) or "fast" (obs (64, 64, 3), same physics, rewards, seeds).
    """
    assert kind in ("official", "fast"), kind
    if kind == "official":
        return gym.make(ENV_ID, disable_env_checker=True, **kw)
    return TimeLimit(OrderEnforcing(FastCarRacing(**kw)), MAX_STEPS)


def preprocess(frame):
    """Official frame (96, 96, 3) uint8 -> (64, 64, 3) uint8: area average, score blacked out.

    ValueError for another shape or type. Area keeps the level of thin HUD bars; nearest loses them.
    """
    shape, dtype = getattr(frame, "shape", None), getattr(frame, "dtype", type(frame).__name__)
    if shape != (cr.STATE_H, cr.STATE_W, 3) or dtype != np.uint8:
        raise ValueError(f"preprocess: expected (96, 96, 3) uint8, found {shape} {dtype}")
    obs = cv2.resize(frame, (OBS_SIZE, OBS_SIZE), interpolation=cv2.INTER_AREA)
    obs[SCENE_H:, :DIGIT_COLS] = 0  # the score is a leak of the return
    return obs


def observe(env, obs):
    """The driver's frame (64, 64, 3) uint8 of an obs of either kind of env."""
    return obs if obs.shape == (OBS_SIZE, OBS_SIZE, 3) else preprocess(obs)
