"""The questions of an evaluation: chosen once by the entropies of one model, then stored.

Departures: the paper does not publish its positions. Ours are a file, so that every checkpoint
answers the same questions.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt.corpus import Document
from rmt.curriculum import TIERS, assign_tiers


@dataclass(frozen=True)
class Position:
    """One question of an evaluation."""

    document: int
    position: int
    entropy: float  # nats, under the model that chose the positions
    tier: str
    target: int  # id of the token there


def choose_positions(
    documents: Sequence[Document],
    entropies: Sequence[np.ndarray],
    thresholds: Sequence[float],
    min_context: int,
    per_tier: int,
    seed: int,
) -> list[Position]:
    """Up to per_tier positions of each tier, uniformly at random; ValueError without any."""
    tiers = [assign_tiers(entropy, thresholds, min_context) for entropy in entropies]
    chosen = []
    for tier, name in enumerate(TIERS):
        places = [(d, int(p)) for d, t in enumerate(tiers) for p in np.flatnonzero(t == tier)]
        rng = np.random.default_rng((seed, tier))
        for index in rng.permutation(len(places))[:per_tier]:
            d, p = places[index]
            chosen.append(Position(d, p, float(entropies[d][p]), name, int(documents[d].tokens[p])))
    if not chosen:
        raise ValueError(
            f"no position has an entropy of {thresholds[0]} nats or more after the first "
            f"{min_context} tokens; lower --tier-thresholds or give longer documents"
        )
    return sorted(chosen, key=lambda p: (p.document, p.position))


def data_key(documents: Sequence[Document]) -> str:
    """Names a data set by its tokens, so that all models meet the same stored positions."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:12]


def write_positions(path: Path, positions: Sequence[Position]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps([asdict(position) for position in positions]))
    os.replace(temporary, path)


def read_positions(path: Path, documents: Sequence[Document]) -> list[Position]:
    """ValueError when the stored positions do not belong to these documents."""
    try:
        positions = [_position(raw) for raw in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--positions {path} is not a file of positions ({error!r}); give another file to "
            "choose anew"
        ) from None
    if not positions:
        raise ValueError(f"--positions {path} is empty; delete it to choose positions anew")
    for p in positions:
        inside = 0 <= p.document < len(documents)
        inside = inside and 0 <= p.position < len(documents[p.document].tokens)
        if not inside or documents[p.document].tokens[p.position] != p.target:
            raise ValueError(
                f"--positions {path} was chosen on other data or with another tokenizer (document "
                f"{p.document}, token {p.position} differs); give another file to choose anew"
            )
    return positions


def _position(raw: dict[str, Any]) -> Position:
    """TypeError, ValueError or KeyError unless raw has the fields of a position."""
    if raw["tier"] not in TIERS:
        raise ValueError(f"tier {raw['tier']!r} is none of {', '.join(TIERS)}")
    numbers = {name: int(raw[name]) for name in ("document", "position", "target")}
    return Position(entropy=float(raw["entropy"]), tier=raw["tier"], **numbers)
