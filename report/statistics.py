"""Statistics of the report card."""

import warnings

import numpy as np
from scipy.stats import rankdata

# ------------------------------------------------------------------ statistics


def auc(positive, negative):
    """P(positive > negative), ties half: the area under the ROC curve (Mann-Whitney)."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return np.nan
    ranks = rankdata(np.r_[positive, negative])
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def r2(truth, told, seen):
    """1 - squared error over variance, of each column, in the rows seen."""
    truth, told = truth[seen], told[seen]
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return 1 - ((truth - told) ** 2).sum(axis=0) / np.where(spread > 0, spread, np.nan)


def spearman(a, b):
    """Rank correlation; 0 where either is constant: a judge that says nothing is not right. nan
    where either has one: a judge that was left out."""
    if np.isnan(a).any() or np.isnan(b).any():
        return np.nan
    a, b = rankdata(a), rankdata(b)
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def cells(statistic, tracks, arrays, args, n=None):
    """[{value, low, high, n, tracks}] of a statistic of rows, its 95 % interval over tracks.

    statistic(*arrays) -> a number or (c,); the arrays' rows belong to `tracks` (n,), which are
    drawn anew, with replacement, --bootstrap times.
    """
    rows = [np.flatnonzero(tracks == t) for t in np.unique(tracks)]
    rng, draws = np.random.default_rng([args.seed, 4]), []
    values = np.atleast_1d(statistic(*arrays))
    for _ in range(args.bootstrap if len(rows) > 1 else 0):  # one track says nothing of others
        pick = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(np.atleast_1d(statistic(*(a[pick] for a in arrays))))
    draws = draws or [np.full(len(values), np.nan)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all draws may be nan: so is the interval
        low, high = np.nanpercentile(np.array(draws, float), [2.5, 97.5], axis=0)
    number = lambda x: float(x) if np.isfinite(x) else None
    return [
        {
            "value": number(v),
            "low": number(a),
            "high": number(b),
            "n": int(len(tracks) if n is None else n),
            "tracks": len(rows),
        }
        for v, a, b in zip(values, low, high)
    ]
