"""What the forest saves: one packed pass against each branch as a sequence of its own.

    python -m benchmarks.forest --model smollm2-135m

Forward and backward of the log-probabilities of G responses on one trunk, both ways in one run,
alternating; prints median and range as JSON. Gradients of both are compared first.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from kernels import linear_objective
from models.weights import build, find
from rmt.forest import Branch, Tree, pack
from rmt.objective import Targets


def forward_backward(model, forest) -> float:
    """Seconds of one pass; gradients are left on the model."""
    targets = Targets.of(forest)
    started = time.perf_counter()
    loss, _, _ = model(
        forest.tokens, forest.position, forest.attend,
        lambda hidden, head: linear_objective(
            targets.read(hidden), head, targets.token, lambda logprob, entropy, index: logprob.sum()
        ),
    )  # fmt: skip
    loss.backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--trunk", type=int, default=256)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--together", type=int, default=8, help="sequences per naive pass")
    o = parser.parse_args()
    model = build(find(o.model), torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, 500, (n,), generator=draw).tolist()
    trunk, responses = ids(o.trunk), [ids(o.response) for _ in range(o.branches)]
    branches = tuple(Branch(i, o.trunk, (), r) for i, r in enumerate(responses))
    packed = [pack([Tree(0, trunk, branches)])]
    alone = [Tree(0, trunk, (Branch(0, o.trunk, (), r),)) for r in responses]
    naive = [pack(alone[i : i + o.together]) for i in range(0, len(alone), o.together)]
    times, gradients = {"forest": [], "naive": []}, {}
    for _ in range(o.repeats + 1):  # the first is a warm-up
        for name, forests in (("forest", packed), ("naive", naive)):
            model.zero_grad(set_to_none=True)
            times[name].append(sum(forward_backward(model, forest) for forest in forests))
            gradients[name] = {n: p.grad for n, p in model.named_parameters()}
    worst = max(
        float((gradients["forest"][n] - g).norm() / g.norm()) for n, g in gradients["naive"].items()
    )
    result = vars(o) | {
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "gradient_difference": worst,
    }  # fmt: skip
    for name, seconds in times.items():
        kept = seconds[1:]
        result[name] = dict(median=statistics.median(kept), low=min(kept), high=max(kept))
    result["speedup"] = result["naive"]["median"] / result["forest"]["median"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
