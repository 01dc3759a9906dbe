"""The fast env equals the official one in physics, and nearly so in its frames; telemetry."""

import pickle

import numpy as np
import pytest
from gymnasium.envs.box2d import car_racing
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from car import FPS, MAX_STEPS, SCENE_H
from car.env import make_env, observe, preprocess
from car.episode import EpisodeRecorder, run_episode
from car.renderer import RenderState
from car.sprites import Hud, hflip
from car.telemetry import TELEMETRY, is_recovered, place_car, telemetry
from tools.bench_env import compare_renderers, follow

MAX_MEAN, MAX_WORST = 0.3, 1.0  # grey levels of 255 off the official picture


class Undrawn(car_racing.CarRacing):
    """The official physics without the 5 ms of drawing."""

    def _render(self, mode):
        return None


def official(**kw):
    return TimeLimit(OrderEnforcing(Undrawn(**kw)), MAX_STEPS)


def named(state):
    return dict(zip(TELEMETRY, state.tolist(), strict=True))


def snapshot(env):
    """Everything of the car that physics or frames depend on."""
    env = env.unwrapped
    bodies = [env.car.hull, *env.car.wheels]
    moving = [(*b.position, b.angle, *b.linearVelocity, b.angularVelocity) for b in bodies]
    wheels = [(w.omega, w.phase, w.gas, w.brake, w.steer, w.joint.angle) for w in env.car.wheels]
    return moving, wheels, env.tile_visited_count, env.t


def random_driver(seed):
    rng = np.random.default_rng(seed)
    return lambda state: rng.uniform((-1, -0.2, 0), (1, 1.2, 1)).astype(np.float32)


def straight_on(state):
    return np.array((0, 0.5, 0), np.float32)


def play(env, twin, driver, seed):
    """Both envs through the same episode -> what the last step returned, but for the picture."""
    env.reset(seed=seed), twin.reset(seed=seed)
    assert env.unwrapped.track == twin.unwrapped.track
    for _ in range(MAX_STEPS):
        action = driver(telemetry(env))
        result, same = env.step(action)[1:], twin.step(action)[1:]
        assert result == same
        assert snapshot(env) == snapshot(twin)
        if result[1] or result[2]:
            break
    return result


def test_whole_episodes_equal_the_official_ones_bit_for_bit():
    env, twin = make_env("fast"), official()  # reused from episode to episode
    assert play(env, twin, follow, seed=1)[3] == {"lap_finished": True}
    assert play(env, twin, random_driver(1), seed=0)[2]  # cut off by the 1000 steps
    reward, terminated, _, info = play(env, twin, straight_on, seed=2)
    assert (reward, terminated, info) == (-100, True, {"lap_finished": False})  # off the playfield
    play(env, twin, random_driver(3), seed=3)


def test_options_of_the_env_work():
    discrete = np.random.default_rng(0).integers(5, size=2000).tolist()
    play(make_env(continuous=False), official(continuous=False), lambda s: discrete.pop(), seed=4)
    env, twin = make_env(domain_randomize=True), official(domain_randomize=True)
    play(env, twin, random_driver(5), seed=5)
    assert np.array_equal(env.unwrapped.road_color, twin.unwrapped.road_color)
    pictured = make_env(render_mode="rgb_array")
    pictured.reset(seed=0)
    assert pictured.render().shape == (400, 600, 3)
    assert pickle.loads(pickle.dumps(pictured.unwrapped)).render_mode == "rgb_array"


def test_an_unknown_kind_is_named():
    with pytest.raises(AssertionError, match="quick"):
        make_env("quick")


def test_pictures_are_those_of_the_official_env():
    for name, rows in compare_renderers(tracks=2).items():
        errors = [row[0] for row in rows]
        assert np.mean(errors) <= MAX_MEAN and np.max(errors) <= MAX_WORST, name


@pytest.mark.parametrize("options", [{}, {"domain_randomize": True}])
def test_frames_drawn_later_are_those_drawn_at_once(options):
    now, later = make_env("fast", **options), make_env("fast", **options)
    for seed in (3, 4):  # instances are reused
        driver, frames = random_driver(seed), []
        assert np.array_equal(now.reset(seed=seed)[0], later.reset(seed=seed)[0])
        for env in (now, later):
            x, y = env.unwrapped.track[40][2:]
            place_car(env, x, y, 0.5, speed=40)  # with a view of tiles that will be touched
        later.unwrapped.defer()
        for _ in range(120):
            action = driver(None)
            frames.append(now.step(action)[0])
            assert later.step(action)[0] is None
        assert np.array_equal(later.unwrapped.deferred_frames(), frames)
        assert np.array_equal(now.step(action)[0], later.step(action)[0])  # as before again


