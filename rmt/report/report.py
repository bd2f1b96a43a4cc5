"""What a run did, for people: a table before and after, curves, and one page to explore.

    python -m rmt.report runs/demo              several runs: their curves are drawn over each other

reads metrics.jsonl and, where they exist, samples.jsonl, documents.json, probes.jsonl, eval.jsonl
and before.json, after.json (and before-ntp.json, after-ntp.json) of eval.py. It writes curves.png
into every run and report.html into the first: a page that needs neither server nor network. Its
style and scripts are in rmt/report/page/.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmt.curriculum import TIERS, tier_probabilities
from rmt.evaluation.compare import differences, read_report, verdict
from rmt.report.curves import PANELS, SMOOTHING, Series, draw_curves
from rmt.system.records import as_json, blamed, parse, read_lines, write_whole
from rmt.system.terminal import safe_printing

ASSETS = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "charts.js", "documents.js", "samples.js", "page.js")
NAMES = {
    "before-ntp": "plain next token, before",
    "after-ntp": "plain next token, after",
    "before": "with thinking, before RMT",
    "after": "with thinking, after RMT",
}
SHOWN = ("model", "method", "batch_size", "group_size", "learning_rate", "seed")


def read_json(path: Path, otherwise: Any) -> Any:
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def evaluations(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Name of an evaluation -> tier -> what was found, for those that were made."""
    found = {}
    for stem, name in NAMES.items():
        with blamed(out / f"{stem}.json"):
            if (out / f"{stem}.json").is_file():
                report = read_json(out / f"{stem}.json", None)
                found[name] = {row["tier"]: row for row in report["tiers"]}
                for row in found[name].values():  # what is not a number fails here
                    _accuracy(row), _length(row)
    return found


def comparison(out: Path) -> str:
    """Markdown table of all evaluations of a run: accuracy with its interval, and lengths."""
    lines = [
        "| accuracy % (95 % interval) | easy | medium | hard | average | thinking tokens |",
        "|---|---|---|---|---|---:|",
    ]
    for name, rows in evaluations(out).items():
        cells = [_accuracy(rows.get(tier)) for tier in (*TIERS, "average")]
        cells.append(_length(rows.get("average", {})))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(out: Path) -> list[str]:
    """For each tier, whether what is right has changed, by a paired test. Empty without both."""
    paths = [out / f"{stem}.json" for stem in ("before", "after")]
    if not all(read_json(path, {}).get("items") for path in paths):
        return []
    try:
        rows = differences(*(read_report(path)["items"] for path in paths))
    except ValueError as error:
        return [f"before and after cannot be compared: {error}"]
    return [f"{row['tier']}: {verdict(row)}" for row in rows]


def _accuracy(row: dict[str, Any] | None) -> str:
    if not row or not row["n"]:
        return "–"
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['accuracy']:.1f} ({low:.1f}–{high:.1f})"


def _length(row: dict[str, Any]) -> str:
    length = row.get("thinking_length")
    return "–" if length is None else f"{length:.1f}"


def series_of(out: Path) -> Series:
    """Every metric of a run that the page shows, where it was measured."""
    wanted = {name for panel in PANELS for name in (*panel.metrics, *panel.targets)}
    wanted.add("reward/match")  # one of the numbers at the top
    series: Series = {}
    add = lambda name, step, value: series.setdefault(name, []).append(
        (step, float(f"{value:.6g}"))
    )
    with blamed(out / "metrics.jsonl"):
        for row in read_lines(out / "metrics.jsonl"):
            for name in sorted(wanted & row.keys()):
                if row[name] is not None:
                    add(name, row["step"], row[name])
    with blamed(out / "eval.jsonl"):
        for evaluation in read_lines(out / "eval.jsonl"):
            for row in evaluation["tiers"]:
                if row["n"] and (name := f"held-out/{row['tier']}") in wanted:
                    add(name, evaluation["step"], row["accuracy"])
            if evaluation.get("nats_per_token") is not None:
                add("held-out/ntp", evaluation["step"], evaluation["nats_per_token"])
    with blamed(out / "run.json"):
        return series | planned(out, [step for step, _ in series.get("draw/easy", [])])


