"""Part 5: what the decoder draws, of the present and of rollouts.

The present: PSNR in dB of the whole frame and of five regions, mean red at kerbs over the grass's
(true kerbs have about 120), the AUC with which red tells kerb pixels from others, and the
correlation of decoded and true brightness within the lawn. Beside it stand ridge regression from
the same latents and from those of an untrained encoder, principal components of the pixels, and an
autoencoder of the same two nets, trained end to end on pixels.

Rollouts: PSNR of the decoded rollout against the true frame, by source. Beside it stand copying the
last frame, an untrained predictor, and the decoded true latent, which no rollout can beat.
"""

import numpy as np
import torch

from report.episodes import TRAINED, UNTRAINED, blocks, choose_samples, rows_by_source
from report.probes import AHEAD, true_frames
from report.statistics import bootstrap_intervals
from support import reconstruction as rec
from support.progress import progress
from train_decoder import train_autoencoder

AE_BATCH, AE_LR = 64, 2e-3  # of the autoencoder, as train_decoder.py has them


@torch.no_grad()
def decode(decoder, z, device):
    """Frames (n, 64, 64, 3) in 0..255 of latents z (n, D)."""
    parts = [decoder(part.to(device)).float().cpu() for part in z.split(256)]
    return rec.channels_last(torch.cat(parts))


def autoencoder(models, train, frames, steps, seed):
    """Frames of Samples as an autoencoder draws them, trained for so many steps on others."""
    rng, offsets = np.random.default_rng([seed, 9]), models.frame_offsets()

    def batches():
        while True:
            rows = np.sort(rng.integers(len(train), size=AE_BATCH))
            yield train[rows].frames(offsets).to(models.device)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = batches(), steps, AE_LR, models.device, models.dtype
        encoder, decoder = train_autoencoder(models.encoder, models.decoder, *sizes)
    return decode(decoder, models.encode_samples(encoder, frames), models.device)


def evaluate_present(models, train, test, cfg):
    """{row: [estimate of each of SCORES]} of what is drawn of the present."""
    fit = choose_samples(train, cfg.train_frames // 3, cfg.seed)
    real, fitted = true_frames(test), true_frames(fit)
    dim, z = models.encoder.dim, lambda samples, nets: samples.z(0, 0, nets)[:, 0]
    drawn = {"this decoder": decode(models.decoder, z(test, TRAINED), models.device)}
    for name, nets in (("ridge regression", TRAINED), ("ridge, untrained encoder", UNTRAINED)):
        drawn[name] = rec.ridge_baseline(z(fit, nets), fitted, z(test, nets))
    drawn[f"PCA of the pixels, {min(dim, len(fit))} numbers"] = rec.pca_baseline(fitted, real, dim)
    if cfg.autoencoder_steps:
        name = f"autoencoder, {cfg.autoencoder_steps} steps"
        every = choose_samples(train, cfg.train_frames, cfg.seed)
        sizes = every, test, cfg.autoencoder_steps, cfg.seed
        drawn[name] = autoencoder(models, *sizes)
    return {
        name: bootstrap_intervals(rec.scores, test.track, rec.frame_sums(real, frames), cfg)
        for name, frames in drawn.items()
    }


def evaluate_futures(models, samples, cfg):
    """{"all" or source: {row: [estimate of each step]}}: PSNR of what is drawn of rollouts."""
    H = max(AHEAD)
    z, act = samples.z(0, H), samples.act(H)
    rollouts = {
        "this predictor": models.rollout(models.predictor, z[:, 0], act),
        "untrained predictor": models.rollout(models.untrained_predictor, z[:, 0], act),
        "the true latent": z[:, 1:],
    }
    error = {name: np.zeros((len(samples), H)) for name in ("copy-last", *rollouts)}
    now = true_frames(samples)
    for t in progress(range(H), desc="decode", unit="step", leave=False):
        for rows in blocks(len(samples)):
            real = true_frames(samples[rows], t + 1)
            error["copy-last"][rows, t] = rec.mean_square(real, now[rows])
            for name, z_hat in rollouts.items():
                drawn = decode(models.decoder, z_hat[rows, t], models.device)
                error[name][rows, t] = rec.mean_square(real, drawn)

    psnr = lambda squares: rec.psnr(squares.mean(axis=0))
    return {
        source: {
            name: bootstrap_intervals(psnr, samples.track[rows], (squares[rows],), cfg)
            for name, squares in error.items()
        }
        for source, rows in rows_by_source(samples).items()
    }


def evaluate_reconstructions(models, train, test, samples, cfg):
    """Part 5: {"present": ..., "rollouts": ...}."""
    frames = choose_samples(test, cfg.frames // 6, cfg.seed)
    return {
        "present": evaluate_present(models, train, frames, cfg),
        "rollouts": evaluate_futures(models, samples, cfg),
    }
