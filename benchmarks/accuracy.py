"""Compare a contender of benchmarks/kernels.py with fp64 on the same rounded inputs."""

import torch
from torch import Tensor

from benchmarks.contenders import Forward, Operation

# Larger errors mean a wrong result: rounding bf16 logits around 30 gives 0.06.
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (0.25, 0.05)}  # absolute, relative


def run(forward: Forward, operation: Operation, leaves, targets, advantage) -> dict[str, Tensor]:
    """Run forward, and backward if the operation has one: {loss, logprob, entropy, grad_…}."""
    with torch.set_grad_enabled(operation.backward):
        results = forward(*leaves, targets, advantage)
    if operation.backward:
        gradients = torch.autograd.grad(results["loss"], leaves)
        results |= {f"grad_{name}": g for name, g in zip(operation.leaves, gradients)}
    return {name: tensor.detach() for name, tensor in results.items()}


def exact(operation: Operation, leaves, targets, advantage) -> dict[str, Tensor]:
    """Compute the same in fp64, some tokens at a time."""
    found = {}
    weights = [leaf.detach().double().requires_grad_() for leaf in leaves[1:]]
    for rows in torch.arange(len(targets), device=targets.device).split(256):
        first = leaves[0].detach()[rows].double().requires_grad_()
        some = [first, *weights], targets[rows], advantage[rows].double()
        part = run(operation.eager, operation, *some)
        for name, tensor in part.items():
            if name in ("loss", "grad_weight"):
                found[name] = found[name] + tensor if name in found else tensor
            else:
                found.setdefault(name, []).append(tensor)
    return {name: torch.cat(x) if isinstance(x, list) else x for name, x in found.items()}


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, x in results.items():
        if name.startswith("grad"):  # in parts: a gradient of a head in fp64 is 6 GB
            parts = list(zip(x.split(4096), truth[name].split(4096)))
            off = sum((a.double() - b).square().sum() for a, b in parts)
            found[name] = float((off / sum(b.square().sum() for _, b in parts)).sqrt())
        elif name != "loss":
            found[name] = float((x.double() - truth[name]).abs().max())
        elif "logprob" not in results:  # a sum over advantages of both signs says little
            found[name] = float(((x.double() - truth[name]) / truth[name]).abs())
    return found


def disagrees(found: dict[str, float], dtype: torch.dtype) -> bool:
    absolute, relative = LIMITS[str(dtype).removeprefix("torch.")]
    limit = lambda name: absolute if name in ("logprob", "entropy") else relative
    return not all(error <= limit(name) for name, error in found.items())  # nan disagrees
