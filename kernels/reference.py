"""The specification of every kernel, in plain PyTorch, for any device and any dtype up to fp64.

Shapes: N tokens, C hidden, V vocabulary. z = logits / temperature, m = max z, D = Σ exp(z − m):

    log p(y) = (z_y − m) − log D
    H        = log D − Σ_v p_v (z_v − m)     nats (Eq. 1); the shift by m keeps it exact

With g = ∂loss/∂log p(y) and h = ∂loss/∂H of a token, the gradient of its logits is

    ∂loss/∂z_v = g (1[v = y] − p_v) − h p_v (log p_v + H)

The functions named linear_* take hidden states and the weight of the head instead of logits and
walk over the tokens in chunks: the (N, V) matrix never exists. Arithmetic is fp32 or wider.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at one time

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32 (fp64 for fp64 inputs), for 2 or 3 dimensions."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def entropy_logprob(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of each row.

    logits (N, V), targets (N,) int64, temperature a number or (N,).
    Returns logprob (N,) and entropy (N,) in nats, fp32 or wider, differentiable both.
    """
    logprob, entropy, _, _ = _statistics(_scale(logits, temperature), targets)
    return logprob, entropy


def linear_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """`entropy_logprob` of hidden @ weight.T, plus whether the target is the likeliest token.

    hidden (N, C), weight (V, C), targets (N,) int64; temperature a number or (N,). Rows of weight
    from vocab_size on are padding and have probability 0. Returns logprob (N,), entropy (N,) in
    nats and top1 (N,) bool (ties count as correct). Ordinary autograd: the backward pass
    recomputes the logits of each chunk.
    """

    def of_chunk(rows, head, target, scale):
        z = _scale(matmul(rows, head.t()), scale)  # (chunk, V)
        logprob, entropy, _, top1 = _statistics(z, target)
        return logprob, entropy, top1

    head = weight[:vocab_size]
    temperature = _per_token(temperature, hidden)
    pieces = [
        checkpoint(of_chunk, hidden[rows], head, targets[rows], temperature[rows],
                   use_reentrant=False)
        for rows in _chunks(len(hidden), chunk)
    ]  # fmt: skip
    return tuple(torch.cat(piece) for piece in zip(*pieces))


@torch.no_grad()
def linear_topk_entropy(
    hidden: Tensor, weight: Tensor, k: int, vocab_size: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Entropy (N,) in nats of the k likeliest tokens, renormalised; k = 0 takes all of them.

    RPT scores difficulty so (arXiv 2506.08007, k = 16). hidden (N, C), weight (V, C).
    """
    head = weight[:vocab_size]
    k = min(k, len(head)) or len(head)
    entropies = []
    for rows in _chunks(len(hidden), chunk):
        top = matmul(hidden[rows], head.t()).topk(k, dim=-1, sorted=False).values  # (chunk, k)
        entropies.append(torch.distributions.Categorical(logits=top, validate_args=False).entropy())
    return torch.cat(entropies)


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ of token_loss over all tokens, with both gradients computed in the same pass.

    token_loss(logprob (n,), entropy (n,), index (n,)) returns the scalar loss of the n tokens of a
    chunk; index says which of the N tokens they are. Because it runs while the chunk's logits are
    there, the backward pass needs no second look at the head: 6·N·V·C operations instead of 8.
    The loss must be a sum over tokens, and token_loss may not hold parameters of its own.

    hidden (N, C), weight (V, C), targets (N,) int64, temperature a number or (N,).
    Returns the loss (scalar), and logprob (N,) and entropy (N,) without gradient.
    """
    return _LinearObjective.apply(
        hidden, weight, targets, token_loss, _per_token(temperature, hidden), vocab_size, chunk
    )


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, temperature, vocab_size, chunk):
        head = weight[:vocab_size]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        logprobs, entropies = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
        for rows in _chunks(len(hidden), chunk):
            z = _scale(matmul(hidden[rows], head.t()), temperature[rows])  # (chunk, V)
            logprob, entropy, log_p, _ = _statistics(z, targets[rows])
            index = torch.arange(rows.start, rows.stop, device=hidden.device)
            part, g, h = _token_gradients(token_loss, logprob, entropy, index)
            loss += part
            logprobs[rows], entropies[rows] = logprob, entropy
            if not (want_hidden or want_weight):
                continue
            dz = log_p.exp() * -(g[:, None] + h[:, None] * (log_p + entropy[:, None]))
            dz[torch.arange(len(dz), device=dz.device), targets[rows]] += g
            dz = (dz / temperature[rows, None]).to(hidden.dtype)  # (chunk, V)
            if want_hidden:
                grad_hidden[rows] = (dz @ head).to(hidden.dtype)
            if want_weight:
                grad_weight[: len(head)] += matmul(dz.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _logprobs, _entropies):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _token_gradients(token_loss, logprob, entropy, index):
    """The chunk's loss and its gradients with respect to log-probability and entropy."""
    with torch.enable_grad():
        logprob = logprob.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_()
        loss = token_loss(logprob, entropy, index)
        gradients = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    return loss.detach(), *gradients


def _statistics(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, log p of all tokens (n, V), and whether the target is the likeliest."""
    shifted = z - z.amax(dim=-1, keepdim=True)
    log_d = shifted.logsumexp(dim=-1, keepdim=True)
    log_p = shifted - log_d
    at_target = shifted.gather(1, targets[:, None])[:, 0]
    # A token of probability 0 has shifted = -inf; its term is 0, not nan.
    weighted = log_p.exp() * shifted.masked_fill(shifted == float("-inf"), 0.0)
    entropy = log_d[:, 0] - weighted.sum(dim=-1)
    return at_target - log_d[:, 0], entropy, log_p, at_target >= 0


def _scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _per_token(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.as_tensor(temperature, device=hidden.device, dtype=wide).expand(len(hidden))


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)] or [slice(0, 0)]
