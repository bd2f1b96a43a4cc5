"""How sure an accuracy is, and whether two differ: intervals, a paired test, a bootstrap.

Positions of one document are not independent of each other, so resampling draws whole documents
(a cluster bootstrap); its random numbers are seeded. Wilson's interval and McNemar's test take
items for independent: an interval here is the wider of Wilson's and the bootstrap's.
"""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # 95 % of a normal distribution
DRAWS = 2000
ENDS = (2.5, 97.5)  # percentiles


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return math.nan, math.nan
    p, scale = right / n, 1 + Z * Z / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: is wrong → right as frequent as right → wrong?

    Binomial (gained + lost, 1/2), not mid-p; items that both have right, or wrong, say nothing.
    """
    changed, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # exact integers; each binomial from the one before it
    for k in range(fewer):
        ways = ways * (changed - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def resample(clusters: Sequence[int], values: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Sums of values (n, ...) over as many clusters as there are, drawn with replacement.

    clusters (n,): which each value belongs to. Returns (draws, ...).
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), math.prod(values.shape[1:])))
    np.add.at(sums, owner, values.reshape(len(values), -1))
    rng, share = np.random.default_rng(0), np.full(len(names), 1 / len(names))
    drawn = [rng.multinomial(len(names), share) @ sums for _ in range(draws)]
    return np.stack(drawn).reshape(draws, *values.shape[1:])


def strata_mean(sums: np.ndarray) -> np.ndarray:
    """(..., strata, 2) sums and counts -> (...) the mean over strata with a count; nan without."""
    total, count = sums[..., 0], sums[..., 1]
    present = count > 0
    rates = np.where(present, total / np.where(present, count, 1), 0.0).sum(-1)
    strata = present.sum(-1)
    return np.where(strata, rates / np.maximum(1, strata), np.nan)


def _pairs(values: Sequence[float], weights: Sequence[float], strata: Sequence) -> np.ndarray:
    """(n, strata, 2): the weighted value and the weight of each item, in its stratum's column."""
    named = np.asarray(strata)[:, None] == np.unique(np.asarray(strata))
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    return np.stack((named * (value * weight)[:, None], named * weight[:, None]), axis=-1)


def mean(values: Sequence[float], weights: Sequence[float], strata: Sequence) -> float:
    """The mean over strata of the weighted means in each; nan of nothing."""
    return float(strata_mean(_pairs(values, weights, strata).sum(0))) if len(values) else math.nan


def bootstrap(
    clusters: Sequence[int], values: Sequence[float], weights: Sequence[float], strata: Sequence
) -> tuple[float, float]:
    """95 % interval of `mean` by percentiles over resampled clusters; nan of a single cluster."""
    if len(set(clusters)) < 2:
        return math.nan, math.nan
    drawn = strata_mean(resample(clusters, _pairs(values, weights, strata)))
    low, high = np.nanpercentile(drawn, ENDS)
    return float(low), float(high)


def interval(
    clusters: Sequence[int], right: Sequence[bool], weights: Sequence[float], strata: Sequence
) -> tuple[float, float]:
    """95 % interval of `mean` of what is right (1) or wrong (0).

    The wider of the bootstrap over clusters, which sees that items of a cluster are alike, and of
    Wilson's of each stratum put together (MOVER, Zou & Donner 2008), which holds where all are
    right, or few are there. Weighted items count as Kish's effective number, (Σw)² / Σw².
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
    middle = sum(p for p, _, _ in found) / len(found)
    below = math.sqrt(sum((p - a) ** 2 for p, a, _ in found)) / len(found)
    above = math.sqrt(sum((p - b) ** 2 for p, _, b in found)) / len(found)
    low, high = np.fmin(low, middle - below), np.fmax(high, middle + above)  # a nan is passed over
    return max(0.0, float(low)), min(1.0, float(high))
