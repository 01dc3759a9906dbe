"""The keys of play.py: in a window, or from a file."""

from collections import deque

import pygame

from support import window as ui
from support.cli import fail

KEYS = {
    "arrow keys": "steer, gas and brake; they override the autopilot",
    "Tab": "dream or simulator",
    "g": "ghost: the simulator under the same actions",
    "a": "autopilot: the planner drives",
    "e": "energies of your driving and of the best plan",
    "t": "teleport",
    "0 to 9": "temperature of the dream: 0 none, 5 usual",
    "r": "new track",
    "space": "pause",
    "s": "one step",
    "v": "record on or off",
    "f": "full screen",
    "h": "help",
    "q or Esc": "quit",
}
BAR = "h help   q quit   arrows drive   Tab dream   g ghost   a autopilot   e energies   t teleport"
BAR += "   space pause   v record   r new track"
ARROWS = {"left", "right", "up", "down"}
DIGITS = "0123456789"
SCRIPTED = ARROWS | {"tab", "space", "q", *"gaetrsv", *DIGITS}  # keys of a script


class PlayWindow(ui.Window):
    """A window whose keys drive: `take` -> (keys that are down, keys pressed since the last)."""

    keys, bar = KEYS, BAR

    def __init__(self, title):
        super().__init__(title)
        self.recording, self.pressed = False, deque()

    @property
    def over(self):
        """As of any window, and when it is lost: nobody could drive or quit."""
        return super().over or not self.visible

    def _key(self, event, repeated):
        name = key_name(self.latin(event))
        if name in ("f", "h", "q", "escape"):
            super()._key(event, repeated)
        elif not repeated or name == "s":
            self.pressed.append(name)

    def take(self, seconds):
        pressed = [self.pressed.popleft() for _ in range(len(self.pressed))]
        return {key_name(key) for key in list(self.held)}, pressed


def key_name(key):
    """pygame's name of a key; the arrows of a keypad are arrows."""
    keypad = {pygame.K_KP4: "left", pygame.K_KP6: "right", pygame.K_KP8: "up", pygame.K_KP2: "down"}
    return keypad.get(key) or pygame.key.name(key)


class KeyScript(ui.NoWindow):
    """The keys of a file, where nothing is shown; a second after the last one it quits.

    Lines: "1.5 tab" presses a key, "2 left down" and "3 left up" hold it; "#" begins a comment.
    """

    def __init__(self, path):
        self.events, self.down = deque(), set()
        for i, line in enumerate(path.read_text(errors="replace").splitlines()):
            words = line.split("#")[0].lower().split()
            if words:
                self.events.append(self._event(words, f"{path}, line {i + 1}: {line.strip()}"))
        self.events = deque(sorted(self.events, key=lambda event: event[0]))
        self.end = (self.events[-1][0] if self.events else 0.0) + 1

    @staticmethod
    def _event(words, where):
        try:
            seconds, key, action = float(words[0]), words[1], (*words[2:], "")[0]
            assert 0 <= seconds < 1e6 and len(words) <= 3 and action in ("", "down", "up")
            assert key in SCRIPTED
        except (ValueError, IndexError, AssertionError):
            keys = " ".join(sorted(SCRIPTED))
            fail(f'{where}; expected "seconds key", with "down" or "up" behind it or not; {keys}')
        return seconds, key, action

    def take(self, seconds):
        pressed = []
        while self.events and self.events[0][0] <= seconds + 1e-9:
            _, key, action = self.events.popleft()
            if action == "up":
                self.down.discard(key)
                continue
            pressed.append(key)
            if action == "down":
                self.down.add(key)
        self.quit = self.quit or seconds >= self.end or "q" in pressed
        return set(self.down), pressed
