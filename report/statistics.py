"""Scores of the report card and their 95 % intervals, bootstrapped over tracks."""

import warnings

import numpy as np
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import r2_score


def auc(positive, negative):
    """Area under the ROC curve of scores (n,) and (m,); nan where either is empty."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return np.nan
    # The Mann-Whitney statistic: 0.15 ms for 2 x 600 scores, where sklearn's roc_auc_score takes
    # 3.3 ms. The bootstrap calls it 24,000 times.
    ranks = rankdata(np.r_[positive, negative])
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def r2(y, y_pred, rows):
    """R² (c,) of each column of y (n, c) where the mask `rows` (n,) is true."""
    if rows.sum() < 2:
        return np.full(y.shape[1], np.nan)
    return r2_score(y[rows], y_pred[rows], multioutput="raw_values", force_finite=False)


def spearman(a, b):
    """Rank correlation of a (n,) and b (n,).

    It is 0 where either is constant, because a constant score ranks nothing. It is nan where
    either contains nan.
    """
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def bootstrap_intervals(statistic, tracks, arrays, cfg, n=None):
    """[{value, low, high, n, tracks}] of a statistic of rows, with its 95 % interval over tracks.

    `statistic(*arrays)` returns a number or (c,). Row i of each array belongs to `tracks[i]`.
    Tracks are resampled with replacement, `cfg.bootstrap` times. A single track has no interval.
    `n` is the number of rows to report, by default all.
    """
    rows = [np.flatnonzero(tracks == t) for t in np.unique(tracks)]
    rng, draws = np.random.default_rng([cfg.seed, 4]), []
    values = np.atleast_1d(statistic(*arrays))

    for _ in range(cfg.bootstrap if len(rows) > 1 else 0):
        pick = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(np.atleast_1d(statistic(*(a[pick] for a in arrays))))

    draws = draws or [np.full(len(values), np.nan)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan in all draws gives a nan interval
        low, high = np.nanpercentile(np.array(draws, float), [2.5, 97.5], axis=0)
    counts = {"n": int(len(tracks) if n is None else n), "tracks": len(rows)}
    finite = lambda x: float(x) if np.isfinite(x) else None
    return [
        {"value": finite(v), "low": finite(a), "high": finite(b), **counts}
        for v, a, b in zip(values, low, high)
    ]
