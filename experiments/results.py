"""Means over seeds of all evaluations, with 95 % intervals.

The half-width of an interval is √(a² + b²): a of the mean over seeds, with Student's t (4.3 for
three seeds); b of the held-out items, which are the same for all seeds, so that more seeds do not
shrink it. Two jobs are compared by the interval of their difference, paired by seed and question,
so that the difficulty of a question cancels.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.jobs import Setting
from rmt.evaluation.compare import paired, read_report
from rmt.evaluation.statistics import bootstrap, mean

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of n values, two-sided 95 %
Z95 = 1.96


@dataclass(frozen=True)
class Value:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.mean >= 100 else 1
        low, high = (f"{end:.{digits}f}" for end in (self.low, self.high))
        return f"{self.mean:.{digits}f} ({low}–{high})"


def value(of_seeds: list[float], item_error: float = 0.0) -> Value:
    """Return the mean over seeds with its interval; item_error: standard error over items."""
    mean, n = statistics.fmean(of_seeds), len(of_seeds)
    spread = T95.get(n, Z95) * statistics.stdev(of_seeds) / math.sqrt(n) if n > 1 else 0.0
    off = math.hypot(spread, Z95 * item_error)
    return Value(mean, mean - off, mean + off)


class Results:
    """Evaluations in out/SEED/JOB/EVALUATION.json, reduced over seeds."""

    def __init__(self, setting: Setting, out: Path):
        self.setting, self.out = setting, out

    def rows(self, job: str, evaluation: str, tier: str) -> list[dict]:
        """Return the row of a tier for each seed that has items of it."""
        files = (self.out / str(s) / job / f"{evaluation}.json" for s in self.setting.seeds)
        found = [json.loads(file.read_text())["tiers"] for file in files if file.exists()]
        return [row for rows in found for row in rows if row["tier"] == tier and row["n"]]

    def accuracy(self, job: str, evaluation: str, tier: str) -> Value | None:
        """Return accuracy in %; None if it was not measured."""
        rows = self.rows(job, evaluation, tier)
        if not rows:
            return None
        error = statistics.fmean((r["high"] - r["low"]) / (2 * Z95) for r in rows)
        return value([100 * r["accuracy"] for r in rows], 100 * error)

    def difference(
        self, better: tuple[str, str], worse: tuple[str, str], tier: str
    ) -> Value | None:
        """Return better − worse in percentage points, paired; None if one was not measured.

        better, worse: (job, evaluation).
        """
        found, clusters, changes = [], [], []
        for seed in self.setting.seeds:
            files = [self.out / str(seed) / j / f"{e}.json" for j, e in (better, worse)]
            if not all(file.exists() for file in files):
                return None
            pairs = paired(*(read_report(file)["items"] for file in reversed(files)))
            pairs = [p for p in pairs if tier in ("average", p[0]["tier"])]
            change = [new["match"] - old["match"] for old, new in pairs]
            clusters.append([old["document"] for old, _ in pairs])
            changes.append((change, [1.0] * len(pairs), [old["tier"] for old, _ in pairs]))
            found.append(100 * mean(*changes[-1]))
        documents = [document for part in clusters for document in part]  # the same for all seeds
        together = [[x for part in column for x in part] for column in zip(*changes)]
        low, high = bootstrap(documents, *together)
        return value(found, 100 * (high - low) / (2 * Z95))

    def mean(self, job: str, evaluation: str, column: str, tier: str, scale=1.0) -> Value | None:
        """Return the mean of a column over seeds; None if a seed does not have it."""
        found = [row[column] for row in self.rows(job, evaluation, tier)]
        return None if not found or None in found else value([scale * x for x in found])


def verdict(difference: Value | None) -> str:
    """Judge the claim that the difference is above 0."""
    if difference is None:
        return "not measured"
    if difference.low > 0:
        return "confirmed"
    return "refuted" if difference.high < 0 else "undecided"
