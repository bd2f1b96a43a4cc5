"""The pages of the study, written from what is stored: tables, in the text of *.md.in."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.designs import (
    CURES,
    HAZARD,
    LONGER,
    LONGER_WORLD,
    POST,
    POST_WORLD,
    SCREEN,
    Design,
    effect_table,
    run_table,
    seeds_with_all,
)
from experiments.stored import BEHIND
from experiments.verdicts import (
    BEYOND,
    CLAIMS,
    LEAST,
    WORLDS,
    Stored,
    answers,
    difference,
    rate,
    seeds_of,
    table,
    untrained,
    verdicts,
)
from rmt.system.records import write_whole

README_TABLE = ("<!-- study -->", "<!-- end -->")
FAR = 10  # points: another machine has other last bits, and so another run


def accuracies(stored: Stored, world: str) -> str:
    """Return a row for each method, after its steps and at RMT's tokens: means over seeds."""
    tiers, lines = untrained(stored, world)["tiers"], []
    for method in ("base", "rmt", *CLAIMS, *BEYOND):
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
                f"{100 * statistics.fmean(f['well_formed'] for f in thought):.0f}",
                f"{statistics.fmean(f['nats'] for f in plain):.3f}",
                f"{statistics.fmean(spent):.2f}" if method != "base" else "–",
            ])  # fmt: skip
    heads = ["", "at", "seeds", "easy", "medium", "hard", "average (each seed)",
             "plain (each seed)", "thinking tokens", "well-formed %", "nats per token of text",
             "million tokens"]  # fmt: skip
    return table(heads, lines)


def span(values: Sequence[float]) -> str:
    """Return the lowest and the highest of some shares: "41–53"."""
    return "–".join(dict.fromkeys(f"{end:.0f}" for end in (min(values), max(values))))


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({', '.join(f'{x:.1f}' for x in values)})"


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
                ", ".join(f"{100 * share:.0f}" for share in row["behind"].values()),
                f"{100 * row['noise']:.0f}",
            ])  # fmt: skip
    heads = ["untrained model", "thinking tokens", "correlation of length and match", "easy %",
             "medium %", "hard %", "hard groups of 4 all wrong %", "coins known %",
             "changed coins known %",
             f"right behind right work and {', '.join(map(str, BEHIND))} sentences %",
             "hard that are noise %"]  # fmt: skip
    return table(heads, lines)


def provenance(stored: Stored) -> str:
    rows = [row for row in stored.values() if "commit" in row]
    if not rows:
        return "<sub>nothing was run yet</sub>"
    unique = lambda name: ", ".join(sorted({row[name] for row in rows}))
    commits = ", ".join(sorted({row["commit"][:12] for row in rows}))
    minutes = sum(row.get("minutes", 0) for row in rows)
    return (
        f"<sub>{len(stored)} jobs, {minutes / 60:.1f} hours of training; {unique('device')}; torch "
        f"{unique('torch')}; commits {commits}. Each job's command, curves and answers: "
        "docs/study.jsonl</sub>"
    )


def lengths(stored: Stored) -> str:
    """Return RMT's thoughts in % of RPT's after as many steps: means, and with each seed."""
    found = []
    for world in WORLDS:
        seeds = seeds_of(stored, world, "rmt") & seeds_of(stored, world, "rpt")
        rmt, rpt = (
            [stored[f"{world}/{method}/{seed}"]["thought"]["thinking"] for seed in sorted(seeds)]
            for method in ("rmt", "rpt")
        )
        if seeds:
            each = ", ".join(f"{100 * a / b:.0f}" for a, b in zip(rmt, rpt))
            found.append(f"{world} {100 * sum(rmt) / sum(rpt):.0f} % ({each})")
    return ", ".join(found) or "not measured yet"


