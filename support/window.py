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
SIZE = VIEW[0] + SIDE, VIEW[1] + LOWER + BAR  # px, the window
SLACK = 0.2  # s that a picture may be late before the clock waits for it
END_S = 2.0  # how long the last picture of a lap stands
SDL_DRIVERS = ("x11", "wayland", "cocoa", "windows")  # of SDL, that show a window on a desktop
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


def keys_text(keys=KEYS):
    """The keys of a window as text for --help."""
    words = ", ".join(f"{key} ({what})" for key, what in keys.items())
    return textwrap.fill(f"keys of the window: {words}", 98)


# ------------------------------------------------------------------ drawing


@lru_cache(maxsize=256)
def letters(text, size):
    """(h, w, 1) float32 in 0..1: how much the text covers of each pixel."""
    pygame.font.init()
    text = text.encode("utf-8", "replace").decode()  # of a folder whose name is no text
    surface = pygame.font.Font(None, size).render(text, True, (255, 255, 255))
    return pygame.surfarray.array_alpha(surface).T[..., None].astype(np.float32) / 255


def write(canvas, text, x, y, color=INK, size=TEXT, align=0.0):
    """Writes text whose top is at y, cut at the canvas's edges -> the x of its right end.

    align: 0, 0.5 or 1 puts its left end, middle or right end at x.
    """
    cover = letters(text, size)
    x = max(0, x - int(align * cover.shape[1]))
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
        v = (np.clip(values, low, high) - low) / (high - low)
        across = x + w * (np.arange(len(v)) + length - len(v)) / max(1, length - 1)
        pts = np.stack([across, y + h - v * h], 1).round().astype(np.int32)
        cv2.polylines(canvas, [pts], False, color, 2, cv2.LINE_AA)


def plot_with_axis(canvas, box, values, colors, length):
    """Plots values (n, k) as k lines, with the numbers of an axis left of the box.

    The axis is logarithmic where all values are positive -> its ends (low, high), as log10 then.
    """
    x, y, w, h = box
    from matplotlib.ticker import MaxNLocator  # here: a script's start need not wait for it

    logs = values.min() > 0
    values = np.log10(values) if logs else values
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(values.min(), values.max())
    low, high = ticks[[0, -1]]
    for tick in ticks:
        at = int(y + h - (tick - low) / (high - low) * h)
        cv2.line(canvas, (x, at), (x + w, at), GRID, 1)
        text = f"{float(f'{10.0**tick:.2g}'):g}" if logs else f"{tick:.4g}"
        write(canvas, text, x - 6, at - 7, DIM, align=1)
    plot(canvas, box, values.T, colors, low, high, length)
    return low, high


def graph(canvas, title, colors, values, left, top, right, length):
    """Draws a title, the names of {name: colour} behind it, and values (n, k) below as k lines."""
    x = write(canvas, title, 12, top, DIM)
    for name, color in colors.items():
        x = write(canvas, name, x + 12, top, color)
    if len(values) > 1:
        box = left, top + 28, right - left, 118
        plot_with_axis(canvas, box, np.array(values), list(colors.values()), length)


