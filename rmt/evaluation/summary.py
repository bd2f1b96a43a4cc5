"""Summarise the answers of an evaluation in rows of a table, with intervals.

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
KINDS = {  # of evaluate.answer_kind
    "plain": "plain answers", "brace": "answers with a brace", "escaped": "escaped answers",
}  # fmt: skip
Items = Sequence[dict[str, Any]]


def summarise(
    items: Items, population: Mapping[str, int] | None = None, lowest: float = math.inf
) -> list[dict[str, Any]]:
    """Return rows: tiers, their average, RPT's nested sets, kinds of answers; or all problems.

    population: how many positions of each tier the documents have, of which items are a sample;
    lowest: the entropy in nats where the lowest tier begins. Nested sets need both.
    """
    if items and all(item["tier"] == PROBLEMS for item in items):
        return [_row(PROBLEMS, items)]
    rows = [_row(name, [i for i in items if i["tier"] == name]) for name in TIERS]
    rows.append(_row("average", items, strata=[i["tier"] for i in items]))
    asked = Counter(item["tier"] for item in items)
    for h in (h for h in NESTED if population and h >= lowest):
        inside = [item for item in items if item["entropy"] > h]
        weights = [population[item["tier"]] / asked[item["tier"]] for item in inside]
        rows.append(_row(f"H > {h}", inside, weights))
    for kind, name in KINDS.items():
        rows.append(_row(name, [i for i in items if i.get("kind") == kind]))
    return [row for row in rows if row["n"] or row["tier"] in TIERS]


def _row(
    name: str, items: Items, weights: Sequence[float] = (), strata: Sequence[str] = ()
) -> dict[str, Any]:
    given = weights or [1.0] * len(items), strata or [name] * len(items)

    def average(values: Sequence[float | None]) -> float:
        """Average what was measured."""
        known = [k for k, value in enumerate(values) if value is not None]
        return mean(*([column[k] for k in known] for column in (values, *given)))

    right, lengths = [i["match"] for i in items], [i["thinking_length"] for i in items]
    low, high = interval([i["document"] for i in items], right, *given)
    budgets = [item["budget"] for item in items]
    return dict(
        tier=name, n=len(items), accuracy=average(right), low=low, high=high,
        prefix_accuracy=average([i.get("prefix_match") for i in items]),
        thinking_length=average(lengths),
        budget_error=average([
            abs(length - budget) / budget if budget and length is not None else None
            for length, budget in zip(lengths, budgets)
        ]),
        well_formed=average([i["well_formed"] for i in items]),
        tokens=sum(i["tokens"] for i in items),
        response_length=average([i["tokens"] for i in items]),
    )  # fmt: skip


def answered(items: Items) -> list[dict[str, Any]]:
    """Keep what a paired comparison needs of each item: the question, and if it was right."""
    return [
        {name: item[name] for name in ("document", "position", "tier", "match")} for item in items
    ]


def say(report: dict[str, Any]) -> None:
    """Print a report of eval.py."""
    asked = f", {report['budget']} tokens asked for" if report["budget"] else ""
    print(f"{report['model']}, mode {report['mode']}, {report['decoding']}{asked}\n")
    print(f"{table(report['tiers'])}\n")
    if (nats := report.get("nats_per_token")) is not None:
        print(f"held-out text: {nats:.4f} nats per token")
    if left_out := report["left_out"]:
        print(
            f"not in the table: {len(left_out)} of {report['records']} records that were left out, "
            f"as {left_out[0]['source']} ({left_out[0]['why']})"
        )
    print(f"{report['seconds']:.0f} s, peak memory {report['peak_memory_gb']:.1f} GB")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the summary as a markdown table."""
    lines = [
        "| tier | n | accuracy % | 95 % interval | by prefix % | thinking tokens | \\|ℓ−B\\|/B "
        "| well-formed % |",
        "|---|---:|---:|:---:|---:|---:|---:|---:|",
    ]
    shown = lambda value, digits=1: "–" if math.isnan(value) else f"{value:.{digits}f}"
    for row in rows:
        right, low, high, prefix, well_formed = (
            shown(100 * row[name])
            for name in ("accuracy", "low", "high", "prefix_accuracy", "well_formed")
        )
        length, off = shown(row["thinking_length"]), shown(row["budget_error"], 2)
        lines.append(
            f"| {row['tier']} | {row['n']} | {right} | {low} – {high} | {prefix} | {length} | "
            f"{off} | {well_formed} |"
        )
    return "\n".join(lines)
