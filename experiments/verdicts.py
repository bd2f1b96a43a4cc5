"""What the study says: a verdict for each claim in each world, written to docs/study.md."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rmt.evaluation.statistics import Z, bootstrap

PAGE = Path("docs/study.md")
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of n values, by n - 1
EQUAL = 3.0  # points
WORLDS = ("none", "overthinking", "unequal-entropy", "unused-tokens", "all")
LEAST = 3  # seeds
CLAIMS = {  # the rival of RMT -> the claim, and the worlds in which the paper's reasons apply
    "without-budget": ("the budget pays", ("overthinking", "all")),
    "without-curriculum": ("the curriculum pays", ("unequal-entropy", "all")),
    "same-mixture": ("the order of the curriculum pays", ("unequal-entropy", "all")),
    "without-ntp": ("next-token prediction pays", ("unused-tokens", "all")),
    "rpt": ("RMT is better than RPT", WORLDS[1:]),
    "rft": ("RMT is better than supervised training on own right answers", WORLDS[1:]),
    "ntp": ("RMT is better than next-token training", WORLDS),
}  # fmt: skip
NOTE = """\
Differences are paired by seed and question. A 95 % interval has half-width √(a² + b²): a of the
mean over seeds (Student's t), b of the questions, which are the same for all seeds (bootstrap over
documents). **Confirmed**: the interval is above 0; **refuted**: below; **equal**: within ±3 points;
else undecided. Fewer than three seeds give no verdict. All seeds of a world share its model, so the
interval is of training, not of models. Nothing is corrected for many claims: of twenty cells
without a difference one would be called one."""
Stored = dict[str, dict]


@dataclass(frozen=True)
class Value:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int
    spread: float = 0.0  # standard deviation over seeds
    item_error: float = 0.0  # standard error over questions

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def verdict(self) -> str:
        if self.seeds < LEAST:
            return f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        if self.low > 0 or self.high < 0:
            return "confirmed" if self.low > 0 else "refuted"
        if max(-self.low, self.high) <= EQUAL:
            return "equal"
        return f"undecided, {self.needed}"

    @property
    def needed(self) -> str:
        """What would tell this difference from 0, or 0 from 3 points, in four of five tries."""
        size = max(abs(self.mean), EQUAL)
        if 1.43 * Z * self.item_error > size:  # 2.8 standard errors
            return "more questions"
        return f"~{max(self.seeds + 1, math.ceil((2.8 * self.spread / size) ** 2))} seeds"


def value(of_seeds: list[float], item_error: float = 0.0) -> Value:
    """Return the mean over seeds with its interval; item_error: standard error over questions."""
    n, spread = len(of_seeds), statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
    student = T95[n - 1] if n <= len(T95) else Z
    off = math.hypot(student * spread / math.sqrt(n), Z * item_error)
    mean = statistics.fmean(of_seeds)
    return Value(mean, mean - off, mean + off, n, spread, item_error)


def seeds_of(stored: Stored, world: str, method: str) -> set[int]:
    prefix = f"{world}/{method}/"
    return {int(name.removeprefix(prefix)) for name in stored if name.startswith(prefix)}


def answers(stored: Stored, world: str, method: str, seed: int, at: str, mode: str) -> dict:
    """Return what a job answered after its steps (at "") or at RMT's tokens ("-tokens")."""
    row = stored[f"{world}/{method}/{seed}"]
    return row.get(mode + at, row[mode])


def better_mode(stored: Stored, world: str, method: str, at: str) -> str:
    """With a thought (sampled) or plainly (the likeliest), whichever is right more often."""
    share = lambda mode: statistics.fmean(
        statistics.fmean(map(int, answers(stored, world, method, s, at, mode)["match"]))
        for s in seeds_of(stored, world, method)
    )
    return max(("thought", "plain"), key=share)


def difference(stored: Stored, world: str, rival: str, at: str) -> Value | None:
    """Return RMT − rival in points; None if no seed has both.

    Both with a thought; next-token training, which teaches no thought, in its better mode.
    """
    seeds = sorted(seeds_of(stored, world, "rmt") & seeds_of(stored, world, rival))
    if not seeds or not seeds_of(stored, world, "base"):
        return None
    base = stored[f"{world}/base/{min(seeds_of(stored, world, 'base'))}"]["thought"]
    mode = better_mode(stored, world, rival, at) if rival == "ntp" else "thought"
    means, changes = [], []
    for seed in seeds:
        ours = answers(stored, world, "rmt", seed, "", "thought")
        theirs = answers(stored, world, rival, seed, at, mode)
        if {ours["asked"], theirs["asked"]} != {base["asked"]}:
            raise ValueError(
                f"{world}/{rival}/{seed}, or RMT of that seed, answers other questions than the "
                "untrained model: lines of docs/study.jsonl are of different versions of the "
                "world; remove the older ones"
            )
        change = [int(a) - int(b) for a, b in zip(ours["match"], theirs["match"])]
        means.append(100 * statistics.fmean(change))
        changes.append(change)
    average = [statistics.fmean(column) for column in zip(*changes)]
    weights, tiers = [1.0] * len(average), list(base["tiers"])
    low, high = bootstrap(base["documents"], average, weights, tiers)
    return value(means, 100 * (high - low) / (2 * Z))


def cost(stored: Stored, world: str, rival: str, at: str) -> float:
    """Return the rival's tokens divided by RMT's, over the seeds that both have."""
    seeds = seeds_of(stored, world, "rmt") & seeds_of(stored, world, rival)
    of = lambda method, name: sum(
        row.get(name, row["tokens"]) for row in (stored[f"{world}/{method}/{s}"] for s in seeds)
    )
    return of(rival, f"tokens{at}") / of("rmt", "tokens")


