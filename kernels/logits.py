"""Log-probability, entropy and masked cross-entropy of logits (N, V) that the caller has.

One pass over the logits forward; one pass backward, which computes the probabilities again from the
logits and two numbers of each row instead of keeping them. Nothing else of size (N, V) exists but
the gradient. Formulas: kernels/tile_math.py; kernels and roofline: kernels/tiles.py.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.dispatch import tiles_of
from kernels.reference import IGNORE, reduce_losses, without_ignored
from kernels.refuse import per_token_inverse, require_logits, require_values
from kernels.tile_math import LossGrads, Statistics, merge

CACHED = 2**20  # numbers: 4 MB


def entropy_logprob(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of each row, both with gradient, in one pass over the logits.

    logits (N, V) in any strides, targets (N,) int64, temperature a positive number or (N,).
    Returns logprob (N,) and entropy (N,) in nats, fp32 (fp64 for fp64 logits). A row whose target
    is -100 is not read: both are 0 there, and so is its gradient. ValueError for shapes, dtypes and
    targets that do not fit. There is no second derivative, and none for the temperature.
    """
    require_logits(logits, targets)
    inverse_t = per_token_inverse(temperature, logits)
    logprob, entropy, _, _ = _entropy_logprob(logits, targets.contiguous(), inverse_t)
    return logprob, entropy


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    reduction: str = "mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the rows whose mask is not 0; the mask weights them.

    logits (N, V), targets (N,) int64, mask (N,) of any dtype. reduction "none" returns mask · loss
    (N,), "sum" their sum, "mean" the sum over `count`: the mask's sum, unless the caller gives the
    count of all micro-batches and ranks. Rows with mask 0 are never read, whatever their target;
    rows with target -100 are rows with mask 0, as in F.cross_entropy. With nothing left the loss is
    0, and its gradient is 0 rather than missing.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of mean, sum, none")
    if mask.shape != targets.shape or mask.device != targets.device:
        raise ValueError(
            f"mask is {tuple(mask.shape)} on {mask.device}, targets {tuple(targets.shape)} on "
            f"{targets.device}; they must be alike"
        )
    targets, mask = without_ignored(targets, mask)
    logprob, _ = entropy_logprob(logits, targets)
    return reduce_losses(-logprob, mask, reduction, count)


@custom_op("rmt::entropy_logprob", mutates_args=())
def _entropy_logprob(
    logits: Tensor, targets: Tensor, inverse_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, and what the backward pass needs: maximum and log_sum. All (N,)."""
    require_values(targets, logits.shape[1], inverse_t)
    outputs = tuple(torch.zeros_like(inverse_t) for _ in range(4))
    for rows in _blocks(logits):
        y, t = targets[rows], inverse_t[rows]
        s, _ = merge(tiles_of(logits).tile_statistics(logits[rows], y, 0, t, keep=None), t)
        ignored = y == IGNORE  # such a row was not read: what stands there means nothing
        for out, x in zip(outputs, (s.logprob, s.entropy, s.maximum, s.log_sum)):
            out[rows] = x.masked_fill(ignored, 0.0)
    return outputs


@_entropy_logprob.register_fake
def _(logits, targets, inverse_t):
    return tuple(torch.empty_like(inverse_t) for _ in range(4))


@custom_op("rmt::entropy_logprob_backward", mutates_args=())
def _entropy_logprob_backward(
    logits: Tensor, targets: Tensor, inverse_t: Tensor, saved: list[Tensor], g: Tensor, h: Tensor
) -> Tensor:
    logprob, entropy, maximum, log_sum = saved
    statistics = Statistics(logprob, entropy, None, maximum, log_sum)
    slopes = LossGrads.of(statistics, inverse_t, g.contiguous(), h.contiguous())
    gradient = logits.new_empty(logits.shape)
    for rows in _blocks(logits):
        known = (logits[rows], targets[rows], 0, slopes.choose(rows))
        tiles_of(logits).gradient_of_logits(*known, out=gradient[rows])
    return gradient


@_entropy_logprob_backward.register_fake
def _(logits, targets, inverse_t, saved, g, h):
    return logits.new_empty(logits.shape)


def _blocks(logits: Tensor) -> list[slice]:
    """All rows at once on a GPU; as many as a cache holds on a CPU. No rows are no block."""
    n, columns = logits.shape
    size = max(1, n if logits.is_cuda else CACHED // columns)
    return [slice(first, first + size) for first in range(0, n, size)]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, g, h, *_):
    logits, targets, inverse_t, *saved = ctx.saved_tensors
    return _entropy_logprob_backward(logits, targets, inverse_t, saved, g, h), None, None


_entropy_logprob.register_autograd(_backward, setup_context=_keep)
