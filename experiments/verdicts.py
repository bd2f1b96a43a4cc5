"""What the study says: a verdict for each claim in each world."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from rmt.evaluation.statistics import Z, bootstrap

EQUAL = 3.0  # points
# Standard errors that are told from 0 in four of five tries; that 0 is told to be within EQUAL.
POWER, POWER_EQUAL = 2.8, 3.24
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom
WORLDS = ("none", "overthinking", "unequal-entropy", "unused-tokens", "all")
LEAST, MOST = 3, 20  # seeds: for a verdict; that a guess from so few can name


@dataclass(frozen=True)
class Claim:
    """That RMT is better than a rival, which is asked in some worlds."""

    rival: str  # in words
    reasons: tuple[str, ...] = ()  # the worlds in which the paper's reasons for it apply
    worlds: tuple[str, ...] = WORLDS


CLAIMS = {  # of the rival
    "as-printed": Claim("RMT with Eq. 6, 7 as printed"),
    "ungated": Claim("RMT with Eq. 6 as printed", worlds=("all",)),
    "group-norm": Claim("RMT with Eq. 7 as printed", worlds=("all",)),
    "without-budget": Claim("RMT without a budget", ("overthinking", "all")),
    "without-curriculum": Claim("RMT without a curriculum", ("unequal-entropy", "all")),
    "same-mixture": Claim(
        "RMT with its tiers in no order",
        ("unequal-entropy", "all"),
        ("none", "unequal-entropy", "all"),
    ),
    "without-ntp": Claim("RMT without next-token prediction", ("unused-tokens", "all")),
    "rpt": Claim("RPT", WORLDS[1:]),
    "rft": Claim("training on own right answers", WORLDS[1:]),
    "ntp": Claim("next-token training", WORLDS),
    "big-batch": Claim("the same in RMT's number of updates", *2 * (("all",),)),
    "rlp": Claim("RLP", WORLDS[1:]),
}
BEYOND = {
    "entropy-budget": Claim("budgets by entropy (Eq. 13)", worlds=("overthinking", "all")),
}
PLAIN = ("ntp", "big-batch")  # next-token training: no thought is taught
Stored = dict[str, dict]


@dataclass(frozen=True)
class Value:
    """A difference of means over seeds with its 95 % interval; seeds: the fewer of both."""

    mean: float
    low: float
    high: float
    seeds: int
    spread: float = 0.0  # standard deviation of what single seeds come to
    item_error: float = 0.0  # standard error over questions, which more seeds do not lower

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.mean:+.1f}"
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
    def brief(self) -> str:
        """The mean in points, bold where its interval is without 0."""
        mean = f"{round(self.mean):+d}" if round(self.mean) else "0"
        return f"**{mean}**" if self.low > 0 or self.high < 0 else mean

    @property
    def needed(self) -> str:
        """What would decide in four of five tries, were the mean and the spread the true ones."""
        error = max(abs(self.mean) / POWER, (EQUAL - abs(self.mean)) / POWER_EQUAL)
        of_seeds = max(1e-12, error**2 - self.item_error**2)
        seeds = max(self.seeds + 1, math.ceil(self.spread**2 / of_seeds) + 2)
        return f"~{seeds} seeds" if seeds <= MOST else f"more than {MOST} seeds"


def student(freedom: float) -> float:
    """Return Student's t for a 95 % interval, to three digits (Abramowitz & Stegun 26.7.5).

    Below 9 degrees of freedom interpolated in their inverse: up to 2 % too large from 2 on.
    """
    if freedom < len(T95) - 1:
        below = int(freedom)
        share = (1 / below - 1 / freedom) * below * (below + 1)
        return T95[below] + share * (T95[below + 1] - T95[below])
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def value(ours: list[float], theirs: list[float], item_error: float = 0.0) -> Value:
    """Return ours − theirs, means over seeds, with Welch's interval.

    item_error: standard error over questions.
    """
    n, spread, off = min(len(ours), len(theirs)), 0.0, math.inf  # of one seed nothing is known
    if n > 1:
        both = [(statistics.variance(x), len(x)) for x in (ours, theirs)]
        error = sum(v / k for v, k in both)
        freedom = error**2 / max(1e-12, sum((v / k) ** 2 / (k - 1) for v, k in both))
        spread = math.sqrt(sum(v for v, _ in both))
        off = math.hypot(student(max(1.0, freedom)) * math.sqrt(error), Z * item_error)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    return Value(mean, mean - off, mean + off, n, spread, item_error)


def seeds_of(stored: Stored, world: str, method: str) -> set[int]:
    prefix = f"{world}/{method}/"
    return {int(name.removeprefix(prefix)) for name in stored if name.startswith(prefix)}


def untrained(stored: Stored, world: str, mode: str = "thought") -> dict | None:
    """Return what the untrained model answered with a thought, or plainly; None: not stored."""
    seeds = seeds_of(stored, world, "base")
    return stored[f"{world}/base/{min(seeds)}"][mode] if seeds else None


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
    """Return RMT − rival in points, over all seeds of each; None if one has none.

    Both with a thought; next-token training, which teaches no thought, in its better mode.
    """
    if not all(seeds_of(stored, world, method) for method in ("base", "rmt", rival)):
        return None
    base, right = untrained(stored, world), []
    mode = better_mode(stored, world, rival, at) if rival in PLAIN else "thought"
    for method, when, how in (("rmt", "", "thought"), (rival, at, mode)):
        rows = []
        for seed in sorted(seeds_of(stored, world, method)):
            answer = answers(stored, world, method, seed, when, how)
            if answer["asked"] != base["asked"]:
                raise ValueError(
                    f"{world}/{method}/{seed} answers other questions than the untrained model: "
                    "lines of docs/study.jsonl are of different versions of the world; remove "
                    "the older ones"
                )
            rows.append([100 * int(m) for m in answer["match"]])
        right.append(rows)
    by_question = [[statistics.fmean(q) for q in zip(*rows)] for rows in right]
    change = [a - b for a, b in zip(*by_question)]
    low, high = bootstrap(base["documents"], change, [1.0] * len(change), list(base["tiers"]))
    by_seed = [[statistics.fmean(row) for row in rows] for rows in right]
    return value(*by_seed, (high - low) / (2 * Z))


def cost(stored: Stored, world: str, rival: str, at: str) -> str:
    """Return the rival's tokens divided by RMT's of that seed: lowest and highest."""
    seeds = seeds_of(stored, world, "rmt") & seeds_of(stored, world, rival)
    rows = [(stored[f"{world}/rmt/{s}"], stored[f"{world}/{rival}/{s}"]) for s in seeds]
    times = [row.get(f"tokens{at}", row["tokens"]) / ours["tokens"] for ours, row in rows]
    return "–".join(dict.fromkeys(f"{x:.2f}" for x in (min(times), max(times))))


def thinking(stored: Stored, world: str, method: str, at: str) -> float:
    """Return a method's mean thinking tokens."""
    seeds = seeds_of(stored, world, method)
    found = (answers(stored, world, method, seed, at, "thought") for seed in seeds)
    return statistics.fmean(answer["thinking"] for answer in found)


