"""How well frames are reconstructed, region by region, and what other codes of the same size give.

The scores are functions of sums over frames. `frame_sums` makes the sums of each frame, so that a
bootstrap can draw frames without looking at pixels again.
"""

import cv2
import numpy as np

from car import SCENE_H
from support.augment import CAR

GRASS_RED = 102  # grey levels of red in grass and road
KERB_RED = 180  # of a pixel that a kerb covers by half; kerbs are red and white
LAWN_GREEN, ROAD_GREEN = 180, 130  # least green of lawn, most green of the road
REGIONS = ("frame", "road edge", "kerbs", "lawn", "car", "instruments")
PSNRS = [f"{name}, dB" for name in REGIONS]
SCORES = (*PSNRS, "red at kerbs", "kerb AUC", "lawn r")


def regions(frames):
    """Masks (N, 64, 64) of REGIONS in true frames (N, 64, 64, 3) uint8, by their colours."""
    red, green = frames[..., 0], frames[..., 1]
    scene = np.zeros(frames.shape[:3], bool)
    scene[:, :SCENE_H] = True
    car = np.zeros_like(scene)
    car[:, *CAR] = True
    world = scene & ~car
    kerbs, lawn = world & (red >= KERB_RED), world & (red < KERB_RED) & (green >= LAWN_GREEN)
    road = world & (red < KERB_RED) & (green < ROAD_GREEN)
    wide = lambda mask: np.stack([cv2.dilate(m.view(np.uint8), np.ones((3, 3))) for m in mask])
    edge = world & (wide(lawn) & wide(road)).astype(bool)
    return dict(zip(REGIONS, (np.ones_like(scene), edge, kerbs, lawn, car, ~scene)))


def frame_sums(real, decoded):
    """Sums of each frame, for `scores`; real (N, 64, 64, 3) uint8, decoded the same in 0..255.

    -> squared errors and pixels of REGIONS (N, 6, 2); of the lawn's true and decoded brightness
    x, y the sums of 1, x, y, xx, yy, xy (N, 6); histograms of decoded red, elsewhere and at kerbs
    (N, 2, 256).
    """
    masks = regions(real)
    error = np.square(decoded - real.astype(np.float32)).mean(axis=3)
    errors = [[(error * m).sum((1, 2)), m.sum((1, 2))] for m in masks.values()]
    x, y = real.mean(axis=3, dtype=np.float32), decoded.mean(axis=3, dtype=np.float32)
    x, y = x - 128, y - 128  # moments of smaller numbers keep more digits
    moments = (np.ones_like(x), x, y, x * x, y * y, x * y)
    lawn = [(masks["lawn"] * m).sum((1, 2), dtype=np.float64) for m in moments]

    # red at kerbs, and in the rest of the scene without the car
    rest = ~(masks["kerbs"] | masks["car"] | masks["instruments"])
    red = decoded[..., 0].round().astype(int)
    counts = [
        [np.bincount(r[m], minlength=256) for m in pair]
        for r, *pair in zip(red, rest, masks["kerbs"])
    ]
    return np.array(errors).transpose(2, 0, 1), np.array(lawn).T, np.array(counts)


def scores(errors, lawn, red):
    """SCORES (9,) of `frame_sums`: PSNR in dB of each region, mean decoded red at kerbs over
    GRASS_RED, the AUC with which red tells kerbs from other pixels, and the correlation of decoded
    and true brightness within the lawn. nan where a region has no pixels."""
    with np.errstate(divide="ignore", invalid="ignore"):
        squares, pixels = errors.sum(axis=0).T
        psnr = 10 * np.log10(255**2 * pixels / squares)
        n, x, y, xx, yy, xy = lawn.sum(axis=0)
        spread = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
        r = (xy / n - x * y / n**2) / np.sqrt(spread) if spread > 1e-6 else np.nan
        other, kerb = red.sum(axis=0)
        excess = (kerb * np.arange(256)).sum() / kerb.sum() - GRASS_RED
        below = other.cumsum() - other / 2  # pixels that a red of 0..255 beats; half of its equals
        auc = (kerb * below).sum() / (kerb.sum() * other.sum())
    return np.array([*psnr, excess, auc, r])


def mean_square(real, decoded):
    """Mean squared error (N,) of frames (N, 64, 64, 3) in 0..255."""
    return np.square(decoded - real.astype(np.float32)).mean(axis=(1, 2, 3))


def psnr(squares):
    """dB of mean squared errors of frames in 0..255."""
    return 10 * np.log10(255**2 / np.maximum(squares, 1e-9))


def channels_last(frames):
    """(N, 3, 64, 64) uint8, or float in about 0..1, a tensor -> (N, 64, 64, 3) in 0..255."""
    scale = 255 if frames.is_floating_point() else 1
    return (frames.cpu() * scale).clamp(0, 255).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------ other codes of the same size


def pca_baseline(train, frames, n):
    """Frames (M, 64, 64, 3) from n principal components of the pixels of training frames."""
    from sklearn.decomposition import PCA  # 1 s, which a refusal need not take

    flat = lambda x: x.reshape(len(x), -1).astype(np.float32)
    pca = PCA(min(n, len(train)), svd_solver="randomized", iterated_power=2, random_state=0)
    pca.fit(flat(train))
    return pca.inverse_transform(pca.transform(flat(frames))).reshape(frames.shape).clip(0, 255)


def ridge_baseline(z_train, train, z):
    """Frames (M, 64, 64, 3) from latents z (M, D) by ridge regression on training latents."""
    from sklearn.linear_model import Ridge

    ridge = Ridge(1.0).fit(z_train, train.reshape(len(train), -1).astype(np.float32))
    return ridge.predict(z).reshape(-1, *train.shape[1:]).clip(0, 255)


def table(rows):
    """Rows {name: SCORES} as text below their columns."""
    lines = [f"{'held out':34}" + "".join(f"{name:>16}" for name in SCORES)]
    for name, row in rows.items():
        lines.append(f"{name:34}" + "".join(f"{value:16.3f}" for value in row))
    return "\n".join(lines)
