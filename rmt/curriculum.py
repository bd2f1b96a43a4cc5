"""Curriculum-based adaptive sampling: tiers of difficulty, their schedule, and the draw.

Departures: the paper draws a position "uniformly from that tier"; here documents are taken in
epochs, so the tier is that of the document at hand, and its positions are drawn without replacement
until they are used up, then reshuffled.

Beyond the paper, off by default: draw tiers by measured match rates (Eq. 13).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIERS = ("easy", "medium", "hard")
DECAY = 0.9  # per step, of the counts behind a tier's match rate
NO_TIER = -1  # too predictable, or too early in the document, to be reasoned about


def tier_probabilities(
    progress: float, early: Sequence[float], late: Sequence[float], start: float, end: float
) -> np.ndarray:
    """Return p_t over (easy, medium, hard) at progress = t/T: early, then a ramp, then late."""
    u = min(1.0, max(0.0, (progress - start) / (end - start)))
    return (1 - u) * np.asarray(early) + u * np.asarray(late)  # Eq. 4


def adaptive_probabilities(right: np.ndarray, responses: np.ndarray, floor: float) -> np.ndarray:
    """Return p_t in proportion to floor + 4·p(1 − p), p = right / responses of each tier.

    p(1 − p) is the variance of the matching reward, 0 where all responses are right or all wrong.
    The floor keeps every tier in use, so that its p stays known.
    """
    p = right / responses
    weight = floor + 4 * p * (1 - p)  # Eq. 13
    return weight / weight.sum()


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


@dataclass(frozen=True)
class Draw:
    """A position to reason about."""

    position: int  # index of the token to be predicted in its document
    tier: int


class Curriculum:
    """Draws positions and counts matches.

    Its state is saved: draws from each tier of each document, and the recent match rate of each
    tier.
    """

    def __init__(self, tiers: Sequence[np.ndarray], seed: int):
        """tiers: (T,) of each document."""
        self.tiers, self.seed = tiers, seed
        self.drawn = np.zeros((len(tiers), len(TIERS)), dtype=np.int64)
        self.rates = np.tile([0.5, 1.0], (len(TIERS), 1))  # right and all responses, decayed

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays to be saved, and restored in place."""
        return {"drawn": self.drawn, "rates": self.rates}

    def fade(self) -> None:
        """Let earlier matches count less; to be called once per step."""
        self.rates *= DECAY

    def observe(self, tier: int, right: int, responses: int) -> None:
        """Record that `right` of the responses about a position of that tier named its token."""
        self.rates[tier] += (right, responses)

    def _pool(self, document: int, tier: int) -> np.ndarray:
        return np.flatnonzero(self.tiers[document] == tier)

    def draw(
        self, step: int, document: int, probabilities: np.ndarray | None, count: int,
        taken: Sequence[int] = (), attempt: int = 0,
    ) -> tuple[list[Draw], int]:  # fmt: skip
        """Draw up to `count` distinct positions, none of `taken`; count draws from empty tiers.

        probabilities None: uniform over the positions of all tiers. An empty tier is dropped and
        the others renormalised. Each `attempt` of a step has its own random numbers.
        """
        rng = np.random.default_rng((self.seed, step, document, attempt))
        gone, draws, empty = set(taken), [], 0
        pools = [self._pool(document, tier).tolist() for tier in range(len(TIERS))]
        sizes = np.array([len(set(pool) - gone) for pool in pools])
        for number in range(count):
            wanted = sizes if probabilities is None else probabilities
            present = wanted * (sizes > 0)
            if not present.sum():
                return draws, empty + count - number
            tier = int(rng.choice(len(TIERS), p=wanted / wanted.sum()))
            if not sizes[tier]:  # count it, and draw from the tiers that the document has
                empty += 1
                tier = int(rng.choice(len(TIERS), p=present / present.sum()))
            position = self._next(document, tier, gone)
            gone.add(position)
            sizes[tier] -= 1
            draws.append(Draw(position, tier))
        return draws, empty

    def _next(self, document: int, tier: int, gone: set[int]) -> int:
        """Take the next position of the shuffle that is not gone; there is one."""
        positions = self._pool(document, tier)
        while True:
            shuffle, index = divmod(int(self.drawn[document, tier]), len(positions))
            self.drawn[document, tier] += 1
            rng = np.random.default_rng((self.seed, document, tier, shuffle))
            position = rng.permutation(positions)[index]
            if position not in gone:
                return int(position)
