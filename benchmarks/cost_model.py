"""Seconds per step, and of a whole run, from operations, bytes and links: arithmetic, no GPU.

    python -m benchmarks.cost_model                  the paper's run, what binds as it grows
    python -m benchmarks.cost_model --model qwen3-4b --machine h200 --gpus 1
    python -m benchmarks.cost_model --machine cpu --measured benchmarks/results/cpu-*.json

benchmarks/cost_machines.py names what is assumed of a machine, benchmarks/cost_run.py what is
assumed of the text and of the model's obedience; the rest of a run is Config. The terms of a step
(benchmarks/cost_terms.py), for the rank that has most to do:

gather         bf16 weights to every rank for the rollout: one all-gather, nothing hides it
prefill        products and attention of trunks and prompts (rmt/engine/flops.py, without the head)
decode         step by step, with as many slots as memory holds: a step reads all weights, the
               trunks and own tokens of its branches, and writes logits; against its operations.
               A slot that falls free is filled, so the last responses end in a thin batch
forward        products and attention of forward and backward pass: 3 forward passes
recompute      one more, with --recompute full
head           the loss in the head, 6 V C per target
copies         of FSDP: gathered weights copied out twice, gradients to fp32 and in: 14 bytes per
               weight and micro-batch
communication  of FSDP, as far as forward, recompute and head do not hide it: per micro-batch two
               bf16 all-gathers (the recomputed pass is inside the backward's), an fp32
               reduce-scatter, and between nodes an fp32 all-reduce of the shard
optimizer      clipping and AdamW: 40 bytes of memory traffic per weight of the shard
checkpoint     12 bytes per weight to the host, every --save-every steps; storage takes them behind
               the next steps, and is waited for only if it is slower than they are

Left out: loading, evaluation, probes, Python between the terms, and responses without advantage,
which are not trained. Thinking follows B_t exactly, which the first steps will not do: with 1,600
tokens a step is what the table says for that length.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import cost_check, plots
from benchmarks.cost_machines import GPUS, World
from benchmarks.cost_run import Text, binding, fitted, step, whole_run
from benchmarks.inputs import flags
from benchmarks.results import write
from models.shapes import SHAPES, published
from rmt.config.config import Config

RUNS = (("h100", 8, "qwen3-14b"), ("h100", 16, "qwen3-14b"), ("h200", 8, "qwen3-14b"),
        ("h200", 1, "qwen3-4b"), ("h200", 1, "qwen3-1.7b"), ("h200", 1, "qwen3-0.6b"))  # fmt: skip
MIDDLE = 357  # B_t when half of the run is over
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], dict[str, int]]]] = {
    # One quantity at a time, around a run of the paper in its middle.
    "G": ((2, 4, 8, 16, 32, 64), lambda g: {"group_size": g}),
    "k": ((1, 2, 4, 8, 16), lambda k: {"positions_per_document": k}),
    "thinking tokens": ((50, 160, 357, 800, 1600), lambda tokens: {"thinking": tokens}),
    "GPUs, 128 documents": (SIZES, lambda gpus: {"gpus": gpus}),
    "GPUs, 16 documents each": (SIZES, lambda gpus: {"gpus": gpus, "batch_size": 16 * gpus}),
}
GUESSES = ("products", "thin", "attention", "head", "streaming", "layer_seconds", "link",
           "network", "hidden", "to_host", "storage")  # fmt: skip
WORSE = 1.25
COSTS = ("layer_seconds",)  # of which more is worse


def paper(machine: str, gpus: int, model: str, c: Config) -> dict[str, Any]:
    """The paper's run on one machine, or the reason why not."""
    text = Text()
    found: dict[str, Any] = {"machine": machine, "gpus": gpus, "model": model}
    try:
        world = World(GPUS[machine], gpus)
        chosen = fitted(world, published(model), c, text)
        found |= {"branches": chosen.max_branches, "recompute": chosen.recompute}
        found |= whole_run(world, published(model), c, text)
    except ValueError as reason:
        found["reason"] = str(reason)
    return found


def paper_table(rows: list[dict]) -> str:
    terms = next((row["terms"] for row in rows if "terms" in row), {})
    head = f"{'':26}{'branches':>9}{'first':>8}{'mean':>8}{'last':>8}{'hours':>8}{'GPU-h':>8}"
    lines = [head + "".join(f"{name:>{len(name) + 2}}" for name in terms)]
    for row in rows:
        name = f"{row['gpus']} x {row['machine'].upper()}, {row['model']}"
        if "reason" in row:
            lines.append(f"{name:26} {row['reason']}")
            continue
        line = f"{name:26}{row['branches']:9d}"
        line += "".join(f"{row[key]:8.1f}" for key in ("first", "seconds", "last", "hours"))
        line += f"{row['hours'] * row['gpus']:8.0f}"
        lines.append(line + "".join(f"{s:{len(name) + 2}.2f}" for name, s in row["terms"].items()))
    return "\n".join(lines)