def shares(stored: Stored) -> str:
    """Return a row per world: tokens and gradients of both parts of the loss, in thirds."""
    lines = []
    for world in WORLDS:
        for seed in sorted(seeds_of(stored, world, "shares")):
            steps = stored[f"{world}/shares/{seed}"]["steps"]
            third = len(steps["cosine"]) // 3
            cells = [world]
            for name, form in (
                ("tokens/rl", ".0f"), ("tokens/ntp", ".0f"), ("norm/rl", ".2f"),
                ("norm/ntp", ".2f"), ("cosine", "+.3f"),
            ):  # fmt: skip
                parts = (steps[name][third * k : third * (k + 1)] for k in range(3))
                cells.append(" / ".join(f"{statistics.median(part):{form}}" for part in parts))
            lines.append(cells)
    heads = ["", "response tokens", "text tokens", "gradient of −J_RL", "of λ·L_NTP", "cosine"]
    return table(heads, lines)


def after_post_training(stored: Stored) -> str:
    """Return a row for each start: right with a thought before, half-way through, and after."""
    lines = []
    for method, start in POST.items():
        for seed in sorted(seeds_of(stored, POST_WORLD, method)):
            tiers = untrained(stored, POST_WORLD)["tiers"]
            row = stored[f"{POST_WORLD}/{method}/{seed}"]
            found = [row[f"thought{name}"] for name in ("-before", "-half", "")]
            shares = [f"{rate(f, tiers):.1f}" for f in found]
            tokens = " / ".join(f"{f['thinking']:.0f}" for f in found)
            lines.append([start, str(seed), *shares, tokens])
    heads = ["trained before", "seed", "before, %", "half-way, %", "after, %", "thinking tokens"]
    return table(heads, lines)


def longer(stored: Stored) -> Iterator[tuple[list[dict], list[dict]]]:
    """Yield for each number of steps RMT's rows, and what next-token training answers plainly.

    It was trained on as many tokens.
    """
    for method in ("rmt", *LONGER):
        seeds = seeds_of(stored, LONGER_WORLD, method) & seeds_of(stored, LONGER_WORLD, "ntp")
        rows = [stored[f"{LONGER_WORLD}/{method}/{seed}"] for seed in sorted(seeds)]
        text = [answers(stored, LONGER_WORLD, "ntp", s, "-tokens", "plain") for s in sorted(seeds)]
        if rows:
            yield rows, [row["plain-ntp"] for row in rows] if method in LONGER else text


def longer_table(stored: Stored) -> str:
    lines = []
    for rows, text in longer(stored):
        tiers = untrained(stored, LONGER_WORLD)["tiers"]
        of_each = lambda found: ", ".join(f"{rate(f, tiers):.1f}" for f in found)  # noqa: B023
        lines.append([
            str(len(rows[0]["curves"]["reward/match"])), str(len(rows)),
            f"{statistics.fmean(row['tokens'] for row in rows) / 1e6:.2f}",
            of_each(row["thought"] for row in rows),
            f"{statistics.fmean(row['thought']['thinking'] for row in rows):.0f}",
            of_each(row["plain"] for row in rows), of_each(text),
        ])  # fmt: skip
    heads = ["RMT's steps", "seeds", "million tokens", "with a thought, %, of each",
             "thinking tokens", "plainly, %", "next-token training, plainly, %"]  # fmt: skip
    return table(heads, lines)


def more_steps(stored: Stored) -> str:
    """Return what `longer_table` has of right answers as a sentence; nothing without rows."""
    thinking, plainly = [], []
    for rows, text in longer(stored):
        share = lambda found: rate(found, untrained(stored, LONGER_WORLD)["tiers"])
        reached = span([share(row["thought"]) for row in rows])
        thinking.append(f"{reached} after {len(rows[0]['curves']['reward/match'])}")
        plainly.append(span(list(map(share, text))))
    if not thinking:
        return ""
    return (
        f"% right in *{LONGER_WORLD}*: RMT with a thought {', '.join(thinking)} steps, next-token "
        f"training on as many tokens plainly {', '.join(plainly)}."
    )


def design_tables(stored: Stored, design: Design, more: Sequence[str] = ()) -> str:
    """Return the tables of a design: of its runs that are stored, and of effects once all are."""
    if not any(seeds_of(stored, design.world, method) for method in design.runs.keys() - {"rmt"}):
        return table((), ())
    effects = [effect_table(stored, design)] if seeds_with_all(stored, design) else []
    return "\n\n".join([run_table(stored, design, more), *effects])


