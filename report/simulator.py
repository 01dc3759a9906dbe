"""Saving and restoring the simulator's state, for plans that are driven from a sample's state."""

from car.physics import is_tile
from car.telemetry import place_car


def save_state(env):
    """All of the simulator's state that its next steps depend on, the track apart.

    -> bodies, of hull and wheels: (x, y, angle, vx, vy, angular velocity);
    wheels: (gas, brake, steer, spin, phase, indices of the tiles touched).
    """
    car = env.unwrapped.car
    bodies = [
        (*b.position, b.angle, *b.linearVelocity, b.angularVelocity)
        for b in (car.hull, *car.wheels)
    ]
    wheels = [
        (w.gas, w.brake, w.steer, w.omega, w.phase, [t.idx for t in w.tiles]) for w in car.wheels
    ]
    return bodies, wheels


def restore_state(env, state):
    """Puts a new car into env, on the same track, in a state of `save_state`.

    After the first step the caller calls `end_contacts`.
    """
    env, (bodies, wheels) = env.unwrapped, state
    place_car(env, *bodies[0][:3])
    for body, (x, y, angle, vx, vy, yaw_rate) in zip((env.car.hull, *env.car.wheels), bodies):
        body.transform = (x, y), angle
        body.linearVelocity, body.angularVelocity = (vx, vy), yaw_rate
    for w, (gas, brake, steer, spin, phase, tiles) in zip(env.car.wheels, wheels):
        w.gas, w.brake, w.steer, w.omega, w.phase = gas, brake, steer, spin, phase
        w.tiles = {env.road[i] for i in tiles}


def end_contacts(env):
    """Sets the tiles of the wheels to those that they touch.

    Box2D never reports the end of the contacts that a restored car began with.
    """
    for w in env.unwrapped.car.wheels:
        touching = (c.other.userData for c in w.contacts if c.contact.touching)
        w.tiles = {tile for tile in touching if is_tile(tile)}
