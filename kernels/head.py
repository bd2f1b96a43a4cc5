"""Log-probability and entropy of a head's tokens, for any loss, through ordinary autograd.

The loop over chunks and slices is that of kernels/slices.py. The backward pass computes the logits
a second time: 8·N·V·C operations forward and backward, where kernels/one_pass.py needs 6. Under
torch.no_grad() this is the cheapest way to get statistics: 2·N·V·C.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from .dispatch import tiles_of
from .logits import entropy_logprob
from .reference import IGNORE, NAMESPACE, TokenStatistics, matmul, wide
from .refuse import (
    per_token_inverse,
    require_head,
    require_softcap,
    require_targets,
    require_values,
)
from .slices import (
    SLICE,
    chunk_of,
    chunk_tiles,
    chunks,
    from_logits,
    products,
    sum_of,
)
from .tile_math import LossGrads, Statistics, merge

MERGED = 1024  # of so many candidates of some slices the k largest are kept
# For the GPU, to count rows, so no CUDA graph can hold them. torch < 2.13 takes no tag by itself.
WAITS = (torch.Tag.cudagraph_unsafe,)


def linear_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> TokenStatistics:
    """Return log p(target), entropy, top-1 and log-sum-exp of hidden @ weight.T, with gradients.

    hidden (…, C) and weight (V, C) in any strides; a weight of another dtype is rounded to that of
    hidden, a slice at a time, and has a gradient of its own dtype. targets (…) int64, -100 for
    none; temperature a positive number or (…). Rows of weight from vocab_size on are padding and
    have probability 0. chunk: tokens at one time; changes memory and speed, not the result.
    softcap: logits are softcap · tanh(logits / softcap) before the temperature, as in Gemma 2.

    Returns logprob, entropy and lse (…) in nats, fp32 (fp64 for fp64), and top1 (…) bool: the
    target is the likeliest token, or one of them. All are 0 or False for tokens without a target.

    The backward pass computes the logits again. ValueError for shapes, dtypes and values that do
    not fit. No second derivative, and no gradient of the temperature. Call it inside the module
    that owns the weight: elsewhere FSDP holds a shard.
    """
    vocab_size = require_head(hidden, weight, vocab_size)
    require_targets(targets, hidden, "hidden")
    inverse_t = per_token_inverse(temperature, hidden)
    require_softcap(softcap)
    x, y, chunk = hidden.flatten(0, -2), targets.flatten(), chunk_of(hidden, chunk)
    found = _statistics(x, weight, y, inverse_t, vocab_size, chunk, softcap)[:4]
    return TokenStatistics(*(part.view(targets.shape) for part in found))


@torch.no_grad()
def linear_topk(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each token and their token ids, largest first.

    hidden (…, C), weight (V, C). Returns logits (…, k) in fp32 or wider and tokens (…, k) int64;
    fewer columns than k where the vocabulary has fewer tokens.
    """
    vocab_size = require_head(hidden, weight, vocab_size)
    if k < 0:
        raise ValueError(f"k {k} must be a number of tokens, 0 or more")
    found = _topk(hidden.flatten(0, -2), weight, k, vocab_size, chunk_of(hidden, chunk))
    return tuple(part.unflatten(0, hidden.shape[:-1]) for part in found)


@torch.no_grad()
def linear_topk_entropy(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int | None = None, chunk: int | None = None
) -> Tensor:
    """Return the entropy (…) in nats of the k likeliest tokens, renormalised; k = 0 takes all.

    RPT measures difficulty this way (arXiv 2506.08007, k = 16). hidden (…, C), weight (V, C).
    """
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    if k == 0 or k >= require_head(hidden, weight, vocab_size):
        return linear_entropy_logprob(hidden, weight, targets, 1.0, vocab_size, chunk).entropy
    logits, _ = linear_topk(hidden, weight, k, vocab_size, chunk)
    return entropy_logprob(logits, targets).entropy


