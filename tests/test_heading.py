"""The memory of the heading: read off frames and latents, and what it makes plans cost."""

import math

import numpy as np
import pytest
import torch
from test_networks import random_nets

from car import FPS, ZOOM_STEPS
from car.env import make_env, observe
from car.telemetry import place_beside, telemetry_of
from collect_race_data import Expert
from collect_recovery_data import FaultyExpert
from drive_mpc import Driver
from networks import DISCOUNT, VALUE_WEIGHT, scored_steps
from support.checkpoints import load_models
from support.disturbance import Disturbance, disturbed_env
from support.heading import HeadingMemory, look_around, speed, turn_readout, yaw_rate
from support.latents import encode
from support.plan_config import PlanConfig
from support.rollout_cost import RolloutCost


def drive(kind, steps=400, seed=200_300):
    """Frames of an expert that errs, and the car's telemetry."""
    env, expert = make_env(kind), FaultyExpert(1.0)
    env.reset(seed=seed)
    expert.reset(env, np.random.default_rng(0))
    frames, states = [], []
    for _ in range(steps):
        frames.append(observe(env, env.step(expert.act(env))[0]))
        states.append(telemetry_of(env))
    env.close()
    return np.stack(frames), {k: np.array([s[k] for s in states]) for k in states[0]}


@pytest.mark.parametrize("kind", ["fast", "official"])
def test_frames_show_yaw_rate_and_speed(kind):
    frames, true = drive(kind)
    read = np.array([yaw_rate(frame) for frame in frames])
    assert np.abs(true["yaw_rate"]).max() > 1.5
    assert np.abs(read - true["yaw_rate"]).max() < 0.12
    read = np.array([speed(frame) for frame in frames])
    fast = np.hypot(true["forward_speed"], true["side_speed"])
    assert fast.max() > 50 and np.abs(read - fast).max() < 6 and np.abs(read - fast).mean() < 2


def off_the_road(state):
    """Rad between car and road, + to the left."""
    return -float(state["heading_error"])


def test_a_frame_shows_the_road_up_to_half_a_turn():
    env, errors, shares = make_env("fast"), [], []
    rng = np.random.default_rng(0)
    for i in range(120):
        if i % 12 == 0:
            env.reset(seed=200_320 + i)
            env.unwrapped.t = math.inf  # the camera has arrived
        tile = int(rng.integers(len(env.unwrapped.track)))
        frame = place_beside(env, tile, rng.uniform(-4, 4), rng.uniform(-math.pi, math.pi), 20)
        axis, _, share = look_around(frame)
        errors.append(abs(math.remainder(axis - off_the_road(telemetry_of(env)), math.pi)))
        shares.append(share)
    assert np.median(errors) < 0.12 and np.quantile(errors, 0.9) < 0.5  # bends lead elsewhere
    assert min(shares) > 0.3
    assert look_around(place_beside(env, 0, 60.0))[1:] < (0.5, 0.01)  # lawn only
    env.close()


@pytest.mark.parametrize("side", [-1, 1])
def test_the_memory_follows_a_car_that_turns_round_beside_the_road_and_leads_it_back(side):
    """A car circles onto the grass, as far as its road is out of sight."""
    env, memory = make_env("fast"), HeadingMemory()
    env.reset(seed=200_331)
    env.unwrapped.t = math.inf
    memory.see(place_beside(env, 20, speed=30))
    for _ in range(400):
        state = telemetry_of(env)
        if abs(state["heading_error"]) > 2.2 and state["wheels_off_road"] == 4:
            break
        lacking = 0.05 * (30 - state["forward_speed"])
        action = [0.4 * side, np.clip(lacking, 0, 0.5), np.clip(-lacking, 0, 0.3)]
        memory.see(env.step(np.array(action, np.float32))[0])
    else:
        pytest.fail("the car did not turn round")
    assert abs(math.remainder(memory.turned - off_the_road(state), 2 * math.pi)) < 0.4
    assert abs(memory.off_course()) > math.pi / 2  # it goes the wrong way

    # placed beside the road along it, a car is off its way, which leads back
    memory.turned, memory.beside = 0.0, 20.0
    assert memory.off_course() == pytest.approx(math.pi / 4)
    memory.beside = -20.0
    assert memory.off_course() == pytest.approx(-math.pi / 4)
    env.close()


@pytest.mark.parametrize("noise", ["none", "noise"])
def test_a_car_that_stands_forgets_its_way(noise):
    env, memory, disturbance = make_env("fast"), HeadingMemory(), Disturbance(noise)
    env.reset(seed=200_331)
    env.unwrapped.t = math.inf
    disturbance.reset(1)
    stands = place_beside(env, 20)
    memory.turned = 3.0
    for _ in range(20):
        memory.see(disturbance(stands))
    assert abs(memory.off_course()) > 2.8  # along the road, the wrong way
    for _ in range(10):
        memory.see(disturbance(stands))
    assert abs(memory.off_course()) < 0.3
    env.close()


