"""Pictures and films. One that cannot be written costs a line, and the old one stays."""

import io
from contextlib import contextmanager, suppress

import cv2
import numpy as np
from tqdm import tqdm

from support.cli import optional
from support.files import replace_atomically
from support.index_page import write_index

GIF_EVERY = 6  # frames of the film per frame of the GIF
GIF_FRAMES = 120  # at most, so that a README can show it
GIF_SCALE = 2 / 3  # of the film's size
GIF_SPEED = 2.5  # times as fast as the film
MOOV_BYTES = 64  # that one frame takes at most in the index of an MP4


@contextmanager
def ornament(path):
    """Around the code that draws `path`. Makes its folder again if that has vanished.

    A picture that cannot be written costs a line: training and measuring go on. One in visuals/
    refreshes its index.html.
    """
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
    try:
        yield
        write_index(path.parent)
    except Exception as e:  # of a drawing library, or the system
        line = getattr(e, "strerror", None) or (str(e).splitlines() or [type(e).__name__])[0]
        tqdm.write(f"{path}: not drawn ({line}); goes on without")


def pyplot():
    """matplotlib.pyplot on a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.usetex"] = False  # a user's own setting asks for LaTeX
    return plt


def plain(name):
    """A folder's or file's name as matplotlib shows it: between two $ it would read a formula."""
    return str(name).replace("$", r"\$")


def save_figure(fig, path):
    """Writes a matplotlib figure as PNG, whole or not at all, and closes it."""
    try:
        replace_atomically(path, lambda f: fig.savefig(f, format="png", dpi=110))
    finally:
        pyplot().close(fig)


def save_gif(path, frames, fps, last_s=0.0):
    """Writes frames (H, W, 3) uint8 as an endless GIF, the last one for `last_s`, whole or not at
    all."""
    from PIL import Image

    palette = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 8)])).quantize(255)
    dither = Image.Dither.NONE
    first, *rest = [Image.fromarray(f).quantize(palette=palette, dither=dither) for f in frames]
    ms = [1000 / fps] * len(rest) + [1000 * max(1 / fps, last_s)]
    options = dict(save_all=True, append_images=rest, duration=ms, loop=0)
    replace_atomically(path, lambda f: first.save(f, format="GIF", **options))


class VideoRecorder:
    """A film as an MP4 that browsers play (H.264, index in front), and its beginning as a GIF.

    Each frame is encoded as it comes, in memory: FFmpeg never sees the file's name.
    """

    def __init__(self, fps):
        self.av, self.fps = optional("av", "av"), fps
        self.stream, self.packets, self.gif, self.gif_last_s = None, [], [], 0.0
        self.frames = 0

    def add(self, frame):
        """frame (H, W, 3) uint8; height and width even."""
        if self.stream is None:
            # superfast: 12 ms of one core a frame of 960x680, 3 MB a lap; veryfast: 18 ms, 2 MB
            options = {"preset": "superfast", "crf": "23"}
            self.encoder = self.av.open(io.BytesIO(), "w", format="mp4")  # which is thrown away
            self.stream = self.encoder.add_stream("libx264", rate=self.fps, options=options)
            self.stream.height, self.stream.width = frame.shape[:2]
            self.stream.pix_fmt = "yuv420p"
            self.stream.codec_context.colorspace = 6  # SMPTE 170M, what swscale converts to
            self.encoder.start_encoding()
        if not self.frames % GIF_EVERY and not self.gif_last_s and len(self.gif) < GIF_FRAMES:
            self.gif.append(self._small(frame))
        image = self.av.VideoFrame.from_ndarray(frame, format="rgb24")
        self.packets += self.stream.encode(image)
        self.frames += 1

    def hold(self, frame, seconds):
        """Adds the frame for so long; the GIF ends at it."""
        if self.gif and not self.gif_last_s:
            self.gif[-1], self.gif_last_s = self._small(frame), seconds
        for _ in range(round(seconds * self.fps)):
            self.add(frame)

    @staticmethod
    def _small(frame):
        return cv2.resize(frame, None, fx=GIF_SCALE, fy=GIF_SCALE, interpolation=cv2.INTER_AREA)

    def save(self, stem):
        """Ends the film and writes stem.mp4 and stem.gif -> those that are there, paths."""
        mp4, gif, done = stem.with_suffix(".mp4"), stem.with_suffix(".gif"), []
        if not self.frames:
            return done
        with ornament(mp4):
            film = self._index_first()
            replace_atomically(mp4, lambda f: f.write(film))
            done.append(mp4)
        with ornament(gif):
            save_gif(gif, self.gif, GIF_SPEED * self.fps / GIF_EVERY, self.gif_last_s)
            done.append(gif)
        return done

    def _index_first(self):
        """The bytes of the film with its index (moov) in front, so that it plays while it loads."""
        out, room = io.BytesIO(), {"moov_size": str(MOOV_BYTES * self.frames + 4096)}
        with self.av.open(out, "w", format="mp4", options=room) as film:
            stream = film.add_stream_from_template(self.stream)
            for packet in self.packets + self.stream.encode(None):
                packet.stream = stream
                film.mux(packet)
        return out.getvalue()
