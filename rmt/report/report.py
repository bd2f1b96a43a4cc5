"""Report on runs: a table before and after, curves, and one page to explore.

    python -m rmt.report runs/demo              several runs share their panels

Reads metrics.jsonl and, where they exist, samples.jsonl, documents.json, probes.jsonl, eval.jsonl,
and before.json, after.json, before-ntp.json, after-ntp.json of eval.py. Writes curves.png into
each run and report.html into the first; the page needs no server and no network. Its style and
scripts are in rmt/report/page/.
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
    """Read a JSON file; return `otherwise` without one."""
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def evaluations(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the evaluations that a run has: name -> tier -> row."""
    found = {}
    for stem, name in NAMES.items():
        with blamed(path := out / f"{stem}.json"):
            if path.is_file():
                found[name] = {row["tier"]: row for row in read_json(path, None)["tiers"]}
                _line(name, found[name])  # fails here if a value is not a number
    return found


def comparison(out: Path) -> str:
    """Format the evaluations of a run as a markdown table: accuracies, intervals, lengths."""
    lines = [
        "| accuracy % (95 % interval) | easy | medium | hard | average | thinking tokens |",
        "|---|---|---|---|---|---:|",
    ]
    return "\n".join(lines + [_line(name, rows) for name, rows in evaluations(out).items()])


def _line(name: str, rows: dict[str, dict[str, Any]]) -> str:
    cells = [name]
    for row in (rows.get(tier) for tier in (*TIERS, "average")):
        if row and row["n"]:
            right, low, high = (100 * row[key] for key in ("accuracy", "low", "high"))
            cells.append(f"{right:.1f} ({low:.1f}–{high:.1f})")
        else:
            cells.append("–")
    length = rows.get("average", {}).get("thinking_length")
    cells.append("–" if length is None else f"{length:.1f}")
    return "| " + " | ".join(cells) + " |"


def verdicts(out: Path) -> list[str]:
    """Test each tier for a change, in pairs; nothing without both evaluations."""
    paths = [out / f"{stem}.json" for stem in ("before", "after")]
    if not all(read_json(path, {}).get("items") for path in paths):
        return []
    try:
        rows = differences(*(read_report(path)["items"] for path in paths))
    except ValueError as error:
        return [f"before and after cannot be compared: {error}"]
    return [f"{row['tier']}: {verdict(row)}" for row in rows]


def series_of(out: Path) -> Series:
    """Collect the metrics of a run that the page shows."""
    with blamed(out / "metrics.jsonl"):
        series = _series(read_lines(out / "metrics.jsonl"))
    with blamed(out / "eval.jsonl"):
        series |= _series([
            {"step": found["step"], "held-out/ntp": found.get("nats_per_token")}
            | {f"held-out/{row['tier']}": row["accuracy"] for row in found["tiers"]}
            | {f"held-out-plain/{tier}": x for tier, x in found.get("plain", {}).items()}
            for found in read_lines(out / "eval.jsonl")
        ])  # fmt: skip
    with blamed(out / "run.json"):
        return series | planned(out, [step for step, _ in series.get("draw/easy", [])])


def _series(rows: Sequence[dict[str, Any]]) -> Series:
    names = [name for panel in PANELS for name in panel.metrics + panel.targets]
    names.append("reward/match")  # one of the numbers at the top
    measured = {name: [row for row in rows if row.get(name) is not None] for name in names}
    return {
        name: [(row["step"], float(f"{row[name]:.6g}")) for row in found]
        for name, found in measured.items()
        if found
    }


def planned(out: Path, steps: Sequence[int]) -> Series:
    """Return the probability of each tier on the curriculum's schedule at these steps."""
    described = read_json(out / "run.json", {})
    config = described.get("config", {})
    if not config.get("curriculum") or not steps:
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
    """Collect all that the page shows of a run."""
    with blamed(out / "run.json"):
        described = read_json(out / "run.json", {})
        facts = {key: value for key, value in described.get("config", {}).items() if key in SHOWN}
        facts |= {key: described[key] for key in ("device", "ranks", "commit") if key in described}
    with blamed(out / "documents.json"):
        documents = read_json(out / "documents.json", [])
    return dict(
        name=name, facts=facts, evaluations=evaluations(out), verdicts=verdicts(out),
        series=series_of(out), samples=read_lines(out / "samples.jsonl"), documents=documents,
        probes=read_lines(out / "probes.jsonl"),
    )  # fmt: skip


def page(runs: Sequence[Path]) -> str:
    """Return one self-contained HTML page about the runs."""
    short = len({out.name for out in runs}) == len(runs)
    names = [out.name if short else out.as_posix() for out in runs]
    data = {
        "smoothing": SMOOTHING,
        "tiers": TIERS,
        "panels": [asdict(panel) for panel in PANELS],
        "runs": [run_data(out, name) for out, name in zip(runs, names)],
    }
    # Without `<`, text of a model cannot end the element that holds it.
    data = json.dumps(as_json(data), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    parts = {
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": data,  # last, so that nothing in it is taken for a placeholder
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
    """Write the page of a run that has just ended; return its path, or why there is none."""
    try:
        return f"wrote {write_page([out])}"
    except Exception as error:  # the run is saved: a failure here must not fail it
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
        title = f"{out}\n" if len(runs) > 1 else ""
        print(f"\n{title}{comparison(out)}\n", *verdicts(out), sep="\n")
    if not all(drawn):
        print("no picture: matplotlib is not installed")
    print("\nwritten:")
    for out in runs:
        for path in sorted(out.rglob("*")):
            if path.is_file() and "checkpoints" not in path.parts:
                print(f"  {path}")
        print(f"  {out / 'checkpoints'}/")
