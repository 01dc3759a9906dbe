"""The picture of a lap, in window and film."""

from collections import deque

import cv2
import torch

from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.renderer import picture
from support import window as ui
from support.dreams import paint

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
        self.track, self.step, self.total, self.picture = track_seed, 0, 0.0, None
        self.costs, self.thumbnails = deque(maxlen=PLANS), {}
        self.window.record(filmed and self.film is not None)

    def __call__(self, env, frame, driver, total):
        """Sees a step; False where the user leaves the lap, or a stop is requested."""
        self.step, self.total = self.step + 1, total
        if self.step % 2 or not (self.window.recording or self.window.visible):
            return not self.window.over
        self.picture = self.compose(env, frame, driver)
        if self.window.recording:
            self.film.add(self.picture)
        return not (self.window.show(self.picture, self.step / FPS) or self.window.over)

    def finish(self, row=None):
        """Shows for a while how the lap ended, on the last picture.

        row: of the report; None where the drive was stopped. -> True where the user goes on early.
        """
        if self.picture is None:
            return False
        end = f"stopped after {self.step} steps"
        score = f"return {self.total:.1f}   {self.step / FPS:.1f} s"
        if row:
            end = "time is up" if row["steps"] >= MAX_STEPS else "left the field"
            end = "lap finished" if row["lap_finished"] else end
            score += f"   {row['tiles_missed']} tiles missed"
        ui.banner(self.picture, end, score)
        if self.window.recording:
            self.film.hold(self.picture, ui.END_S)
        return self.window.show(self.picture, self.step / FPS + ui.END_S) == "next"

    def draw_car(self, env, line, zoom):
        """A new picture (H, W, 3) uint8: the car from above, and below it numbers and `line`.

        zoom: whether to say that the driver waits for the zoom.
        """
        canvas, (w, h) = ui.blank(), ui.VIEW
        canvas[:h, :w] = picture(env, ui.VIEW)
        where = f"{self.name}   track {self.track}   step {self.step}"
        ui.write(canvas, f"{where}   return {self.total:.1f}{line}", 12, h + 10)
        if zoom:
            ui.banner(canvas, "waiting for the zoom")
        return canvas

    def compose(self, env, frame, driver):
        """The picture (H, W, 3) uint8 of a step."""
        plans, zoom = hasattr(driver, "u"), self.step <= ZOOM_STEPS
        speed = env.unwrapped.car.hull.linearVelocity.length
        line = f"   speed {speed:.0f}" + (f"   plan {driver.ms[-1]:.0f} ms" if driver.ms else "")
        canvas = self.draw_car(env, line, plans and zoom)

        # what the driver sees and plans, and the costs of its candidates
        costs = getattr(driver, "costs", None)
        if costs is not None:
            self.costs.append((float(costs.median()), float(costs.min())))
            if self.decoder and (self.step % 4 == 0 or not self.thumbnails):
                self.thumbnails = self.decode(driver)  # takes half a plan's time
        pictures = {"the driver sees" if plans else "a frame of 64 x 64": frame, **self.thumbnails}
        for i, (name, small) in enumerate(pictures.items()):
            x, y = ui.VIEW[0] + 14 + (THUMBNAIL + 12) * (i % 2), 50 + (THUMBNAIL + 70) * (i // 2)
            ui.paste(canvas, small, x, y, THUMBNAIL)
            ui.write(canvas, name, x, y - 22, ui.WARM if i else ui.INK)
        if plans and not zoom:
            self.draw_plan(canvas, driver)
        if len(self.costs) > 1:
            title, colors = "cost of the candidates:", {"median": ui.INK, "lowest": ui.WARM}
            ui.graph(canvas, title, colors, self.costs, 60, LOW, ui.VIEW[0] - 12, PLANS)
        return canvas

    def draw_plan(self, canvas, driver):
        """Draws steering, gas and brake of the plan, from now to the horizon."""
        x, w, u = ui.VIEW[0] + 76, 236, driver.u.float().cpu().numpy()
        seconds = len(u) * driver.encoder.repeat / FPS
        ui.write(canvas, "the plan", x, LOW, ui.DIM)
        ui.write(canvas, f"{seconds:.2g} s", x + w, LOW, ui.DIM, align=0.5)
        rows = ("right", "left", ui.INK), ("gas", "brake", ui.WARM)
        for i, (up, down, color) in enumerate(rows):
            y = LOW + 24 + 64 * i
            canvas[y : y + 54, x : x + w] = 39  # grey
            cv2.line(canvas, (x, y + 27), (x + w, y + 27), (100, 100, 104), 1)
            ui.write(canvas, up, x - 62, y + 2, color)
            ui.write(canvas, down, x - 62, y + 38, color)
            ui.plot(canvas, (x, y + 2, w, 50), [u[:, i]], [color], -1, 1, len(u))

    @torch.inference_mode()
    def decode(self, driver):
        """{name: picture (64, 64, 3) uint8} of a third, two thirds and the end of the plan."""
        z_hat = driver.rollout()
        picks = sorted({max(0, len(z_hat) * k // 3 - 1) for k in (1, 2, 3)})
        names = [f"rollout, {(k + 1) * driver.encoder.repeat / FPS:.2f} s" for k in picks]
        return dict(zip(names, paint(self.decoder, z_hat[picks])))
