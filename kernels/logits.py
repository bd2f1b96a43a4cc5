"""Log-probability, entropy and masked cross-entropy of logits (…, V) that the caller passes.

One pass over the logits forward, one backward. The backward pass computes the probabilities again
from the logits and two numbers per row, so that only the gradient has size (N, V). Formulas:
kernels/tile_math.py; kernels and roofline: kernels/tiles.py.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.library import custom_op

from .dispatch import tiles_of
from .reference import IGNORE, NAMESPACE, LogitStatistics, reduce_losses, without_ignored
from .refuse import per_token_inverse, require_logits, require_values
from .tile_math import LossGrads, Statistics, merge

CACHED = 2**20  # logits of a block on a CPU: 4 MB, which its cache holds


def entropy_logprob(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> LogitStatistics:
    """Return log p(target) and entropy of each row, with gradients, in one pass over the logits.

    logits (…, V) in any strides, targets (…) int64, temperature a positive number or (…). Up to
    three dimensions are never copied, as `logits[:, :-1]` with batch and time.
    Returns logprob (…) and entropy (…) in nats, fp32 (fp64 for fp64 logits). A row whose target
    is -100 does not count: both are 0, and so is its gradient; Triton does not read it. ValueError
    for shapes, dtypes and targets that do not fit. No second derivative, and no gradient of the
    temperature.
    """
    require_logits(logits, targets)
    inverse_t = per_token_inverse(temperature, logits)
    z = logits.flatten(0, -3) if logits.dim() > 2 else logits[None]  # (B, n, V)
    found = _entropy_logprob(z, targets.flatten().contiguous(), inverse_t)
    return LogitStatistics(*(part.view(targets.shape) for part in found[:2]))


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    reduction: str = "mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the rows, weighted by the mask.

    logits (…, V), targets (…) int64, mask (…) of any dtype, not negative. reduction "none" returns
    mask · loss (…), "sum" their sum, "mean" the sum over `count`: the mask's sum, unless the caller
    gives the count of all micro-batches and ranks. Rows with mask 0 do not count, whatever their
    target; rows with target -100 count as mask 0, as in F.cross_entropy. With no rows left the loss
    is 0, and its gradient is 0, not missing.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is not one of mean, sum, none")
    if mask.shape != targets.shape or mask.device != targets.device:
        raise ValueError(
            f"mask is {tuple(mask.shape)} on {mask.device}, targets {tuple(targets.shape)} on "
            f"{targets.device}; give them one shape and device"
        )
    targets, mask = without_ignored(targets, mask)
    logprob, _ = entropy_logprob(logits, targets)
    return reduce_losses(-logprob, mask, reduction, count)


@custom_op(f"{NAMESPACE}::entropy_logprob", mutates_args=())
def _entropy_logprob(
    logits: Tensor, targets: Tensor, inverse_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob and entropy, and maximum and log_sum for the backward pass. All (B·n,)."""
    require_values(targets, logits.shape[2], inverse_t)
    outputs = tuple(torch.zeros_like(inverse_t) for _ in range(4))
    for rows, z in _blocks(logits):
        y, t = targets[rows], inverse_t[rows]
        s, _ = merge(tiles_of(logits).tile_statistics(z, y, 0, t, keep=None), t)
        ignored = y == IGNORE  # not read: their statistics are undefined
        for out, x in zip(outputs, (s.logprob, s.entropy, s.maximum, s.log_sum)):
            out[rows] = x.masked_fill(ignored, 0.0)
    return outputs


@_entropy_logprob.register_fake
def _(logits, targets, inverse_t):
    return tuple(torch.empty_like(inverse_t) for _ in range(4))


@custom_op(f"{NAMESPACE}::entropy_logprob_backward", mutates_args=())
def _entropy_logprob_backward(
    logits: Tensor, targets: Tensor, inverse_t: Tensor, saved: list[Tensor], g: Tensor, h: Tensor
) -> Tensor:
    logprob, entropy, maximum, log_sum = saved
    statistics = Statistics(logprob, entropy, None, None, maximum, log_sum)
    slopes = LossGrads.of(statistics, inverse_t, g.contiguous(), h.contiguous())
    gradient = logits.new_empty(logits.shape)
    for rows, z in _blocks(logits):
        known = (z, targets[rows], 0, slopes.choose(rows))
        tiles_of(logits).gradient_of_logits(*known, out=gradient.flatten(0, 1)[rows])
    return gradient


@_entropy_logprob_backward.register_fake
def _(logits, targets, inverse_t, saved, g, h):
    return logits.new_empty(logits.shape)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of all B·n and their logits (m, V), none for no rows; nothing is copied.

    A block is all rows on a GPU and as many as a cache holds on a CPU, within one of B if these are
    not one after another, as in `logits[:, :-1]`.
    """
    batch, n, columns = logits.shape
    if n == 1 or logits.stride(0) == n * logits.stride(1):
        batch, n, logits = 1, batch * n, logits.flatten(0, 1)[None]
    size = max(1, n if logits.is_cuda else CACHED // columns)
    for b, first in product(range(batch), range(0, n, size)):
        z = logits[b, first : first + size]
        yield slice(b * n + first, b * n + first + len(z)), z


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, g, h, *_):
    logits, targets, inverse_t, *saved = ctx.saved_tensors
    return _entropy_logprob_backward(logits, targets, inverse_t, saved, g, h), None, None


_entropy_logprob.register_autograd(_backward, setup_context=_keep)
