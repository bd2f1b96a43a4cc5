"""What a run did, for people: a table before and after, a picture of the curves, one HTML page.

    python -m rmt.report runs/demo

reads metrics.jsonl, samples.jsonl and, where they exist, before.json and after.json of eval.py
(and before-ntp.json, after-ntp.json), and writes curves.png and report.html beside them.
"""

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmt.curriculum import TIERS

SMOOTHING = 0.8  # of the drawn curves: weight of the past
NAMES = {
    "before-ntp": "plain next token, before",
    "after-ntp": "plain next token, after",
    "before": "with thinking, before RMT",
    "after": "with thinking, after RMT",
}
PANELS = (  # title, unit, metrics
    ("next token named", "share of responses", [f"match/{t}" for t in TIERS] + ["reward/match"]),
    ("thinking length", "tokens", ["length/thinking", "budget"]),
    ("raw text", "nats per token", ["loss/ntp"]),
    ("responses", "share", ["share/well_formed", "share/zero_variance_groups",
                            "share/advantage_from_length"]),
)  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparison(out: Path) -> str:
    """Markdown table of all evaluations of a run: accuracy with its interval, and lengths."""
    lines = [
        "| accuracy % (95 % interval) | easy | medium | hard | average | thinking tokens |",
        "|---|---|---|---|---|---:|",
    ]
    for stem, name in NAMES.items():
        path = out / f"{stem}.json"
        if path.is_file():
            rows = {row["tier"]: row for row in json.loads(path.read_text())["tiers"]}
            cells = [_accuracy(rows[tier]) for tier in (*TIERS, "average")]
            length = rows["average"]["thinking_length"]
            cells.append("–" if length is None else f"{length:.1f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(out: Path) -> list[str]:
    """For each tier, whether the intervals before and after are apart. Empty without both."""
    paths = [out / f"{stem}.json" for stem in ("before", "after")]
    if not all(path.is_file() for path in paths):
        return []
    before, after = ({r["tier"]: r for r in json.loads(p.read_text())["tiers"]} for p in paths)
    words = []
    for tier in (*TIERS, "average"):
        old, new = before[tier], after[tier]
        if not old["n"]:
            continue
        apart = "up" if new["low"] > old["high"] else "down" if new["high"] < old["low"] else None
        words.append(
            f"{tier}: {apart or 'no difference'} (intervals {'apart' if apart else 'overlap'})"
        )
    return words


def _accuracy(row: dict[str, Any]) -> str:
    if not row["n"]:
        return "–"
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['accuracy']:.1f} ({low:.1f}–{high:.1f})"


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """One picture with a panel per subject; False when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    for axis, (title, unit, names) in zip(axes.flat, PANELS):
        for name in names:
            points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            if points:
                steps, values = zip(*points)
                style = "k--" if name == "budget" else "-"
                axis.plot(steps, _smooth(values), style, label=name, linewidth=1.6)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    smooth, weight, total = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return smooth


def page(out: Path, table: str, samples: Sequence[dict[str, Any]]) -> str:
    """Table, picture and the last rollouts as one self-contained HTML page."""
    picture = out / "curves.png"
    image = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="curves of the run">'
    rows = [line.strip("|").split("|") for line in table.splitlines() if not line.startswith("|-")]
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    shown = "".join(
        f"<h3>step {s['step']}, {s['tier']}: next token {html.escape(repr(s['truth']))}, "
        f"answered {html.escape(repr(s['answer']))}, reward {s['reward']['total']:.2f}</h3>"
        f"<pre>… {html.escape(s['context'])}</pre><pre>{html.escape(s['response'])}</pre>"
        for s in [*samples[:4], *samples[-8:]]
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Reinforcement mid-training</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:.2em .8em;"
        "border-bottom:1px solid #ccc}pre{background:#f4f4f4;padding:.6em;white-space:pre-wrap}"
        f"img{{max-width:100%}}</style><h1>{html.escape(out.name)}</h1><table>{cells}</table>"
        f"{image}<h2>First and last rollouts</h2>{shown}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not (Path(arguments[0]) / "metrics.jsonl").is_file():
        sys.exit("usage: python -m rmt.report RUN, a directory with the metrics.jsonl of a run")
    out = Path(arguments[0])
    table = comparison(out)
    drawn = draw_curves(read_lines(out / "metrics.jsonl"), out / "curves.png")
    (out / "report.html").write_text(page(out, table, read_lines(out / "samples.jsonl")))
    print(f"\n{table}\n")
    for line in verdicts(out):
        print(line)
    if not drawn:
        print("no picture: matplotlib is not installed")
    print("\nwritten:")
    for path in sorted(p for p in out.rglob("*") if p.is_file() and "checkpoints" not in p.parts):
        print(f"  {path}")
    print(f"  {out / 'checkpoints'}/")


if __name__ == "__main__":
    main()
