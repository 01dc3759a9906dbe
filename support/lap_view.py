"""What a lap looks like in window and film."""

from collections import deque

import cv2
import numpy as np
import torch

from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.renderer import picture
from support.window import (
    DIM,
    END_S,
    GRID,
    INK,
    VIEW,
    WARM,
    banner,
    blank,
    linear_axis,
    log_axis,
    plot,
    write,
)

VIDEO_FPS = 25


# ------------------------------------------------------------------ pictures

CELL = 160  # px, a small picture
LOW = VIEW[1] + 36  # px, where curve and plan begin


class LapView:
    """What a lap looks like: the car, what the driver sees, its plan and what it imagines of it,
    energies. Every second step goes to the window and, while it records, to the film.
    """

    TRACE = 250  # plans that the energy curve shows

    def __init__(self, window, film, name, decoder=None):
        self.window, self.film, self.name, self.decoder = window, film, name, decoder

    def reset(self, track_seed):
        self.track, self.step, self.picture = track_seed, 0, None
        self.trace, self.dreams, self.command = deque(maxlen=self.TRACE), [], ""

    def __call__(self, env, frame, driver, total):
        """Sees a step; False where the user leaves the lap."""
        self.step += 1
        if self.step % 2 or not (self.window.recording or self.window.visible):
            return not self.window.quit
        if getattr(driver, "energies", None) is not None:
            e = driver.energies.float()
            self.trace.append((float(e.min()), float(e.median())))
        self.picture = self.compose(env, frame, driver, total)
        if self.window.recording:
            self.film.add(self.picture)
        self.command = self.window.show(self.picture, self.step / FPS)
        return not self.command

    def finish(self, row):
        """How it ended stands a while on the last picture."""
        if self.picture is None:
            return
        end = (
            "lap finished"
            if row["lap_finished"]
            else "time is up"
            if row["steps"] >= MAX_STEPS
            else "left the field"
        )
        banner(
            self.picture,
            end,
            f"return {row['return']:.1f}   {row['steps'] / FPS:.1f} s   "
            f"{row['tiles_missed']} tiles missed",
        )
        if self.window.recording:
            self.film.hold(self.picture, END_S)
        self.command = self.window.show(self.picture, self.step / FPS + END_S)

    def compose(self, env, frame, driver, total):
        """One picture (H, W, 3) uint8."""
        canvas, (w, h) = blank(), VIEW
        canvas[:h, :w] = picture(env, VIEW)
        plans = hasattr(driver, "u")
        if plans and self.step <= ZOOM_STEPS:
            banner(canvas, "waiting for the zoom")
        speed = env.unwrapped.car.hull.linearVelocity.length
        text = (
            f"{self.name}   track {self.track}   step {self.step}   return {total:.1f}   "
            f"speed {speed:.0f}"
        )
        text += f"   plan {driver.ms[-1]:.0f} ms" if driver.ms else ""
        write(canvas, text, 12, h + 10)
        self.draw_cells(canvas, frame, driver)
        if plans and self.step > ZOOM_STEPS:
            self.draw_plan(canvas, driver)
        if len(self.trace) > 1:
            x = write(canvas, "energy of the futures:", 12, LOW, DIM)
            x = write(canvas, "median", x + 12, LOW, INK)
            write(canvas, "lowest", x + 12, LOW, WARM)
            box, t = (60, LOW + 24, w - 72, 118), np.array(self.trace)
            logs = t.min() > 0  # a classifier's energies are logits
            low, high = (log_axis if logs else linear_axis)(canvas, box, t)
            t = np.log10(t) if logs else t
            plot(canvas, box, t[:, ::-1].T, (INK, WARM), low, high, self.TRACE)
        return canvas

    def draw_plan(self, canvas, driver):
        """Steering, gas and brake of the plan, from now to the horizon."""
        x, w, u = VIEW[0] + 76, 236, driver.u.float().cpu().numpy()
        seconds = len(u) * driver.encoder.repeat / FPS
        write(canvas, "the plan", x, LOW, DIM)
        write(canvas, f"{seconds:.2g} s", x + w, LOW, DIM, center=True)
        for i, (up, down, color) in enumerate((("right", "left", INK), ("gas", "brake", WARM))):
            y = LOW + 24 + 64 * i
            canvas[y : y + 54, x : x + w] = GRID[0] // 2 + 8
            cv2.line(canvas, (x, y + 27), (x + w, y + 27), (100, 100, 104), 1)
            write(canvas, up, x - 62, y + 2, color)
            write(canvas, down, x - 62, y + 38, color)
            plot(canvas, (x, y + 2, w, 50), [u[:, i]], [color], -1, 1, len(u))

    def draw_cells(self, canvas, frame, driver):
        """Four small pictures: the frame, and three of the chosen plan's dream, up to its end."""
        plans = hasattr(driver, "u")
        cells = [("the driver sees" if plans else "a frame of 64 x 64", frame)]
        if self.decoder is not None and getattr(driver, "energies", None) is not None:
            if self.step % 4 == 0 or not self.dreams:  # decoding takes as long as half a plan
                self.dreams = self.decode(driver)
            cells += self.dreams
        for i, (name, small) in enumerate(cells):
            x, y = VIEW[0] + 14 + (CELL + 12) * (i % 2), 50 + (CELL + 70) * (i // 2)
            canvas[y : y + CELL, x : x + CELL] = cv2.resize(
                small, (CELL, CELL), interpolation=cv2.INTER_NEAREST
            )
            write(canvas, name, x, y - 22, INK if i == 0 else WARM)

    @torch.inference_mode()
    def decode(self, driver):
        """[(name, picture (64, 64, 3) uint8)] of a third, two thirds and the end of the plan."""
        z_hat = driver.dream()
        picks = [max(0, len(z_hat) * k // 3 - 1) for k in (1, 2, 3)]
        out = self.decoder(z_hat[picks]).clamp(0, 1).mul(255).byte().cpu()
        names = [f"dreams {(k + 1) * driver.encoder.repeat / FPS:.2f} s" for k in picks]
        return list(zip(names, out.permute(0, 2, 3, 1).numpy()))
