"""The public functions of `kernels` in plain PyTorch, with whole logits.

Ordinary autograd, any device, any dtype up to fp64; products with a gradient are in fp32 or wider.
Tests compare the kernels and their chunked loops with this file. The arithmetic without whole
logits is in kernels/tile_math.py, the loop in kernels/slices.py.

Shapes: N tokens, or any (…), C hidden, V vocabulary. Entropy is Eq. 1, in nats.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = __package__.replace(".", "_")  # of our operators, wherever this folder lies
IGNORE = -100  # the target of a token without a target; PyTorch's ignore_index

TokenLossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class LogitStatistics(NamedTuple):
    """Of each token, in nats. (…) each"""

    logprob: Tensor
    entropy: Tensor


class TokenStatistics(NamedTuple):
    """Of each token. (…) each"""

    logprob: Tensor
    entropy: Tensor
    top1: Tensor  # the target is the likeliest token, or one of them
    lse: Tensor  # log Σ exp(logit / T)


class HeadObjective(NamedTuple):
    """The loss of all tokens, and what it was computed from, without gradient."""

    loss: Tensor  # scalar
    logprob: Tensor  # (…)
    entropy: Tensor


def entropy_logprob(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> LogitStatistics:
    """Return log p(target) (…) and entropy (…) of logits (…, V); 0 where target is IGNORE."""
    log_p = _over(logits, temperature).log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1)
    ignored = targets == IGNORE
    logprob = log_p.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    return LogitStatistics(logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0))


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    reduction: str = "mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """Return −Σ mask · log p(target), divided by the mask's sum or `count` if reduction is "mean".

    A row whose target is IGNORE counts as mask 0, in the sum and in the count.
    """
    targets, mask = without_ignored(targets, mask)
    logprob, _ = entropy_logprob(logits, targets)
    return reduce_losses(-logprob, mask, reduction, count)


def linear_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> TokenStatistics:
    """Return `entropy_logprob`, top 1 and log-sum-exp of z = hidden (…, C) @ weight (V, C).T.

    softcap: of softcap · tanh(z / softcap) instead (Gemma 2, arXiv 2408.00118).
    """
    logits = _logits(hidden, weight, vocab_size)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    ignored = targets == IGNORE
    at_target = logits.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    top1 = (at_target >= logits.amax(dim=-1)) & ~ignored
    lse = _over(logits, temperature).logsumexp(dim=-1).masked_fill(ignored, 0.0)
    return TokenStatistics(*entropy_logprob(logits, targets, temperature), top1, lse)


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLossFunction,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> HeadObjective:
    """Return token_loss of all tokens with a target, and log p and entropy without gradient."""
    found = linear_entropy_logprob(hidden, weight, targets, temperature, vocab_size)
    logprob, entropy = found.logprob, found.entropy
    index = (targets != IGNORE).flatten().nonzero()[:, 0]
    loss = token_loss(logprob.flatten()[index], entropy.flatten()[index], index)
    return HeadObjective(loss, logprob.detach(), entropy.detach())


def linear_topk(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each token (…, k) and their token ids (…, k)."""
    logits = _logits(hidden, weight, vocab_size)
    return tuple(logits.topk(min(k, logits.shape[-1]), dim=-1))


def linear_topk_entropy(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int | None = None
) -> Tensor:
    """Return the entropy (…) of the k likeliest tokens, renormalised; k = 0 takes all."""
    top, _ = linear_topk(hidden, weight, k or len(weight), vocab_size)
    return entropy_logprob(top, torch.zeros_like(top[..., 0], dtype=torch.int64)).entropy


def _over(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return logits (…, V) / T in fp32 or wider; T a number or (…)."""
    t = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    return logits.to(wide(logits)) / t


def _logits(hidden: Tensor, weight: Tensor, vocab_size: int | None) -> Tensor:
    """Return hidden (…, C) @ weight (V, C).T over the rows of the vocabulary. (…, V)"""
    logits = matmul(hidden.flatten(0, -2), weight[:vocab_size].t())
    return logits.unflatten(0, hidden.shape[:-1])


def branch_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    start: Tensor,
    fork: Tensor,
    length: Tensor,
) -> Tensor:
    """Attend from each branch's query q (n, H, D) to its part of a trunk and its own tokens.

    Branch i sees tokens start[i] … start[i] + fork[i] − 1 of trunk_k, trunk_v (T, K, D), and
    tokens 0 … length[i] − 1 of own_k[i], own_v[i] (capacity, K, D). Returns (n, H, D), 0 for a
    branch that sees no token.
    """
    out = torch.zeros_like(q)
    rep = q.shape[1] // trunk_k.shape[1]  # heads that share keys and values
    for i, (a, seen, own) in enumerate(zip(start.tolist(), fork.tolist(), length.tolist())):
        if seen + own == 0:
            continue
        k = torch.cat([trunk_k[a : a + seen], own_k[i, :own]]).to(wide(q))  # (tokens, K, D)
        v = torch.cat([trunk_v[a : a + seen], own_v[i, :own]]).to(wide(q))
        k, v = (x.repeat_interleave(rep, dim=1) for x in (k, v))  # (tokens, H, D)
        scores = torch.einsum("hd,thd->ht", q[i].to(wide(q)), k) * q.shape[2] ** -0.5
        out[i] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), v).to(q.dtype)
    return out


def without_ignored(targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Set targets to IGNORE where the mask is 0, and the mask to 0 where they are IGNORE."""
    ignored = (mask == 0) | (targets == IGNORE)
    return targets.masked_fill(ignored, IGNORE), mask.masked_fill(ignored, 0)


def reduce_losses(
    losses: Tensor, mask: Tensor, reduction: str, count: float | Tensor | None = None
) -> Tensor:
    """Weight losses (N,) by mask (N,), and reduce them: "none", "sum", or "mean" over count."""
    mask = mask.to(losses.dtype)  # first: a sum in 16 bits loses rows, or overflows
    weighted = losses * mask
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    count = torch.as_tensor(mask.sum() if count is None else count).to(losses)
    return weighted.sum() / torch.where(count == 0, 1.0, count)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def plain_dtypes(x: Tensor) -> AbstractContextManager:
    """Disable autocast, which would round every product to bf16."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, accumulated in fp32 (fp64 for fp64), for 2 or 3 dimensions.

    The product of two bf16 numbers is exact in fp32: a GPU computes fp32 logits (the "fp32 head")
    at bf16's speed. A CPU multiplies in fp32: there PyTorch's bf16 product with fp32 sums depends
    on a setting of the whole process, which other threads would see. Where a gradient is
    wanted a GPU multiplies in fp32, too: PyTorch has none of its product with fp32 sums.
    """
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and not learns:
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a, b, out_dtype=torch.float32)
    with plain_dtypes(a):
        return a.to(wide(a)) @ b.to(wide(a))


def write_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to out, accumulated in fp32 (fp64 for fp64) and rounded to out's dtype.

    A GPU may add parts of a product in 16 bits unless PyTorch's
    allow_bf16_reduced_precision_reduction is off.
    """
    if a.is_cuda and a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(matmul(a, b))


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out, in out's fp32 or fp64, so that a sum over many chunks stays exact."""
    if a.is_cuda and a.element_size() == 2 and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # PyTorch 2.10 or newer
    else:
        # A separate product: addmm_ may add each of its terms to the large sum in out.
        with plain_dtypes(a):
            out.add_(a.to(out.dtype) @ b.to(out.dtype))
