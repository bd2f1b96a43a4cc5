"""Tables of `make paper` and `make beyond`, with the paper's numbers and a verdict per claim."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.jobs import Setting
from experiments.results import Results, Value, verdict
from rmt.curriculum import TIERS

COLUMNS = (*TIERS, "average")


@dataclass(frozen=True)
class Row:
    """A line of a table: its title, job and evaluation, and the paper's numbers."""

    title: str
    job: str
    eval: str = "text"
    paper: tuple[float, ...] = ()  # the paper's accuracy: easy, medium, hard, average
    length: float | None = None  # the paper's mean response, in tokens


NTR = Row("thinking, untrained (NTR)", "base", "text", (8.47, 5.08, 4.51, 6.02), 1577)
ASKED = Row("thinking on a budget, untrained", "base", "budget")
RPT = Row("RPT", "rpt", "text", (48.67, 35.84, 23.03, 35.85), 872)
RPT_TOKENS = Row("RPT, stopped at RMT's tokens", "rpt-tokens")
RMT = Row("**RMT**", "rmt", "text", (76.92, 55.79, 44.64, 59.12), 186)
MAIN = [
    Row("next token, untrained (NTP)", "base", "plain", (47.89, 34.61, 25.01, 35.84)),
    Row("next token, trained on RMT's tokens", "ntp-tokens"),
    Row("next token, trained for RMT's minutes", "ntp-minutes"),
    NTR, ASKED, RPT, RPT_TOKENS, RMT,
]  # fmt: skip
ABLATIONS = [
    Row("**RMT**", "rmt", "text", (62.50, 43.96, 34.14, 46.87)),
    Row("without the budget (DTB)", "without-budget", "text", (60.35, 32.79, 27.59, 40.24)),
    Row("without the curriculum (CAS)", "without-curriculum", "text", (59.32, 42.66, 27.68, 43.22)),
    Row("without next-token prediction", "without-ntp", "text", (40.00, 34.26, 27.27, 33.84)),
    Row("next-token prediction alone, RMT's tokens", "ntp-tokens"),
]
LENGTHS = [NTR, ASKED, RPT, RPT_TOKENS, Row("RMT without the budget", "without-budget"), RMT]
OTHER = [  # text of another domain, see experiments/jobs.py
    Row("next token, untrained", "base", "other-plain"),
    Row("next token, trained on RMT's tokens", "ntp-tokens", "other"),
    Row("thinking, untrained", "base", "other"),
    Row("RPT", "rpt", "other"),
    Row("**RMT**", "rmt", "other"),
]
BEYOND = [
    Row("**RMT**", "rmt"),
    Row("tiers by what they can teach (`--curriculum-rule adaptive`)", "adaptive"),
    Row("length paid to right answers only (`--length-reward-gate correct_only`)", "correct-only"),
    Row("budgets by entropy (`--budget-entropy 1`)", "budget-entropy"),
    Row("next-token prediction alone, RMT's tokens", "ntp-tokens"),
    Row("RMT on four documents", "few"),
    Row("the same, without noise (`--noise-after 8`)", "few-noise-filter"),
]
NEW = [  # trained on text of the other domain
    Row("next token, untrained", "base", "other-plain"),
    Row("next token, NTP alone on RMT's tokens", "new-ntp", "other-plain"),
    Row("next token, RPT", "new-rpt", "other-plain"),
    Row("next token, RMT without next-token prediction", "new-without-ntp", "other-plain"),
    Row("next token, RMT", "new-rmt", "other-plain"),
    Row("thinking, untrained", "base", "other"),
    Row("thinking, RPT", "new-rpt", "other"),
    Row("thinking, RMT without next-token prediction", "new-without-ntp", "other"),
    Row("thinking, **RMT**", "new-rmt", "other"),
]
POST = [  # before and after, of Qwen3 where the paper has it
    ("instruct model", "base", (12.84, 54.17)),
    ("NTP, RMT's tokens", "ntp-tokens", (None, None)),
    ("RPT", "rpt", (23.17, 48.50)),
    ("**RMT**", "rmt", (25.17, 64.33)),
]
NOTE = (
    "*Italics*: the paper's numbers, of Qwen3-14B (ablations: of R1-Distill-Qwen-14B) on Omni-MATH "
    "and Skywork problems. Intervals are over seeds and held-out items."
)