@pytest.fixture(scope="module")
def nets():
    return load_models(".", None, torch.device("cpu"))[0]


def make_driver(nets):
    cfg = PlanConfig(samples=8, max_gas=1.0)
    return Driver(nets, cfg, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("disturbance", ["none", "noise", "shift3"])
def test_a_lap_is_never_the_wrong_way(nets, disturbance):
    """An expert drives; the driver looks on and remembers."""
    env, expert, disturb = disturbed_env("fast", disturbance), Expert(1.0), Disturbance(disturbance)
    driver, off = make_driver(nets), []
    obs, _ = env.reset(seed=200_340)
    expert.reset(env)
    driver.reset(200_340)
    disturb.reset(200_340)
    for _ in range(560):
        driver.act(disturb(observe(env, obs)))
        off.append(abs(driver.memory.off_course()))
        obs = env.step(expert.act(env))[0]
    env.close()
    assert max(off) < 1.2 and np.median(off) < 0.1


def test_the_driver_plans_by_its_memory(nets):
    env, driver = make_env("fast"), make_driver(nets)
    env.reset(seed=200_331)
    env.unwrapped.t = math.inf
    askew = place_beside(env, 20, askew=1.0, speed=20)
    costs = []
    for wrong in (False, True):
        driver.reset(1)
        driver.t = ZOOM_STEPS
        if wrong:
            driver.memory.frames, driver.memory.turned = 100, 2.5
        driver.act(askew)
        costs.append(driver.costs)
    assert (costs[1] > costs[0]).all()
    driver.reset(2)
    assert driver.memory.turned == 0
    env.close()


def test_latents_show_the_turn_between_two_of_them():
    nets, _, _ = load_models(".", None, torch.device("cpu"), names=("encoder",))
    encoder, (frames, true) = nets["encoder"], drive("fast")
    rates = true["yaw_rate"]
    R, first = encoder.repeat, encoder.span - 1
    rows = [np.arange(first - k * R, len(frames) - k * R) for k in (2, 1, 0)]
    obs = torch.from_numpy(np.stack([frames[r] for r in rows], 1)).permute(0, 1, 4, 2, 3)
    z = encode(encoder, obs, torch.device("cpu"), torch.float32)[:, : encoder.planned]
    weights, bias = turn_readout(encoder)
    read = (z @ weights + bias).numpy() * FPS / R
    assert np.corrcoef(read, rates[first:])[0, 1] > 0.98
    assert np.polyfit(read, rates[first:], 1)[0] == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("turned", [0.0, 2.0, -3.0])
def test_the_wrong_way_costs_as_much_as_random_driving(turned):
    nets, H = random_nets(), 7
    predictor, cost = nets["predictor"], nets["cost"]
    far, act = cost.mu[None] + 100.0, torch.randn(32, H, 3)
    readout = torch.randn(8) / 10, 0.05
    folded = RolloutCost(**nets, kind="value", turn_readout=readout)
    assert cost.is_ood(far)
    z_hat = predictor.rollout(far.expand(32, -1), act)
    heading = turned + (z_hat @ readout[0] + readout[1]).cumsum(1)
    wrong = cost.random_energy * (-heading.cos()).clamp_min(0)
    some = list(scored_steps(H))
    expected = H * (cost.saturate(cost.energy(z_hat[:, some])) + wrong[:, some]).mean(1)
    ends = cost.terminal_value(z_hat[:, -1]) + VALUE_WEIGHT * wrong[:, -1]
    expected = expected + DISCOUNT**H * ends
    assert torch.allclose(folded(far, act, turned), expected, rtol=1e-4, atol=1e-4)
    without = RolloutCost(**nets, kind="value")
    assert torch.equal(without(far, act, turned), without(far, act))


def test_headings_count_out_of_distribution_and_on_the_wrong_way_only():
    nets = random_nets()
    z, act = nets["cost"].mu[None] + 0.01, torch.randn(32, 7, 3)
    folded = RolloutCost(**nets, kind="value", turn_readout=(torch.zeros(8), 0.0))
    assert not nets["cost"].is_ood(z)
    plain = folded(z, act)
    assert torch.equal(folded(z, act, 1.5), plain)
    assert (folded(z, act, 1.6) != plain).all()
    density = RolloutCost(**nets, kind="density", turn_readout=(torch.zeros(8), 0.0))
    assert torch.equal(density(z, act, 3.0), density(z, act))
