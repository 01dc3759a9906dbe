"""Other colours of grass and road, and the palette that takes them out again."""

import numpy as np
import pytest

from car import SCENE_H
from car.env import make_env
from drive_mpc import LEARN_COLORS
from support.disturbance import MOST_SHIFT, SHIFTS, disturbed_env
from support.palette import Palette

TRACK, STEPS = 200_100, 140
GAS = np.array([0, 0.15, 0], np.float32)


def drive(env, seed):
    """Frames of a car that leaves its start slowly, straight on."""
    frames = [env.reset(seed=seed)[0]]
    for _ in range(STEPS):
        frames.append(env.step(GAS)[0])
    return np.stack(frames)


def scene_error(a, b):
    """Mean absolute difference of two lists of frames, without their HUD, in levels."""
    return np.abs(a[:, :SCENE_H].astype(float) - b[:, :SCENE_H]).mean()


@pytest.mark.parametrize("seed", range(TRACK, TRACK + 4))
def test_frames_in_the_usual_colours_stay_as_they_are(seed):
    palette, frames = Palette(), drive(make_env(), seed)
    palette.learn(frames[LEARN_COLORS])
    assert all(palette(frame) is frame for frame in frames[LEARN_COLORS:])


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("seed", range(TRACK, TRACK + 4))
def test_shifted_colours_come_back_to_the_usual_ones(kind, seed):
    usual, shifted = drive(make_env(), seed), drive(disturbed_env("fast", kind), seed)
    palette = Palette()
    palette.learn(shifted[LEARN_COLORS])
    assert palette.colors is not None
    mended = np.stack([palette(frame) for frame in shifted[LEARN_COLORS:]])
    before, after = (scene_error(x, usual[LEARN_COLORS:]) for x in (shifted[LEARN_COLORS:], mended))
    assert after < 2 and after < before / 5, (before, after)
    assert np.array_equal(mended[:, SCENE_H:], shifted[LEARN_COLORS:, SCENE_H:])  # the HUD stays


def test_random_colours_are_found():
    env = make_env(domain_randomize=True)
    for seed in range(TRACK, TRACK + 6):
        frames, palette = drive(env, seed), Palette()
        palette.learn(frames[LEARN_COLORS])
        road, grass = palette.colors
        u = env.unwrapped
        wanted = np.concatenate([u.road_color, u.bg_color, u.grass_color])
        assert np.abs(np.concatenate([road, *grass]) - wanted).max() < 6


@pytest.mark.parametrize("kind", ["fast", "official"])
@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_moves_colours_and_nothing_else(kind, name):
    plain, env = make_env(kind), disturbed_env(kind, name)
    roads = []
    for seed in (TRACK, TRACK + 1, TRACK):
        for e in (plain, env):
            e.reset(seed=seed)
        u = env.unwrapped
        assert u.track == plain.unwrapped.track
        road, grass = u.road_color - 102, u.bg_color - (102, 204, 102)
        numbers = np.unique(road.round(6))
        assert len(numbers) == SHIFTS[name] and np.abs(road).max() <= MOST_SHIFT
        assert np.abs(grass).max() <= MOST_SHIFT and not np.allclose(road, grass)
        roads.append(road)
    assert np.array_equal(roads[0], roads[2]) and not np.array_equal(roads[0], roads[1])
