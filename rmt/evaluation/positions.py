"""The questions of an evaluation: chosen once by the entropies of one model, then stored.

Departures: the paper does not publish its positions. Ours are a file, so that every checkpoint
answers the same questions. The file has the settings that chose them, too.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmt.curriculum import TIERS, assign_tiers
from rmt.data.corpus import Document
from rmt.evaluation.summary import summarise
from rmt.system.records import write_whole


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
    """The questions, and what they were chosen from and by."""

    positions: list[Position]
    thresholds: tuple[float, ...] = ()  # lower ends of the tiers in nats; of old files unknown
    population: dict[str, int] = field(default_factory=dict)  # positions of each tier; the same
    settings: dict[str, Any] = field(default_factory=dict)  # flag -> value; the same

    def summary(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows about the answers."""
        return summarise(items, self.population, min(self.thresholds, default=math.inf))


def choose_positions(
    documents: Sequence[Document],
    entropies: Sequence[np.ndarray],
    thresholds: Sequence[float],
    min_context: int,
    per_tier: int,
    seed: int,
    settings: dict[str, Any] | None = None,
) -> Chosen:
    """Up to per_tier positions of each tier, uniformly at random; ValueError without any."""
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
    ordered = sorted(chosen, key=lambda p: (p.document, p.position))
    ends = tuple(float(threshold) for threshold in thresholds)
    return Chosen(ordered, ends, population, _plain(settings or {}))


def data_key(documents: Sequence[Document]) -> str:
    """Names a data set by its tokens, so that all models meet the same stored positions."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:12]


def write_positions(path: Path, chosen: Chosen) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(chosen)))


def read_positions(
    path: Path, documents: Sequence[Document], asked: Mapping[str, Any] | None = None
) -> Chosen:
    """ValueError when the stored positions do not belong to these documents, or were chosen with
    other values of the flags in `asked`.
    """
    try:
        chosen = _chosen(json.loads(path.read_text(encoding="utf-8")))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(
            f"--positions {path} is not a file of positions ({error!r}); give another file to "
            "choose anew"
        ) from None
    if not chosen.positions:
        raise ValueError(f"--positions {path} is empty; delete it to choose positions anew")
    for name, value in (asked or {}).items():
        if name in chosen.settings and _plain(value) != (kept := chosen.settings[name]):
            raise ValueError(
                f"--{name.replace('_', '-')} {_shown(value)}, but the positions stored in {path} "
                f"were chosen with {_shown(kept)}; leave the flag out, or give --positions "
                "another file to choose anew"
            )
    for p in chosen.positions:
        inside = 0 <= p.document < len(documents)
        inside = inside and 0 <= p.position < len(documents[p.document].tokens)
        if not inside or documents[p.document].tokens[p.position] != p.target:
            raise ValueError(
                f"--positions {path} was chosen on other data or with another tokenizer (document "
                f"{p.document}, token {p.position} differs); give another file to choose anew"
            )
    return chosen


def _chosen(raw: Any) -> Chosen:
    """Of a file; a bare list of positions is what earlier versions wrote."""
    if isinstance(raw, list):
        return Chosen([_position(p) for p in raw])
    positions = [_position(p) for p in raw["positions"]]
    thresholds = tuple(float(x) for x in raw["thresholds"])
    population = {name: int(raw["population"][name]) for name in TIERS}
    asked = Counter(p.tier for p in positions)
    few = [name for name in TIERS if population[name] < asked[name]]
    if few:
        raise ValueError(f"{asked[few[0]]} positions of the {population[few[0]]} of tier {few[0]}")
    return Chosen(positions, thresholds, population, dict(raw["settings"]))


def _position(raw: dict[str, Any]) -> Position:
    """TypeError, ValueError or KeyError unless raw has the fields of a position."""
    if raw["tier"] not in TIERS:
        raise ValueError(f"tier {raw['tier']!r} is none of {', '.join(TIERS)}")
    numbers = {name: int(raw[name]) for name in ("document", "position", "target")}
    entropy = float(raw["entropy"])
    if not entropy >= 0:
        raise ValueError(f"an entropy of {entropy} nats")
    return Position(entropy=entropy, tier=raw["tier"], **numbers)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