def test_random_colours_are_drawn_and_visited_tiles_repainted():
    official, fast = (make_env(kind, domain_randomize=True) for kind in ("official", "fast"))
    for seed in (6, 7):
        pair = [(env, env.reset(seed=seed)[0]) for env in (official, fast)]
        for _ in range(60):
            a, b = (observe(env, obs) for env, obs in pair)
            assert np.abs(a.astype(int) - b).mean() < MAX_WORST
            pair = [(env, env.step(straight_on(None))[0]) for env in (official, fast)]


def test_obs_spaces_and_types():
    for kind, side in (("official", 96), ("fast", 64)):
        env = make_env(kind)
        obs, info = env.reset(seed=0)
        assert obs.shape == (side, side, 3) and obs.dtype == np.uint8 and info == {}
        assert env.observation_space.contains(obs)
        assert observe(env, obs).shape == (64, 64, 3)
        again = env.step(np.zeros(3, np.float32))[0]
        assert not np.shares_memory(obs, again)


def test_the_score_is_masked_and_the_bars_are_not():
    frame = np.full((96, 96, 3), 200, np.uint8)
    obs = preprocess(frame)
    assert (obs[56:, :8] == 0).all()
    assert (obs[56:, 8:] == 200).all() and (obs[:56] == 200).all()
    env = make_env()
    env.reset(seed=0)
    place_car(env, 0, 0, 0, speed=90)
    obs = env.step(np.zeros(3, np.float32))[0]
    assert (obs[56:, :8] == 0).all() and obs[59:62, 8].min() > 50  # the speed bar


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((3, 96, 96), np.uint8),
        np.zeros((96, 96, 3), np.float32),
        [[0]],
    ],
)
def test_preprocess_takes_official_frames_only(frame):
    with pytest.raises(ValueError, match=r"expected \(96, 96, 3\) uint8, found"):
        preprocess(frame)


def test_telemetry_has_the_signs_it_names():
    env = make_env("fast")
    env.reset(seed=0)
    _, beta, x, y = env.unwrapped.track[30]
    right, ahead = np.array((np.cos(beta), np.sin(beta))), np.array((-np.sin(beta), np.cos(beta)))

    place_car(env, *(np.array((x, y)) + 3 * right), beta, speed=20)
    state = named(telemetry(env))
    assert state["lateral_offset"] == pytest.approx(3, abs=1e-3) and state["tile_index"] == 30
    assert state["heading_error"] == pytest.approx(0, abs=1e-5)
    assert state["forward_speed"] == pytest.approx(20) and state["speed"] == pytest.approx(20)
    assert state["side_speed"] == pytest.approx(0, abs=1e-4)

    for _ in range(25):  # steered to the right, off the centre line
        env.step(np.array((0.5, 0.2, 0), np.float32))
    state = named(telemetry(env))
    assert state["lateral_offset"] > 3 and state["yaw_rate"] < 0 and state["steer_angle"] < 0
    assert state["heading_error"] > 0  # it is to turn left
    assert state["wheel_spin_rl"] > 0 and 0 < state["tiles_visited"] < 1

    place_car(env, *(np.array((x, y)) + 15 * right + 2 * ahead), beta + 2 * np.pi)
    env.step(np.zeros(3, np.float32))
    state = named(telemetry(env))
    assert state["wheels_off_road"] == 4 and state["lateral_offset"] > 12
    assert state["heading_error"] == pytest.approx(0, abs=1e-3)  # wrapped


def test_telemetry_is_finite_and_the_same_in_all_kinds():
    states = []
    for kind in ("official", "fast"):
        env = make_env(kind)
        env.reset(seed=3)
        driver = random_driver(0)
        for _ in range(60):
            env.step(driver(None))
        states.append(telemetry(env))
    assert states[0].shape == (len(TELEMETRY),) and states[0].dtype == np.float32
    assert np.isfinite(states[0]).all() and np.array_equal(*states)


def test_telemetry_finds_the_nearest_tile_after_any_jump():
    env = make_env("fast")
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        env.reset(seed=seed)
        track = np.array(env.unwrapped.track)
        for i in rng.integers(len(track), size=20):
            place_car(env, *track[i, 2:], track[i, 1])
            assert named(telemetry(env))["tile_index"] == i
            nearer = telemetry(env)  # and again from there
            assert named(nearer)["tile_index"] == i


@pytest.mark.parametrize("offset", [-6, 0, 6])
def test_telemetry_goes_over_smoothly_from_tile_to_tile(offset):
    """Along a line at constant offset, turning evenly between tiles: what was asked is told."""
    env = make_env("fast")
    env.reset(seed=1)
    _, betas, xs, ys = np.array(env.unwrapped.track).T
    curvature, worst = [], np.zeros(2)
    for i in range(20, len(xs) - 20, 3):
        for t in np.linspace(0, 1, 5)[:-1]:
            blend = lambda v: (1 - t) * v[i] + t * v[i + 1]
            turn = (betas[i + 1] - betas[i] + np.pi) % (2 * np.pi) - np.pi
            beta = betas[i] + t * turn
            place_car(
                env, blend(xs) + offset * np.cos(beta), blend(ys) + offset * np.sin(beta), beta
            )
            state = named(telemetry(env))
            worst = np.maximum(
                worst, (abs(state["lateral_offset"] - offset), abs(state["heading_error"]))
            )
            curvature.append(state["curvature_20"])
    assert worst[0] < 0.01 and worst[1] < 0.005
    assert len(np.unique(np.float32(curvature))) > 0.5 * len(curvature)  # not tile by tile


