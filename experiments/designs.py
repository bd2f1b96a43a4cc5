"""Two-level designs: how much each setting matters, found from a few runs of RMT.

HAZARD asks when the length reward outweighs the match, and what each cure costs: five settings in
16 runs, the fifth high where an odd number of the others is (2^(5-1), resolution V: no effect of
one or two settings is mixed with another such). SCREEN asks what matters at all: nine settings in
twelve runs (Plackett & Burman 1946), each effect clear of the others but not of what pairs of
settings do together. An effect is the mean of the runs with the high value less that with the low.
Seeds are blocks: an effect is computed with each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from experiments.verdicts import Stored, rate, seeds_of, student, table, untrained

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    name: str
    values: tuple[str, str]  # low and high, in words
    high: Flags
    low: Flags = ()  # as in the study's RMT
    tiers: tuple[str, str] | None = None  # to which it confines training: "em", "h"


@dataclass(frozen=True)
class Design:
    name: str
    world: str
    settings: tuple[Setting, ...]
    levels: tuple[tuple[int, ...], ...]  # of each run: 0 or 1 for each setting
    pairs: bool  # whether effects of two settings together can be told

    @property
    def runs(self) -> dict[str, Flags]:
        """Return method -> flags; the run whose settings are all RMT's is RMT."""
        found = {}
        for levels in self.levels:
            chosen = (s.high if level else s.low for s, level in zip(self.settings, levels))
            flags = tuple(word for setting in chosen for word in setting)
            found[self.name + "-" + "".join(map(str, levels)) if flags else "rmt"] = flags
        return found

    @property
    def tiers(self) -> dict[str, str]:
        """Return method -> the tiers that it trains, whose questions count; "" are all."""
        each = (zip(self.settings, levels) for levels in self.levels)
        found = (next((s.tiers[level] for s, level in run if s.tiers), "") for run in each)
        return dict(zip(self.runs, found))


def plackett_burman(settings: int) -> tuple[tuple[int, ...], ...]:
    """Return the levels of up to eleven settings in twelve runs."""
    row = (1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0)
    return (*((row[-k:] + row[:-k])[:settings] for k in range(11)), (0,) * settings)


HAZARD = Design(
    "hazard", "unequal-entropy",
    (
        Setting("w", ("0.1", "0.3"), ("--length-weight", "0.3")),
        Setting("length reward for", ("all", "right ones"),
                ("--length-reward-gate", "correct_only"), ("--length-reward-gate", "none")),
        Setting("Eq. 7 divides by the deviation of", ("group", "batch"),
                ("--advantage-norm", "batch"), ("--advantage-norm", "group")),
        Setting("B_T (the work takes 29)", ("30", "10"), ("--budget-decay", "0.3334")),
        Setting("tiers, right when untrained", ("easy and medium, 26 %", "hard, 4 %"),
                ("--curriculum-early", "0", "0", "1", "--curriculum-late", "0", "0", "1"),
                ("--curriculum-early", ".5", ".5", "0", "--curriculum-late", ".5", ".5", "0"),
                ("em", "h")),
    ),
    tuple((*four, sum(four) % 2) for four in product((0, 1), repeat=4)), pairs=True,
)  # fmt: skip
WORST = "hazard-00011"  # as printed, few right answers, a budget that is too small
CURES = {  # other ones
    "hazard-none": (*HAZARD.runs[WORST], "--advantage-norm", "none"),
    "hazard-drop": (*HAZARD.runs[WORST], "--zero-variance-groups", "drop"),
}
SCREEN = Design(
    "screen", "unequal-entropy",
    (
        Setting("w", ("0.1", "0.3"), ("--length-weight", "0.3")),
        Setting("λ", ("1", "0.3"), ("--ntp-weight", "0.3")),
        Setting("t1, t2", ("0.3, 0.7", "0, 0.5"),
                ("--curriculum-start", "0", "--curriculum-end", "0.5")),
        Setting("p_early", ("0.6 0.3 0.1", "0.4 0.4 0.2"),
                ("--curriculum-early", "0.4", "0.4", "0.2")),
        Setting("p_late", ("0.1 0.3 0.6", "0.2 0.4 0.4"),
                ("--curriculum-late", "0.2", "0.4", "0.4")),
        Setting("lower ends of the tiers", ("0.5 1 1.5", "0.5 1 2"),
                ("--tier-thresholds", "0.5", "1", "2")),
        Setting("G", ("8", "4"), ("--group-size", "4")),
        Setting("temperature", ("0.8", "1"), ("--temperature", "1")),
        Setting("warm-up", ("10 steps", "none"), ("--warmup-steps", "0")),
    ),
    plackett_burman(9), pairs=False,
)  # fmt: skip
DESIGNS = (HAZARD, SCREEN)
# Tiers as often as the curriculum draws them over 60 steps, at every step.
MIXED = ("--curriculum-early", ".35", ".3", ".35", "--curriculum-late", ".35", ".3", ".35")
# Does the gain survive post-training, by RL without a budget and without text? What came before it.
POST = {"post-untrained": "base", "post-rmt": "rmt", "post-ntp": "ntp"}
POST_WORLD, POST_STEPS = "unused-tokens", 60  # to half-way
# RMT in more steps where it has not ended after the study's, and next-token training beside it.
LONGER_WORLD, LONGER = "all", {"longer-180": 180, "longer-540": 540}