def verdicts(stored: Stored, at: str) -> str:
    lines = []
    for rival, (claim, where) in CLAIMS.items():
        cells = []
        for world in WORLDS:
            found = difference(stored, world, rival, at)
            text = "–"
            if found is not None:
                times = cost(stored, world, rival, at)
                text = f"**{found.verdict}** {found}" + f", × {times:.2g} tokens" * (not at)
            cells.append(text + " †" * (world in where))
        lines.append([claim, *cells])
    return table(["RMT − rival, points", *WORLDS], lines)


def rate(found: dict, tiers: str, tier: str = "") -> float:
    """Return right answers in %, of one tier ("e", "m", "h") or of all."""
    own = [int(m) for m, t in zip(found["match"], tiers) if tier in ("", t)]
    return 100 * statistics.fmean(own) / found["samples"]


def accuracies(stored: Stored, world: str) -> str:
    """Return a row for each method, after its steps and at RMT's tokens: means over seeds."""
    first = min(seeds_of(stored, world, "base"))
    tiers, lines = stored[f"{world}/base/{first}"]["thought"]["tiers"], []
    for method in ("base", "rmt", *CLAIMS):
        seeds = sorted(seeds_of(stored, world, method))
        rows = [stored[f"{world}/{method}/{seed}"] for seed in seeds]
        measured = [at for at in ("", "-tokens") if any(f"thought{at}" in row for row in rows)]
        for at in measured:
            thought, plain = (
                [answers(stored, world, method, seed, at, mode) for seed in seeds]
                for mode in ("thought", "plain")
            )
            by_tier = [statistics.fmean(rate(f, tiers, tier) for f in thought) for tier in "emh"]
            spent = [row.get(f"tokens{at}", row.get("tokens", 0)) / 1e6 for row in rows]
            lines.append([
                method, "RMT's tokens" if at else "T steps" if method != "base" else "–",
                str(len(seeds)), *(f"{share:.1f}" for share in by_tier),
                *(spread([rate(f, tiers) for f in found]) for found in (thought, plain)),
                f"{statistics.fmean(f['thinking'] for f in thought):.0f}",
                f"{statistics.fmean(f['nats'] for f in plain):.3f}",
                f"{statistics.fmean(spent):.2f}" if method != "base" else "–",
            ])  # fmt: skip
    heads = ["", "at", "seeds", "easy", "medium", "hard", "average (seeds)", "plain (seeds)",
             "thinking tokens", "nats per token of text", "million tokens"]  # fmt: skip
    return table(heads, lines)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def obstacles(stored: Stored) -> str:
    lines = []
    for world in WORLDS:
        for seed in sorted(seeds_of(stored, world, "base")):
            row = stored[f"{world}/base/{seed}"]
            found, tiers = row["thought"], row["thought"]["tiers"]
            hard = [int(m) for m, t in zip(found["match"], tiers) if t == "h"]
            lines.append([
                world, f"{found['thinking']:.0f}", f"{found['correlation']:+.2f}",
                *(f"{rate(found, tiers, t):.1f}" for t in "emh"),
                f"{100 * hard.count(0) / len(hard):.0f}", f"{100 * row['coins']['same']:.0f}",
                f"{100 * row['coins']['changed']:.0f}" if "changed" in row["coins"] else "–",
            ])  # fmt: skip
    heads = ["untrained model", "thinking tokens", "correlation of length and match", "easy %",
             "medium %", "hard %", "hard groups of 4 all wrong %", "coins known %",
             "changed coins known %"]  # fmt: skip
    return table(heads, lines)


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [list(heads)]
    rows += [["---"] * len(rows[0]), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def provenance(stored: Stored) -> str:
    rows = [row for row in stored.values() if "commit" in row]
    if not rows:
        return "<sub>nothing was run yet</sub>"
    unique = lambda name: ", ".join(dict.fromkeys(row[name] for row in rows))
    minutes = sum(row["minutes"] for row in stored.values())
    return (
        f"<sub>{len(stored)} jobs, {minutes / 60:.1f} hours of a core; {unique('device')}; torch "
        f"{unique('torch')}; commits {unique('commit')}. Each job's command, curves and answers: "
        "docs/study.jsonl</sub>"
    )


def write_page(stored: Stored) -> str:
    """Write docs/study.md; return it."""
    parts = [
        "# When does each part pay?",
        "Written by `make study` ([study.py](../experiments/study.py), "
        "[verdicts.py](../experiments/verdicts.py)); the worlds: "
        "[worlds.py](../assets/worlds.py).",
        "## The obstacles, measured on the untrained models", obstacles(stored),
        "## Verdicts at equal steps", verdicts(stored, ""),
        "RMT − rival, points of 600 held-out questions, with a thought (sampled at 0.8); "
        "next-token training in its better mode. † the paper's reason for the part applies in "
        f"this world. {NOTE}",
        "## Verdicts at equal tokens", verdicts(stored, "-tokens"),
        "Where a rival's T steps cost 5 % more or less tokens than RMT's, it was run again for as "
        "many steps as cost the same, with its schedules ending there.",
    ]  # fmt: skip
    for world in WORLDS:
        if seeds_of(stored, world, "rmt"):
            parts += [f"## {world}: right with a thought, %", accuracies(stored, world)]
    page = "\n\n".join([*parts, provenance(stored)]) + "\n"
    PAGE.write_text(page, encoding="utf-8")
    return page
