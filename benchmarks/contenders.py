"""The contenders of benchmarks/kernels.py: ours, usual PyTorch, and peers.

A contender's forward takes the leaves (hidden and weight, or logits), the targets and advantages of
N tokens, and returns those of {loss, logprob, entropy} that it computes. Losses are sums over
tokens, so that all have the same gradients. A contender that cannot compute an operation has a
reason in place of its function, and the table prints it.

Calls of peers are as in Liger-Kernel 00eba63 and e11c2d6 (2026-08), ml-cross-entropy 3a79837,
TRL 1.16 and PyTorch 2.13. Those of Liger and CCE need a GPU; they ran on an H200 with Liger-Kernel
0.8.5, whose scaled loss needs nvidia-cutlass-dsl besides.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.reference import IGNORE, wide

ENTROPY_WEIGHT = 0.1  # larger than in training, to show a wrong entropy gradient
TOP = 16  # k of the top-k entropy: training's default

Forward = Callable[..., dict[str, Tensor]]


class Contender(NamedTuple):
    name: str
    forward: Forward | str  # or the reason why there is none
    kernels: str = "reference"  # RMT_KERNELS while it runs


class Operation(NamedTuple):
    leaves: tuple[str, ...]  # inputs that get a gradient
    backward: bool
    passes: int  # over the head: products of 2·N·V·C; over the logits: reads and writes of N·V
    eager: Forward


@contextmanager
def kernels_by(choice: str) -> Iterator[None]:
    """Set RMT_KERNELS within a `with` block."""
    before = os.environ.get("RMT_KERNELS")
    os.environ["RMT_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["RMT_KERNELS"]
        if before is not None:
            os.environ["RMT_KERNELS"] = before


# Ours.


def token_loss(advantage: Tensor):
    """Build an on-policy loss with entropy bonus: every token has a gradient, none is skipped."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        ratio = (logprob - logprob.detach()).exp()
        return -(advantage[index] * ratio).sum() - ENTROPY_WEIGHT * entropy.sum()

    return loss


def one_pass(hidden, weight, targets, advantage):
    loss, logprob, entropy = kernels.linear_objective(
        hidden, weight, targets, token_loss(advantage)
    )
    return {"loss": loss, "logprob": logprob, "entropy": entropy}


def recompute(hidden, weight, targets, advantage):
    logprob, entropy, *_ = kernels.linear_entropy_logprob(hidden, weight, targets)
    return _objective(logprob, entropy, targets, advantage)


def one_pass_cross_entropy(hidden, weight, targets, _):
    negative = lambda logprob, entropy, index: -logprob.sum()
    return {"loss": kernels.linear_objective(hidden, weight, targets, negative)[0]}


def topk_entropy(hidden, weight, targets, _):
    return {"entropy": kernels.linear_topk_entropy(hidden, weight, TOP)}


def given_logits(logits, targets, advantage):
    return _objective(*kernels.entropy_logprob(logits, targets), targets, advantage)


def given_logits_cross_entropy(logits, targets, _):
    return {"loss": kernels.masked_cross_entropy(logits, targets, targets != IGNORE, "sum")}


# Usual PyTorch: whole logits in the dtype of the model, then fp32.


def eager_given_logits(logits, targets, advantage):
    ignored = targets == IGNORE
    log_p = logits.to(wide(logits)).log_softmax(-1)  # (N, V)
    logprob = log_p.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprob, entropy = (x.masked_fill(ignored, 0) for x in (logprob, entropy))
    return _objective(logprob, entropy, targets, advantage)


def eager(hidden, weight, targets, advantage):
    return eager_given_logits(hidden @ weight.t(), targets, advantage)


def eager_topk_entropy(hidden, weight, targets, _):
    logits = hidden @ weight.t()
    log_p = logits.topk(TOP).values.to(wide(logits)).log_softmax(-1)
    return {"entropy": -(log_p.exp() * log_p).sum(-1)}


def eager_given_logits_cross_entropy(logits, targets, _):
    return {"loss": F.cross_entropy(logits.to(wide(logits)), targets, reduction="sum")}


def eager_cross_entropy(hidden, weight, targets, _):
    return eager_given_logits_cross_entropy(hidden @ weight.t(), targets, _)


def _objective(logprob, entropy, targets, advantage):
    index = torch.arange(len(targets), device=targets.device)
    loss = token_loss(advantage)(logprob, entropy, index)
    return {"loss": loss, "logprob": logprob, "entropy": entropy}


# Peers.


def compiled(forward: Forward, device: torch.device) -> Forward | str:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler, and there is none"
    return torch.compile(forward, dynamic=False)


def torch_fused(chunked: bool, device: torch.device) -> Forward | str:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later)"
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda hidden, weight, targets, _: {
        "loss": F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    }