def verdicts(stored: Stored, claims: dict[str, Claim], at: str) -> str:
    """Return a line for each claim, a cell for each world: after T steps, or at RMT's tokens."""
    lines = []
    for rival, claim in claims.items():
        cells = []
        for world in WORLDS:
            found = difference(stored, world, rival, at)
            text = "–"
            if found is not None:
                said = found if found.seeds >= LEAST else f"{found.mean:+.1f}"
                tokens = thinking(stored, world, "rmt", ""), thinking(stored, world, rival, at)
                text = f"**{found.verdict}** {said}; thinks {tokens[0]:.0f} : {tokens[1]:.0f}"
                text += f"; × {cost(stored, world, rival, at)} tokens"
            cells.append(text + " †" * (world in claim.reasons))
        lines.append([f"{claim.rival} (*{rival}*)", *cells])
    return table(["RMT − …, points", *WORLDS], lines)


def rate(found: dict, tiers: str, tier: str = "") -> float:
    """Return right answers in %, of some tiers ("e", "m", "h", "em") or of all."""
    own = [int(m) for m, t in zip(found["match"], tiers) if t in (tier or t)]
    return 100 * statistics.fmean(own) / found["samples"]


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows, lines = [list(heads)], list(lines)
    if not lines:
        return "Not measured yet."
    rows += [["---"] * len(rows[0]), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