def _cell(here: Value | None, there: float | None = None) -> str:
    """Format a measured value beside the paper's."""
    cell = "–" if here is None else str(here)
    return cell if there is None else f"{cell} · *{there:g}*"


def _table(heads: list[str], lines: list[tuple[str, list[str]]]) -> str:
    found = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(found + ["| " + " | ".join([title, *cells]) + " |" for title, cells in lines])


def accuracy_table(results: Results, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        found = [results.accuracy(row.job, row.eval, tier) for tier in COLUMNS]
        lines.append((row.title, [*map(_cell, found, row.paper or [None] * len(COLUMNS))]))
    return _table(["accuracy %, 95 % interval", *COLUMNS], lines)


def length_table(results: Results, rows: list[Row]) -> str:
    """Return lengths of responses and of thoughts by tier, budget errors, well-formed shares."""
    lines = []
    for row in rows:
        mean = lambda column, tier="average", scale=1.0, row=row: _cell(
            results.mean(row.job, row.eval, column, tier, scale)
        )
        whole = results.mean(row.job, row.eval, "response_length", "average")
        cells = [_cell(whole, row.length), *(mean("thinking_length", tier) for tier in COLUMNS)]
        cells += [mean("budget_error", scale=100), mean("well_formed", scale=100)]
        lines.append((row.title, cells))
    thoughts = [f"thought, {tier}" for tier in COLUMNS]
    heads = ["tokens, 95 % interval", "response", *thoughts, "off the budget %", "well-formed %"]
    return _table(heads, lines)


def post_table(results: Results) -> str:
    lines = []
    for title, start, paper in POST:
        solved = (
            results.accuracy(f"{start}-{when}", "problems", "problems")
            for when in ("before", "after")
        )
        lines.append((title, [*map(_cell, solved, paper)]))
    return _table(["problems solved %, 95 % interval", "before", "after"], lines)


def claims(results: Results) -> str:
    """Return a sentence for each claim of the paper, with our verdict."""
    rmt, lines = ("rmt", "text"), []
    more = "RMT predicts more tokens rightly than"
    for title, worse in (
        (f"{more} RPT", ("rpt", "text")),
        (f"{more} RPT with as many tokens", ("rpt-tokens", "text")),
        (f"{more} thinking untrained (NTR)", ("base", "text")),
        (f"{more} the plain next token (NTP)", ("base", "plain")),
        (f"{more} next-token training on as many tokens", ("ntp-tokens", "text")),
        ("the budget helps", ("without-budget", "text")),
        ("the curriculum helps", ("without-curriculum", "text")),
        ("next-token prediction helps", ("without-ntp", "text")),
    ):
        lines.append(_claim(results, title, rmt, worse))
    solved, post = ("rmt-after", "problems"), "post-training ends higher from RMT than from"
    for title, worse in ((f"{post} the instruct model", "base"), (f"{post} RPT", "rpt")):
        worse = (f"{worse}-after", "problems")
        lines.append(_claim(results, title, solved, worse, "problems"))
    ours, theirs = (
        results.mean(job, "text", "thinking_length", "average") for job in ("rmt", "rpt")
    )
    if ours and theirs:
        lines.append(
            f"- RMT thinks for a fifth of RPT's length: **{ours.mean / theirs.mean:.0%}** "
            f"({ours} against {theirs} tokens; the paper's responses 186 against 872)"
        )
    return "\n".join(lines)


def _claim(
    results: Results, title: str, better: tuple[str, str], worse: tuple[str, str],
    tier: str = "average",
) -> str:  # fmt: skip
    difference = results.difference(better, worse, tier)
    if difference is None:
        return f"- {title}: **{verdict(difference)}**"
    found = [results.accuracy(*which, tier) for which in (better, worse)]
    return (
        f"- {title}: **{verdict(difference)}**, by {difference} points "
        f"({found[0]} against {found[1]})"
    )


def new_claims(results: Results) -> str:
    """Return the same for text that is new to the model, once `make beyond` has run."""
    rmt, before = ("new-rmt", "other-plain"), ("base", "other-plain")
    if results.accuracy(*rmt, "average") is None:
        return ""
    claim = lambda title, better, worse: _claim(results, title, better, worse)
    return "\n".join([
        "Trained on text that the model does not know, and predicting it without a thought:\n",
        claim("next-token prediction helps", rmt, ("new-without-ntp", "other-plain")),
        claim("RMT predicts more tokens rightly than RPT", rmt, ("new-rpt", "other-plain")),
        claim("RMT predicts more tokens rightly than before", rmt, before),
        claim("RMT predicts more tokens rightly than next-token training on as many tokens", rmt,
              ("new-ntp", "other-plain")),
        claim("with a thought, RMT predicts more tokens rightly than before", ("new-rmt", "other"),
              ("base", "other")),
    ])  # fmt: skip


def record(out: Path) -> dict[str, dict]:
    """Collect commands, minutes, versions and evaluation rows of each job SEED/NAME."""
    found = {}
    for done in sorted(out.glob("*/*/done.json")):
        place, about = done.parent, json.loads(done.read_text())
        if (place / "run.json").exists():
            run = json.loads((place / "run.json").read_text())
            about |= {name: run[name] for name in ("commit", "python", "torch", "device")}
        about["tiers"] = {
            file.stem: report["tiers"]
            for file in sorted(place.glob("*.json"))
            if "tiers" in (report := json.loads(file.read_text()))
        }
        found[f"{place.parent.name}/{place.name}"] = about
    return found


def provenance(setting: Setting, jobs: dict[str, dict]) -> str:
    """Return hardware, versions, seeds and time, as a note below the tables."""
    trained = [about for about in jobs.values() if "commit" in about]
    if not trained:
        return "<sub>nothing was run yet</sub>"
    about, minutes = trained[0], sum(about["minutes"] for about in jobs.values())
    commits = ", ".join(dict.fromkeys(about["commit"] for about in trained))
    return (
        f"<sub>`make paper`: seeds "
        f"{', '.join(map(str, setting.seeds))}; {setting.steps} steps, {setting.post_steps} of "
        f"post-training; {about['device']}, torch {about['torch']}, commits {commits}; "
        f"{len(jobs)} jobs, those of `make beyond` too, with {minutes:.0f} minutes together. "
        f"Commands, versions, minutes and rows of each: docs/paper-{setting.model}.json</sub>"
    )


def write_tables(setting: Setting, out: Path) -> str:
    """Write all tables to docs/paper-NAME.md and their numbers to docs/paper-NAME.json.

    Tables of the paper's claims also go into docs/results.md, between the model's markers.
    """
    results, jobs, name = Results(setting, out), record(out), setting.model
    main = "\n\n".join([
        accuracy_table(results, MAIN), accuracy_table(results, ABLATIONS),
        length_table(results, LENGTHS), post_table(results), NOTE, claims(results),
        new_claims(results), provenance(setting, jobs),
    ])  # fmt: skip
    page = "\n\n".join([
        f"# The paper in miniature: {name}", "Written by `make paper` and `make beyond`.", main,
        "## Text of another domain", accuracy_table(results, OTHER),
        "## Training on text of another domain", accuracy_table(results, NEW),
        "## Beyond the paper", accuracy_table(results, BEYOND), length_table(results, BEYOND),
    ])  # fmt: skip
    Path(f"docs/paper-{name}.md").write_text(page + "\n", encoding="utf-8")
    Path(f"docs/paper-{name}.json").write_text(json.dumps(jobs, indent=1), encoding="utf-8")
    results_page = Path("docs/results.md")
    begin, end = f"<!-- paper {name} -->", f"<!-- /paper {name} -->"
    old = results_page.read_text(encoding="utf-8")
    if begin in old and end in old:
        new = f"{old.split(begin)[0]}{begin}\n{main}\n{end}{old.split(end)[1]}"
        results_page.write_text(new, encoding="utf-8")
    return page
