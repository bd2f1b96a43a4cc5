"""The cost model held against this CPU: rates from some measurements, predictions of others.

    python -m benchmarks.cost_model --machine cpu --measured benchmarks/results/cpu-*.json

What is read from where, for each dtype. Nothing of it is predicted:

flops, bandwidth  benchmarks/rollout, `ceilings`: micro-benchmarks of one matrix product and a copy
head              benchmarks/kernels: what the loss in the head reaches, of 512 tokens in fp32
layer_seconds     benchmarks/rollout of one sequence: what is left of a step, per layer, when the
                  weights have been read at `bandwidth`
products          benchmarks/forest, sweep of four layers without a head: operations over seconds.
                  Without a sweep in that dtype its full depth serves, less the head
thin              benchmarks/cost_rates, products with 32 rows; where there is none, as `products`

What is predicted: rollout and update of benchmarks/rl_step (30 layers, head, recomputation, FSDP's
copies, AdamW), sampling of 32 sequences, the packed pass of benchmarks/forest at full depth, and
every point of benchmarks/scaling. Attention is as fast as products here; nothing overlaps.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from benchmarks import inputs
from benchmarks.cost_machines import Machine, World
from benchmarks.cost_terms import Flops, decode_parts, gather, prefill, update
from benchmarks.scaling import ROW, plant
from benchmarks.trainers import ROW as STEP_ROW
from models.config import ModelConfig
from models.shapes import published
from rmt.forest import Tree

TOLERANCE = 0.25
PARTS = ("rl_step", "rollout", "forest", "scaling", "kernels", "cost_rates")
ITEMSIZE = {"bfloat16": 2, "float32": 4}
MODEL = "smollm2-135m"
HEAD = 0.5  # share of the ceiling, where benchmarks/kernels was not measured


@dataclass(frozen=True)
class Prediction:
    """Seconds of one thing, predicted and measured (the median)."""

    what: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def close(self) -> bool:
        return abs(self.off) <= TOLERANCE


def read(paths: Sequence[Path]) -> dict[str, dict]:
    """Results by the benchmark that their command names; a later file replaces an earlier one."""
    found = {}
    for path in paths:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        part = result["command"].split("benchmarks.")[1].split()[0]
        if part in PARTS:
            found[part] = result
    for part in ("rollout", "forest"):
        if part not in found:
            raise ValueError(
                f"rates of a CPU come from benchmarks/{part}, whose file is missing; add "
                f"benchmarks/results/cpu-{part}.json to --measured"
            )
    return found


def shape_of(layers: int = 0) -> ModelConfig:
    shape = published(MODEL)
    return replace(shape, num_hidden_layers=layers) if layers else shape


def machine_of(results: dict[str, dict], dtype: str) -> Machine:
    """This CPU in one dtype; ValueError when a rate was not measured."""
    contests = [c for c in results["rollout"]["contests"] if c["dtype"] == dtype]
    alone = next((c for c in contests if c["sequences"] == 1), None)
    passes = _passes(results["forest"], dtype)
    if alone is None or not passes:
        raise ValueError(f"no rates in {dtype}: rollout (one sequence) or forest was not measured")
    rows = results.get("kernels", {}).get("shapes", {}).get(MODEL, {}).get("rows", ())
    ours = [r["roofline"] for r in rows if r["operation"] == "objective" and "roofline" in r]
    bare = Machine(
        f"CPU, {dtype}", flops=alone["ceilings"]["flops"], bandwidth=alone["ceilings"]["bytes"],
        memory=float("inf"), products=1.0, thin=1.0, attention=1.0, head=ours[0] if ours else HEAD,
        streaming=1.0, overlap=0.0, layer_seconds=0.0, per_node=1, itemsize=ITEMSIZE[dtype],
        head_itemsize=4, sharded=dtype == "bfloat16",
    )  # fmt: skip
    few = results.get("cost_rates", {}).get("products", {}).get(dtype)
    bare = _with_products(bare, passes, few)
    left = alone["rows"][0]["median"] - sampling(bare, alone)
    latency = max(0.0, left / (alone["response"] * shape_of().num_hidden_layers))
    return _with_products(replace(bare, layer_seconds=latency), passes, few)


def _passes(forest: dict, dtype: str) -> list[dict]:
    """Packed passes to take the rate from: the sweep has no head, contests have."""
    sweep = [p for p in forest["sweep"] if p["dtype"] == dtype]
    return sweep or [c | {"headed": True} for c in forest["contests"] if c["dtype"] == dtype]


def _with_products(m: Machine, passes: list[dict], few: dict | None) -> Machine:
    """Operations of all passes over what is left of their time without head and overheads."""
    operations = seconds = 0.0
    for point in passes:
        flops = Flops.of(shape_of(point["layers"]), _forest_trees(point))
        operations += 3 * (flops.products + flops.attention)
        seconds += _ours(point) - 3 * point["layers"] * m.layer_seconds
        seconds -= 3 * flops.head / (m.flops * m.head) if "headed" in point else 0.0
    share = thin = operations / seconds / m.flops
    if few:
        beside = max(few["median"] - few["bytes"] / m.bandwidth, few["operations"] / m.flops)
        thin = few["operations"] / beside / m.flops
    return replace(m, products=share, thin=thin, attention=share)


def _ours(contest: dict) -> float:
    return contest["rows"][0]["median"]


def _forest_trees(point: dict) -> list[Tree]:
    """The one tree of benchmarks/forest: its prompts have no token."""
    answers = [[range(point["response"])] * point["branches"]]
    (tree,) = inputs.trees([range(point["prefix"] + 1)], answers)
    return [replace(tree, branches=tuple(replace(b, prompt=()) for b in tree.branches))]


def sampling(m: Machine, contest: dict) -> float:
    """Seconds of benchmarks/rollout's sampling, and of its like in benchmarks/rl_step."""
    n = contest["documents"] * contest["group"]
    trees = inputs.trees([range(contest["prefix"])] * contest["documents"])
    lengths, fork = [contest["response"]] * n, contest["prefix"] - 1
    decoding = decode_parts(m, shape_of(), lengths, n, fork, 1, contest["group"])["decode"]
    return prefill(m, shape_of(), Flops.of(shape_of(), trees)) + decoding


