"""Time, memory and error of the head and its losses: ours, usual PyTorch, and peers.

    python -m benchmarks.kernels --json kernels.json

Operations (benchmarks/contenders.py has the contenders):

    objective             RL-like loss of log p and entropy, gradients of hidden and weight
    statistics            log p and entropy, no gradient
    cross-entropy         of the head, gradients of hidden and weight
    top-k entropy         of the 16 likeliest tokens: how training measures difficulty; no gradient
    logits statistics, logits objective, logits cross-entropy: the same for given logits

All contenders have the same inputs in the same dtype and layout. Each is first compared with fp64
on the same rounded inputs, for all tokens; then its memory is measured; then all are timed in turn,
A B C A B C, with median and range. One that disagrees or fails stays in the table with a remark.

    work        2·N·V·C operations per product with the head: one for statistics, three with both
                gradients; N·V numbers read or written: once for statistics of logits, three times
                with their gradient. N counts tokens with a target: 63 of 64 (of
                top-k entropy, which has no targets, all are computed)
    roofline    time at the machine's ceilings over the measured time. Ceilings are measured in this
                run; for an H200 they are those of the goals, 790 TFLOP/s and 4.3 TB/s
    peak        highest bytes beyond the inputs, gradients included
    gradients   bytes of the gradients alone
    error       log p and entropy: largest absolute difference; loss: relative; gradients: Frobenius
                norm of the difference over that of the gradient
    ratio       ours (the default) / the best peer that agrees: below 1 ours is better
"""

import argparse
import json
import statistics
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.accuracy import LIMITS, disagrees, errors, exact, run
from benchmarks.contenders import HEAD, OPERATIONS, Contender, contenders, kernels_by
from kernels.reference import IGNORE


class Shape(NamedTuple):
    hidden: int  # C
    vocabulary: int  # V


SHAPES = {
    "tiny": Shape(32, 500),
    "smollm2-135m": Shape(576, 49152),
    "qwen3-0.6b-sixteenth": Shape(1024, 9496),  # a sixteenth of its vocabulary, for a CPU
    "qwen3-0.6b": Shape(1024, 151936),
    "qwen3-4b": Shape(2560, 151936),
    "qwen3-14b": Shape(5120, 151936),
}
USUAL = {  # shapes, tokens, repeats, dtype
    "cuda": (["smollm2-135m", "qwen3-0.6b", "qwen3-4b", "qwen3-14b"], 8192, 20, "bfloat16"),
    "cpu": (["smollm2-135m", "qwen3-0.6b-sixteenth"], 512, 5, "float32"),
}
SPREAD = 3.0  # standard deviation of the logits of tokens that are not the target
TERMS = {"logprob": "log p", "entropy": "H", "loss": "loss", "grad_hidden": "dX",
         "grad_weight": "dW", "grad_logits": "dZ"}  # fmt: skip


def make_inputs(shape: Shape, tokens: int, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """Make tokens with log p from about −16 to about −0.001 (p = 0.999), and their logits."""
    draw = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=draw, device=device)
    weight = normal(shape.vocabulary, shape.hidden) * (SPREAD / shape.hidden**0.5)
    targets = torch.randint(shape.vocabulary, (tokens,), generator=draw, device=device)
    raised = torch.linspace(0, 24, tokens, device=device) / SPREAD**2
    hidden = normal(tokens, shape.hidden) + raised[:, None] * weight[targets]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "logits": (hidden.detach() @ weight.detach().t()).requires_grad_(),
        "targets": targets.index_fill(0, torch.arange(0, tokens, 64, device=device), IGNORE),
        "advantage": normal(tokens),
    }


def measure(name: str, who: list[Contender], inputs: dict[str, Tensor], repeats: int) -> list[dict]:
    """Return a row per contender of an operation: `times` in seconds etc., or a `reason`."""
    operation, device = OPERATIONS[name], inputs["targets"].device
    data = [inputs[leaf] for leaf in operation.leaves], inputs["targets"], inputs["advantage"]
    truth, rows, running = exact(operation, *data), [], []
    for contender in who:
        row = {"operation": name, "contender": contender.name}
        rows.append(row)
        if isinstance(contender.forward, str):
            row["reason"] = contender.forward
            continue
        try:
            with kernels_by(contender.kernels):
                results = run(contender.forward, operation, *data)
        except Exception as error:  # whatever a peer raises, the others continue
            row["reason"] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            continue
        row["errors"] = errors(results, truth)
        row["disagrees"] = disagrees(row["errors"], inputs["weight"].dtype)
        row["gradient_bytes"] = sum(x.nbytes for k, x in results.items() if k.startswith("grad"))
        work = partial(run, contender.forward, operation, *data)
        running.append((row, contender.kernels, work))
        del results
    del truth
    for row, choice, work in running:
        with kernels_by(choice):
            row["peak_bytes"], row["times"] = machine.peak_memory(work, device), []
    for _ in range(repeats):
        for row, choice, work in running:
            with kernels_by(choice):
                row["times"].append(machine.seconds(work, device))
    return rows


