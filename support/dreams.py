"""Rollouts as pictures: real frames above decoded ones."""

import numpy as np
import torch
from tqdm import tqdm

from buffer import Loader
from networks import stack_frames
from support.checkpoints import build, numbered, read
from support.cli import Refusal, command
from support.pictures import plain, pyplot, save_figure, save_gif
from support.window import GRID, INK, PAPER, write

SHOWN = (0, 1, 5, 10, 15)  # steps of a dream that the picture shows
GIF_SCALE = 3  # screen pixels a pixel
GIF_GAP = 8  # screen pixels between two windows
GIF_FPS = 8


# ------------------------------------------------------------------ pictures


def load_decoder(models, key, device):
    """The newest decoder of a folder that was trained on this encoder, or None, and says so."""
    for _, path in reversed(numbered(models, "decoder_ep*.pth")):
        try:
            payload = read(path, "train_decoder.py")
            if payload.get("encoder_key") == key:
                return build(payload, "decoder", path).to(device).eval().requires_grad_(False)
        except (Refusal, OSError) as e:  # pictures are for the eye: nothing stops for one
            tqdm.write(f"skipped: {e}")
    tqdm.write(
        f"no decoder of this encoder, so no picture of dreams; "
        f"{command('train_decoder.py', models.parent, '--once')} makes it, this command "
        "again then draws them"
    )
    return None


def dream_windows(sources, encoder, horizon, seed=0):
    """Held-out windows to dream, the same every time: obs (n, H + history, 3, 64, 64), act, and the
    name of the source that each is from; two of each source, in order of the sources."""
    held = [s[1] for s in sources.values()]
    stream = Loader(
        held, 2 * len(held), horizon + 1, encoder.history, encoder.repeat, seed=seed + 5
    ).batches(labels=True)
    obs, act, labels = next(stream)
    stream.close()
    order = sorted(range(len(labels)), key=lambda i: labels[i][0])
    return obs[order], act[order], [list(sources)[labels[i][0]] for i in order]


@torch.no_grad()
def dream(encoder, predictor, decoder, obs, act, device):
    """Real frames, decoded dreams, both (n, H + 1, 64, 64, 3) uint8; step 0 is reconstructed."""
    n, h = len(obs), encoder.history
    z0 = encoder(stack_frames(obs[:, :h].to(device), h))
    z = torch.cat([z0[:, None], predictor.rollout(z0, act.to(device))], dim=1)  # (n, H + 1, D)
    frames = decoder(z.flatten(0, 1)).clamp(0, 1).mul(255).byte().cpu()
    frames = frames.view(n, -1, 3, 64, 64)
    return obs[:, h - 1 :].permute(0, 1, 3, 4, 2).numpy(), frames.permute(0, 1, 3, 4, 2).numpy()


def draw_dream(real, dreamt, names, path, seconds):
    """The sheet: for each window a row of real frames above its dream; `seconds` between steps."""
    shown = [t for t in SHOWN if t < real.shape[1]]
    plt = pyplot()
    fig, axes = plt.subplots(
        2 * len(names),
        len(shown),
        layout="constrained",
        squeeze=False,
        figsize=(1.5 * len(shown) + 0.6, 3.0 * len(names)),
    )
    for i, name in enumerate(names):
        for row, frames, what in ((2 * i, real, "real"), (2 * i + 1, dreamt, "dreamt")):
            for ax, t in zip(axes[row], shown):
                ax.imshow(frames[i, t], interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                if row == 0:
                    ax.set_title(f"step {t} ({t * seconds:.2f} s)", fontsize=8)
            axes[row, 0].set_ylabel(f"{plain(name)}\n{what}", fontsize=8)
    save_figure(fig, path)


def animate_dream(real, dreamt, names, path, seconds):
    """The GIF: real above dreamt, all windows side by side, each under the name of its folder; a
    bar counts the steps, so many `seconds` each."""
    n, steps, side = len(real), real.shape[1], 64 * GIF_SCALE
    left, pitch, head, bar = 76, side + GIF_GAP, 30, 30  # px
    frames = []
    for t in range(steps):
        canvas = np.full((head + bar + 2 * side, left + n * pitch, 3), PAPER, np.uint8)
        for row, word, pictures in ((head, "real", real), (head + side + bar, "dreamt", dreamt)):
            write(canvas, word, 8, row + side // 2 - 8)
            for i in range(n):
                x = left + i * pitch
                canvas[row : row + side, x : x + side] = (
                    pictures[i, t].repeat(GIF_SCALE, 0).repeat(GIF_SCALE, 1)
                )
        for i, name in enumerate(names):
            write(canvas, name, left + i * pitch, 8)
        y, width, done = head + side, n * pitch - GIF_GAP, t / max(1, steps - 1)
        write(canvas, f"{t * seconds:.2f} s", 8, y + 7)
        canvas[y + 11 : y + 19, left : left + width] = GRID
        canvas[y + 11 : y + 19, left : left + round(width * done)] = INK
        frames.append(canvas)
    save_gif(path, [frames[0]] * 4 + frames, GIF_FPS, last_s=0.7)