def predictions(results: dict[str, dict]) -> Iterator[Prediction]:
    """Everything that was measured and that no rate was taken from."""
    for dtype in ITEMSIZE:
        try:
            m = machine_of(results, dtype)
        except ValueError:
            continue
        contests = lambda part: (
            c
            for c in results.get(part, {}).get("contests", ())
            if c["dtype"] == dtype  # noqa: B023
        )
        for contest in contests("rl_step"):
            yield from _rl_step(m, contest)
        for contest in contests("rollout"):
            if contest["sequences"] > 1:
                what = f"rollout of {contest['sequences']} sequences, {dtype}"
                yield Prediction(what, sampling(m, contest), _ours(contest))
        for contest in contests("forest"):
            if "headed" not in _passes(results["forest"], dtype)[0]:
                seconds = _pass(m, contest)
                yield Prediction(f"forest, packed, {dtype}", seconds, _ours(contest))
        scaling = results.get("scaling", {"command": "", "points": ()})
        if f"--dtype {dtype}" in scaling["command"]:
            word = lambda flag, said=scaling["command"]: int(said.split(flag)[1].split()[0])
            for point in scaling["points"]:
                yield from _scaling(m, point, word("--layers"), word("--prefix"))


def _pass(m: Machine, contest: dict) -> float:
    """Forward and backward pass of benchmarks/forest, which has neither FSDP nor an optimizer."""
    alone, flops = World(replace(m, sharded=False), 1), Flops.of(shape_of(), _forest_trees(contest))
    terms = update(alone, shape_of(), flops, 1, recompute=False)
    return terms["forward"] + terms["head"]


def _update(m: Machine, shape: ModelConfig, trees: Sequence[Tree], row: int) -> float:
    """A whole update with recomputation, in rows of so many tokens."""
    rows = math.ceil(sum(map(len, trees)) / row)
    return sum(update(World(m, 1), shape, Flops.of(shape, trees), rows, recompute=True).values())


def _rl_step(m: Machine, contest: dict) -> Iterator[Prediction]:
    answers = [[range(contest["response"])] * contest["group"]] * contest["documents"]
    trees = inputs.trees([range(contest["prefix"])] * contest["documents"], answers)
    ours = contest["rows"][0]
    learning = _update(m, shape_of(), trees, STEP_ROW["cpu"])
    rollout, said = sampling(m, contest) + gather(World(m, 1), shape_of()), ours["rollout_seconds"]
    yield Prediction(f"rl_step, {contest['dtype']}", rollout + learning, ours["median"])
    yield Prediction("  its rollout", rollout, said)
    yield Prediction("  its update", learning, ours["median"] - said)


def _scaling(m: Machine, point: dict, layers: int, prefix: int) -> Iterator[Prediction]:
    shape, group, length = shape_of(layers), point["group"], point["length"]
    prefixes = [list(range(prefix))] * point["documents"]
    asked = plant(prefixes, point["positions"])
    forks = [b.fork for tree in asked for b in tree.branches]
    n = len(forks) * group
    decoding = decode_parts(m, shape, [length] * n, n, sum(forks) / len(forks), 1, group)["decode"]
    what = ", ".join(f"{name} {point[name]}" for name in ("documents", "positions", "group"))
    what = f"scaling, {what}, length {length}"
    rollout = prefill(m, shape, Flops.of(shape, asked)) + decoding
    yield Prediction(f"{what}: rollout", rollout, point["rollout"]["median"])
    said = [SimpleNamespace(tokens=range(length))] * group
    trees = plant(prefixes, point["positions"], [said] * len(forks))
    learning = _update(m, shape, trees, ROW)
    yield Prediction(f"{what}: update", learning, point["update"]["median"])


def report(results: dict[str, dict]) -> str:
    """The rates, and every prediction beside what was measured."""
    lines = []
    for dtype in ITEMSIZE:
        try:
            m = machine_of(results, dtype)
        except ValueError as reason:
            lines.append(str(reason))
            continue
        rates = {name: getattr(m, name) * m.flops for name in ("products", "thin", "head")}
        lines.append(
            f"{m.name}: {m.flops / 1e9:.0f} GFLOP/s and {m.bandwidth / 1e9:.1f} GB/s at most; "
            + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
            + f"; a layer takes {1e3 * m.layer_seconds:.2f} ms at least"
        )
    found = list(predictions(results))
    lines.append(f"\n{'':66}{'predicted':>10}{'measured':>10}{'off':>8}")
    for p in found:
        mark = "" if p.close else f"  beyond {TOLERANCE:.0%}"
        lines.append(f"{p.what:66}{p.predicted:10.2f}{p.measured:10.2f}{p.off:+8.0%}{mark}")
    lines.append(f"{sum(p.close for p in found)} of {len(found)} are within {TOLERANCE:.0%}")
    return "\n".join(lines)
