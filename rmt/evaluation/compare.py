"""Compare two evaluations of the same questions in pairs.

    python -m rmt.evaluation.compare before.json after.json      reports of eval.py --json

gained: questions that only the second has right; lost: only the first; with --samples, those that
one has right more often. Of a question that has more responses in one file, its first count, so
that without a difference gains and losses are equally likely. p is McNemar's exact test, which
assumes independent questions; the interval of the difference is a bootstrap over documents, which
does not. A difference is clear when both say so.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rmt.curriculum import TIERS
from rmt.evaluation.statistics import bootstrap, mcnemar, mean
from rmt.evaluation.summary import PROBLEMS, Items
from rmt.system.terminal import safe_printing

ALPHA = 0.05
Pair = tuple[dict[str, Any], dict[str, Any]]  # the answers to one question, before and after


def paired(before: Items, after: Items) -> list[Pair]:
    """Pair the answers to each question; ValueError unless both answer the same ones.

    Of k responses each, the first, with their mean `match`; k is the smaller number of the two.
    """
    old, new = map(_by_question, (before, after))
    if old.keys() != new.keys():
        raise ValueError(
            f"they answer other questions ({len(old.keys() & new.keys())} of {len(old)} and "
            f"{len(new)} are the same); evaluate both on the same data with the same --positions"
        )
    if not old:
        raise ValueError("they answer no question; evaluate on data that have some")
    k = min(len(group) for groups in (old, new) for group in groups.values())
    merged = lambda group: group[0] | {"match": fmean(item["match"] for item in group[:k])}
    return [(merged(group), merged(new[question])) for question, group in old.items()]


def _by_question(items: Items) -> dict[tuple, list[dict[str, Any]]]:
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for item in items:
        grouped.setdefault(_question(item), []).append(item)
    return grouped


def _question(item: dict[str, Any]) -> tuple:
    """Identify a question; only eval.py's have a `target`."""
    return tuple(item.get(k) for k in ("document", "position", "tier", "target"))


def differences(before: Items, after: Items) -> list[dict[str, Any]]:
    """Return a row per tier and one for their average, the mean over tiers; of problems one."""
    pairs = paired(before, after)
    named = {tier: (tier,) for tier in TIERS} | {"average": TIERS, PROBLEMS: (PROBLEMS,)}
    rows = [_row(name, [p for p in pairs if p[0]["tier"] in own]) for name, own in named.items()]
    return [row for row in rows if row["n"]]


def _row(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    changes = [new["match"] - old["match"] for old, new in pairs]
    given = [1.0] * len(pairs), [old["tier"] for old, _ in pairs]
    low, high = bootstrap([old["document"] for old, _ in pairs], changes, *given)
    gained, lost = sum(x > 0 for x in changes), sum(x < 0 for x in changes)
    return dict(
        tier=name, n=len(pairs), before=mean([old["match"] for old, _ in pairs], *given),
        after=mean([new["match"] for _, new in pairs], *given), difference=mean(changes, *given),
        low=low, high=high, gained=gained, lost=lost, p=mcnemar(gained, lost),
    )  # fmt: skip


def direction(row: dict[str, Any]) -> str:
    """Return "up", "down", or "no clear difference" where chance would explain it."""
    if row["p"] < ALPHA and (row["low"] > 0 or row["high"] < 0):
        return "up" if row["low"] > 0 else "down"
    return "no clear difference"


def verdict(row: dict[str, Any]) -> str:
    """Describe the difference in words, with its numbers."""
    return f"{direction(row)}, {change(row)}, p = {row['p']:.2g}"


def change(row: dict[str, Any]) -> str:
    """Format the difference and its interval in percentage points; one document has no interval."""
    low, high = (100 * row[end] for end in ("low", "high"))
    ends = "–" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"
    return f"{100 * row['difference']:+.1f} ({ends})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the differences as a markdown table."""
    lines = [
        "| tier | n | before % | after % | difference (95 % interval) | gained | lost | p | |",
        "|---|---:|---:|---:|:---:|---:|---:|---:|---|",
    ]
    for row in rows:
        before, after = (f"{100 * row[name]:.1f}" for name in ("before", "after"))
        lines.append(
            f"| {row['tier']} | {row['n']} | {before} | {after} | {change(row)} | {row['gained']} "
            f"| {row['lost']} | {row['p']:.2g} | {direction(row)} |"
        )
    return "\n".join(lines)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of eval.py; ValueError if it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for item in report["items"]:
            item["document"], item["position"], hash(_question(item))  # are needed
            if item["tier"] not in (*TIERS, PROBLEMS):
                raise ValueError(f"tier {item['tier']!r}")
            if item["match"] not in (0, 1):
                raise ValueError(f"match {item['match']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no report of eval.py ({error!r}); make one with --json"
        ) from None
    return report


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    names = sys.argv[1:] if arguments is None else arguments
    if len(names) != 2:
        sys.exit(
            "usage: python -m rmt.evaluation.compare BEFORE.json AFTER.json (of eval.py --json)"
        )
    try:
        before, after = map(read_report, map(Path, names))
        rows = differences(before["items"], after["items"])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' and '.join(map(str, names))}: {error}")
    for name in ("data", "decoding"):
        if before.get(name) != after.get(name):
            print(f"note: {name} differs: {before.get(name)} and {after.get(name)}")
    grouped = (_by_question(report["items"]).values() for report in (before, after))
    few, many = sorted(max(map(len, groups), default=1) for groups in grouped)
    if few != many:
        print(f"note: of the {many} responses to a question the first {few} count")
    print(table(rows))


if __name__ == "__main__":
    main()
