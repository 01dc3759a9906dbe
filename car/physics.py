"""CarRacing's physics: the official step in plain floats, bit for bit."""

import math

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d import car_dynamics as cd
from gymnasium.envs.box2d import car_racing as cr
from gymnasium.error import InvalidAction

from car import FPS, OBS_SIZE

PLAYFIELD = cr.PLAYFIELD  # units from the centre to the edge: crossing it ends the episode


# ---- physics: the official step in plain floats, bit for bit -------------------------------------

ENGINE = cd.ENGINE_POWER
INERTIA = cd.WHEEL_MOMENT_OF_INERTIA
GRIP = 205000 * cd.SIZE * cd.SIZE  # force per unit/s of slip, before the friction limit
RIGHT = cr.Box2D.b2Vec2(1, 0)
# (steer to the left, gas, brake) of the env's discrete actions: none, right, left, gas, brake
DISCRETE = ((0, 0, 0), (-0.6, 0, 0), (0.6, 0, 0), (0, 0.2, 0), (0, 0, 0.8))


def sign(x):
    return (x > 0) - (x < 0)


def step_car(car, dt):
    """`Car.step` on Python floats: the same operations in the same order, half the time."""
    for w in car.wheels:
        turn = w.steer - w.joint.angle
        w.joint.motorSpeed = sign(turn) * min(50.0 * abs(turn), 3.0)
        grass = not w.tiles
        limit = cd.FRICTION_LIMIT * 0.6 if grass else cd.FRICTION_LIMIT
        side = w.GetWorldVector(RIGHT)
        sx, sy = side.x, side.y  # the wheel's forward vector is (-sy, sx), exactly
        v = w.linearVelocity
        vx, vy = v.x, v.y
        vf = -sy * vx + sx * vy
        vs = sx * vx + sy * vy
        omega = w.omega
        omega += dt * ENGINE * w.gas / INERTIA / (abs(omega) + 5.0)
        car.fuel_spent += dt * ENGINE * w.gas
        if w.brake >= 0.9:
            omega = 0.0
        elif w.brake > 0:
            omega -= sign(omega) * min(15 * w.brake, abs(omega))
        w.phase += omega * dt
        f_force = (-vf + omega * w.wheel_rad) * GRIP
        p_force = -vs * GRIP
        force = math.sqrt(f_force * f_force + p_force * p_force)
        leave_skid(car, w, force > 2.0 * limit, grass)
        if force > limit:
            f_force = f_force / force * limit
            p_force = p_force / force * limit
        w.omega = omega - dt * f_force * w.wheel_rad / INERTIA
        fx, fy = p_force * sx + f_force * -sy, p_force * sy + f_force * sx
        w.ApplyForceToCenter((fx, fy), True)


def leave_skid(car, w, skids, grass):
    """The skid marks of `Car.step`, which only `render()` shows."""
    if not skids:
        w.skid_start = w.skid_particle = None
    elif w.skid_particle and w.skid_particle.grass == grass and len(w.skid_particle.poly) < 30:
        w.skid_particle.poly.append((w.position[0], w.position[1]))
    elif w.skid_start is None:
        w.skid_start = w.position
    else:
        w.skid_particle = car._create_particle(w.skid_start, w.position, grass)
        w.skid_start = None


class Contacts(cr.FrictionDetector):
    """FrictionDetector that gives a tile its new colour, and notes it, at the first touch only."""

    def _contact(self, contact, begin):
        tile, other = contact.fixtureA.body.userData, contact.fixtureB.body.userData
        if not is_tile(tile):
            tile, other = other, tile
            if not is_tile(tile):
                return
        env = self.env
        if tile.idx not in env.touched:
            env.touched.add(tile.idx)
            env.fresh.append(tile.idx)
            tile.color[:] = env.road_color
        if other is None or "tiles" not in other.__dict__:
            return  # the hull
        if not begin:
            other.tiles.remove(tile)
            return
        other.tiles.add(tile)
        if not tile.road_visited:
            tile.road_visited = True
            env.reward += 1000.0 / len(env.track)
            env.tile_visited_count += 1
            lap = env.tile_visited_count / len(env.track) > self.lap_complete_percent
            env.new_lap = env.new_lap or (tile.idx == 0 and lap)


def is_tile(data):
    """Whether the user data of a body are those of a tile of the road."""
    return data is not None and "road_friction" in data.__dict__


class PhysicsCarRacing(cr.CarRacing):
    """CarRacing that draws no observation (zeros): for tuning drivers that read `telemetry`."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.touched, self.fresh = set(), []  # tiles touched so far, and since the last picture
        self.observation_space = gym.spaces.Box(0, 255, (OBS_SIZE, OBS_SIZE, 3), np.uint8)

    def step(self, action):
        """`CarRacing.step` bit for bit, in plain floats: see there."""
        if action is not None:
            self._act(action)
        step_car(self.car, 1.0 / FPS)
        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)
        self.t += 1.0 / FPS
        self.state = self._render("state_pixels")
        reward, terminated, info = 0, False, {}
        if action is not None:  # reset() steps once without
            reward, terminated, info = self._judge()
        if self.render_mode == "human":
            self.render()
        return self.state, reward, terminated, False, info

    def _create_track(self):
        if not super()._create_track():
            return False
        self.touched, self.fresh = set(), []
        listener = Contacts(self, self.lap_complete_percent)
        self.world.contactListener_bug_workaround = self.world.contactListener = listener
        return True

    def _act(self, action):
        if not self.continuous:
            if not self.action_space.contains(action):
                raise InvalidAction(f"expected a member of {self.action_space}, found {action!r}")
            steer, gas, brake = DISCRETE[action]
        else:
            steer, gas, brake = action.astype(np.float64).tolist()
            steer, gas = -steer, min(max(gas, 0.0), 1.0)
        wheels = self.car.wheels
        wheels[0].steer = wheels[1].steer = steer
        for w in wheels[2:]:
            w.gas += min(gas - w.gas, 0.1)
        for w in wheels:
            w.brake = brake

    def _judge(self):
        """-> (reward of this step, terminated, info)"""
        self.reward -= 0.1
        self.car.fuel_spent = 0.0
        reward = self.reward - self.prev_reward
        self.prev_reward = self.reward
        terminated, info = False, {}
        if self.tile_visited_count == len(self.track) or self.new_lap:
            terminated, info["lap_finished"] = True, True
        x, y = self.car.hull.position
        if abs(x) > cr.PLAYFIELD or abs(y) > cr.PLAYFIELD:
            terminated, info["lap_finished"], reward = True, False, -100
        return reward, terminated, info

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        return np.zeros((OBS_SIZE, OBS_SIZE, 3), np.uint8)