def planned(out: Path, steps: Sequence[int]) -> Series:
    """Probability of each tier that the curriculum's schedule had at these steps."""
    described = read_json(out / "run.json", {})
    config = described.get("config", {})
    by_schedule = config.get("curriculum") and config.get("curriculum_rule") != "adaptive"
    if not by_schedule or not steps:
        return {}
    knobs = [config[f"curriculum_{name}"] for name in ("early", "late", "start", "end")]
    lengths = described.get("lengths", [[0, described["total_steps"]]])
    total = lambda step: [length for first, length in lengths if first <= step][-1]
    rows = [tier_probabilities(step / total(step), *knobs) for step in steps]
    return {
        f"planned/{tier}": [(step, round(float(row[k]), 4)) for step, row in zip(steps, rows)]
        for k, tier in enumerate(TIERS)
    }


def run_data(out: Path, name: str) -> dict[str, Any]:
    """All that the page shows of a run."""
    with blamed(out / "run.json"):
        described = read_json(out / "run.json", {})
        config = described.get("config", {})
        facts = {name: config[name] for name in SHOWN if name in config}
        facts |= {
            name: described[name] for name in ("device", "ranks", "commit") if name in described
        }
    with blamed(out / "documents.json"):
        documents = read_json(out / "documents.json", [])
    return {
        "name": name,
        "facts": facts,
        "evaluations": evaluations(out),
        "verdicts": verdicts(out),
        "series": series_of(out),
        "samples": read_lines(out / "samples.jsonl"),
        "documents": documents,
        "probes": read_lines(out / "probes.jsonl"),
    }


def page(runs: Sequence[Path]) -> str:
    """One self-contained HTML page about the runs."""
    short = len({out.name for out in runs}) == len(runs)
    names = [out.name if short else out.as_posix() for out in runs]
    data = {
        "smoothing": SMOOTHING,
        "tiers": TIERS,
        "panels": [asdict(panel) for panel in PANELS],
        "runs": [run_data(out, name) for out, name in zip(runs, names)],
    }
    # What a model wrote cannot end the element that holds it: no `<` is left in it.
    data = json.dumps(as_json(data), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    parts = {
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": data,  # last: what it says is never taken for a place to fill
    }
    html = (ASSETS / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        html = html.replace(f"{{{{{name}}}}}", text, 1)
    return html


def write_page(runs: Sequence[Path]) -> Path:
    path = runs[0] / "report.html"
    write_whole(path, page(runs))
    return path


def try_report(out: Path) -> str:
    """Where the page of a run that has just ended is, or why there is none."""
    try:
        return f"wrote {write_page([out])}"
    except Exception as error:  # the run is saved: whatever is wrong here must not look like a loss
        return f"no report ({type(error).__name__}: {error}); try python -m rmt.report {out}"


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    runs = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not runs or not all((out / "metrics.jsonl").is_file() for out in runs):
        sys.exit("usage: python -m rmt.report RUN ..., directories with the metrics.jsonl of a run")
    try:
        drawn = [draw_curves(series_of(out), out / "curves.png") for out in runs]
        write_page(runs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for out in runs:
        print(f"\n{out}\n{comparison(out)}\n" if len(runs) > 1 else f"\n{comparison(out)}\n")
        for line in verdicts(out):
            print(line)
    if not all(drawn):
        print("no picture: matplotlib is not installed")
    print("\nwritten:")
    for out in runs:
        kept = (path for path in out.rglob("*") if path.is_file())
        for path in sorted(path for path in kept if "checkpoints" not in path.parts):
            print(f"  {path}")
        print(f"  {out / 'checkpoints'}/")


if __name__ == "__main__":
    main()