def liger(accumulate: torch.dtype | None, device: torch.device) -> Forward | str:
    if device.type != "cuda":
        return "needs a GPU"
    try:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Liger
    except ImportError as error:
        return f"not installed: no {error.name}"
    # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
    # return_z_loss, accum_dtype; the first output is the loss in every version
    rest = (None, None, IGNORE, 0.0, 0.0, "sum", None, False, accumulate)
    return lambda hidden, weight, targets, _: {
        "loss": Liger.apply(hidden, weight, targets, *rest)[0]
    }


def liger_scaled(device: torch.device) -> Forward | str:
    if device.type != "cuda":
        return "needs a GPU"
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger
    except ImportError as error:
        return f"not installed, or older than this function: no such thing in {error.name}"

    def forward(hidden, weight, targets, advantage):
        nll, entropy = Liger.apply(hidden, weight, targets, 1.0, IGNORE, 1, True)
        return _objective(-nll, entropy.float(), targets, advantage)  # its entropy is bf16

    return forward


def cut_cross_entropy(impl: str, device: torch.device) -> Forward | str:
    if device.type != "cuda":
        return "needs a GPU"
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return f"not installed: no {error.name}"
    return lambda hidden, weight, targets, _: {
        "loss": linear_cross_entropy(hidden, weight, targets, reduction="sum", impl=impl)
    }


def trl(entropy: bool, device: torch.device) -> Forward | str:
    """TRL's fused head: what GRPOTrainer computes log p and entropy with."""
    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as SIZE
        from trl.trainer.utils import _ChunkedLogProbFunction as Chunked
    except ImportError as error:
        return f"not installed, or older than this function: no {error.name}"

    def forward(hidden, weight, targets, advantage):
        rows = (targets != IGNORE).nonzero()[:, 0]
        known = (hidden[rows], weight, None, targets[rows], 1.0, SIZE, None, 1.0)
        found = Chunked.apply(*known, ("log_probs", "entropy") if entropy else ("log_probs",))
        if not entropy:
            return {"loss": -found[0].sum()}
        every = (x.new_zeros(len(targets)).index_put((rows,), x) for x in found[:2])
        return _objective(*every, targets, advantage)

    return forward


# Operations and their contenders.

HEAD, LOGITS = ("hidden", "weight"), ("logits",)
OPERATIONS = {
    "objective": Operation(HEAD, True, 3, eager),
    "statistics": Operation(HEAD, False, 1, eager),
    "cross-entropy": Operation(HEAD, True, 3, eager_cross_entropy),
    "top-k entropy": Operation(HEAD, False, 1, eager_topk_entropy),
    "logits statistics": Operation(LOGITS, False, 1, eager_given_logits),
    "logits objective": Operation(LOGITS, True, 3, eager_given_logits),
    "logits cross-entropy": Operation(LOGITS, True, 3, eager_given_logits_cross_entropy),
}
OURS = {
    "objective": {"one pass": one_pass, "recompute": recompute},
    "statistics": {"": recompute},
    "cross-entropy": {"one pass": one_pass_cross_entropy},
    "top-k entropy": {"": topk_entropy},
    "logits statistics": {"": given_logits},
    "logits objective": {"": given_logits},
    "logits cross-entropy": {"": given_logits_cross_entropy},
}


def contenders(name: str, device: torch.device) -> list[Contender]:
    """Return all contenders of an operation: ours first, our default before all."""
    operation, gpu = OPERATIONS[name], device.type == "cuda"
    found = []
    for choice in ("triton", "reference") if gpu else ("reference", "triton"):
        for way, forward in OURS[name].items():
            if choice != "reference" and not gpu:
                forward = "needs a GPU: the interpreter's time says nothing"
            found.append(Contender(f"ours {choice} {way}".strip(), forward, choice))
    found.append(Contender("eager", operation.eager))
    found.append(Contender("torch.compile", compiled(operation.eager, device)))
    return found + [Contender(peer, forward) for peer, forward in _peers(name, device).items()]


def _peers(name: str, device: torch.device) -> dict[str, Forward | str]:
    if OPERATIONS[name].leaves == LOGITS:  # Liger overwrites the shared logits with its gradient
        return {"Liger": "overwrites its logits, which the others still need"}
    losses = {
        "F.linear_cross_entropy": torch_fused(False, device),
        "F.linear_cross_entropy chunked": torch_fused(True, device),
        "Liger": liger(None, device),
        "Liger, fp32 sums": liger(torch.float32, device),
        "CCE": cut_cross_entropy("cce", device),
        "CCE exact": cut_cross_entropy("cce_exact", device),
    }
    if name == "top-k entropy":
        return dict.fromkeys((*losses, "TRL"), "has no top k")
    if name == "cross-entropy":
        return losses | {"TRL": trl(False, device)}
    only = dict.fromkeys(losses, "computes cross-entropy only, no entropy")
    return only | {"Liger scaled": liger_scaled(device), "TRL": trl(True, device)}
