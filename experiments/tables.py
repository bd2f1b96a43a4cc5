"""The tables of `make paper`: means over seeds with intervals, the paper's numbers, and verdicts.

An interval has two parts, added as squares: of the mean over seeds, with Student's t; and of the
held-out items, which all seeds answer, so that more seeds do not make it smaller. With three seeds
t is 4.3: an interval that excludes another says something.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.jobs import Row, Setting
from rmt.curriculum import TIERS

COLUMNS = (*TIERS, "average")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of n values, two-sided 95 %
Z95 = 1.96

MAIN = [
    Row("next token, untrained (NTP)", "base", "plain", (47.89, 34.61, 25.01, 35.84)),
    Row("next token, trained on RMT's tokens", "ntp-tokens", "text"),
    Row("next token, trained for RMT's minutes", "ntp-minutes", "text"),
    Row("thinking, untrained (NTR)", "base", "text", (8.47, 5.08, 4.51, 6.02, 1577)),
    Row("thinking on a budget, untrained", "base", "budget"),
    Row("RPT", "rpt", "text", (48.67, 35.84, 23.03, 35.85, 872)),
    Row("**RMT**", "rmt", "text", (76.92, 55.79, 44.64, 59.12, 186)),
]
ABLATIONS = [
    Row("**RMT**", "rmt", "text", (62.50, 43.96, 34.14, 46.87)),
    Row("without the budget (DTB)", "without-budget", "text", (60.35, 32.79, 27.59, 40.24)),
    Row("without the curriculum (CAS)", "without-curriculum", "text", (59.32, 42.66, 27.68, 43.22)),
    Row("without next-token prediction", "without-ntp", "text", (40.00, 34.26, 27.27, 33.84)),
    Row("next-token prediction alone, RMT's tokens", "ntp-tokens", "text"),
]
OTHER = [  # text of another domain, see experiments/jobs.py
    Row("next token, untrained", "base", "other-plain"),
    Row("next token, trained on RMT's tokens", "ntp-tokens", "other"),
    Row("thinking, untrained", "base", "other"),
    Row("RPT", "rpt", "other"),
    Row("**RMT**", "rmt", "other"),
]
POST = [  # before and after, of Qwen3 where the paper has it
    ("instruct model", "base", (12.84, 54.17)),
    ("NTP, RMT's tokens", "ntp-tokens", ()),
    ("RPT", "rpt", (23.17, 48.50)),
    ("**RMT**", "rmt", (25.17, 64.33)),
]


@dataclass(frozen=True)
class Value:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f}–{self.high:.1f})"


def value(of_seeds: list[float], item_error: float = 0.0) -> Value:
    """Mean and interval of a number that each seed has; item_error: its standard error by items."""
    mean, n = statistics.fmean(of_seeds), len(of_seeds)
    spread = T95.get(n, Z95) * statistics.stdev(of_seeds) / math.sqrt(n) if n > 1 else 0.0
    off = math.hypot(spread, Z95 * item_error)
    return Value(mean, mean - off, mean + off, n)


class Results:
    """What the evaluations of all seeds found."""

    def __init__(self, setting: Setting, out: Path):
        self.setting, self.out = setting, out

    def rows(self, job: str, evaluation: str) -> list[dict[str, dict]]:
        """By seed that has it: the rows of an evaluation by tier."""
        files = (self.out / str(s) / job / f"{evaluation}.json" for s in self.setting.seeds)
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        return [{row["tier"]: row for row in report["tiers"]} for report in found]

    def accuracy(self, job: str, evaluation: str, tier: str) -> Value | None:
        rows = [r[tier] for r in self.rows(job, evaluation) if tier in r and r[tier]["n"]]
        if not rows:
            return None
        error = statistics.fmean((r["high"] - r["low"]) / (2 * Z95) for r in rows)
        return value([100 * r["accuracy"] for r in rows], 100 * error)

    def length(self, job: str, evaluation: str) -> Value | None:
        rows = [r["average"]["thinking_length"] for r in self.rows(job, evaluation)]
        return value(rows) if rows and None not in rows else None


def accuracy_table(results: Results, rows: list[Row]) -> list[str]:
    lines = ["| accuracy %, 95 % interval · *paper* | easy | medium | hard | average | thinking |",
             "|---|---|---|---|---|---:|"]  # fmt: skip
    for row in rows:
        found = [results.accuracy(row.job, row.eval, tier) for tier in COLUMNS]
        found.append(results.length(row.job, row.eval))
        paper = [*row.paper, *[None] * (5 - len(row.paper))]
        cells = []
        for here, there in zip(found, paper):
            cell = "–" if here is None else str(here)
            cells.append(cell if there is None else f"{cell} · *{there:g}*")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return lines


def post_table(results: Results) -> list[str]:
    lines = ["| problems solved %, 95 % interval · *paper* | before | after |", "|---|---|---|"]
    for title, start, paper in POST:
        cells = []
        for i, when in enumerate(("before", "after")):
            found = results.accuracy(f"{start}-{when}", "problems", "problems")
            cell = "–" if found is None else str(found)
            cells.append(f"{cell} · *{paper[i]:g}*" if paper else cell)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def verdict(better: Value | None, worse: Value | None) -> str:
    if better is None or worse is None:
        return "not measured"
    if better.low > worse.high:
        return "confirmed"
    return "refuted" if better.high < worse.low else "undecided"


def claims(results: Results) -> list[str]:
    """A plain sentence for each claim of the paper, with what was found here."""
    average = lambda job, evaluation="text": results.accuracy(job, evaluation, "average")
    solved = lambda job: results.accuracy(f"{job}-after", "problems", "problems")
    rmt, lines = average("rmt"), []
    for title, better, worse in (
        ("RMT predicts more tokens rightly than RPT", rmt, average("rpt")),
        ("RMT predicts more tokens rightly than thinking untrained (NTR)", rmt, average("base")),
        ("RMT predicts more tokens rightly than the plain next token (NTP)", rmt,
         average("base", "plain")),
        ("RMT predicts more tokens rightly than training on the same tokens by NTP alone", rmt,
         average("ntp-tokens")),
        ("the budget helps", rmt, average("without-budget")),
        ("the curriculum helps", rmt, average("without-curriculum")),
        ("next-token prediction helps", rmt, average("without-ntp")),
        ("post-training ends higher from RMT than from the instruct model", solved("rmt"),
         solved("base")),
        ("post-training ends higher from RMT than from RPT", solved("rmt"), solved("rpt")),
    ):  # fmt: skip
        shown = f"{better} against {worse}" if better and worse else "–"
        lines.append(f"- {title}: **{verdict(better, worse)}** here ({shown}).")
    lengths = [results.length(job, "text") for job in ("rmt", "rpt")]
    if all(lengths):
        share = lengths[0].mean / lengths[1].mean
        lines.append(
            f"- RMT thinks for a fifth of RPT's length: **{share:.0%}** here "
            f"({lengths[0].mean:.0f} of {lengths[1].mean:.0f} tokens; in the paper 186 of 872)."
        )
    return lines


def write_tables(setting: Setting, name: str, out: Path) -> str:
    """All tables as Markdown, also put into docs/paper-NAME.md and between README.md's markers."""
    results = Results(setting, out)
    text = "\n".join([
        *accuracy_table(results, MAIN), "", *accuracy_table(results, ABLATIONS), "",
        "Text of another domain:", "", *accuracy_table(results, OTHER), "", *post_table(results),
        "",
        "*Italics*: the paper's own numbers, of Qwen3-14B (ablations: of R1-Distill-Qwen-14B) on "
        "Omni-MATH; \"thinking\" is the mean length, in the paper of the whole response.", "",
        *claims(results), "", provenance(setting, name, out),
    ])  # fmt: skip
    Path(f"docs/paper-{name}.md").write_text(text + "\n", encoding="utf-8")
    readme, begin, end = Path("README.md"), f"<!-- paper {name} -->", f"<!-- /paper {name} -->"
    old = readme.read_text(encoding="utf-8")
    if begin in old and end in old:
        new = f"{old.split(begin)[0]}{begin}\n{text}\n{end}{old.split(end)[1]}"
        readme.write_text(new, encoding="utf-8")
    return text


def provenance(setting: Setting, name: str, out: Path) -> str:
    """Hardware, versions, seeds and time: what the numbers depend on."""
    runs = sorted(out.glob("*/rmt/run.json"))
    if not runs:
        return "<sub>nothing was run yet</sub>"
    about = json.loads(runs[0].read_text())
    minutes = [json.loads(f.read_text())["minutes"] for f in out.glob("*/*/done.json")]
    return (
        f"<sub>`make paper{'' if name == 'tiny' else f' MODEL={name}'}`: seeds "
        f"{', '.join(map(str, setting.seeds))}; {setting.steps} steps, {setting.post_steps} of "
        f"post-training; {about['device']}, torch {about['torch']}, commit {about['commit']}; "
        f"{len(minutes)} jobs, {sum(minutes):.0f} minutes of one job at a time. Commands and times "
        f"of each are in runs/paper/{name}/SEED/JOB/done.json.</sub>"
    )
