"""What an evaluation found, as rows of a table with intervals.

An average is the mean of the three tiers, in every column. Tiers are sampled equally often however
many positions they have; RPT's nested sets (entropy above a threshold) are unions of tiers, so
their items are weighted by how many positions they stand for (Horvitz & Thompson 1952).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rmt.curriculum import TIERS
from rmt.evaluation.statistics import interval, mean

PROBLEMS = "problems"  # in place of a tier
NESTED = (0.5, 1.0, 1.5)  # nats
KINDS = {  # rmt.prompt.answer_kind
    "plain": "plain answers", "brace": "answers with a brace", "escaped": "escaped answers",
}  # fmt: skip
Items = Sequence[dict[str, Any]]


def summarise(
    items: Items, population: Mapping[str, int] | None = None, lowest: float = math.inf
) -> list[dict[str, Any]]:
    """A row per disjoint tier, their average, RPT's nested sets, and kinds of answers; of problems
    one row.

    population: positions of each tier in the documents, of which the items are a sample; lowest:
    entropy in nats from which the tiers have all of them. Without them no nested set is known.
    """
    if items and all(item["tier"] == PROBLEMS for item in items):
        return [_row(PROBLEMS, items)]
    rows = [_row(name, [i for i in items if i["tier"] == name]) for name in TIERS]
    rows.append(_row("average", items, strata=[i["tier"] for i in items]))
    if population:
        asked = Counter(item["tier"] for item in items)
        for h in (h for h in NESTED if h >= lowest):
            inside = [item for item in items if item["entropy"] > h]
            weights = [population[item["tier"]] / asked[item["tier"]] for item in inside]
            rows.append(_row(f"H > {h}", inside, weights))
    for kind, name in KINDS.items():
        rows.append(_row(name, [i for i in items if i.get("kind") == kind]))
    return [row for row in rows if row["n"] or row["tier"] in TIERS]


def _row(
    name: str, items: Items, weights: Sequence[float] | None = None, strata: Sequence | None = None
) -> dict[str, Any]:
    weights, strata = weights or [1.0] * len(items), strata or [0] * len(items)

    def over(value, there=lambda item: True) -> float:
        kept = [k for k, item in enumerate(items) if there(item)]
        pick = lambda values: [values[k] for k in kept]
        return mean([value(item) for item in pick(items)], pick(weights), pick(strata))

    thought = lambda item: item["thinking_length"] is not None
    off = lambda item: abs(item["thinking_length"] - item["budget"]) / item["budget"]
    right, documents = [item["match"] for item in items], [item["document"] for item in items]
    low, high = interval(documents, right, weights, strata)
    return dict(
        tier=name, n=len(items), accuracy=over(lambda item: item["match"]), low=low, high=high,
        prefix_accuracy=over(
            lambda item: item["prefix_match"], lambda item: item.get("prefix_match") is not None
        ),
        thinking_length=over(lambda item: item["thinking_length"], thought),
        budget_error=over(off, lambda item: thought(item) and item["budget"]),
        well_formed=over(lambda item: item["well_formed"]),
        tokens=sum(item["tokens"] for item in items),
        response_length=over(lambda item: item["tokens"]),
    )  # fmt: skip


def answered(items: Items) -> list[dict[str, Any]]:
    """Of each item what a paired comparison needs: which question, and whether it was right."""
    return [
        {name: item[name] for name in ("document", "position", "tier", "match")} for item in items
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a markdown table."""
    lines = [
        "| tier | n | accuracy % | 95 % interval | by prefix % | thinking tokens | \\|ℓ−B\\|/B "
        "| well-formed % |",
        "|---|---:|---:|:---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["tier"], str(row["n"]), _percent(row["accuracy"]),
            f"{_percent(row['low'])} – {_percent(row['high'])}", _percent(row["prefix_accuracy"]),
            _number(row["thinking_length"], 1), _number(row["budget_error"], 2),
            _percent(row["well_formed"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
