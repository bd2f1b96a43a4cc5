"""The order in which documents are drawn: epochs, or a mixture of sources by weight."""

from collections.abc import Sequence

import numpy as np

MOST_DRAWN = 10**8  # documents of all steps, repetitions included


def document_order(
    parts: Sequence[int], weights: Sequence[float], batch: int, steps: int, seed: int
) -> np.ndarray:
    """Return (steps, batch) document indices: shuffled epochs end to end, none twice in a step.

    parts: the source of each document. With weights each source has epochs of its own and a share
    by its weight: draw i of a source with share w is due after (i + 1/2) / w draws of the run, so
    any stretch of the run has nearly these shares, and a longer run begins like a shorter one.
    ValueError when a step draws more documents of a source than it has.
    """
    draws = steps * batch
    if draws > MOST_DRAWN:
        raise ValueError(
            f"{steps:,} steps of --batch-size {batch} draw more than {MOST_DRAWN:,} documents; "
            "lower --steps, or else --epochs"
        )
    if not weights:
        if batch > len(parts):
            raise ValueError(
                f"batch_size {batch} exceeds the {len(parts)} documents of the corpus; "
                f"use --batch-size {len(parts)} or less, or more data"
            )
        return _epochs(len(parts), np.arange(draws) // batch, (seed,)).reshape(steps, batch)
    shares = np.asarray(weights) / sum(weights)
    due = [(np.arange(np.ceil(w * (draws + len(shares))) + 1) + 0.5) / w for w in shares]
    source = np.repeat(np.arange(len(due)), [len(times) for times in due])
    source = source[np.argsort(np.concatenate(due), kind="stable")[:draws]]  # (draws,)
    order = np.empty(draws, dtype=np.int64)
    for part in range(len(shares)):
        own, places = np.flatnonzero(np.asarray(parts) == part), np.flatnonzero(source == part)
        most = int(np.bincount(places // batch, minlength=1).max())
        if most > len(own):
            raise ValueError(
                f"--data-weights {' '.join(map(str, weights))}: a step draws up to {most} "
                f"documents of path {part + 1} of --data, which has {len(own)}; lower its weight "
                "or --batch-size, or give it more text"
            )
        order[places] = own[_epochs(len(own), places // batch, (seed, part))]
    return order.reshape(steps, batch)


def _epochs(documents: int, step_of: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Return (draws,) of shuffled epochs end to end; step_of (draws,): the step of each, rising."""
    epochs = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(step_of), max(1, documents)):
        key = (seed[0], first // documents, *seed[1:])
        shuffled = np.random.default_rng(key).permutation(documents)
        # Documents of the step that this epoch completes come last.
        begun = first - np.searchsorted(step_of, step_of[first])
        again = np.isin(shuffled, epochs[-1][len(epochs[-1]) - begun :])
        epochs.append(np.concatenate((shuffled[~again], shuffled[again])))
    return np.concatenate(epochs)[: len(step_of)]