def banner(canvas, *lines):
    """Writes lines of text on a dark band in the middle of the car's view."""
    (w, h), height = VIEW, 34 * len(lines) + 18
    top = (h - height) // 2
    canvas[top : top + height, :w] //= 4
    for i, line in enumerate(lines):
        write(canvas, line, w // 2, top + 12 + 34 * i, INK, 28 if i else 36, align=0.5)


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
    keys, bar = KEYS, KEYS_BAR

    def __init__(self, title):
        """Raises pygame.error where there is no display."""
        pygame.display.init()
        pygame.display.set_caption(title)
        pygame.key.set_repeat(300, 60)  # ms
        self.held = set()  # keys that are down
        self.shown = deque(maxlen=25)  # (time, second of the lap) of the last pictures
        self.changed = threading.Condition()  # a picture came, or a key
        self.picture, self.dirty = None, False
        self.help = self.paused = self.next = self.chosen = self.full = False
        self.steps = 0  # to go on by, while it is paused
        self.due, self.last = 0.0, 0.0  # when the last picture was due, and its second of the lap

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
            if self.quit and self.visible:
                self.close()
            elif self.visible:
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

            # the clock; a second that falls begins another lap
            now = time.monotonic()
            self.due += max(0.0, seconds - self.last)
            self.due = now if self.due < now - SLACK else self.due
            if seconds < self.last or self.paused:
                self.shown.clear()
            self.last = seconds

            # wait until the picture is due, or a key
            while self.visible and not (self.next or self.steps or self.over):
                early = 0.1 if self.paused else self.due - time.monotonic()
                if early <= 0:
                    break
                self.changed.wait(early)
            self.steps = max(0, self.steps - 1)
            self.shown.append((time.monotonic(), seconds))
            command = "quit" if self.quit else "next" if self.next else ""
            self.next = False
            return command

    def pace(self):
        """Seconds of the lap in one second, over the last pictures; 1 is real time."""
        if len(self.shown) < 5:
            return 1.0
        (t0, s0), (t1, s1) = self.shown[0], self.shown[-1]
        return (s1 - s0) / max(1e-6, t1 - t0)

    def record(self, on):
        if not self.chosen:
            self.recording = on

    def close(self):
        with self.changed:
            self.visible = False
            self.changed.notify_all()
        pygame.display.quit()

    # -------------------------------------------------------------- main thread

    def _events(self):
        for event in pygame.event.get():
            with self.changed:
                self.dirty = True
                if event.type == pygame.KEYDOWN:
                    self._key(event, event.key in self.held)
                    self.held.add(event.key)
                elif event.type == pygame.KEYUP:
                    self.held.discard(event.key)
                elif event.type == pygame.QUIT:
                    self.quit = True
                self.changed.notify_all()

    @staticmethod
    def latin(event):
        """The key of an event; of another alphabet, the letter that a Latin keyboard has there."""
        other = 127 < event.key < 1 << 30
        return ord("a") + event.scancode - pygame.KSCAN_A if other else event.key

    def _key(self, event, repeated):
        key = self.latin(event)
        if key in (pygame.K_s, pygame.K_RIGHT):
            self.paused, self.steps = True, max(self.steps, 1) if repeated else self.steps + 1
        elif repeated:
            return
        elif key == pygame.K_SPACE:
            self.paused, self.steps = not self.paused, 0
        elif key == pygame.K_r:
            self.next = True
        elif key == pygame.K_v:
            self.recording, self.chosen = not self.recording, True
        elif key == pygame.K_h:
            self.help = not self.help
        elif key == pygame.K_f:
            self.full = not self.full
            mode = ((0, 0), pygame.FULLSCREEN) if self.full else (SIZE, pygame.RESIZABLE)
            pygame.display.set_mode(*mode)
        elif key in (pygame.K_q, pygame.K_ESCAPE):
            self.quit = True

    def _draw(self):
        if not self.dirty or self.picture is None:
            return
        self.dirty = False
        picture = self.picture
        if self.help:
            picture = picture // 4
            for i, (key, what) in enumerate(self.keys.items()):
                write(picture, key, 60, 50 + 40 * i, WARM, 32)
                write(picture, what, 240, 50 + 40 * i, INK, 32)

        # the picture, as large as fits, in the middle
        screen = pygame.display.get_surface()  # of the size that the user gave it
        # opened with the first picture: one that was open while the nets loaded got lost
        screen = screen or pygame.display.set_mode(SIZE, pygame.RESIZABLE)
        w, h = screen.get_size()
        surface = pygame.image.frombuffer(picture, picture.shape[1::-1], "RGB")
        spot = surface.get_rect().fit((0, 0, w, max(1, h - BAR)))
        screen.fill(PAPER)
        screen.blit(pygame.transform.smoothscale(surface, spot.size), spot)

        # the bar: state and keys
        bar = np.full((BAR, w, 3), GRID, np.uint8)
        state = "recording  " * self.recording + "paused  " * self.paused
        pace = self.pace()
        if not self.paused and abs(pace - 1) > 0.05:
            state += f"{pace:.2f} x real time  "
        x = write(bar, state, 8, 6, WARM, BAR_TEXT)
        write(bar, self.bar, x + 8, 6, DIM, BAR_TEXT)
        screen.blit(pygame.image.frombuffer(bar, (w, BAR), "RGB"), (0, h - BAR))
        pygame.display.flip()


def open_window(title, kind=Window, without="; files only"):
    """A Window of this kind, or where there is no desktop a NoWindow; says why."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (display or sys.platform in ("darwin", "win32")):
        print(f'no window (no display: README, "Windows"){without}')
        return NoWindow()
    try:
        pygame.display.init()
        if (driver := pygame.display.get_driver()) in SDL_DRIVERS:
            return kind(title)
        why = f'SDL finds only its driver "{driver}"'
    except pygame.error as e:
        why = e
    pygame.display.quit()
    print(f'no window ({why}; README, "Windows"){without}')
    return NoWindow()