def required(name: str, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Return the floating-point operations and bytes that an operation needs at least."""
    operation, targets = OPERATIONS[name], inputs["targets"]
    live, (vocabulary, hidden) = int((targets != IGNORE).sum()), inputs["weight"].shape
    itemsize = inputs["weight"].itemsize
    if operation.leaves == HEAD:
        trips = 2 if operation.backward else 1  # inputs, and gradients back
        flops = operation.passes * 2 * live * vocabulary * hidden
        return flops, trips * (live + vocabulary) * hidden * itemsize
    return 0, operation.passes * live * vocabulary * itemsize


def rate(row: dict, flops: int, moved: int, roof: dict[str, float]) -> None:
    """Add median, range, rates and roofline to a row, from its times."""
    if "times" in row:
        times = row["times"]
        row["median"], row["low"], row["high"] = statistics.median(times), min(times), max(times)
        row["tflops"] = flops / row["median"] / 1e12
        row["gbytes"] = moved / row["median"] / 1e9
        ideal = max(flops / roof["flops"], moved / roof["bytes"])
        row["roofline"] = ideal / row["median"]


def ratios(rows: list[dict]) -> dict:
    """Compare our default (the first row) with the fastest and the leanest peer that agrees."""
    ours, found = rows[0], {"operation": rows[0]["operation"], "ours": rows[0]["contender"]}
    peers = [r for r in rows if not r["contender"].startswith("ours") and not r.get("disagrees")]
    for word, field in (("time", "median"), ("memory", "peak_bytes")):
        best = min((p for p in peers if p.get(field)), key=lambda row: row[field], default=None)
        both = best is not None and bool(ours.get(field))
        found[f"best_{word}"] = best["contender"] if both else None
        found[f"ratio_{word}"] = ours[field] / best[field] if both else None
    return found


def benchmark(shape: Shape, tokens: int, repeats: int, dtype: torch.dtype, device) -> dict:
    """Measure all operations of one shape."""
    measured = [machine.ceilings(device, dtype)]
    inputs = make_inputs(shape, tokens, dtype, device)
    rows, states = [], {"before": machine.state(device)}
    for name in OPERATIONS:
        rows.append(measure(name, contenders(name, device), inputs, repeats))
        states[name] = machine.state(device)
    torch.compiler.reset()
    measured.append(machine.ceilings(device, dtype))  # again: the load may have changed
    best = {unit: max(m[unit] for m in measured) for unit in measured[0]}
    roof = machine.known(device, dtype) or best
    for found in rows:
        for row in found:
            rate(row, *required(row["operation"], inputs), roof)
    return shape._asdict() | {
        "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
        "ceilings": roof, "ceilings_measured": best, "states": states,
        "ratios": [ratios(found) for found in rows], "rows": list(chain.from_iterable(rows)),
    }  # fmt: skip


def rates(found: dict) -> str:
    said = []
    for which in ("ceilings", "ceilings_measured"):
        flops, moved = found[which]["flops"], found[which]["bytes"]
        said.append(f"{which.replace('_', ' ')} {flops / 1e12:.2f} TFLOP/s, {moved / 1e9:.0f} GB/s")
    return "; ".join(said)


def table(found: dict) -> str:
    head = f"{'ms (range)':>25} {'peak MB':>9} {'grad MB':>8}  TFLOP/s   GB/s roof  error"
    lines = []
    for comparison in found["ratios"]:
        name = comparison["operation"]
        lines += ["", f"{name:34}{head}"]
        mine = [row for row in found["rows"] if row["operation"] == name]
        lines += [line(row) for row in mine if "median" in row]
        for reason in dict.fromkeys(row["reason"] for row in mine if "reason" in row):
            who = "; ".join(r["contender"] for r in mine if r.get("reason") == reason)
            lines.append(f"  not here: {who} ({reason})")
        for word in ("time", "memory"):
            if comparison[f"ratio_{word}"] is not None:
                lines.append(f"  {word}: {comparison['ours']} / {comparison[f'best_{word}']}"
                             f" = {comparison[f'ratio_{word}']:.3g}")  # fmt: skip
    return "\n".join(lines)


def line(row: dict) -> str:
    ms, low, high = (f"{1e3 * row[k]:.1f}" for k in ("median", "low", "high"))
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    off = ", ".join(f"{TERMS[name]} {error:.0e}" for name, error in row["errors"].items())
    return (
        f"  {row['contender']:32}{ms:>9} ({low + '–' + high:>13}) {peak:>9} "
        f"{row['gradient_bytes'] / 1e6:8.0f} {row['tflops']:8.2f} {row['gbytes']:6.0f} "
        f"{row['roofline']:4.0%}  {off}{'  DISAGREES' * row['disagrees']}"
    )


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, tokens, repeats, dtype = USUAL[device.type]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--dtype", choices=LIMITS, default=dtype)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    o = parser.parse_args()
    if min(o.tokens, o.repeats) < 1:
        parser.error(f"--tokens {o.tokens} and --repeats {o.repeats} must be at least 1")
    dtype = getattr(torch, o.dtype)
    flags = f"--shapes {' '.join(o.shapes)} --tokens {o.tokens} --repeats {o.repeats}"
    command = f"python -m benchmarks.kernels {flags} --dtype {o.dtype}"
    result = {"command": command, **machine.about(device), "shapes": {}}
    print(f"{result['device']}\n{command}")
    for name in o.shapes:
        found = benchmark(SHAPES[name], o.tokens, o.repeats, dtype, device)
        result["shapes"][name] = found
        print(f"\n{name}: {o.tokens} tokens, C = {SHAPES[name].hidden}, V = "
              f"{SHAPES[name].vocabulary}; {rates(found)}{table(found)}", flush=True)  # fmt: skip
        if o.json:  # after each shape, to keep what is measured
            o.json.parent.mkdir(parents=True, exist_ok=True)
            o.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
