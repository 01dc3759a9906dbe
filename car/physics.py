"""CarRacing's physics, bit for bit, on plain floats and without drawing.

numpy scalars make the official `Car.step` slow. `FloatCar.step` does the same operations in the
same order on Python floats. Skid marks, which only `render()` shows, are left out.
"""

import math

from gymnasium.envs.box2d import car_dynamics as cd
from gymnasium.envs.box2d import car_racing as cr

PLAYFIELD = cr.PLAYFIELD  # units from the centre to the edge: crossing it ends the episode
GRIP = 205000 * cd.SIZE * cd.SIZE  # force per unit/s of slip, below the friction limit
RIGHT = cr.Box2D.b2Vec2(1, 0)


class FloatCar(cd.Car):
    """The official car, whose step takes half the time."""

    def gas(self, gas):
        gas = min(max(float(gas), 0.0), 1.0)
        for w in self.wheels[2:]:
            w.gas += min(gas - w.gas, 0.1)  # gradually up, at once down

    def step(self, dt):
        """Steers, drives and brakes the wheels, and applies the tyres' forces for dt seconds."""
        power, inertia = cd.ENGINE_POWER, cd.WHEEL_MOMENT_OF_INERTIA
        for w in self.wheels:
            turn = float(w.steer) - w.joint.angle
            w.joint.motorSpeed = min(max(50.0 * turn, -3.0), 3.0)

            # slip: speed of the ground minus speed of the rolling wheel
            side = w.GetWorldVector(RIGHT)
            sx, sy = side.x, side.y  # the wheel's forward vector is (-sy, sx), exactly
            v = w.linearVelocity
            vx, vy = v.x, v.y
            vf = -sy * vx + sx * vy
            vs = sx * vx + sy * vy
            omega, brake = w.omega, float(w.brake)
            omega += dt * power * w.gas / inertia / (abs(omega) + 5.0)
            if brake >= 0.9:
                omega = 0.0
            elif brake > 0:
                omega -= min(max(omega, -15 * brake), 15 * brake)
            w.phase += omega * dt

            # force against the slip, as far as the friction goes
            limit = cd.FRICTION_LIMIT if w.tiles else cd.FRICTION_LIMIT * 0.6
            f_force = (-vf + omega * w.wheel_rad) * GRIP
            p_force = -vs * GRIP
            force = math.sqrt(f_force * f_force + p_force * p_force)
            if force > limit:
                f_force = f_force / force * limit
                p_force = p_force / force * limit
            w.omega = omega - dt * f_force * w.wheel_rad / inertia
            fx, fy = p_force * sx + f_force * -sy, p_force * sy + f_force * sx
            w.ApplyForceToCenter((fx, fy), True)


def is_tile(data):
    """Whether the user data of a body are those of a tile of the road."""
    return data is not None and "road_friction" in data.__dict__


class TouchListener(cr.FrictionDetector):
    """The official contact listener, 11 us a step faster, which also notes tiles at first touch."""

    def _contact(self, contact, begin):
        env = self.env
        a, b = contact.fixtureA.body.userData, contact.fixtureB.body.userData
        tile, other = (a, b) if is_tile(a) else (b, a)
        if not is_tile(tile):
            return
        if tile.idx not in env.touched:
            env.touched.add(tile.idx)
            env.fresh.append(tile.idx)
            tile.color[:] = env.road_color
        if other is None or "tiles" not in other.__dict__:
            return  # the hull
        (other.tiles.add if begin else other.tiles.remove)(tile)
        if begin and not tile.road_visited:
            tile.road_visited = True
            env.reward += 1000.0 / len(env.track)
            env.tile_visited_count += 1
            lap = env.tile_visited_count / len(env.track) > self.lap_complete_percent
            env.new_lap = env.new_lap or (tile.idx == 0 and lap)
