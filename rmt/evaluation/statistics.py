"""Compute intervals of an accuracy, and test whether two accuracies differ.

Positions of one document are not independent, so the bootstrap draws whole documents; it is seeded.
Wilson's interval and McNemar's test assume that items are independent: an interval here is the
wider of Wilson's and the bootstrap's.
"""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # 95 % of a normal distribution
DRAWS = 2000
ENDS = (2.5, 97.5)  # percentiles


def wilson(right: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927); nan of nothing."""
    if n == 0:
        return math.nan, math.nan
    p, scale = right / n, 1 + Z * Z / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test that gains and losses are equally likely.

    Binomial (gained + lost, 1/2), not mid-p; items that did not change do not count.
    """
    changed, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # exact integers; each binomial from the one before it
    for k in range(fewer):
        ways = ways * (changed - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def resample(clusters: Sequence[int], values: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Draw as many clusters as there are, with replacement; return the sums of their values.

    clusters (n,): the cluster of each value; values (n, ...). Returns (draws, ...).
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), math.prod(values.shape[1:])))
    np.add.at(sums, owner, values.reshape(len(values), -1))
    share = np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(0).multinomial(len(names), share, size=draws)
    return (counts @ sums).reshape(draws, *values.shape[1:])


def _strata_mean(sums: np.ndarray) -> np.ndarray:
    """Average over strata: (..., strata, 2) sums and counts -> (...); nan where all are empty."""
    total, count = sums[..., 0], sums[..., 1]
    rates = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    strata = (count > 0).sum(-1)
    return np.where(strata, rates.sum(-1) / np.maximum(1, strata), np.nan)


def _weighted(values: Sequence[float], weights: Sequence[float], strata: Sequence) -> np.ndarray:
    """Return (n, strata, 2): each item's weighted value and weight, in its stratum's column."""
    named = np.asarray(strata)[:, None] == np.unique(np.asarray(strata))
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    return named[..., None] * np.stack((value * weight, weight), axis=-1)[:, None]


def mean(values: Sequence[float], weights: Sequence[float], strata: Sequence) -> float:
    """Average the weighted means of the strata; nan of nothing."""
    return float(_strata_mean(_weighted(values, weights, strata).sum(0)))


def bootstrap(
    clusters: Sequence[int], values: Sequence[float], weights: Sequence[float], strata: Sequence
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `mean` over resampled clusters; nan of one cluster."""
    if len(set(clusters)) < 2:
        return math.nan, math.nan
    drawn = _strata_mean(resample(clusters, _weighted(values, weights, strata)))
    low, high = np.nanpercentile(drawn, ENDS)
    return float(low), float(high)


def interval(
    clusters: Sequence[int], right: Sequence[bool], weights: Sequence[float], strata: Sequence
) -> tuple[float, float]:
    """Return a 95 % interval of `mean` of what is right (1) or wrong (0).

    It is the wider of two: the bootstrap over clusters, whose items are alike, and Wilson's of each
    stratum put together (MOVER, Zou & Donner 2008), which holds where all are right or few are
    there. Weighted items count as Kish's effective number, (Σw)² / Σw².
    """
    if not len(right):
        return math.nan, math.nan
    low, high = bootstrap(clusters, right, weights, strata)
    right, weight, strata = (np.asarray(x) for x in (right, weights, strata))
    found = []
    for name in np.unique(strata):
        w = weight[strata == name].astype(float)
        p, n = float(w @ right[strata == name] / w.sum()), float(w.sum() ** 2 / (w @ w))
        found.append((p, *wilson(p * n, n)))
    p, a, b = np.array(found).T  # (strata,) each
    below, above = (float(np.linalg.norm(p - end)) / len(p) for end in (a, b))
    low, high = np.fmin(low, p.mean() - below), np.fmax(high, p.mean() + above)  # skips a nan
    return max(0.0, float(low)), min(1.0, float(high))
