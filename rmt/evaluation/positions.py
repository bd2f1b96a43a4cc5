"""Choose the positions of an evaluation once, by the entropies of one model, and store them.

Departures: the paper does not publish its positions. Ours are a file, so that every checkpoint
answers the same questions. The file also has the settings that chose them.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmt.curriculum import TIERS, assign_tiers
from rmt.data.corpus import Document
from rmt.evaluation.summary import summarise


@dataclass(frozen=True)
class Position:
    """One question of an evaluation."""

    document: int
    position: int
    entropy: float  # nats, under the model that chose the positions
    tier: str
    target: int  # id of the token there


@dataclass(frozen=True)
class Chosen:
    """The positions, and what chose them."""

    positions: list[Position]
    thresholds: tuple[float, ...] = ()  # lower ends of the tiers in nats
    population: dict[str, int] = field(default_factory=dict)  # tier -> positions in the documents
    settings: dict[str, Any] = field(default_factory=dict)  # name of a flag -> value

    def summary(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Summarise the answers in rows of a table."""
        return summarise(items, self.population, min(self.thresholds, default=math.inf))


def choose_positions(
    documents: Sequence[Document], entropies: Sequence[np.ndarray], thresholds: Sequence[float],
    min_context: int, per_tier: int, seed: int, settings: Mapping[str, Any] | None = None,
) -> Chosen:  # fmt: skip
    """Draw up to per_tier positions of each tier uniformly; ValueError without any."""
    tiers = [assign_tiers(entropy, thresholds, min_context) for entropy in entropies]
    chosen, population = [], {}
    for tier, name in enumerate(TIERS):
        places = [(d, int(p)) for d, t in enumerate(tiers) for p in np.flatnonzero(t == tier)]
        population[name] = len(places)
        rng = np.random.default_rng((seed, tier))
        for index in rng.permutation(len(places))[:per_tier]:
            d, p = places[index]
            chosen.append(Position(d, p, float(entropies[d][p]), name, int(documents[d].tokens[p])))
    if not chosen:
        raise ValueError(
            f"no position has an entropy of {thresholds[0]} nats or more after the first "
            f"{min_context} tokens; lower --tier-thresholds or give longer documents"
        )
    chosen.sort(key=lambda p: (p.document, p.position))
    return Chosen(chosen, tuple(map(float, thresholds)), population, dict(settings or {}))


def data_key(documents: Sequence[Document]) -> str:
    """Hash a data set, so that all models find the same stored positions."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
        if document.answer:  # of a problem or a trace
            digest.update(repr((document.answer, document.thought)).encode("utf-8"))
    return digest.hexdigest()[:12]


def read_positions(
    path: Path, documents: Sequence[Document], asked: Mapping[str, Any] | None = None
) -> Chosen:
    """Read stored positions.

    ValueError if they belong to other documents, or other values of the flags in `asked` chose
    them.
    """
    try:
        chosen = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as e:
        raise ValueError(
            f"--positions {path} is not a file of positions ({e!r}); give another file to choose "
            "anew"
        ) from None
    if not chosen.positions:
        raise ValueError(f"--positions {path} is empty; delete it to choose positions anew")
    for name, value in (asked or {}).items():
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if (kept := chosen.settings.get(name, value)) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but the positions stored in {path} were "
                f"chosen with {kept}; leave the flag out, or give --positions another file to "
                "choose anew"
            )
    for p in chosen.positions:
        inside = 0 <= p.document < len(documents)
        inside = inside and 0 < p.position < len(documents[p.document].tokens)
        if not inside or documents[p.document].tokens[p.position] != p.target:
            raise ValueError(
                f"--positions {path} was chosen on other data or with another tokenizer (document "
                f"{p.document}, token {p.position} differs); give another file to choose anew"
            )
    return chosen


def _parse(raw: Any) -> Chosen:
    """Read the content of a file."""
    positions = list(map(_position, raw["positions"]))
    if len({(p.document, p.position) for p in positions}) < len(positions):
        raise ValueError("a position is there twice")
    thresholds = tuple(map(float, raw["thresholds"]))
    population = {name: int(raw["population"][name]) for name in TIERS}
    for name, count in Counter(p.tier for p in positions).items():
        if count > population[name]:
            raise ValueError(f"{count} positions of the {population[name]} of tier {name}")
    return Chosen(positions, thresholds, population, dict(raw["settings"]))


def _position(raw: dict[str, Any]) -> Position:
    document, position, target = (int(raw[name]) for name in ("document", "position", "target"))
    found = Position(document, position, float(raw["entropy"]), raw["tier"], target)
    if found.tier not in TIERS or not found.entropy >= 0:
        raise ValueError(f"tier {found.tier!r} with an entropy of {found.entropy} nats")
    return found