def seeds_with_all(stored: Stored, design: Design) -> list[int]:
    """Return the seeds of which every run of the design is stored."""
    return sorted(set.intersection(*(seeds_of(stored, design.world, m) for m in design.runs)))


@dataclass(frozen=True)
class Effect:
    """What a high value changes: right answers in points, with each seed; thinking tokens."""

    of_seeds: list[float]
    tokens: float

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval (Student's t over seeds, which are blocks) is without 0."""
        n = len(self.of_seeds)
        off = student(n - 1) * np.std(self.of_seeds, ddof=1) / n**0.5 if n > 1 else np.inf
        return bool(abs(np.mean(self.of_seeds)) > off)


def effects(stored: Stored, design: Design) -> dict[str, Effect]:
    """Return the effects of each setting, and of each two."""
    seeds, base = seeds_with_all(stored, design), untrained(stored, design.world)
    of = lambda method: (stored[f"{design.world}/{method}/{seed}"]["thought"] for seed in seeds)
    right = np.array(
        [[rate(f, base["tiers"], own) for f in of(m)] for m, own in design.tiers.items()]
    )
    length = np.array([[f["thinking"] for f in of(method)] for method in design.runs])
    sign = 2 * np.array(design.levels) - 1
    columns = {setting.name: sign[:, k] for k, setting in enumerate(design.settings)}
    if design.pairs:
        for (a, i), (b, j) in combinations(enumerate(design.settings), 2):
            columns[f"{i.name} and {j.name}"] = sign[:, a] * sign[:, b]
    change = lambda of_runs, column: of_runs[column > 0].mean(0) - of_runs[column < 0].mean(0)
    return {
        name: Effect(change(right, column).tolist(), float(change(length, column).mean()))
        for name, column in columns.items()
    }


def effect_table(stored: Stored, design: Design) -> str:
    values = {s.name: " → ".join(s.values) for s in design.settings}
    lines = []
    for name, effect in effects(stored, design).items():
        mean = f"{np.mean(effect.of_seeds):+.1f}"
        each = ", ".join(f"{x:+.1f}" for x in effect.of_seeds)
        lines.append([name, values.get(name, ""), f"**{mean}**" if effect.clear else mean, each,
                      f"{effect.tokens:+.0f}"])  # fmt: skip
    heads = ["setting", "low → high", "right, points", "with each seed", "thinking tokens"]
    return table(heads, lines)


def run_table(stored: Stored, design: Design, more: Sequence[str] = ()) -> str:
    """Return a row for each run: its settings, and what it came to."""
    tiers = untrained(stored, design.world)["tiers"]
    worded = {
        method: [s.values[level] for s, level in zip(design.settings, levels)]
        for method, levels in zip(design.runs, design.levels)
    }
    worded |= {method: [method, *[""] * (len(design.settings) - 1)] for method in more}
    lines, common = [], set(seeds_with_all(stored, design))
    for method, words in worded.items():
        own = seeds_of(stored, design.world, method)
        seeds, asked = (
            sorted(own & common or own),
            design.tiers.get(method, design.tiers.get(WORST)),
        )
        rows = [stored[f"{design.world}/{method}/{seed}"] for seed in seeds]
        if not rows:
            continue
        early, late = (
            {n: _mean(rows, n, last) for n in rows[0]["curves"]} for last in (False, True)
        )
        lines.append([
            *words, str(len(seeds)),
            ", ".join(f"{rate(row['thought'], tiers, asked):.1f}" for row in rows),
            f"{np.mean([row['thought']['thinking'] for row in rows]):.0f}",
            f"{100 * np.mean([row['thought']['well_formed'] for row in rows]):.0f}",
            f"{100 * early['share/advantage_from_length']:.0f}",
            f"{100 * early['reward/match']:.0f} → {100 * late['reward/match']:.0f}",
        ])  # fmt: skip
    heads = [s.name for s in design.settings] + [
        "seeds", "right, %, of each", "thinking tokens", "well-formed %",
        "variance of advantages from length, first fifth of the steps, %",
        "match in training, first → last fifth, %",
    ]  # fmt: skip
    return table(heads, lines)


def _mean(rows: Sequence[dict], name: str, last: bool) -> float:
    """Return the mean of a curve over the first or the last fifth of the steps of all runs."""
    curves = [row["curves"][name] for row in rows]
    fifths = [-(-len(curve) // 5) for curve in curves]
    parts = (c[-n:] if last else c[:n] for c, n in zip(curves, fifths))
    return float(np.mean([x for part in parts for x in part if x is not None]))
