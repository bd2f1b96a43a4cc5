"""Two-level designs: how much each setting matters, found from a few runs of RMT.

HAZARD asks when the length reward outweighs the match, and what each cure costs: five settings in
16 runs, the fifth high where an odd number of the others is (2^(5-1), resolution V: no effect of
one or two settings is mixed with another such). SCREEN asks what matters at all: nine settings in
twelve runs (Plackett & Burman 1946), each effect clear of the others but not of what pairs of
settings do together. An effect is the mean of the runs with the high value less that with the low.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from experiments.verdicts import Stored, Value, rate, seeds_of, student, table, untrained
from rmt.evaluation.statistics import Z, bootstrap

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    name: str
    values: tuple[str, str]  # low and high, in words
    high: Flags
    low: Flags = ()  # as in the study's RMT


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
        Setting("right at the start", ("25 %", "4 %"),
                ("--curriculum-early", "0", "0", "1", "--curriculum-late", "0", "0", "1"),
                ("--curriculum-early", ".5", ".5", "0", "--curriculum-late", ".5", ".5", "0")),
    ),
    tuple((*four, sum(four) % 2) for four in product((0, 1), repeat=4)), pairs=True,
)  # fmt: skip
CURES = {  # other ones, of the worst case: few right answers, a budget that is too small
    "hazard-none": (*HAZARD.runs["hazard-00011"], "--advantage-norm", "none"),
    "hazard-drop": (*HAZARD.runs["hazard-00011"], "--zero-variance-groups", "drop"),
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
# Does the gain survive post-training, by RL without a budget and without text? What came before it.
POST = {"post-untrained": "base", "post-rmt": "rmt", "post-ntp": "ntp"}
POST_WORLD, POST_STEPS = "unused-tokens", 60  # to half-way


def seeds_with_all(stored: Stored, design: Design) -> list[int]:
    """Return the seeds of which every run of the design is stored."""
    return sorted(set.intersection(*(seeds_of(stored, design.world, m) for m in design.runs)))


def effects(stored: Stored, design: Design) -> dict[str, tuple[Value, float]]:
    """Return the effects: on right answers, in points with a 95 % interval, and on thinking tokens.

    The interval has the variances between seeds, with Satterthwaite's degrees of freedom, and that
    of the questions.
    """
    seeds = seeds_with_all(stored, design)
    base = untrained(stored, design.world)
    rows = [
        [stored[f"{design.world}/{method}/{seed}"]["thought"] for seed in seeds]
        for method in design.runs
    ]
    right = 100 * np.array([[list(map(int, f["match"])) for f in row] for row in rows])  # N, S, Q
    length = np.array([[f["thinking"] for f in row] for row in rows])
    if len(seeds) > 1:
        variances = right.mean(axis=2).var(axis=1, ddof=1)  # runs that collapse have more
        freedom = (len(seeds) - 1) * variances.sum() ** 2 / max(1e-9, (variances**2).sum())
        error = 2 * (variances.mean() / (len(rows) * len(seeds))) ** 0.5
        noise = student(max(1, int(freedom))) * error
    sign = 2 * np.array(design.levels) - 1
    columns = {(setting.name,): sign[:, k] for k, setting in enumerate(design.settings)}
    if design.pairs:
        for (a, i), (b, j) in combinations(enumerate(design.settings), 2):
            columns[i.name, j.name] = sign[:, a] * sign[:, b]
    found = {}
    for names, column in columns.items():
        change = lambda of_runs, column=column: (
            of_runs[column > 0].mean(axis=0) - of_runs[column < 0].mean(axis=0)
        )
        of_questions = change(right.mean(axis=1))
        low, high = bootstrap(
            base["documents"], of_questions, [1.0] * len(of_questions), list(base["tiers"])
        )
        mean, questions = of_questions.mean(), (high - low) / (2 * Z)
        off = np.hypot(Z * questions, noise) if len(seeds) > 1 else np.inf
        effect = Value(mean, mean - off, mean + off, len(seeds))
        found[" and ".join(names)] = effect, change(length.mean(axis=1))
    return found


def effect_table(stored: Stored, design: Design) -> str:
    values = {s.name: " → ".join(s.values) for s in design.settings}
    lines = []
    for name, (effect, tokens) in effects(stored, design).items():
        clear = effect.low > 0 or effect.high < 0
        said = str(effect) if np.isfinite(effect.low) else f"{effect.mean:+.1f} (1 seed)"
        lines.append([name, values.get(name, ""), f"**{said}**" if clear else said,
                      f"{tokens:+.0f}"])  # fmt: skip
    return table(["setting", "low → high", "right, points", "thinking tokens"], lines)


def run_table(stored: Stored, design: Design, more: Sequence[str] = ()) -> str:
    """Return a row for each run: its settings, and what it came to."""
    tiers = untrained(stored, design.world)["tiers"]
    worded = {
        method: [s.values[level] for s, level in zip(design.settings, levels)]
        for method, levels in zip(design.runs, design.levels)
    }
    worded |= {method: [method, *[""] * (len(design.settings) - 1)] for method in more}
    lines = []
    for method, words in worded.items():
        seeds = sorted(seeds_of(stored, design.world, method))
        rows = [stored[f"{design.world}/{method}/{seed}"] for seed in seeds]
        if not rows:
            continue
        early, late = (
            {n: _mean(rows, n, last) for n in rows[0]["curves"]} for last in (False, True)
        )
        lines.append([
            *words, str(len(seeds)),
            " ".join(f"{rate(row['thought'], tiers):.1f}" for row in rows),
            f"{np.mean([row['thought']['thinking'] for row in rows]):.0f}",
            f"{100 * np.mean([row['thought']['well_formed'] for row in rows]):.0f}",
            f"{100 * early['share/advantage_from_length']:.0f}",
            f"{100 * early['reward/match']:.0f} → {100 * late['reward/match']:.0f}",
        ])  # fmt: skip
    heads = [s.name for s in design.settings] + [
        "seeds", "right, %, of each", "thinking tokens", "well-formed %",
        "advantage from length, first fifth of the steps, %",
        "match in training, first → last fifth, %",
    ]  # fmt: skip
    return table(heads, lines)


def _mean(rows: Sequence[dict], name: str, last: bool) -> float:
    """Return the mean of a curve over the first or the last fifth of the steps of all runs."""
    curves = [row["curves"][name] for row in rows]
    fifths = [-(-len(curve) // 5) for curve in curves]
    parts = (c[-n:] if last else c[:n] for c, n in zip(curves, fifths))
    return float(np.mean([x for part in parts for x in part if x is not None]))
