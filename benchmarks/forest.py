"""Savings of the forest in training: one packed pass against a separate sequence per branch.

    python -m benchmarks.forest --model smollm2-135m --json forest.json

Forward and backward of the log-probabilities of the responses to one prefix. Both use the same
model and the same head, at response tokens only:

packed        the prefix once, then all its branches (rmt/forest.py)
independent   prefix + response for each, `together` sequences of equal length at a time: a plain
              causal batch without padding, the best case of usual trainers

First at full depth, in turns, with a comparison of gradients. Then a sweep of prefix, branches and
response, one at a time around that point, to show where packing stops paying (below 1). The sweep
runs few layers and no head: the head's work is the same for both, and all layers are alike, so they
change the size of the ratio, but not if it is above 1.

peak: memory of one pass beyond what is allocated before, gradients included.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs, machine, plots
from benchmarks.results import ratios, spread, table, write
from kernels import linear_objective
from models.transformer import Transformer
from models.weights import build
from rmt.forest import pack
from rmt.objective import Targets
from rmt.trees import Branch, Tree

SWEEPS = {"prefix": (16, 64, 256, 1024), "branches": (1, 2, 8, 32), "response": (16, 64, 256)}
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}  # of the gradients' difference; bf16 rounds both


def log_probabilities(hidden: Tensor, head: Tensor, predecessor: Tensor, token: Tensor) -> Tensor:
    """Sum the log-probabilities of the tokens (n,), from hidden states at predecessor (n,)."""
    read = hidden.index_select(0, predecessor)
    return linear_objective(read, head, token, lambda logprob, entropy, index: logprob.sum())[0]


def without_head(hidden: Tensor, head: Tensor, predecessor: Tensor, token: Tensor) -> Tensor:
    """Return a scalar of the same hidden states, at almost no cost."""
    direction = torch.linspace(-1, 1, hidden.shape[1], device=hidden.device)
    return (hidden.index_select(0, predecessor).float() @ direction).sum()


def packed(model: Transformer, prefix: list[int], responses: list[list[int]], loss, device) -> None:
    branches = tuple(Branch(i, len(prefix), (), r) for i, r in enumerate(responses))
    forest = pack([Tree(0, prefix, branches)], device)
    targets = Targets.of(forest)
    readout = lambda hidden, head: loss(hidden, head, targets.predecessor, targets.token)
    model(forest.tokens, forest.position, forest.attend, readout).backward()


def independent(
    model: Transformer, prefix: list[int], responses: list[list[int]], loss, device, together: int
) -> None:
    for first in range(0, len(responses), together):
        rows = [prefix + response for response in responses[first : first + together]]
        tokens = torch.tensor(rows, device=device)  # (sequences, T)
        count, length = tokens.shape
        place = torch.arange(count * length, device=device).view(count, length)
        predecessor = place[:, len(prefix) - 1 : -1].flatten()
        readout = lambda hidden, head, p=predecessor, t=tokens: loss(
            hidden, head, p, t[:, len(prefix) :].flatten()
        )
        position = torch.arange(length, device=device).repeat(count)
        model(tokens.flatten(), position, partial(causal, count), readout).backward()


def causal(count: int, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within `count` packed sequences: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
    if not q.is_cuda:  # as the forest does on a CPU, where it is as fast as enable_gqa or faster
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=q.is_cuda)
    return out.transpose(1, 2).reshape(q.shape)


def measure(
    model: Transformer, point: dict[str, int], o: argparse.Namespace, loss: Callable, rounds: int
) -> dict:
    """Measure both at one point: times in turns, peaks, and the difference of gradients."""
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, str(weight.dtype).removeprefix("torch.")
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(len(weight), (n,), generator=draw).tolist()
    prefix = ids(point["prefix"])
    responses = [ids(point["response"]) for _ in range(point["branches"])]
    everything = model, prefix, responses, loss, device
    works = {
        "packed": partial(packed, *everything),
        "independent": partial(independent, *everything, o.together),
    }
    peaks, gradients, times = {}, {}, {name: [] for name in works}
    for name, work in works.items():  # these are the warm-up as well
        model.zero_grad(set_to_none=True)
        peaks[name] = machine.peak_memory(work, device)
        gradients[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    difference = _difference(gradients["packed"], gradients["independent"])
    if not difference < LIMITS[dtype]:
        raise SystemExit(f"gradients differ by {difference:.1e} at {point}, {dtype}")
    gradients.clear()
    for _ in range(rounds):
        for name, work in works.items():
            model.zero_grad(set_to_none=True)
            times[name].append(machine.seconds(work, device))
    tokens = point["branches"] * point["response"]
    rows = [{"contender": n, "peak_bytes": peaks[n], **spread(times[n], tokens)} for n in works]
    found = point | {"dtype": dtype, "layers": len(model.model.layers), **ratios(rows)}
    return found | {"gradient_difference": difference, "rows": rows}


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the relative difference of all gradients together."""
    off = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return float((off / sum(g.double().square().sum() for g in b.values())).sqrt())


