"""Two evaluations of the same questions: who is better, and could it be chance?

    python -m rmt.evaluation.compare before.json after.json      reports of eval.py --json

gained: questions that only the second has right; lost: only the first. p is McNemar's exact test,
which takes questions for independent; the interval of the difference is a bootstrap over documents,
which does not. A difference is called one when both say so.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmt.curriculum import TIERS
from rmt.evaluation.statistics import bootstrap, mcnemar, mean
from rmt.evaluation.summary import PROBLEMS, Items
from rmt.system.terminal import safe_printing

ALPHA = 0.05
SAME = ("data", "decoding")  # of a report: what makes two comparable


def paired(before: Items, after: Items) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers to each question; ValueError unless both were asked the same ones."""
    asked = [{_question(item): item for item in items} for items in (before, after)]
    if asked[0].keys() != asked[1].keys():
        raise ValueError(
            f"they answer other questions ({len(asked[0].keys() & asked[1].keys())} of "
            f"{len(asked[0])} and {len(asked[1])} are the same); evaluate both on the same data "
            "with the same --positions"
        )
    return [(item, asked[1][question]) for question, item in asked[0].items()]


def _question(item: dict[str, Any]) -> tuple:
    """`target` is in reports of eval.py, `seed` where runs of several seeds are put together."""
    return tuple(item.get(k) for k in ("seed", "document", "position", "tier", "target"))


def differences(before: Items, after: Items) -> list[dict[str, Any]]:
    """A row per tier and their average, the mean over tiers; of problems one row."""
    pairs = paired(before, after)
    named = {tier: [pair for pair in pairs if pair[0]["tier"] == tier] for tier in TIERS}
    named |= {"average": [pair for pair in pairs if pair[0]["tier"] in TIERS]}
    named |= {PROBLEMS: [pair for pair in pairs if pair[0]["tier"] == PROBLEMS]}
    return [_row(name, found) for name, found in named.items() if found]


def _row(name: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    changes = [int(new["match"]) - int(old["match"]) for old, new in pairs]
    given = [1.0] * len(pairs), [old["tier"] for old, _ in pairs]
    low, high = bootstrap([old["document"] for old, _ in pairs], changes, *given)
    gained, lost = changes.count(1), changes.count(-1)
    return dict(
        tier=name, n=len(pairs), before=mean([old["match"] for old, _ in pairs], *given),
        after=mean([new["match"] for _, new in pairs], *given), difference=mean(changes, *given),
        low=low, high=high, gained=gained, lost=lost, p=mcnemar(gained, lost),
    )  # fmt: skip


def direction(row: dict[str, Any]) -> str:
    """up, down, or no difference that chance would not explain."""
    if row["p"] < ALPHA and (row["low"] > 0 or row["high"] < 0):
        return "up" if row["low"] > 0 else "down"
    return "no clear difference"


def verdict(row: dict[str, Any]) -> str:
    """In words, with the numbers."""
    return f"{direction(row)}, {change(row)}, p = {row['p']:.2g}"


def change(row: dict[str, Any]) -> str:
    """In points of per cent; of one document there is no interval."""
    low, high = (100 * row[end] for end in ("low", "high"))
    ends = "–" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"
    return f"{100 * row['difference']:+.1f} ({ends})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| tier | n | before % | after % | difference (95 % interval) | gained | lost | p | |",
        "|---|---:|---:|---:|:---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = (
            row["tier"], str(row["n"]), f"{100 * row['before']:.1f}", f"{100 * row['after']:.1f}",
            change(row), str(row["gained"]), str(row["lost"]), f"{row['p']:.2g}", direction(row),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_report(path: Path) -> dict[str, Any]:
    """What eval.py wrote; ValueError if it did not."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for item in report["items"]:
            item["document"], item["position"], item["tier"], hash(_question(item))  # are needed
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
    for name in SAME:
        if before.get(name) != after.get(name):
            print(f"note: {name} differs: {before.get(name)} and {after.get(name)}")
    print(table(rows))


if __name__ == "__main__":
    main()
