"""Curriculum-based adaptive sampling: which positions of a document to reason about.

Departures: the paper draws a position "uniformly from that tier"; with documents taken in epochs,
one position per document, the tier is that of the document at hand. Positions are drawn without
replacement until the document's tier is used up, then reshuffled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIERS = ("easy", "medium", "hard")
NO_TIER = -1  # too predictable, or too early in the document, to be reasoned about


def tier_probabilities(
    progress: float, early: Sequence[float], late: Sequence[float], start: float, end: float
) -> np.ndarray:
    """p_t over (easy, medium, hard) at `progress` = t/T: early, then a ramp, then late."""
    u = min(1.0, max(0.0, (progress - start) / (end - start)))
    return (1 - u) * np.asarray(early) + u * np.asarray(late)  # Eq. 4


def assign_tiers(entropy: np.ndarray, thresholds: Sequence[float], min_context: int) -> np.ndarray:
    """Tier of each position from its entropy in nats: 0 easy, 1 medium, 2 hard, -1 none.

    entropy (T,) of predicting each token from those before it; thresholds are the lower ends of
    the three tiers; the first min_context positions have no tier.
    """
    tiers = np.searchsorted(np.asarray(thresholds), entropy, side="right") - 1
    tiers[:min_context] = NO_TIER
    return tiers


def quantile_thresholds(
    entropies: Sequence[np.ndarray], quantiles: Sequence[float], min_context: int
) -> tuple[float, ...]:
    """Lower ends of the tiers as quantiles over all positions that may be targets."""
    return tuple(np.quantile(np.concatenate([e[min_context:] for e in entropies]), quantiles))


def document_order(documents: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """(steps, batch) document indices: shuffled epochs end to end, no document twice in a step."""
    if batch > documents:
        raise ValueError(
            f"batch_size {batch} exceeds the {documents} documents of the corpus; "
            f"use --batch-size {documents} or less, or more data"
        )
    order, epoch = np.zeros(0, dtype=np.int64), 0
    while len(order) < steps * batch:
        shuffled = np.random.default_rng((seed, epoch)).permutation(documents)
        started = order[len(order) - len(order) % batch :]  # the step that this epoch completes
        again = np.isin(shuffled, started)
        order = np.concatenate((order, shuffled[~again], shuffled[again]))
        epoch += 1
    return order[: steps * batch].reshape(steps, batch)


@dataclass(frozen=True)
class Draw:
    """A position to reason about."""

    position: int  # index of the token to be predicted in its document
    tier: int


class Curriculum:
    """Draws positions. State: how many were drawn from each tier of each document."""

    def __init__(self, tiers: Sequence[np.ndarray], seed: int):
        """tiers: for each document the tier of each position (T,)."""
        self.tiers, self.seed = tiers, seed
        self.drawn = np.zeros((len(tiers), len(TIERS)), dtype=np.int64)
        self.sizes = np.array([[(t == k).sum() for k in range(len(TIERS))] for t in tiers])

    def draw(
        self, step: int, document: int, probabilities: np.ndarray | None, count: int
    ) -> tuple[list[Draw], int]:
        """Up to `count` distinct positions of a document, and how often a drawn tier was empty.

        probabilities None: no curriculum, uniform over the positions of all tiers. A tier that the
        document lacks is dropped and the others renormalised; without any, nothing is drawn.
        """
        sizes = self.sizes[document]
        wanted = sizes / max(1, sizes.sum()) if probabilities is None else probabilities
        present = wanted * (sizes > 0)
        if present.sum() == 0:
            return [], count
        rng = np.random.default_rng((self.seed, step, document))
        draws: dict[int, Draw] = {}
        dropped = 0
        for _ in range(min(count, int(sizes[present > 0].sum()))):
            tier = int(rng.choice(len(TIERS), p=wanted / wanted.sum()))
            if not sizes[tier]:
                dropped += 1
                tier = int(rng.choice(len(TIERS), p=present / present.sum()))
            position = self._next(document, tier)
            draws.setdefault(position, Draw(position, tier))
        return list(draws.values()), dropped

    def _next(self, document: int, tier: int) -> int:
        """The next position of the current shuffle of (document, tier)."""
        positions = np.flatnonzero(self.tiers[document] == tier)
        shuffle, index = divmod(int(self.drawn[document, tier]), len(positions))
        self.drawn[document, tier] += 1
        rng = np.random.default_rng((self.seed, document, tier, shuffle))
        return int(rng.permutation(positions)[index])

    def state_dict(self) -> dict:
        return {"drawn": self.drawn.copy()}

    def load_state_dict(self, state: dict) -> None:
        if state["drawn"].shape != self.drawn.shape:
            raise ValueError(
                f"the checkpoint's curriculum covers {len(state['drawn'])} documents, the data has "
                f"{len(self.drawn)}; resume with the data the run started with"
            )
        self.drawn = np.array(state["drawn"])
