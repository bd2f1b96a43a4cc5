"""Summarise the answers of an evaluation in rows of a table, with intervals.

With k responses to a question its accuracy is their mean, so that an interval is about questions,
however many responses each has. An average is the mean of the three tiers, in every column. Tiers
are sampled equally often however many positions they have; RPT's nested sets (entropy above a
threshold) are unions of tiers, so their items are weighted by how many positions they stand for
(Horvitz & Thompson 1952).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
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
    starts = [k for k, item in enumerate(items) if not item.get("sample")]
    groups = [items[k:end] for k, end in zip(starts, [*starts[1:], len(items)])]  # by question
    of_groups = [[column[k] for k in starts] for column in given]

    def average(values: Sequence[float | None]) -> float:
        """Average what was measured."""
        known = [k for k, value in enumerate(values) if value is not None]
        return mean(*([column[k] for k in known] for column in (values, *given)))

    right = [fmean(item["match"] for item in group) for group in groups]
    low, high = interval([group[0]["document"] for group in groups], right, *of_groups)
    row = dict(tier=name, n=len(groups), accuracy=mean(right, *of_groups), low=low, high=high)
    if len(items) > len(groups):
        row |= dict(
            samples=len(groups[0]), majority=mean(list(map(majority, groups)), *of_groups),
            any_right=mean([share > 0 for share in right], *of_groups),
        )  # fmt: skip
    lengths, budgets = ([i[name] for i in items] for name in ("thinking_length", "budget"))
    return row | dict(
        prefix_accuracy=average([i.get("prefix_match") for i in items]),
        thinking_length=average(lengths),
        budget_error=average([
            abs(length - budget) / budget if budget and length is not None else None
            for length, budget in zip(lengths, budgets)
        ]),
        well_formed=average([i["well_formed"] for i in items]),
        cut_off=average([i.get("cut_off") for i in items]),
        tokens=sum(i["tokens"] for i in items),
        response_length=average([i["tokens"] for i in items]),
    )  # fmt: skip


def majority(responses: Items) -> bool:
    """Return whether the commonest answer, by its text, is right; of equally common the first.

    Responses without a readable answer do not vote; if none votes, it is wrong.
    """
    voters = [r for r in responses if r["answer"] is not None]
    votes = Counter(r["answer"] for r in voters)  # in the order of first votes
    return bool(voters) and max(voters, key=lambda r: votes[r["answer"]])["match"]


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
    """Format the summary as a markdown table; of k responses each with avg@k, maj@k and pass@k."""
    k = max((row.get("samples", 1) for row in rows), default=1)
    several = {"majority": f"maj@{k} %", "any_right": f"pass@{k} %"} if k > 1 else {}
    heads = [
        "tier", "n", f"avg@{k} %" if k > 1 else "accuracy %", "95 % interval", *several.values(),
        "by prefix %", "thinking tokens", "\\|ℓ−B\\|/B", "well-formed %",
        "cut off %",
    ]  # fmt: skip
    rule = ["---", *(":---:" if head == "95 % interval" else "---:" for head in heads[1:])]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|"]
    shown = lambda value, digits=1: "–" if math.isnan(value) else f"{value:.{digits}f}"
    for row in rows:
        percent = lambda name: shown(100 * row.get(name, math.nan))  # noqa: B023 - called at once
        cells = [
            row["tier"], str(row["n"]), percent("accuracy"),
            f"{percent('low')} – {percent('high')}", *map(percent, several),
            percent("prefix_accuracy"), shown(row["thinking_length"]),
            shown(row["budget_error"], 2), percent("well_formed"),
            percent("cut_off"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
