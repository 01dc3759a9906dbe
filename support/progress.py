"""Progress bars: one that moves on a terminal, a line now and then in a file or a pipe."""

import sys
import time

from tqdm import tqdm

LINE_S = 30  # seconds between two lines in a file


def progress(*args, **kw):
    """tqdm's bar (its arguments) on stderr; where that is no terminal, Lines."""
    moves = sys.stderr is not None and sys.stderr.isatty()
    return (tqdm if moves else Lines)(*args, **{"mininterval": 1, **kw})


class Lines(tqdm):
    """A bar for files: whole lines, LINE_S apart. One that stays (`leave`) has a first and a last
    line too, so that a short run shows where it began and ended."""

    def __init__(self, *args, **kw):
        self.printed = -LINE_S if kw.get("leave", True) else time.monotonic()
        super().__init__(*args, **kw, ascii=True, maxinterval=2 * LINE_S)
        self._time = time.monotonic  # a clock that nobody sets
        self.start_t = self.last_print_t = self._time()

    def display(self, msg=None, pos=None):
        if time.monotonic() - self.printed >= LINE_S:
            self.print_line()

    def print_line(self):
        self.fp.write(f"{self}\n")
        self.fp.flush()
        self.printed = time.monotonic()

    def clear(self, nolock=False):
        """Lines stay."""

    def close(self):
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.leave:
                self.print_line()
