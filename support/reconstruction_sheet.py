"""Pictures of reconstructions: the sheet of a checkpoint, and one frame over the epochs."""

import zipfile

import cv2
import numpy as np

from support.files import replace_atomically
from support.pictures import plain, pyplot, save_figure, save_gif
from support.reconstruction import mean_square, psnr, regions
from support.window import INK, PAPER, write

PICTURES = 4  # held-out frames of each source on the sheet, and close-ups of kerbs
CLOSE = 20  # px of a frame, the side of a close-up
GIF_SIDE, GIF_FPS = 320, 2  # screen px of a frame; epochs a second


def kerb_frames(real):
    """Rows of up to PICTURES frames with many kerb pixels, from all over real (N, 64, 64, 3)."""
    kerbs = regions(real)["kerbs"].sum((1, 2))
    parts = np.array_split(np.arange(len(real)), min(PICTURES, len(real)))
    most = [part[kerbs[part].argmax()] for part in parts]
    return [j for j in most if kerbs[j]]


def close_up(frame, real):
    """The CLOSE x CLOSE px of a frame around most of the kerbs of its true frame."""
    kerbs = regions(real[None])["kerbs"][0].astype(np.float32)
    share = cv2.boxFilter(kerbs, -1, (CLOSE, CLOSE), borderType=cv2.BORDER_CONSTANT)
    half, size = CLOSE // 2, len(frame)
    y, x = (np.clip(i, half, size - half) for i in np.unravel_index(share.argmax(), share.shape))
    return frame[y - half : y + half, x - half : x + half]


def draw_sheet(real, painted, names, epoch, path):
    """PNG: real frames above reconstructed ones with their PSNR, two rows a source, then kerbs.

    real (N, 64, 64, 3) uint8; painted the same in 0..255; names: the source of each frame.
    """
    squares, painted = mean_square(real, painted), painted.round().astype(np.uint8)
    decibels, overall = psnr(squares), psnr(squares.mean())
    rows = []  # (label, [(true picture, reconstructed picture, row of the frame)])
    for name in dict.fromkeys(names):
        own = [j for j, source in enumerate(names) if source == name]
        some = [own[i] for i in sorted({*np.linspace(0, len(own) - 1, PICTURES).astype(int)})]
        rows.append((f"{plain(name)}\nheld out", [(real[j], painted[j], j) for j in some]))
    near = lambda frames, j: close_up(frames[j], real[j])
    close = [(near(real, j), near(painted, j), j) for j in kerb_frames(real)]
    if close:
        rows.append(("kerbs\nclose up", close))

    # true above reconstructed
    plt = pyplot()
    figsize = 1.75 * PICTURES, 3.7 * len(rows)
    fig, axes = plt.subplots(2 * len(rows), PICTURES, figsize=figsize, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for (label, pictures), above, below in zip(rows, axes[::2], axes[1::2]):
        for top, bottom, (true, drawn, j) in zip(above, below, pictures):
            for ax, frame in ((top, true), (bottom, drawn)):
                ax.axis("on")
                ax.set(xticks=[], yticks=[])
                ax.imshow(frame, interpolation="nearest")
            bottom.set_xlabel(f"{decibels[j]:.1f} dB", fontsize=8)
        above[0].set_ylabel(label, fontsize=8)
        below[0].set_ylabel("reconstructed", fontsize=8)
    title = f"encoder epoch {epoch}: {overall:.1f} dB over {len(real):,} held-out frames"
    fig.suptitle(title, fontsize=9)
    save_figure(fig, path)


def add_to_progress(real, painted, epoch, gif):
    """Adds an epoch to the GIF of one frame over the epochs. The frames are in the .npz beside it.

    Epochs behind this one belong to an earlier run and are dropped.
    """
    j, kept = next(iter(kerb_frames(real)), 0), gif.with_suffix(".npz")
    try:
        with np.load(kept, allow_pickle=False) as file:
            frames = {int(n): file[n] for n in file.files if int(n) < epoch}
        if not np.array_equal(frames.get(0), real[j]):
            frames = {}  # of other data
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        frames = {}
    frames |= {0: real[j], epoch: painted[j].round().astype(np.uint8)}
    frames = dict(sorted(frames.items()))
    replace_atomically(kept, lambda f: np.savez(f, **{str(n): x for n, x in frames.items()}))

    # true on the left, reconstructed on the right
    shown = []
    for n, frame in list(frames.items())[1:]:
        canvas = np.full((GIF_SIDE + 34, 2 * GIF_SIDE + 8, 3), PAPER, np.uint8)
        for x, picture, text in ((0, real[j], "true"), (GIF_SIDE + 8, frame, f"epoch {n}")):
            large = cv2.resize(picture, (GIF_SIDE,) * 2, interpolation=cv2.INTER_NEAREST)
            canvas[34:, x : x + GIF_SIDE] = large
            write(canvas, text, x + GIF_SIDE // 2, 9, INK, align=0.5)
        shown.append(canvas)
    save_gif(gif, shown, GIF_FPS, last_s=2.0)
