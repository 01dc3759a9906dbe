"""A window for pictures that a script makes, with the same keys everywhere; how to draw on them.

The script's work runs in a thread beside the window, so that keys answer while it plans or loads.
"""

import os
import sys
import textwrap
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import lru_cache

import cv2
import numpy as np
import pygame

from support.cli import Stop

VIEW, SIDE, LOWER = (600, 480), 360, 200  # px: the car, the column beside it, what is below both
INK, DIM, PAPER, WARM = (235, 235, 235), (150, 150, 150), (24, 24, 28), (255, 170, 60)
GRID = (62, 62, 68)
TEXT = 22  # px, the height of a line: readable in a GIF of two thirds the size
BAR, BAR_TEXT = 26, 20  # px, the line of keys below the picture, and its text
SLACK = 0.2  # s that a picture may be late before the clock waits for it
END_S = 2.0  # how long the last picture of a lap stands
DRIVERS = ("x11", "wayland", "cocoa", "windows")  # of SDL, that show a window on a desktop
KEYS = {
    "space": "pause",
    "s or right": "one step",
    "r": "next track",
    "v": "record on or off",
    "f": "full screen",
    "h": "help",
    "q or Esc": "quit",
}
KEYS_BAR = "   ".join(f"{key.split()[0]} {what}" for key, what in KEYS.items())
KEYS_TEXT = ", ".join(f"{key} ({what})" for key, what in KEYS.items())
KEYS_TEXT = textwrap.fill(f"keys of the window: {KEYS_TEXT}", 98)


# ------------------------------------------------------------------ drawing


@lru_cache(maxsize=256)
def letters(text, size):
    """(h, w, 1) float32 in 0..1: how much the text covers of each pixel."""
    pygame.font.init()
    text = text.encode("utf-8", "replace").decode()  # of a folder whose name is no text
    surface = pygame.font.Font(None, size).render(text, True, (255, 255, 255))
    return pygame.surfarray.array_alpha(surface).T[..., None].astype(np.float32) / 255


def write(canvas, text, x, y, color=INK, size=TEXT, center=False):
    """Text with its upper left corner at (x, y), or its upper middle; cut at the canvas's edges.
    Returns the x of its right end."""
    cover = letters(text, size)
    x = max(0, x - cover.shape[1] // 2) if center else x
    spot = canvas[y : y + cover.shape[0], x : x + cover.shape[1]]
    cover = cover[: spot.shape[0], : spot.shape[1]]
    spot[:] = spot + (np.array(color, np.float32) - spot) * cover
    return x + cover.shape[1]


EMPTY = np.full((VIEW[1] + LOWER, VIEW[0] + SIDE, 3), PAPER, np.uint8)


def blank():
    """An empty picture (H, W, 3) uint8, of even height and width as films want it."""
    return EMPTY.copy()  # 7 ms less than filling it


def paste(canvas, small, x, y, size):
    """Draws a picture (h, w, 3) enlarged to size x size, its upper left corner at (x, y)."""
    large = cv2.resize(small, (size, size), interpolation=cv2.INTER_NEAREST)
    canvas[y : y + size, x : x + size] = large


def plot(canvas, box, series, colors, low, high, length):
    """Draws the series as lines in box (x, y, w, h), scaled to low..high.

    Each series has equally many points, the newest at the right; `length` points fill the box.
    """
    x, y, w, h = box
    for values, color in zip(series, colors):
        v = (np.clip(values, low, high) - low) / max(1e-6, high - low)
        across = x + w * (np.arange(len(v)) + length - len(v)) / max(1, length - 1)
        pts = np.stack([across, y + h - v * h], 1).round().astype(np.int32)
        cv2.polylines(canvas, [pts], False, color, 2, cv2.LINE_AA)


def log_axis(canvas, box, values):
    """Draws a logarithmic axis around positive values (n, k): lines in box (x, y, w, h), numbers
    left of it -> (low, high), the ends of the axis as log10."""
    low, high = np.log10(values.min()), np.log10(values.max())
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    ticks = np.log10([m * 10.0**k for k in range(int(low) - 2, int(high) + 3) for m in steps])
    first = np.searchsorted(ticks, low + 1e-9, "right") - 1
    last = np.searchsorted(ticks, max(high, low + 1e-6) - 1e-9)
    return _axis(canvas, box, ticks[first : last + 1], lambda tick: f"{10.0**tick:g}")


def linear_axis(canvas, box, values):
    """Draws a linear axis around values (n, k), as `log_axis` does -> (low, high)."""
    low, high = values.min(), values.max()
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6)))
    low, high = np.floor(low / step) * step, (np.floor(high / step) + 1) * step
    return _axis(canvas, box, np.arange(low, high + step / 2, step), "{:g}".format)


