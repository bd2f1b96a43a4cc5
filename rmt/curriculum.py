"""Curriculum: tiers of difficulty, their schedule, and the draw.

Departures: the paper draws a position "uniformly from that tier"; here documents are taken in
epochs, so the tier is that of the document at hand, and its positions are drawn without replacement
until they are used up, then reshuffled.
"""

from collections.abc import Sequence

import numpy as np

TIERS = ("easy", "medium", "hard")
NO_TIER = -1  # too predictable, or too early in the document, to be reasoned about


def tier_probabilities(
    progress: float, early: Sequence[float], late: Sequence[float], start: float, end: float
) -> np.ndarray:
    """Return p_t over (easy, medium, hard) at progress = t/T: early, then a ramp, then late."""
    u = min(1.0, max(0.0, (progress - start) / (end - start)))
    return (1 - u) * np.asarray(early) + u * np.asarray(late)  # Eq. 4


def assign_tiers(entropy: np.ndarray, thresholds: Sequence[float], min_context: int) -> np.ndarray:
    """Return the tier of each position by its entropy in nats: 0 easy, 1 medium, 2 hard, -1 none.

    entropy (T,) of predicting each token from those before it; thresholds are the lower ends of
    the three tiers; the first min_context positions have no tier.
    """
    tiers = np.searchsorted(np.asarray(thresholds), entropy, side="right") - 1
    tiers[:min_context] = NO_TIER
    return tiers


def low_entropy(tiers: np.ndarray, min_context: int) -> np.ndarray:
    """Mark predictable tokens: below all tiers, and not too early in the document to have one."""
    return (tiers == NO_TIER) & (np.arange(len(tiers)) >= min_context)


def quantile_thresholds(
    entropies: Sequence[np.ndarray], quantiles: Sequence[float], min_context: int
) -> tuple[float, ...]:
    """Return lower ends of the tiers as quantiles over all positions that may have one."""
    return tuple(np.quantile(np.concatenate([e[min_context:] for e in entropies]), quantiles))


class Curriculum:
    """Draws positions by tier. Its state, draws from each tier of each document, is saved."""

    def __init__(self, tiers: Sequence[np.ndarray], seed: int):
        """tiers: (T,) of each document."""
        self.tiers, self.seed = tiers, seed
        self.drawn = np.zeros((len(tiers), len(TIERS)), dtype=np.int64)

    def _pool(self, document: int, tier: int) -> np.ndarray:
        return np.flatnonzero(self.tiers[document] == tier)

    def draw(
        self, step: int, document: int, probabilities: np.ndarray | None, count: int,
        taken: Sequence[int] = (), attempt: int = 0,
    ) -> tuple[list[int], int]:  # fmt: skip
        """Draw up to `count` distinct positions, none of `taken`; count draws from empty tiers.

        probabilities None: uniform over the positions of all tiers. An empty tier is dropped and
        the others renormalised. Each `attempt` of a step has its own random numbers.
        """
        rng = np.random.default_rng((self.seed, step, document, attempt))
        gone, drawn, empty = set(taken), [], 0
        pools = [self._pool(document, tier).tolist() for tier in range(len(TIERS))]
        sizes = np.array([len(set(pool) - gone) for pool in pools])
        for number in range(count):
            wanted = sizes if probabilities is None else probabilities
            present = wanted * (sizes > 0)
            if not present.sum():
                return drawn, empty + count - number
            tier = int(rng.choice(len(TIERS), p=wanted / wanted.sum()))
            if not sizes[tier]:  # count it, and draw from the tiers that the document has
                empty += 1
                tier = int(rng.choice(len(TIERS), p=present / present.sum()))
            position = self._next(document, tier, gone)
            gone.add(position)
            sizes[tier] -= 1
            drawn.append(position)
        return drawn, empty

    def _next(self, document: int, tier: int, gone: set[int]) -> int:
        """Return the next shuffled position of the tier that is not in `gone`; one must be left."""
        positions = self._pool(document, tier)
        while True:
            shuffle, index = divmod(int(self.drawn[document, tier]), len(positions))
            self.drawn[document, tier] += 1
            rng = np.random.default_rng((self.seed, document, tier, shuffle))
            position = rng.permutation(positions)[index]
            if position not in gone:
                return int(position)
