"""Pictures and videos, written whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import fail
from support.files import replace_atomically


@contextmanager
def ornament(path):
    """Around what draws `path`: makes its folder again where that has vanished; a picture that
    cannot be written costs a line, for what is trained and measured goes on without it."""
    try:
        path.parent.mkdir(exist_ok=True)
        yield
    except OSError as e:
        tqdm.write(f"{path}: not drawn ({e.strerror or e}); goes on without")


def pyplot():
    """matplotlib.pyplot on a backend that needs no display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(fig, path):
    """A matplotlib figure as PNG, whole or not at all."""
    try:
        replace_atomically(path, lambda f: fig.savefig(f, format="png", dpi=110), patient=False)
    finally:
        pyplot().close(fig)


def save_gif(path, frames, fps):
    """Frames (H, W, 3) uint8 as an endless GIF, whole or not at all."""
    from PIL import Image
    palette = Image.fromarray(np.concatenate(frames[::max(1, len(frames) // 8)])).quantize(255)
    pictures = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE)
                for f in frames]
    replace_atomically(path, lambda f: pictures[0].save(
        f, format="GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0),
        patient=False)


def save_mp4(path, frames, fps):
    """Frames (H, W, 3) uint8 as a video, whole or not at all; OpenCV wants a real file name."""
    import cv2
    h, w, _ = frames[0].shape
    tmp = Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
    out = cv2.VideoWriter(str(tmp), cv2.VideoWriter_fourcc(*"mp4v"), fps, (w, h))
    if not out.isOpened():
        fail(f"{path}: OpenCV cannot write mp4 there")
    for frame in frames:
        out.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    out.release()
    os.replace(tmp, path)
