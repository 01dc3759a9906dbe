"""Principal components of frames: the parts of a latent that need no convolutions."""

import numpy as np
import torch

from networks import SCENE_VALUES
from support.cli import fail

RED_WEIGHT = 2.5  # only kerbs and the car vary in red; 1: 46 grey levels at kerbs, 2.5: 59


@torch.no_grad()
def fit_pca(encoder, x):
    """Fits the HUD's and the scene's components to frames x (N, 3, 64, 64) uint8.

    Each component gets variance 1. Those of the scene see red RED_WEIGHT times, because kerbs cover
    two pixels in a thousand, and each frame mirrored too, because tracks turn left more often.
    """
    if len(x) < (n := max(encoder.hud_pca, encoder.scene_pca)):
        fail(f"{n} components of {len(x)} frames: collect more, or lower --scene_pca")
    if encoder.hud_pca:
        hud = encoder.hud_pixels(x).float().cpu().numpy() / 127.5 - 1
        mean, components = whitening(hud, encoder.hud_pca, "full")
        encoder.pca_mean.copy_(torch.from_numpy(mean))
        encoder.pca_components.copy_(torch.from_numpy(components))
    if encoder.scene_pca:
        red = np.repeat(np.float32([RED_WEIGHT, 1, 1]), SCENE_VALUES // 3)
        x = torch.cat([x, x.flip(-1)])
        scene = encoder.scene_pixels(x).float().cpu().numpy() * red
        mean, components = whitening(scene, encoder.scene_pca, "randomized")
        encoder.scene_mean.copy_(torch.from_numpy(mean / red))
        encoder.scene_components.copy_(torch.from_numpy(components * red[:, None]))


def whitening(x, n, solver):
    """(mean (V,), components (V, n)) of x (N, V); a component of x - mean has variance 1."""
    from sklearn.decomposition import PCA  # 1 s, which a refusal need not take

    pca = PCA(n, svd_solver=solver, random_state=0).fit(x)
    variance = pca.explained_variance_
    size = np.sqrt(np.maximum(variance, 1e-6 * max(1.0, variance[0])))
    return pca.mean_, (pca.components_ / size[:, None]).T