def sweep(model: Transformer, centre: dict[str, int], o: argparse.Namespace) -> list[dict]:
    """Measure all points of SWEEPS; the model keeps its first layers only."""
    model.model.layers = model.model.layers[: o.sweep_layers]
    points = [centre | {name: value} for name, values in SWEEPS.items() for value in values]
    unique = [point for number, point in enumerate(points) if point not in points[:number]]
    found = []
    print(f"\nindependent / packed, {o.sweep_layers} layers without head")
    for point in sorted(unique, key=lambda point: list(point.values())):
        found.append(measure(model, point, o, without_head, o.sweep_rounds))
        what = "  ".join(f"{name} {value:5d}" for name, value in point.items())
        print(f"  {what}: time {1 / found[-1]['ratio_time']:5.2f}  "
              f"memory {1 / found[-1]['ratio_memory']:5.2f}", flush=True)  # fmt: skip
    return found


def panels(points: list[dict], centre: dict[str, int]) -> list[dict]:
    """Arrange the sweep as one plot per quantity."""
    made = []
    for name in SWEEPS:
        others = {key: value for key, value in centre.items() if key != name}
        row = [p for p in points if all(p[key] == value for key, value in others.items())]
        row.sort(key=lambda point: point[name])
        series = {word: [1 / p[f"ratio_{word}"] for p in row] for word in ("time", "memory")}
        label = name + ", at " + ", ".join(f"{k} {v}" for k, v in others.items())
        made.append({"label": label, "unit": "independent / packed", "x": [p[name] for p in row],
                     "series": series, "level": 1, "log": True})  # fmt: skip
    return made


def main() -> None:
    parser = inputs.parser_of(__doc__, documents=None, group=None)
    parser.add_argument("--branches", type=int, default=32, help="responses on the prefix")
    parser.add_argument("--together", type=int, default=8, help="independent sequences per pass")
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=["bfloat16", "float32"])
    parser.add_argument("--sweep-layers", type=int, default=4, help="of the sweep; 0: no sweep")
    parser.add_argument("--sweep-rounds", type=int, default=3, help="it is in the first dtype")
    o = parser.parse_args()
    inputs.prepare(o)
    device = machine.device_here()
    command = f"python -m benchmarks.forest {' '.join(inputs.flags(o))}"
    result = {"command": command, **machine.about(device), "contests": [], "sweep": []}
    print(f"{result['device']}\n{command}", flush=True)
    centre = {"prefix": o.prefix, "branches": o.branches, "response": o.response}
    for dtype in o.dtypes:
        model = build(inputs.directory(o), device, getattr(torch, dtype))
        found = measure(model, centre, o, log_probabilities, o.rounds)
        result["contests"].append(found)
        for key in ("ratio_time", "ratio_memory"):
            result.setdefault(key, found[key])
        write(o.json, result)
        print(f"\n{centre}, {found['layers']} layers, {dtype}; gradients differ by "
              f"{found['gradient_difference']:.0e}\n{table(found['rows'], found)}",
              flush=True)  # fmt: skip
    if o.sweep_layers:
        model = build(inputs.directory(o), device, getattr(torch, o.dtypes[0]))
        result["sweep"] = sweep(model, centre, o)
        write(o.json, result)
        plots.lines(o.json, panels(result["sweep"], centre), "training: independent / packed")


if __name__ == "__main__":
    main()
