"""The memory of the heading: read off frames and latents, and what it makes plans cost."""

import math

import numpy as np
import pytest
import torch
from test_networks import random_nets

from car import FPS
from car.env import make_env, observe
from car.telemetry import telemetry_of
from collect_recovery_data import FaultyExpert
from networks import DISCOUNT, VALUE_WEIGHT, scored_steps
from support.checkpoints import load_models
from support.heading import MEMORY, HeadingMemory, turn_readout, yaw_rate
from support.latents import encode
from support.rollout_cost import RolloutCost


def drive(kind, steps=400, seed=200_300):
    """Frames and yaw rates of an expert that errs."""
    env, expert = make_env(kind), FaultyExpert(1.0)
    env.reset(seed=seed)
    expert.reset(env, np.random.default_rng(0))
    frames, rates = [], []
    for _ in range(steps):
        frames.append(observe(env, env.step(expert.act(env))[0]))
        rates.append(telemetry_of(env)["yaw_rate"])
    return np.stack(frames), np.array(rates)


@pytest.mark.parametrize("kind", ["fast", "official"])
def test_frames_show_the_yaw_rate(kind):
    frames, rates = drive(kind)
    read = np.array([yaw_rate(frame) for frame in frames])
    assert np.abs(rates).max() > 1.5 and np.abs(read - rates).max() < 0.12


def test_latents_show_the_turn_between_two_of_them():
    nets, _, _ = load_models(".", None, torch.device("cpu"), names=("encoder",))
    encoder, (frames, rates) = nets["encoder"], drive("fast")
    R, first = encoder.repeat, encoder.span - 1
    rows = [np.arange(first - k * R, len(frames) - k * R) for k in (2, 1, 0)]
    obs = torch.from_numpy(np.stack([frames[r] for r in rows], 1)).permute(0, 1, 4, 2, 3)
    z = encode(encoder, obs, torch.device("cpu"), torch.float32)[:, : encoder.planned]
    weights, bias = turn_readout(encoder)
    read = (z @ weights + bias).numpy() * FPS / R
    assert np.corrcoef(read, rates[first:])[0, 1] > 0.98
    assert np.polyfit(read, rates[first:], 1)[0] == pytest.approx(1, abs=0.12)


def hud(rate):
    """A frame whose red bar shows a yaw rate."""
    env = make_env()
    env.reset(seed=1)
    env.unwrapped.car.hull.angularVelocity = rate
    return env.step(np.zeros(3, np.float32))[0]


def test_the_road_leads_where_an_expert_goes_until_the_car_is_lost_or_turned():
    left, straight, memory = hud(3.0), hud(0.0), HeadingMemory()
    rate = yaw_rate(left)
    assert 1 < rate < 4 and abs(yaw_rate(straight)) < 0.3
    see = lambda frame, seconds: [memory.see(frame) for _ in range(round(seconds * FPS))]
    expert, unsure, lost = 0.01, 0.1, 0.5  # energies, over random driving's
    assert memory.turned(lost) is None  # it has seen no road yet
    assert memory.turned(expert) is None
    see(left, 1 / rate)
    assert memory.turned(expert) is None  # a bend: the road turned with the car
    see(left, 1 / rate)
    assert memory.turned(unsure) is None  # perhaps a slide: the road did not
    see(left, 1.5 / rate)
    off = memory.turned(lost)
    assert off == pytest.approx(2.5, abs=0.1)  # the road is where it was
    assert memory.turned(expert) == off  # along a road, the wrong way
    see(left, (2 * math.pi - 2.5) / rate)
    assert memory.turned(expert) is None  # all the way round
    see(left, 2.5 / rate)
    see(straight, MEMORY)
    assert memory.turned(lost) is None  # too long ago


@pytest.mark.parametrize("turned", [0.0, 2.0, -3.0])
def test_headings_off_the_roads_cost_as_much_as_random_driving(turned):
    nets, H = random_nets(), 7
    predictor, cost = nets["predictor"], nets["cost"]
    z, act = cost.mu[:1] + 0.1, torch.randn(32, H, 3)
    readout = torch.randn(8) / 10, 0.05
    folded = RolloutCost(**nets, kind="value", turn_readout=readout)
    plain = folded(z, act)
    folded.turned = turned
    z_hat = predictor.rollout(z.expand(32, -1), act)
    heading = turned + (z_hat @ readout[0] + readout[1]).cumsum(1)
    wrong = cost.random_energy * (1 - heading.cos()) / 2
    some = list(scored_steps(H))
    expected = H * (cost.saturate(cost.energy(z_hat[:, some])) + wrong[:, some]).mean(1)
    ends = cost.terminal_value(z_hat[:, -1]) + VALUE_WEIGHT * wrong[:, -1]
    expected = expected + DISCOUNT**H * ends
    assert torch.allclose(folded(z, act), expected, rtol=1e-4, atol=1e-4)
    folded.turned = None
    assert torch.equal(folded(z, act), plain)
