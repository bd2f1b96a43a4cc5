"""Loss, statistics and both gradients in one pass over the head.

See kernels/slices.py for the loop. The loss runs inside a chunk because exp(x) exists only then. RL
tokens and text tokens of a forest share the pass, its reads of the head and its sum of the head's
gradient.
"""

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports Dynamo: 4 seconds

from .reference import HeadObjective, TokenLossFunction, wide
from .refuse import (
    per_token_inverse,
    require_head,
    require_one_pass,
    require_targets,
    require_values,
)
from .slices import chunk_of, chunk_tiles, chunks, from_exponentials, products, sum_of
from .tile_math import LossGrads, Statistics, merge


@_disable_dynamo  # a callback and rows chosen by value: no graph can hold them
def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLossFunction,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> HeadObjective:
    """Sum token_loss over all tokens with a target; compute both gradients in the same pass.

    token_loss(logprob (n,), entropy (n,), index (n,)) returns the scalar loss of the n tokens of a
    chunk; index has their numbers among all N tokens, those of targets.flatten(). It is called once
    per chunk: the loss must be a sum over tokens, and its other inputs (advantages, old log p,
    global counts) must be known before. It may use no parameters and no other tensor that requires
    a gradient. A token for which both derivatives of the loss are 0, as in a group without
    advantage, costs only its statistics.

    hidden, weight, targets, temperature, vocab_size, chunk and errors: `linear_entropy_logprob`.
    Returns the loss (scalar), and logprob (…) and entropy (…) without gradient. Gradients are
    summed in fp32, then rounded to the dtype of hidden and weight. fp16 is refused: gradients of
    logits would round to 0 before any loss scale applies. Under torch.no_grad() the loss costs no
    more than the statistics. Put factors into token_loss: multiplied with one that comes later, a
    bf16 gradient is rounded again (1.3 times the error).
    """
    vocab_size = require_head(hidden, weight, vocab_size)
    require_targets(targets, hidden, "hidden")
    require_one_pass(hidden, weight)
    inverse_t = per_token_inverse(temperature, hidden)
    require_values(targets.flatten(), vocab_size, inverse_t)
    chunk = chunk_of(hidden, chunk)
    known = (targets.flatten(), token_loss, inverse_t, vocab_size, chunk, torch.is_grad_enabled())
    loss, *statistics = _LinearObjective.apply(hidden.flatten(0, -2), weight, *known)
    return HeadObjective(loss, *(part.view(targets.shape) for part in statistics))


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, inverse_t, vocab_size, chunk, enabled):
        head, dtype = weight[:vocab_size], wide(hidden)
        want_hidden, want_weight = (enabled and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        parts = chunks(targets, chunk)
        grad_weight = sum_of(weight, len(parts)) if want_weight else None
        learns = want_hidden or want_weight
        loss = hidden.new_zeros((), dtype=dtype)
        logprobs, entropies = (hidden.new_zeros(len(hidden), dtype=dtype) for _ in range(2))
        for rows in parts:
            x, y, t = hidden[rows], targets[rows], inverse_t[rows]
            tiles = chunk_tiles(x, head, y, t, keep=learns)
            statistics, offset = merge(tiles, t)
            # Store them before the loss, which may overwrite its arguments.
            logprobs[rows], entropies[rows] = statistics.logprob, statistics.entropy
            value, g, h = _slopes(token_loss, statistics, rows, enabled)
            loss += value
            alive = ((g != 0) | (h != 0)).nonzero()[:, 0] if learns else rows[:0]
            if len(alive):
                slopes = LossGrads.of(statistics, t, g, h).choose(alive)
                gradients = from_exponentials(tiles, offset, alive, y[alive], slopes, x.dtype)
                dx = products(gradients, x[alive], head, want_hidden, grad_weight)
                if want_hidden:
                    grad_hidden[rows[alive]] = dx.to(hidden.dtype)
            del tiles  # else two chunks' exponentials would be in memory
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():  # create_graph; once_differentiable would drop it silently
            raise RuntimeError("linear_objective has no second derivative; drop create_graph=True")
        # A number: as a tensor, 1/3 would be rounded to bf16, and 1 would cost a pass over dW. This
        # waits for the forward pass's products.
        factor = grad.item()
        gradients = (
            x if x is None else _times(x, factor, dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )  # fmt: skip
        return *gradients, None, None, None, None, None, None


def _times(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return factor · x, computed in fp32 or wider and rounded to dtype without a temporary."""
    if factor == 1:
        # Autograd may add to what it gets: with retain_graph x itself is needed again.
        return x.to(dtype, copy=torch._C._autograd._get_current_graph_task_keep_graph())
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _slopes(token_loss: TokenLossFunction, statistics: Statistics, index: Tensor, enabled: bool):
    """Return a chunk's loss and its derivatives by log p and entropy of each token."""
    logprob, entropy = statistics.logprob, statistics.entropy
    with torch.set_grad_enabled(enabled):
        if enabled:
            logprob, entropy = logprob.requires_grad_(), entropy.requires_grad_()
        loss = token_loss(logprob, entropy, index)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            given = f"tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
            raise ValueError(f"token_loss must return a scalar tensor, not {given}; sum it")
        if not loss.requires_grad:
            return loss, torch.zeros_like(logprob), torch.zeros_like(entropy)
        _require_nothing_else(loss, logprob, entropy)
        slopes = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    return loss.detach(), *slopes


def _require_nothing_else(loss: Tensor, *leaves: Tensor) -> None:
    """Refuse a loss of any other tensor that requires a gradient: it would get none."""
    nodes, known = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node = nodes.pop()
        x = getattr(node, "variable", None)  # of a leaf
        if x is not None and not any(x is leaf for leaf in leaves):
            raise ValueError(
                f"token_loss uses a tensor {tuple(x.shape)} that requires a gradient, and would "
                "get none; detach it, or use linear_entropy_logprob"
            )
        new = {parent for parent, _ in getattr(node, "next_functions", ()) if parent} - known
        nodes += new
        known |= new
