"""A display without a screen, and keys that are pressed in it."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import cv2
import pytest

needs_xvfb = pytest.mark.skipif(
    not all(map(shutil.which, ("Xvfb", "xdotool", "import"))),
    reason="no Xvfb, xdotool or ImageMagick",
)


@contextmanager
def xvfb(folder):
    """-> (environment of a process in it, screen() -> its pixels as bytes, press(key, how)).

    how: a command of xdotool.
    """
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-noreset", "-screen", "0", "1100x800x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)  # or a server that does not start is waited for
    try:
        env = {"DISPLAY": f":{os.read(read, 20).decode().strip()}"}
        run = lambda *words: subprocess.run(words, check=True, env=os.environ | env)

        def screen():
            run("import", "-window", "root", str(folder / "screen.png"))
            return cv2.imread(str(folder / "screen.png")).tobytes()

        yield env, screen, lambda key, how="key": run("xdotool", how, key)
    finally:
        server.terminate()
        server.wait()