@custom_op(f"{NAMESPACE}::linear_topk", mutates_args=())
def _topk(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int, chunk: int
) -> tuple[Tensor, Tensor]:
    found = []
    for x in hidden.split(chunk):
        best, tokens = [], []
        for first in range(0, vocab_size, SLICE):
            last = min(first + SLICE, vocab_size)
            z = matmul(x, weight[first:last].t().to(x.dtype))
            values, columns = tiles_of(x).tile_topk(z, k)
            best.append(values)
            tokens.append(columns + first)
            if last == vocab_size or len(best) * k >= MERGED:
                values = torch.cat(best, dim=1)
                values, order = values.topk(min(k, values.shape[1]), dim=1)  # (n, k)
                best, tokens = [values], [torch.cat(tokens, dim=1).gather(1, order)]
        found.append((*best, *tokens))
    return tuple(map(torch.cat, zip(*found)))


@_topk.register_fake
def _(hidden, weight, k, vocab_size, chunk):
    shape = len(hidden), min(k, vocab_size)
    return (
        hidden.new_empty(shape, dtype=wide(hidden)), hidden.new_empty(shape, dtype=torch.int64)
    )  # fmt: skip


@custom_op(f"{NAMESPACE}::linear_statistics", mutates_args=(), tags=WAITS)
def _statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, inverse_t: Tensor, vocab_size: int, chunk: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the fields of tile_math.Statistics, each (N,)."""
    require_values(targets, vocab_size, inverse_t)
    outputs = Statistics(*_like_statistics(inverse_t))
    for rows in chunks(targets, chunk):
        t = inverse_t[rows]
        x, y = hidden[rows], targets[rows]
        tiles = chunk_tiles(x, weight[:vocab_size], y, t, keep=False, softcap=softcap)
        for output, part in zip(outputs, merge(tiles, t)[0]):
            output[rows] = part
    return tuple(outputs)


@_statistics.register_fake
def _(hidden, weight, targets, inverse_t, vocab_size, chunk, softcap):
    return _like_statistics(inverse_t)


def _like_statistics(inverse_t: Tensor) -> tuple[Tensor, ...]:
    zeros = [torch.zeros_like(inverse_t) for _ in range(6)]
    zeros[2] = zeros[2].bool()
    return tuple(zeros)


@custom_op(f"{NAMESPACE}::linear_statistics_backward", mutates_args=(), tags=WAITS)
def _statistics_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, inverse_t: Tensor, saved: list[Tensor],
    g: Tensor, h: Tensor, of_lse: Tensor, vocab_size: int, chunk: int, softcap: float | None,
    want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = hidden, weight, targets, inverse_t, saved, g, h, of_lse
    options = vocab_size, chunk, softcap, want_hidden, want_weight
    return recompute_gradients(*known, *options, hidden.dtype)


def recompute_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, inverse_t: Tensor, saved: list[Tensor],
    g: Tensor, h: Tensor, of_lse: Tensor, vocab_size: int, chunk: int, softcap: float | None,
    want_hidden: bool, want_weight: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return gradients of hidden (N, C), in dtype, and weight (V, C); empty if not wanted."""
    grad_hidden = hidden.new_empty(0)
    if want_hidden:
        grad_hidden = torch.zeros_like(hidden, dtype=dtype)
    parts = chunks(targets.where((g != 0) | (h != 0) | (of_lse != 0), IGNORE), chunk)
    grad_weight = sum_of(weight, len(parts)) if want_weight else None
    slopes = LossGrads.of(Statistics(*saved), inverse_t, g, h, of_lse)
    head = weight[:vocab_size]
    for rows in parts:
        x = hidden[rows]
        gradients = from_logits(x, head, targets[rows], slopes.choose(rows), softcap)
        dx = products(gradients, x, head, want_hidden, grad_weight)
        if want_hidden:
            grad_hidden[rows] = dx.to(dtype)
    return grad_hidden, weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype)


@_statistics_backward.register_fake
def _(
    hidden, weight, targets, inverse_t, saved, g, h, of_lse, vocab_size, chunk, softcap,
    want_hidden, want_weight,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
    )


def _keep(ctx, inputs, output):
    hidden, weight, targets, inverse_t, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, inverse_t, *output)
    ctx.mark_non_differentiable(output[2], *output[4:])


def _backward(ctx, g, h, _, of_lse, *__):
    hidden, weight, targets, inverse_t, *saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = _statistics_backward(
        hidden, weight, targets, inverse_t, saved, g, h, of_lse, *ctx.options, *wanted
    )
    return *(g if want else None for g, want in zip(gradients, wanted)), *(None,) * 5


_statistics.register_autograd(_backward, setup_context=_keep)
