"""Cost of our step as documents, positions, group and length vary, one at a time.

    python -m benchmarks.scaling --model smollm2-135m --json scaling.json

A step asks k positions of each document, with G responses of exactly `length` tokens to each.
Rollouts and update are those of train.py (benchmarks/trainers.py), timed separately. Three claims
are tested:

- both grow linearly in response tokens: a straight line is fitted for each quantity, with R²;
- tokens that responses share are computed once, whatever G is: `prefill rows` are the tokens of
  the first pass in sampling, `shared rows` the tokens of training outside responses, as they are
  packed for the model. Both are the trunks and one prompt token per position;
- memory grows with the tokens of a micro-batch and of the cache.

The model has few layers, since all layers are alike, but its full width and whole head, with random
weights. All points take turns, so that a change of the machine affects all of them. There is no
peer here: benchmarks/rl_step.py has one.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from benchmarks import inputs, machine, plots, trainers
from benchmarks.results import spread, write
from benchmarks.trainers import Trainer, judge, make_run, respond, step_on
from rmt import forest, rollout
from rmt.system.metrics import Metrics
from rmt.trees import Branch, Tree

SWEEPS = {
    "documents": (1, 2, 4, 8), "positions": (1, 2, 4, 8), "group": (2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128),
}  # fmt: skip
ROW = 16384  # tokens of a micro-batch, as in train.py: holds all branches of a document
PHASES = ("rollout", "update")


def plant(prefixes: list[list[int]], positions: int, groups=None) -> list[Tree]:
    """Fork k branches per document, evenly over its second half, with a prompt of one token."""
    trees = []
    for number, ids in enumerate(prefixes):
        branches = []
        for i in range(positions):
            fork = len(ids) - 1 - i * (len(ids) // (2 * positions))
            index = number * positions + i
            answers = [()] if groups is None else [r.tokens for r in groups[index]]
            for j, answer in enumerate(answers):
                branches.append(
                    Branch(index * len(answers) + j, fork, ids[fork : fork + 1], answer)
                )
        trees.append(Tree(number, ids[:-1], tuple(branches)))
    return trees


@contextmanager
def packed_rows() -> Iterator[list[int]]:
    """Yield the tokens of each row that is packed meanwhile, without a GPU's padding.

    The model itself is not touched: a hook on it would be part of what compiled layers depend on.
    """
    rows: list[int] = []

    def counting(trees, *given, **options):
        packed = forest.pack(trees, *given, **options)
        rows.append(int((packed.tree >= 0).sum()))
        return packed

    with patch.object(rollout, "pack", counting), patch.object(trainers, "pack", counting):
        yield rows


def step(run: Trainer, point: dict[str, int], prefixes: list[list[int]]) -> dict[str, float]:
    """Run one step at a point; return seconds of its two phases and tokens of each."""
    documents = prefixes[: point["documents"]]
    with packed_rows() as rows:
        started = time.perf_counter()
        groups = respond(run, plant(documents, point["positions"]), point["group"], point["length"])
        _wait(run)
        middle = time.perf_counter()
        prefill = sum(rows)
        rows.clear()
        rewards, advantage = judge(run, groups)
        trees = plant(documents, point["positions"], groups)
        trained = step_on(run, trees, groups, rewards, advantage, Metrics()).trees
        _wait(run)
        ended = time.perf_counter()
    own = sum(len(branch.response) for tree in trained for branch in tree.branches)
    return {
        "rollout": middle - started, "update": ended - middle,
        "prefill_rows": prefill, "shared_rows": sum(rows) - own,
    }  # fmt: skip


def _wait(run: Trainer) -> None:
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)


def fit(tokens: list[float], seconds: list[float]) -> dict[str, float] | None:
    """Fit seconds = slope · tokens + intercept by least squares; r2: explained variance."""
    if len(set(tokens)) < 2:
        return None
    slope, intercept = statistics.linear_regression(tokens, seconds)
    r2 = statistics.correlation(tokens, seconds) ** 2
    return {"slope": slope, "intercept": intercept, "r2": r2}


def summary(points: list[dict], centre: dict[str, int]) -> dict[str, dict]:
    """Return for each quantity its values, seconds of both phases, fits over response tokens."""
    found = {}
    for name in SWEEPS:
        others = {key: value for key, value in centre.items() if key != name}
        row = [p for p in points if all(p[key] == value for key, value in others.items())]
        row.sort(key=lambda point: point[name])
        tokens = [p["tokens"] for p in row]
        found[name] = {
            "values": [p[name] for p in row], "tokens": tokens,
            "prefill_rows": [p["prefill_rows"] for p in row],
            "shared_rows": [p["shared_rows"] for p in row],
            **{phase: [p[phase]["median"] for p in row] for phase in PHASES},
            "fit": {phase: fit(tokens, [p[phase]["median"] for p in row]) for phase in PHASES},
        }  # fmt: skip
    return found


def report(found: dict[str, dict]) -> str:
    lines = []
    for name, row in found.items():
        lines.append(f"\n{name:20}" + "".join(f"{value:9d}" for value in row["values"]))
        lines.append(f"{'  response tokens':20}" + "".join(f"{n:9.0f}" for n in row["tokens"]))
        for phase in PHASES:
            lines.append(f"  {phase + ', seconds':18}" + "".join(f"{s:9.2f}" for s in row[phase]))
            if f := row["fit"][phase]:
                lines[-1] += f"   {1e3 * f['slope']:.2f} ms per token + {f['intercept']:.2f} s"
                lines[-1] += f", R² {f['r2']:.4f}"
        for what in ("prefill_rows", "shared_rows"):
            lines.append(f"  {what.replace('_', ' '):18}" + "".join(f"{n:9.0f}" for n in row[what]))
    return "\n".join(lines)


def measure(o: argparse.Namespace, run: Trainer, points: list[dict[str, int]]) -> list[dict]:
    most = max(point["documents"] for point in points)
    prefixes = [ids for _, ids in inputs.prompts(run.source, most, o.prefix)]
    answers: list[list[dict]] = [[] for _ in points]
    peaks = []
    for point in points:  # also the warm-up
        work = lambda point=point: step(run, point, prefixes)
        peaks.append(machine.peak_memory(work, run.world.device))
    for _ in range(o.rounds):
        for point, said in zip(points, answers):
            said.append(step(run, point, prefixes))
    rows = []
    for point, said, peak in zip(points, answers, peaks):
        tokens = point["documents"] * point["positions"] * point["group"] * point["length"]
        phases = {phase: spread([s[phase] for s in said], tokens) for phase in PHASES}
        counts = {name: said[0][name] for name in ("prefill_rows", "shared_rows")}
        rows.append(point | {"tokens": tokens, "peak_bytes": peak, **counts, **phases})
    return rows


def main() -> None:
    parser = inputs.parser_of(
        __doc__, response=None, documents=2, prefix=128, layers=4, rounds=3, group=8
    )
    parser.add_argument("--positions", type=int, default=2, help="k: positions per document")
    parser.add_argument("--length", type=int, default=32, help="tokens of each response")
    usual = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=usual)
    parser.add_argument("--largest", type=int, default=128, help="leave larger values out")
    o = parser.parse_args()
    inputs.prepare(o)
    device = machine.device_here()
    command = f"python -m benchmarks.scaling {' '.join(inputs.flags(o))}"
    result = {"command": command, **machine.about(device)}
    print(f"{result['device']}\n{command}", flush=True)
    centre = {name: getattr(o, name) for name in SWEEPS}
    every = [
        centre | {name: value}
        for name, values in SWEEPS.items()
        for value in (centre[name], *values)
        if value <= max(o.largest, centre[name])
    ]
    points = [point for number, point in enumerate(every) if point not in every[:number]]
    o.response = o.length  # make_run reads it
    run = make_run(o, inputs.directory(o), inputs.dtype_of(o), ROW)
    rows = measure(o, run, points)
    found = summary(rows, centre)
    result |= {"centre": centre, "points": rows, "summary": found}
    write(o.json, result)
    print(report(found))
    shown = [
        {"label": name, "unit": "seconds", "x": row["values"],
         "series": {phase: row[phase] for phase in PHASES}}
        for name, row in found.items()
    ]  # fmt: skip
    plots.lines(o.json, shown, "what a step of ours costs")


if __name__ == "__main__":
    main()