@pytest.mark.parametrize("kind", ["official", "fast"])
def test_place_car_puts_the_car_there(kind):
    env = make_env(kind)
    env.reset(seed=0)
    bodies = env.unwrapped.world.bodies
    visited, angle = env.unwrapped.tile_visited_count, 2.0
    obs = place_car(env, 10.0, -20.0, angle, speed=40.0, yaw_rate=0.5)
    assert observe(env, obs).shape == (64, 64, 3)
    assert len(env.unwrapped.world.bodies) == len(bodies)  # the old car is gone
    state = named(telemetry(env))
    assert (state["x"], state["y"], state["hull_angle"]) == (10, -20, 2)
    assert state["forward_speed"] == pytest.approx(40, rel=1e-5)
    assert state["yaw_rate"] == pytest.approx(0.5)
    assert env.unwrapped.tile_visited_count == visited
    place_car(env, 10.0, -20.0, angle, speed=40.0)
    for _ in range(10):  # rolls straight on, without a jolt
        env.step(np.zeros(3, np.float32))
    state = named(telemetry(env))
    assert state["speed"] == pytest.approx(40, abs=0.1) and abs(state["yaw_rate"]) < 0.02
    ahead = np.array((-np.sin(angle), np.cos(angle))) * 40 * 10 / FPS
    assert np.allclose((state["x"] - 10, state["y"] + 20), ahead, atol=0.2)


@pytest.mark.parametrize("steer, yaw_rate", [(0.3, -2.0), (-0.4, 6.0), (0.11, 10.0), (0.0, -0.7)])
def test_mirrored_instruments_are_those_of_the_mirrored_car(steer, yaw_rate):
    def drawn(sign):
        wheels = [(100.0, 0.0, sign * steer)] * 4
        state = RenderState(1.0, 0.0, 0.0, 0.0, 60.0, sign * yaw_rate, wheels, [])
        frame = np.zeros((64, 64, 3), np.uint8)
        Hud().draw(state, frame[SCENE_H:])
        return frame

    right, left = drawn(1), drawn(-1)
    off = np.abs(hflip(right).astype(int) - left)
    assert off.max() <= 20 and off.sum() < np.abs(right.astype(int) - left).sum() / 10
    assert (hflip(right)[:, :18] == right[:, :18]).all()  # speed and wheels


def test_mirrored_scenes_exchange_left_and_right_and_twice_is_the_frame():
    env = make_env("fast")
    frames = np.stack([env.reset(seed=s)[0] for s in range(3)])
    env.close()
    scene = slice(None), slice(0, SCENE_H)
    assert (hflip(frames)[scene] == frames[scene][:, :, ::-1]).all()
    assert (hflip(frames) != frames).any(axis=(1, 2, 3)).all()
    assert (hflip(hflip(frames)) == frames).all()


class Straight:
    """Drives straight on for 30 steps."""

    max_steps = 30

    def reset(self, env, rng):
        pass

    def act(self, env):
        return straight_on(None)


def test_a_recorded_episode_is_the_one_that_was_driven():
    seen = []
    env, twin, recorder = make_env("fast"), make_env("fast"), EpisodeRecorder()
    on_step = lambda env, t: seen.append((t, env.unwrapped.t))
    arrays, end = run_episode(env, Straight(), 3, None, on_step)
    recorder.add(twin.reset(seed=3)[0], telemetry(twin))
    for _ in range(30):
        obs, reward, *_ = twin.step(straight_on(None))
        recorder.add(obs, telemetry(twin), straight_on(None), reward)
    expected = recorder.arrays(False, True)
    assert list(arrays) == list(expected) and end == {"lap_finished": False}
    assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)
    assert arrays["obs"].shape == (31, 64, 64, 3) and arrays["act"].shape == (30, 3)
    assert arrays["truncated"].nonzero()[0].tolist() == [29] and not arrays["terminated"].any()
    assert [t for t, _ in seen] == list(range(30))  # before every step
    assert seen[0][1] == pytest.approx(1 / FPS) and seen[29][1] == pytest.approx(30 / FPS)


def test_recovered_is_on_the_road_along_it_and_moving():
    assert is_recovered(3, -0.4, 16)
    assert not is_recovered(2, 0, 50) and not is_recovered(4, 0.6, 50)
    assert not is_recovered(4, 0, 14)