def summary(stored: Stored) -> str:
    """Return what README.md says, of enough seeds: RMT in each world, claims asked in all."""
    gains = []
    for world in WORLDS:
        if len(seeds := seeds_of(stored, world, "rmt")) >= LEAST:
            base = untrained(stored, world)
            rows = (stored[f"{world}/rmt/{seed}"]["thought"] for seed in seeds)
            shares = [rate(row, base["tiers"]) for row in rows]
            plain = rate(untrained(stored, world, "plain"), base["tiers"])
            plainly = statistics.fmean(
                rate(stored[f"{world}/rmt/{seed}"]["plain"], base["tiers"]) for seed in seeds
            )
            before, reached = rate(base, base["tiers"]), span(shares)
            gains.append(
                f"{world} {before:.0f}→{reached} ({len(shares)}; {plain:.0f}→{plainly:.0f})"
            )
    decided = {  # claim -> world -> RMT − rival
        claim.rival: {
            world: v.brief for world in WORLDS
            if (v := difference(stored, world, rival, "-tokens")) and v.seeds >= LEAST
        } for rival, claim in CLAIMS.items() if claim.worlds == WORLDS
    }  # fmt: skip
    worlds = [world for world in WORLDS if any(world in of for of in decided.values())]
    lines = [[text, *(of.get(w, "–") for w in worlds)] for text, of in decided.items() if of]
    heads = ["RMT − …, points at equal tokens (**bold**: interval without 0)", *worlds]
    claims = table(heads, lines) if lines else ""
    before_after = (
        "Right with a thought, before → after RMT, lowest–highest seed, % (seeds; plainly): "
        f"{', '.join(gains)}."
    )
    return "\n\n".join(filter(None, (before_after, claims, more_steps(stored))))


def compare_again(stored: Stored, again: Stored) -> str:
    """Print what is stored beside what was run again; return an error if they are far apart."""
    lines, far = [], []
    for name in sorted(again.keys() & stored.keys()):
        tiers = untrained(again, name.partition("/")[0])["tiers"]
        shares = [rate(rows[name]["thought"], tiers) for rows in (stored, again)]
        lines.append([name, *(f"{share:.1f}" for share in shares)])
        if abs(shares[0] - shares[1]) > FAR:
            far.append(name)
    print(table(["right with a thought, %", "stored", "again"], lines))
    return f"error: more than {FAR} points apart: {', '.join(far)}" if far else ""


def tables(stored: Stored) -> dict[str, str]:
    """Return the tables by their names in study.md.in and reviewers.md.in."""
    of_worlds = [
        f"## {world}: right with a thought, %\n\n{accuracies(stored, world)}"
        for world in WORLDS if seeds_of(stored, world, "rmt")
    ]  # fmt: skip
    return {
        "obstacles": obstacles(stored), "verdicts": verdicts(stored, CLAIMS, ""),
        "lengths": lengths(stored), "worlds": "\n\n".join(of_worlds),
        "verdicts at equal tokens": verdicts(stored, CLAIMS, "-tokens"),
        "shares": shares(stored), "screen": design_tables(stored, SCREEN),
        "hazard": design_tables(stored, HAZARD, tuple(CURES)),
        "beyond": verdicts(stored, BEYOND, ""), "post-training": after_post_training(stored),
        "longer": longer_table(stored), "provenance": provenance(stored),
    }  # fmt: skip


def write_pages(stored: Stored) -> None:
    """Write docs/study.md, docs/reviewers.md, and the study's table in README.md."""
    found = tables(stored)
    for name in ("study", "reviewers"):
        page = Path(f"experiments/{name}.md.in").read_text(encoding="utf-8")
        for place, text in found.items():
            page = page.replace(f"{{{{{place}}}}}", text)
        write_whole(Path(f"docs/{name}.md"), page)
    begin, end = README_TABLE
    before, _, rest = Path("README.md").read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_whole(Path("README.md"), f"{before}{begin}\n{summary(stored)}\n{end}{after}")
