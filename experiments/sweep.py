"""Sweep knobs: train over a grid of values and seeds; write a table and a heat map.

    python -m experiments.sweep --vary length-weight=0,0.1,0.3 --vary ntp-weight=0,0.1,1 \\
        --seeds 0 1 --model tiny --preset demo --steps 30 --eval-data assets/tiny_corpus/eval.jsonl

Flags of train.py go to all runs; --vary names a knob and its values (lists of numbers with /
between them: tier-thresholds=0.5/1.0/1.5,0.3/0.9/1.4). Runs are saved in OUT/POINT/SEED, not
repeated, and resumed if they were stopped. OUT/sweep.md has the table, OUT/sweep.json its numbers,
and OUT/sweep.png the heat map of two knobs.

accuracy: of the last evaluation on --eval-data, over the tiers; without it, the share of right
answers in the last fifth of the steps. All other columns are means over these steps. The evaluation
samples as training does (--eval-decoding). If all points answer the same held-out questions, each
is compared with the first (rmt/evaluation/compare.py).
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from experiments.runner import Job, JobFailed, run_all, side_by_side
from rmt.config.config import Config
from rmt.config.flags import flag
from rmt.evaluation.compare import differences, verdict
from rmt.evaluation.summary import PROBLEMS
from rmt.report.report import read_json
from rmt.system.lock import held
from rmt.system.records import read_lines
from rmt.system.terminal import safe_printing

Point = tuple[str, ...]  # a value of each knob that is varied
COLUMNS = {  # metric of metrics.jsonl -> heading and scale
    "reward/match": ("right in training %", 100),
    "length/thinking": ("thinking tokens", 1),
    "length/budget_error": ("off the budget", 1),
    "share/well_formed": ("well-formed %", 100),
    "share/advantage_from_length": ("advantage from length %", 100),
    "loss/ntp": ("NTP loss", 1),
}


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict, list[str]]:
    """Return options, knob -> values, and flags for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--vary", action="append", required=True, metavar="KNOB=VALUE,VALUE,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    many = side_by_side()
    parser.add_argument("--jobs", type=int, default=many, help=f"at one time (here {many})")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options, rest = parser.parse_known_args(arguments)
    knobs, known = {}, {field.name for field in fields(Config)}
    for word in options.vary:
        name, _, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if name not in known or not values:
            sys.exit(
                f"error: --vary {word}: give a knob of train.py and its values, such as "
                "length-weight=0,0.1,0.3 (train.py --help lists the knobs)"
            )
        knobs[name] = values.split(",")
    for name in (*knobs, "seed"):
        if flag(name) in rest:
            sys.exit(f"error: {flag(name)} is varied; leave it out of the flags for all runs")
    return options, knobs, rest


def jobs_of(options: argparse.Namespace, knobs: dict, rest: Sequence[str]) -> dict[Point, list]:
    """Return the runs of each point of the grid, one per seed."""
    grid = {}
    for point in itertools.product(*knobs.values()):
        setting = [word for name, value in zip(knobs, point) for word in _words(name, value)]
        folder = "_".join(f"{n}={v.replace('/', '-')}" for n, v in zip(knobs, point))
        grid[point] = []
        for seed in options.seeds:
            out = options.out / folder / str(seed)
            command = ("train.py", *rest, *setting, "--seed", str(seed), "--out", str(out))
            grid[point].append(Job(out, lambda command=command: [command]))
    return grid


def _words(name: str, value: str) -> list[str]:
    if value in ("True", "False"):
        return [flag(name) if value == "True" else flag(f"no_{name}")]
    return [flag(name), *value.split("/")]