def guesses(machine: str, gpus: int, model: str, c: Config) -> dict[str, float]:
    """By how much the run gets longer when one guess is 1.25 times too optimistic."""
    m, shape, text = GPUS[machine], published(model), Text()
    hours = lambda m, text: whole_run(World(m, gpus), shape, c, text)["hours"]
    base, found = hours(m, text), {}
    for name in GUESSES:
        factor = WORSE if name in COSTS else 1 / WORSE
        found[name] = hours(replace(m, **{name: getattr(m, name) * factor}), text) / base - 1
    for name in ("spread", "imbalance", "tokens"):
        changed = type(getattr(text, name))(getattr(text, name) * WORSE)
        found[name] = hours(m, replace(text, **{name: changed})) / base - 1
    longer = replace(c, budget_start=int(c.budget_start * WORSE))
    found["thinking"] = whole_run(World(m, gpus), shape, longer, text)["hours"] / base - 1
    return found


def grow(name: str, machine: str, gpus: int, model: str, c: Config) -> Iterator[dict[str, Any]]:
    """A sweep: seconds, terms and what binds at each value, or the reason why not."""
    values, changed = SWEEPS[name]
    for value in values:
        changes = {"gpus": gpus, "thinking": MIDDLE} | changed(value)
        size, thinking = changes.pop("gpus"), changes.pop("thinking")
        config = replace(c, **changes)
        try:
            world = World(GPUS[machine], size)
            terms, decoding = step(world, published(model), config, Text(), thinking)
        except ValueError as reason:
            yield {"value": value, "reason": str(reason)}
            continue
        seconds = sum(terms.values())
        yield {
            "value": value, "seconds": seconds, "binds": binding(terms, decoding), "terms": terms,
            "decoding": decoding, "gpu_seconds": seconds * size / config.batch_size,
        }  # fmt: skip


def grow_table(name: str, rows: list[dict]) -> str:
    lines = [f"{name:>24}{'s per step':>12}{'GPU-s per document':>20}   share of the largest terms"]
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['value']:24d}   {row['reason']}")
            continue
        shares = sorted(((s / row["seconds"], term) for term, s in row["terms"].items()))[:-4:-1]
        names = [row["binds"], *(term for _, term in shares[1:])]
        said = ", ".join(f"{term} {share:.0%}" for term, (share, _) in zip(names, shares))
        lines.append(f"{row['value']:24d}{row['seconds']:12.1f}{row['gpu_seconds']:20.2f}   {said}")
    return "\n".join(lines)


def panels(grown: dict[str, list[dict]]) -> list[dict]:
    """Seconds of the terms that matter, one plot per sweep."""
    made = []
    for name, rows in grown.items():
        known = [row for row in rows if "terms" in row]
        shares = [(t, s / row["seconds"]) for row in known for t, s in row["terms"].items()]
        terms = dict.fromkeys(term for term, share in shares if share > 0.05)
        series = {term: [row["terms"][term] for row in known] for term in terms}
        made.append({"label": name, "unit": "seconds per step", "log": True, "series": series,
                     "x": [row["value"] for row in known]})  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, help="one run instead of the table's")
    parser.add_argument("--machine", choices=(*GPUS, "cpu"), default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--measured", nargs="+", type=Path, help="results of benchmarks, for cpu")
    parser.add_argument("--json", type=Path, help="where to write all numbers; a plot beside it")
    o = parser.parse_args()
    if o.machine == "cpu":
        return cpu(o)
    c, model = Config(), o.model or "qwen3-14b"
    rows = [paper(*run, c) for run in ([(o.machine, o.gpus, model)] if o.model else RUNS)]
    print(f"the paper's run: {int(c.epochs * Text.documents / c.batch_size)} steps of "
          f"{c.batch_size} documents, seconds per step\n{paper_table(rows)}")  # fmt: skip
    where = (o.machine, o.gpus, model)
    doubted = guesses(*where, c) if all("terms" in row for row in rows) else {}
    print(f"\n{o.gpus} x {o.machine.upper()}, {model}: how much longer the run is when a guess is "
          f"{WORSE} times too good")  # fmt: skip
    print("  ".join(f"{name} {more:+.1%}" for name, more in doubted.items()))
    grown = {name: list(grow(name, *where, c)) for name in SWEEPS}
    print(f"\nwhat binds on {o.gpus} x {o.machine.upper()}, at {MIDDLE} thinking tokens")
    for name, found in grown.items():
        print(f"\n{grow_table(name, found)}")
    machines = {name: asdict(machine) for name, machine in GPUS.items()}
    command = f"python -m benchmarks.cost_model {' '.join(flags(o))}"
    write(o.json, {"command": command, "machines": machines, "text": asdict(Text()), "runs": rows,
                   "guesses": doubted, "growing": grown})  # fmt: skip
    plots.lines(o.json, panels(grown), f"seconds per step, {model} on {o.machine.upper()}")


def cpu(o: argparse.Namespace) -> None:
    if not o.measured:
        raise SystemExit(
            "error: the rates of a CPU come from measurements; add --measured "
            "benchmarks/results/cpu-*.json"
        )
    try:
        results = cost_check.read(o.measured)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    print(cost_check.report(results))
    found = [asdict(p) | {"off": p.off} for p in cost_check.predictions(results)]
    command = f"python -m benchmarks.cost_model {' '.join(flags(o))}"
    write(o.json, {"command": command, "cpu": found})


if __name__ == "__main__":
    main()
