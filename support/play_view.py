"""The picture of a tick of play.py."""

import cv2
import numpy as np

from car import FPS
from car.renderer import picture
from support import window as ui
from support.dreams import paint

TICK = 2 / FPS  # s
AHEAD = 5  # latents after which a rollout is compared with what came, as in demo_energy.py
TRACE = 150  # ticks that the graph shows
GHOST = 300, 240  # px
STEER, BRAKE = 0.4, 0.3  # of a held key; the joint stops at 0.4
GREEN, RED = (90, 200, 120), (240, 90, 90)
ENERGIES = {"yours": ui.WARM, "best plan": GREEN, f"surprise, {AHEAD * TICK:.1f} s": RED}


def compose(game, decoder):
    """The picture (H, W, 3) uint8 of a tick."""
    canvas, (w, h), read = ui.blank(), ui.VIEW, game.read()
    dream = game.dreaming
    (frame,) = paint(decoder, game.z)
    enlarge = lambda frame, size: cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
    canvas[:h, :w] = enlarge(frame, ui.VIEW) if dream else picture(game.env, ui.VIEW)
    if game.paused:
        ui.banner(canvas, "paused", "space goes on, s makes one step")
    elif game.ended and not dream:
        ui.banner(canvas, game.ended, f"return {game.total:.1f}   r: new track")

    # what is shown, and who drives
    (speed, true_speed), (yaw, true_yaw) = read.values()
    who = "you drive" if game.manual else f"autopilot, {len(game.driver.costs)} futures"
    where = "the dream" if dream else "the simulator"
    now = speed if dream else true_speed
    x = ui.write(canvas, where, 12, h + 10, ui.WARM if dream else ui.INK)
    ui.write(canvas, f"{who}   speed {now:.0f}   track {game.track}", x + 24, h + 10)

    # the ghost
    x = w + 24
    if dream and game.ghost:
        what = f"ghost: {game.ended}" if game.ended else "ghost: the simulator, same actions"
        ui.write(canvas, what, x, 10)
        canvas[34 : 34 + GHOST[1], x : x + GHOST[0]] = picture(game.env, GHOST)
        y = 42 + GHOST[1]
        heat = f", temperature {game.temperature:g}" if game.model else ""
        ui.write(canvas, f"{game.dream_ticks * TICK:.1f} s of dream{heat}", x, y, ui.WARM)
        ui.write(canvas, f"speed {speed:.0f}, ghost {true_speed:.0f}", x, y + 24)
        ui.write(canvas, f"yaw rate {yaw:+.2f}, ghost {true_yaw:+.2f} rad/s", x, y + 48)
    elif not dream:
        ui.write(canvas, "decoded from the latent", x, 10)
        canvas[34 : 34 + GHOST[1], x : x + GHOST[0]] = enlarge(frame, GHOST)
        ui.write(canvas, f"return {game.total:.1f}", x, 42 + GHOST[1])
    draw_pedals(canvas, game.pedals, x, 380)
    if game.energies:
        title, ends = "energy, the newest at the right:", (76, h + 36, w + 326)
        ui.graph(canvas, title, ENERGIES, game.trace, *ends, TRACE)
    return canvas


def draw_pedals(canvas, pedals, x, y):
    """Draws steering, gas and brake as bars."""
    rows = ("steer", pedals[0] / STEER, ui.INK), ("gas", pedals[1], GREEN)
    for i, (name, value, color) in enumerate((*rows, ("brake", pedals[2] / BRAKE, RED))):
        top, left, width = y + 28 * i, x + 70, 220
        ui.write(canvas, name, x, top, color)
        canvas[top : top + 16, left : left + width] = ui.GRID
        zero = left + width // 2 if name == "steer" else left
        end = zero + round(np.clip(value, -1, 1) * (left + width - zero))
        canvas[top : top + 16, min(zero, end) : max(zero, end) + 1] = color