def found_in(out: Path) -> dict[str, float | None] | None:
    """Read the results of a run; None if it has not ended."""
    if not (out / "done.json").exists():
        return None
    rows = read_lines(out / "metrics.jsonl")
    last = rows[-max(1, len(rows) // 5) :]
    found = {name: _mean([row.get(name) for row in last]) for name in COLUMNS}
    found["accuracy"], found["items"] = found["reward/match"], []
    if evaluations := read_lines(out / "eval.jsonl"):
        tiers = {row["tier"]: row for row in evaluations[-1]["tiers"]}
        found["accuracy"] = tiers.get("average", tiers.get("problems"))["accuracy"]
        seed = read_json(out / "run.json", {})["config"]["seed"]
        found["items"] = [item | {"seed": seed} for item in evaluations[-1].get("items", ())]
    return found


def against(first: Sequence[dict], found: Sequence[dict]) -> str:
    """Format the difference in held-out answers, paired by seed and question; – if unpaired."""
    items = [[item for run in runs for item in run["items"]] for runs in (first, found)]
    try:
        rows = differences(*items)
    except ValueError:
        return "–"
    rows = [row for row in rows if row["tier"] in ("average", PROBLEMS)]
    return verdict(rows[0]) if rows else "–"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def table(knobs: dict, results: dict[Point, list[dict]]) -> str:
    """Return a Markdown table: a line per point, means over seeds, range of accuracy."""
    heads = [*map(flag, knobs), "accuracy % (range over seeds)", "against the first line"]
    heads += [heading for heading, _ in COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first = next(iter(results.values()), [])
    for point, found in results.items():
        cells = list(point)
        if found:
            each = [100 * r["accuracy"] for r in found if r["accuracy"] is not None]
            spread = (
                f"{statistics.fmean(each):.1f} ({min(each):.1f}–{max(each):.1f})" if each else ""
            )
            cells += [spread or "–", "–" if found is first else against(first, found)]
            for name, (_, scale) in COLUMNS.items():
                mean = _mean([result[name] for result in found])
                cells.append("–" if mean is None else f"{scale * mean:.3g}")
        lines.append("| " + " | ".join([*cells, *["–"] * (len(heads) - len(cells))]) + " |")
    return "\n".join(lines)


def heat_map(knobs: dict, results: dict[Point, list[dict]], path: Path) -> bool:
    """Draw accuracy over two knobs; return False if it cannot be drawn."""
    try:
        import matplotlib
    except ImportError:
        return False
    known = all(r and all(one["accuracy"] is not None for one in r) for r in results.values())
    if len(knobs) != 2 or not known:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    (rows, columns), (below, beside) = knobs.values(), knobs
    mean = lambda point: 100 * statistics.fmean(r["accuracy"] for r in results[point])
    values = [[mean((row, column)) for column in columns] for row in rows]
    figure, axis = pyplot.subplots(
        figsize=(1.6 + len(columns), 1.2 + 0.6 * len(rows)), constrained_layout=True
    )
    image = axis.imshow(values, cmap="viridis", aspect="auto")
    axis.set(xlabel=flag(beside), ylabel=flag(below), title="accuracy %")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    middle = sum(image.get_clim()) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "black" if value > middle else "white"
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    options, knobs, rest = read_arguments(sys.argv[1:] if arguments is None else arguments)
    grid = jobs_of(options, knobs, rest)
    if not options.table:
        try:
            with held("--out", options.out):
                run_all([job for jobs in grid.values() for job in jobs], max(1, options.jobs))
        except (JobFailed, ValueError) as failure:
            sys.exit(f"error: {failure}")
    results = {
        point: [found for job in jobs if (found := found_in(job.out))]
        for point, jobs in grid.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(knobs, results)
    (options.out / "sweep.md").write_text(text + "\n", encoding="utf-8")
    kept = lambda run: {name: value for name, value in run.items() if name != "items"}
    record = [dict(zip(knobs, point), runs=list(map(kept, r))) for point, r in results.items()]
    (options.out / "sweep.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    drawn = heat_map(knobs, results, options.out / "sweep.png")
    print(f"{text}\n\nwritten: {options.out / 'sweep.md'}, sweep.json{', sweep.png' * drawn}")


if __name__ == "__main__":
    main()