def _axis(canvas, box, ticks, name):
    (x, y, w, h), (low, high) = box, ticks[[0, -1]]
    for tick in ticks[:: max(1, (len(ticks) + 3) // 5)]:
        at = int(y + h - (tick - low) / (high - low) * h)
        cv2.line(canvas, (x, at), (x + w, at), GRID, 1)
        text = name(round(tick, 9))
        write(canvas, text, max(0, x - 6 - letters(text, TEXT).shape[1]), at - 7, DIM)
    return low, high


def banner(canvas, *lines):
    """Writes lines of text on a dark band in the middle of the car's view."""
    (w, h), height = VIEW, 34 * len(lines) + 18
    top = (h - height) // 2
    canvas[top : top + height, :w] //= 4
    for i, line in enumerate(lines):
        write(canvas, line, w // 2, top + 12 + 34 * i, INK, 36 if i == 0 else 28, center=True)


# ------------------------------------------------------------------ windows


class NoWindow:
    """The methods of a window where nothing is shown and nobody waits."""

    visible = quit = False  # whether there is a window; whether the user left
    recording = True  # whether pictures belong to the film

    @property
    def over(self):
        """Whether the work should end: the user left, or a stop was requested."""
        return self.quit or Stop.requested

    def run(self, work):
        """work() -> its result."""
        return work()

    def show(self, picture, seconds):
        """Shows the picture (H, W, 3) uint8 of a lap's second `seconds` -> "", "next" or "quit"."""
        return ""

    def record(self, on):
        """Sets whether pictures belong to the film, where the user has not."""
        self.recording = on


class Window(NoWindow):
    """A resizable window that keeps real time where the machine can; see KEYS.

    `run` belongs to the main thread, as SDL wants it; the work in it calls `show`.
    """

    visible = True

    def __init__(self, title):
        """Raises pygame.error where there is no display."""
        pygame.display.init()
        pygame.display.set_caption(title)
        pygame.key.set_repeat(300, 60)  # ms
        self.changed = threading.Condition()  # a picture came, or a key
        self.screen = self.picture = self.size = None
        self.dirty = self.full = self.help = self.paused = self.next = self.chosen = False
        self.steps = 0  # to go on by, while it is paused
        self.held = set()  # keys that are down
        self.began, self.last, self.shown = None, 0.0, deque(maxlen=25)  # the clock of a lap

    def run(self, work):
        """work() in a thread, while the window lives -> its result."""
        done = Future()

        def body():
            try:
                done.set_result(work())
            except BaseException as e:  # raised by result()
                done.set_exception(e)

        threading.Thread(target=body, daemon=True).start()  # Ctrl-C twice ends it
        while not done.done():
            try:
                self._events()
                self._draw()
            except pygame.error as e:  # the display went away
                print(f"the window is lost ({e}); goes on without it")
                self.close()
            with self.changed:
                self.changed.wait(1 / 60)
        self.close()
        return done.result()

    def show(self, picture, seconds):
        with self.changed:
            self.picture, self.dirty = picture, True
            self.changed.notify_all()
            if seconds < self.last:  # another lap
                self._restart()
            self.last = seconds

            # wait until the picture is due, or a key
            while self.visible and not (self.next or self.over):
                now = time.monotonic()
                if self.paused:
                    self._restart()
                    if self.steps:
                        self.steps -= 1
                        break
                    self.changed.wait(0.1)
                    continue
                if self.began is None or self.began + seconds < now - SLACK:
                    self.began = now - seconds
                early = self.began + seconds - now
                if early <= 0:
                    self.shown.append((now, seconds))
                    break
                self.changed.wait(early)
            command = "quit" if self.quit else "next" if self.next else ""
            self.next = False
            return command

    def record(self, on):
        if not self.chosen:
            self.recording = on

    def close(self):
        with self.changed:
            self.visible = False
            self.changed.notify_all()
        pygame.display.quit()

    def pace(self):
        """Seconds of the lap in one second, over the last pictures; 1.0 is real time; None: too few
        pictures to tell."""
        if len(self.shown) < 5:
            return None
        (t0, s0), (t1, s1) = self.shown[0], self.shown[-1]
        return (s1 - s0) / max(1e-6, t1 - t0)

    def _restart(self):
        self.began = None
        self.shown.clear()

    # -------------------------------------------------------------- main thread

    def _events(self):
        for event in pygame.event.get() if self.visible else []:
            with self.changed:
                self.dirty = True
                if event.type == pygame.KEYDOWN:
                    self._key(event)
                elif event.type == pygame.KEYUP:
                    self.held.discard(event.key)
                elif event.type == pygame.QUIT:
                    self.quit = True
                self.changed.notify_all()
            if self.quit:
                return self.close()

    def _key(self, event):
        key, again = event.key, event.key in self.held
        self.held.add(key)
        if 127 < key < 1 << 30:  # another alphabet: the letter that a Latin keyboard has there
            key = ord("a") + event.scancode - pygame.KSCAN_A
        if key in (pygame.K_s, pygame.K_RIGHT):  # held down: as many steps as go
            self.paused = True
            self.steps = max(self.steps, 1) if again else self.steps + 1
        elif again:
            return
        elif key == pygame.K_SPACE:
            self.paused, self.steps = not self.paused, 0
        elif key == pygame.K_r:
            self.next = True
        elif key == pygame.K_v:
            self.recording, self.chosen = not self.recording, True
        elif key == pygame.K_h:
            self.help = not self.help
        elif key == pygame.K_f and self.screen:
            self.size = self.size if self.full else self.screen.get_size()
            self.full = not self.full
            self._open()
        elif key in (pygame.K_q, pygame.K_ESCAPE):
            self.quit = True

    def _open(self):
        if self.size is None:  # the picture's, or what fits on the screen
            height, width = self.picture.shape[:2]
            room = [0.9 * side for side in (pygame.display.get_desktop_sizes() or [(1e5, 1e5)])[0]]
            scale = min(1, room[0] / width, room[1] / (height + BAR))
            self.size = round(scale * width), round(scale * height) + BAR
        size, flag = ((0, 0), pygame.FULLSCREEN) if self.full else (self.size, pygame.RESIZABLE)
        self.screen = pygame.display.set_mode(size, flag)

    def _draw(self):
        if not self.visible or not self.dirty or self.picture is None:
            return
        self.dirty = False
        if self.screen is None:
            self._open()
        self.screen = pygame.display.get_surface()  # of the size that the user gave it

        # the picture, as large as fits, in the middle
        (w, h), picture = self.screen.get_size(), self.picture
        scale = max(min(w / picture.shape[1], (h - BAR) / picture.shape[0]), 0.05)
        size = [max(1, round(scale * side)) for side in picture.shape[1::-1]]
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        picture = cv2.resize(picture, size, interpolation=kind)
        if self.help:
            picture //= 4
            for i, (key, what) in enumerate(KEYS.items()):
                write(picture, key, 60, 50 + 40 * i, WARM, 32)
                write(picture, what, 240, 50 + 40 * i, INK, 32)
        left, top = max(0, (w - size[0]) // 2), max(0, (h - BAR - size[1]) // 2)
        rest = max(0, h - top - size[1]), left, max(0, w - left - size[0])
        canvas = cv2.copyMakeBorder(picture, top, *rest, cv2.BORDER_CONSTANT, value=PAPER)

        # the bar: keys and state
        bar, state, pace = canvas[-BAR:], "paused" * self.paused, self.pace()
        bar[:] = GRID
        if pace and not self.paused:
            state = f"{pace:.2f} x real time" if abs(pace - 1) > 0.05 else "real time"
        state = "recording   " * self.recording + state
        x = w - 8 - letters(state, BAR_TEXT).shape[1]
        roomy = letters(KEYS_BAR, BAR_TEXT).shape[1] + 16 <= x
        write(bar, KEYS_BAR if roomy else "h help   q quit", 8, 6, DIM, BAR_TEXT)
        write(bar, state, max(0, x), 6, WARM if self.recording else INK, BAR_TEXT)
        self.screen.blit(pygame.image.frombuffer(canvas, canvas.shape[1::-1], "RGB"), (0, 0))
        pygame.display.flip()


def open_window(title):
    """A Window, or where there is no display a NoWindow; says why."""
    desktop = sys.platform in ("darwin", "win32")
    if not (desktop or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print('no window (no display: README, "Windows"); files only')
        return NoWindow()
    try:
        window = Window(title)
    except pygame.error as e:
        print(f"no window ({e}); files only")
        return NoWindow()
    driver = pygame.display.get_driver()
    if driver in DRIVERS:
        return window
    window.close()
    print(f'no window (SDL finds no desktop, only its driver "{driver}"); files only')
    return NoWindow()
