"""Profile decoding: time in matrix products, attention, other operators, and Python."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn_linear", "einsum")
PRODUCT_PARTS = ("_linear_pointwise", "mkl_linear", "gemm", "gemv", "nvjet", "cutlass", "xmma")
ATTENTION = ("scaled_dot_product", "attention", "flash_fwd", "fmha")
OUR_ATTENTION = ("parts", "merge")  # the Triton kernels of kernels/branch_parts.py


def kind(name: str) -> str:
    """Classify an operator or kernel: product, attention or rest."""
    short = name.removeprefix("aten::").removeprefix("mkldnn::")
    if short in OUR_ATTENTION or any(part in name for part in ATTENTION):
        return "attention"
    if short in PRODUCTS or any(part in name for part in PRODUCT_PARTS):
        return "product"
    return "rest"


def _operators(work: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Return the seconds of each operator without its children, and wall-clock seconds."""
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    spent = {}
    for event in trace.key_averages():
        took = event.self_device_time_total if gpu else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0.0) + took / 1e6
    return spent, wall


def matrix_share(sample: Callable[[int], object], tokens: int) -> dict:
    """Return time shares of the decode steps of `sample(tokens)`, and the costliest operators.

    A run of one token is subtracted, which leaves tokens − 1 steps without prefill. `outside` is a
    share of wall-clock time, with Python and the profiler's own cost, so it is an upper bound;
    `outside_operators` is a share of operator time.
    """
    _operators(lambda: sample(1))  # the profiler's own warm-up
    first, first_wall = _operators(lambda: sample(1))
    spent, wall = _operators(lambda: sample(tokens))
    steps = {name: max(0.0, took - first.get(name, 0.0)) for name, took in spent.items()}
    wall, total = wall - first_wall, sum(steps.values())
    by_kind = {"product": 0.0, "attention": 0.0, "rest": 0.0}
    for name, took in steps.items():
        by_kind[kind(name)] += took
    costliest = sorted(steps.items(), key=lambda item: -item[1])[:10]
    return {
        "steps": tokens - 1, "seconds": wall, "operators_seconds": total,
        "seconds_by_kind": by_kind,
        "outside": 1 - by_kind["product"] / wall,
        "outside_operators": 1 - by_kind["product"] / total,
        "outside_products_and_attention": 1 - (by_kind["product"] + by_kind["attention"]) / wall,
        "costliest": [[name, took] for name, took in costliest],
    }  # fmt: skip


def report(found: dict) -> str:
    """Format a profile for --profile."""
    lines = [
        f"{found['steps']} decode steps under the profiler, {found['seconds']:.2f} s by the clock, "
        f"{found['operators_seconds']:.2f} s in operators",
        f"outside matrix products: {found['outside']:.0%} of the clock, "
        f"{found['outside_operators']:.0%} of operators; attention not counted as outside: "
        f"{found['outside_products_and_attention']:.0%} of the clock",
    ]
    lines += [f"  {took:8.3f} s  {kind(name):9}  {name}" for name, took in found["costliest"]]
    return "\n".join(lines)
