"""The picture of a lap, in window and film."""

from collections import deque

import cv2
import numpy as np
import torch

from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.renderer import picture
from support import window as ui

VIDEO_FPS = 25  # of two environment steps one is shown
THUMBNAIL = 160  # px, a small picture
PLANS = 250  # plans that the curve of costs shows
LOW = ui.VIEW[1] + 36  # px, the top of curve and plan


class LapView:
    """Shows the car, what the driver sees, its plan with the rollout, and the candidates' costs.

    Every second step goes to the window and, while that records, to the film.
    """

    def __init__(self, window, film, name, decoder=None):
        """film: a VideoRecorder, or None where nothing is to be drawn."""
        self.window, self.film, self.name, self.decoder = window, film, name, decoder

    def reset(self, track_seed, filmed=True):
        """Begins a lap, which goes to the film where the user says nothing else."""
        self.track, self.step, self.picture = track_seed, 0, None
        self.costs, self.thumbnails = deque(maxlen=PLANS), []
        self.window.record(filmed and self.film is not None)

    def __call__(self, env, frame, driver, total):
        """Sees a step; False where the user leaves the lap, or a stop is requested."""
        self.step += 1
        if self.step % 2 or not (self.window.recording or self.window.visible):
            return not self.window.over
        if getattr(driver, "costs", None) is not None:
            costs = driver.costs.float()
            self.costs.append((float(costs.median()), float(costs.min())))
        self.picture = self.compose(env, frame, driver, total)
        if self.window.recording:
            self.film.add(self.picture)
        return not (self.window.show(self.picture, self.step / FPS) or self.window.over)

    def finish(self, row):
        """Shows for a while how the lap ended, on the last picture; row: of the report."""
        if self.picture is None:
            return
        end = "time is up" if row["steps"] >= MAX_STEPS else "left the field"
        end = "lap finished" if row["lap_finished"] else end
        score = f"return {row['return']:.1f}   {row['steps'] / FPS:.1f} s"
        ui.banner(self.picture, end, f"{score}   {row['tiles_missed']} tiles missed")
        if self.window.recording:
            self.film.hold(self.picture, ui.END_S)
        self.window.show(self.picture, self.step / FPS + ui.END_S)

    def compose(self, env, frame, driver, total):
        """The picture (H, W, 3) uint8 of a step."""
        canvas, (w, h) = ui.blank(), ui.VIEW
        canvas[:h, :w] = picture(env, ui.VIEW)
        plans = hasattr(driver, "u")
        if plans and self.step <= ZOOM_STEPS:
            ui.banner(canvas, "waiting for the zoom")

        # a line of numbers
        speed = env.unwrapped.car.hull.linearVelocity.length
        text = f"{self.name}   track {self.track}   step {self.step}   return {total:.1f}"
        text += f"   speed {speed:.0f}" + (f"   plan {driver.ms[-1]:.0f} ms" if driver.ms else "")
        ui.write(canvas, text, 12, h + 10)

        # what the driver sees and plans, and the costs of its candidates
        self.draw_thumbnails(canvas, frame, driver)
        if plans and self.step > ZOOM_STEPS:
            self.draw_plan(canvas, driver)
        if len(self.costs) > 1:
            self.draw_costs(canvas, (60, LOW + 24, w - 72, 118))
        return canvas

    def draw_costs(self, canvas, box):
        """Draws the candidates' costs, median and lowest, of the last plans."""
        x = ui.write(canvas, "cost of the candidates:", 12, LOW, ui.DIM)
        x = ui.write(canvas, "median", x + 12, LOW, ui.INK)
        ui.write(canvas, "lowest", x + 12, LOW, ui.WARM)
        costs = np.array(self.costs)
        logs = costs.min() > 0  # a classifier's energies are logits
        low, high = (ui.log_axis if logs else ui.linear_axis)(canvas, box, costs)
        costs = np.log10(costs) if logs else costs
        ui.plot(canvas, box, costs.T, (ui.INK, ui.WARM), low, high, PLANS)

    def draw_plan(self, canvas, driver):
        """Draws steering, gas and brake of the plan, from now to the horizon."""
        x, w, u = ui.VIEW[0] + 76, 236, driver.u.float().cpu().numpy()
        seconds = len(u) * driver.encoder.repeat / FPS
        ui.write(canvas, "the plan", x, LOW, ui.DIM)
        ui.write(canvas, f"{seconds:.2g} s", x + w, LOW, ui.DIM, center=True)
        for i, (up, down, color) in enumerate(
            (("right", "left", ui.INK), ("gas", "brake", ui.WARM))
        ):
            y = LOW + 24 + 64 * i
            canvas[y : y + 54, x : x + w] = 39  # grey
            cv2.line(canvas, (x, y + 27), (x + w, y + 27), (100, 100, 104), 1)
            ui.write(canvas, up, x - 62, y + 2, color)
            ui.write(canvas, down, x - 62, y + 38, color)
            ui.plot(canvas, (x, y + 2, w, 50), [u[:, i]], [color], -1, 1, len(u))

    def draw_thumbnails(self, canvas, frame, driver):
        """Draws four small pictures: the frame, and three of the plan's rollout, up to its end."""
        name = "the driver sees" if hasattr(driver, "u") else "a frame of 64 x 64"
        if self.decoder is not None and getattr(driver, "costs", None) is not None:
            if self.step % 4 == 0 or not self.thumbnails:  # decoding takes half a plan's time
                self.thumbnails = self.decode(driver)
        for i, (name, small) in enumerate([(name, frame), *self.thumbnails]):
            x, y = ui.VIEW[0] + 14 + (THUMBNAIL + 12) * (i % 2), 50 + (THUMBNAIL + 70) * (i // 2)
            ui.paste(canvas, small, x, y, THUMBNAIL)
            ui.write(canvas, name, x, y - 22, ui.INK if i == 0 else ui.WARM)

    @torch.inference_mode()
    def decode(self, driver):
        """[(name, picture (64, 64, 3) uint8)] of a third, two thirds and the end of the plan."""
        z_hat = driver.rollout()
        picks = [max(0, len(z_hat) * k // 3 - 1) for k in (1, 2, 3)]
        out = self.decoder(z_hat[picks]).clamp(0, 1).mul(255).byte().cpu()
        names = [f"rollout, {(k + 1) * driver.encoder.repeat / FPS:.2f} s" for k in picks]
        return list(zip(names, out.permute(0, 2, 3, 1).numpy()))
