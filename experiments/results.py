"""What the evaluations of all seeds found, as means with intervals.

An interval has two parts, added as squares: of the mean over seeds, with Student's t; and of the
held-out items, which all seeds answer, so that more seeds do not make it smaller. With three seeds
t is 4.3. Two jobs are compared by the interval of their difference, seed by seed and question by
question: the questions are the same, so what makes one hard for both does not count.
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
    """Mean and interval of a number that each seed has; item_error: its standard error by items."""
    mean, n = statistics.fmean(of_seeds), len(of_seeds)
    spread = T95.get(n, Z95) * statistics.stdev(of_seeds) / math.sqrt(n) if n > 1 else 0.0
    off = math.hypot(spread, Z95 * item_error)
    return Value(mean, mean - off, mean + off)


class Results:
    """Evaluations in out/SEED/JOB/EVALUATION.json."""

    def __init__(self, setting: Setting, out: Path):
        self.setting, self.out = setting, out

    def rows(self, job: str, evaluation: str, tier: str) -> list[dict]:
        """Of each seed that has it: the row of a tier that has items."""
        files = (self.out / str(s) / job / f"{evaluation}.json" for s in self.setting.seeds)
        found = [json.loads(file.read_text())["tiers"] for file in files if file.exists()]
        return [row for rows in found for row in rows if row["tier"] == tier and row["n"]]

    def accuracy(self, job: str, evaluation: str, tier: str) -> Value | None:
        """In %; None if it was not measured."""
        rows = self.rows(job, evaluation, tier)
        if not rows:
            return None
        error = statistics.fmean((r["high"] - r["low"]) / (2 * Z95) for r in rows)
        return value([100 * r["accuracy"] for r in rows], 100 * error)

    def difference(
        self, better: tuple[str, str], worse: tuple[str, str], tier: str
    ) -> Value | None:
        """In points of %, of two (job, evaluation), paired by seed and question; None without."""
        found, clusters, changes = [], [], []
        for seed in self.setting.seeds:
            files = [self.out / str(seed) / j / f"{e}.json" for j, e in (better, worse)]
            if not all(file.exists() for file in files):
                return None
            pairs = paired(*(read_report(file)["items"] for file in reversed(files)))
            pairs = [p for p in pairs if tier in ("average", p[0]["tier"])]
            change = [int(new["match"]) - int(old["match"]) for old, new in pairs]
            clusters.append([old["document"] for old, _ in pairs])
            changes.append((change, [1.0] * len(pairs), [old["tier"] for old, _ in pairs]))
            found.append(100 * mean(*changes[-1]))
        documents = [document for part in clusters for document in part]  # the same of all seeds
        together = [[x for part in column for x in part] for column in zip(*changes)]
        low, high = bootstrap(documents, *together)
        return value(found, 100 * (high - low) / (2 * Z95))

    def mean(self, job: str, evaluation: str, column: str, tier: str, scale=1.0) -> Value | None:
        """Of a column of the evaluations, over seeds; None if a seed does not have it."""
        found = [row[column] for row in self.rows(job, evaluation, tier)]
        return None if not found or None in found else value([scale * x for x in found])


def verdict(difference: Value | None) -> str:
    """Of the claim that it is above 0."""
    if difference is None:
        return "not measured"
    if difference.low > 0:
        return "confirmed"
    return "refuted" if difference.high < 0 else "undecided"
