"""Rollouts as pictures: real frames above decoded ones."""

import numpy as np
import torch
from tqdm import tqdm

from buffer import Loader
from car import FPS
from networks import stack_frames
from support.checkpoints import build, fingerprint, hint, numbered, read
from support.cli import Refusal
from support.pictures import ornament, plain, pyplot, save_figure, save_gif
from support.window import GRID, INK, PAPER, write

SHOWN = (0, 1, 5, 10, 15)  # latents ahead in the sheet
GIF_SCALE = 3  # screen pixels a pixel
GIF_GAP = 8  # screen pixels between two windows
GIF_FPS = 8


def load_newest(models, name, device, encoder_key):
    """The newest decoder or dream model in a folder that was trained on this encoder, or None."""
    for _, path in reversed(numbered(models, f"{name}_ep*.pth")):
        try:
            payload = read(path, f"train_{name}.py")
            if payload.get("encoder_key") == encoder_key:
                return build(payload, name, path).to(device).eval().requires_grad_(False)
        except (Refusal, OSError) as e:  # nothing stops for a picture
            tqdm.write(f"skipped: {e}")
    return None


def load_decoder(models, key, device):
    """The newest decoder in a folder that was trained on this encoder, or None with a line."""
    decoder = load_newest(models, "decoder", device, key)
    if decoder is None:
        how = hint(models / "decoder_ep1.pth", "train_decoder.py", "--once")
        tqdm.write(f"no decoder of this encoder, so no pictures of rollouts{how}")
    return decoder


def load_dream(models, encoder, device):
    """The newest dream model in a folder that was trained on this encoder, or None with a line.

    It has a predictor of its own; the planner's may have learned on since.
    """
    model = load_newest(models, "dream", device, fingerprint(encoder))
    if model is None:
        what = "no dream model of this encoder: the predictor dreams, for two seconds at most"
        tqdm.write(f"{what}; train_dream.py makes one from ROOT/models and its data")
    return model


def dream_windows(sources, encoder, horizon, seed=0):
    """Held-out windows, two of each source, the same every time, in order of the sources.

    -> obs (n, H + history, 3, 64, 64), act (n, H, 3), the name of each window's source.
    """
    held = [s[1] for s in sources.values()]
    window = horizon + 1, encoder.history, encoder.repeat
    stream = Loader(held, 2 * len(held), *window, seed=seed + 5).batches(labels=True)
    obs, act, labels = next(stream)
    stream.close()
    order = sorted(range(len(labels)), key=lambda i: labels[i][0])
    return obs[order], act[order], [list(sources)[labels[i][0]] for i in order]


@torch.no_grad()
def paint(decoder, z):
    """Latents z (N, D) -> pictures (N, 64, 64, 3) uint8."""
    frames = decoder(z).clamp(0, 1).mul(255).byte().cpu()
    return frames.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def dream(encoder, predictor, decoder, obs, act, device):
    """Real frames and decoded rollouts, both (n, H + 1, 64, 64, 3) uint8; 0 is the present."""
    n, h = len(obs), encoder.history
    z0 = encoder(stack_frames(obs[:, :h].to(device), h))
    z = torch.cat([z0[:, None], predictor.rollout(z0, act.to(device))], dim=1)  # (n, H + 1, D)
    frames = paint(decoder, z.flatten(0, 1)).reshape(n, -1, 64, 64, 3)
    return obs[:, h - 1 :].permute(0, 1, 3, 4, 2).numpy(), frames


def draw_dreams(encoder, predictor, decoder, windows, sources, sheet, device):
    """Draws the sheet, with one window of each source, and output_dream.gif beside it."""
    obs, act, names = windows
    real, dreamt = dream(encoder, predictor, decoder, obs, act, device)
    first, seconds = [names.index(name) for name in sources], encoder.repeat / FPS
    with ornament(sheet):
        draw_dream(real[first], dreamt[first], sources, sheet, seconds)
    with ornament(gif := sheet.with_name("output_dream.gif")):
        animate_dream(real, dreamt, names, gif, seconds)


def draw_dream(real, dreamt, names, path, seconds):
    """PNG: for each window a row of real frames above its rollout; `seconds` between latents."""
    shown = [t for t in SHOWN if t < real.shape[1]]
    rows = []
    for name, frames, rollout in zip(names, real, dreamt):
        rows += [(f"{name}\nreal", frames[shown]), (f"{name}\nrollout", rollout[shown])]
    draw_strips(rows, [f"latent {t} ({t * seconds:.2f} s)" for t in shown], path)


def draw_strips(rows, titles, path):
    """PNG: a row of pictures (n, 64, 64, 3) for each (label, pictures), under n titles."""
    plt = pyplot()
    figsize = 1.5 * len(titles) + 0.6, 1.5 * len(rows)
    grid = dict(nrows=len(rows), ncols=len(titles), squeeze=False)
    fig, axes = plt.subplots(**grid, layout="constrained", figsize=figsize)
    for line, (label, pictures) in zip(axes, rows):
        for ax, picture in zip(line, pictures):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(plain(label), fontsize=8)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=8)
    save_figure(fig, path)


def animate_dream(real, dreamt, names, path, seconds):
    """GIF: real above rollout, all windows side by side, a bar that shows the time."""
    n, steps, side = len(real), real.shape[1], 64 * GIF_SCALE
    left, pitch, head, bar = 76, side + GIF_GAP, 30, 30  # px
    size = head + bar + 2 * side, left + n * pitch, 3
    zoom = lambda frame: frame.repeat(GIF_SCALE, 0).repeat(GIF_SCALE, 1)
    frames = []
    for t in range(steps):
        canvas = np.full(size, PAPER, np.uint8)

        # two rows of pictures
        for row, word, pictures in ((head, "real", real), (head + side + bar, "rollout", dreamt)):
            write(canvas, word, 8, row + side // 2 - 8)
            for i in range(n):
                x = left + i * pitch
                canvas[row : row + side, x : x + side] = zoom(pictures[i, t])
        for i, name in enumerate(names):
            write(canvas, name, left + i * pitch, 8)

        # the bar between them
        y, width, done = head + side, n * pitch - GIF_GAP, t / max(1, steps - 1)
        write(canvas, f"{t * seconds:.2f} s", 8, y + 7)
        canvas[y + 11 : y + 19, left : left + width] = GRID
        canvas[y + 11 : y + 19, left : left + round(width * done)] = INK
        frames.append(canvas)
    save_gif(path, [frames[0]] * 4 + frames, GIF_FPS, last_s=0.7)
