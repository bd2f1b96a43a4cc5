"""Decode attention of many branches: each sees the beginning of a trunk, then its own tokens.

The softmax over two sets of keys is merged from the softmax over each. With o the weighted values
of a set and l = log Σ exp(q·k/√D) its log-sum-exp,

    out = w o_trunk + (1 − w) o_own,    w = exp(l_trunk) / (exp(l_trunk) + exp(l_own))

So a trunk's keys are in memory once, and are read once for all branches of a tile
(kernels/branch_tiles.py). This file has the PyTorch backend, kernels/branch_parts.py the Triton
kernels; `branch_attention` of kernels/reference.py is the definition.

Shapes: n branches, T tokens of all trunks one after another, L own tokens, H heads, K key/value
heads, D head dim; H = K · rep. Branch i has slot i of the own cache.
"""

import torch
from torch import Tensor

from .branch_tiles import Groups, Seen, bias_of, groups_of
from .dispatch import choice
from .reference import matmul
from .refuse import require_attention, require_reach


@torch.no_grad()
def branch_attention(
    q: Tensor, trunk_k: Tensor, trunk_v: Tensor, own_k: Tensor, own_v: Tensor, seen: Seen
) -> Tensor:
    """Attend from q (n, H, D) to the trunk tokens and own tokens that each branch sees.

    trunk_k, trunk_v (T, K, D); own_k, own_v (slots ≥ n, capacity, K, D), ignored beyond a branch's
    length even if nan. Softmax of q·k/√D in fp32, or fp64; a branch that sees no token gets 0.
    Returns (n, H, D) in q's dtype, without a gradient. ValueError for shapes, dtypes and counts
    that do not fit. Counts on a GPU are checked by assertions there, once for each `seen`, and a
    branch whose counts exceed the caches gets nan.
    """
    require_attention(q, trunk_k, trunk_v, own_k, own_v, seen)
    if not len(q):
        return torch.empty_like(q)
    tier = choice(q)
    require_reach(seen, len(trunk_k), own_k.shape[1], look=tier == "reference" or not q.is_cuda)
    if tier != "reference":
        from . import branch_parts  # imports triton

        return branch_parts.branch_attention(q, trunk_k, trunk_v, own_k, own_v, seen)
    n, heads, size = q.shape
    q = q.unflatten(1, (trunk_k.shape[1], -1))  # (n, K, rep, D)
    start, fork, length = seen.values()
    parts = []
    groups = groups_of(start, fork, q.shape[2], q.device)
    if groups.members:
        parts.append(_attend_trunk(q, trunk_k, trunk_v, groups))
    if longest := max(length):
        own = (x[:n, :longest].transpose(1, 2) for x in (own_k, own_v))  # (n, K, L, D)
        parts.append(_attend_own(q, *own, bias_of(length, q.shape[2], q.device), seen.length))
    if not parts:
        return q.new_zeros(n, heads, size)
    return _merge(*parts).to(q.dtype).reshape(n, heads, size)


def _attend_trunk(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return weighted values (n, K, rep, D) and log-sum-exp (n, K, rep) over k, v (T, K, D)."""
    n, kv_heads, rep, size = q.shape
    # The rep queries of a key are adjacent rows: (1, K, n·rep, D).
    q = q if groups.order is None else q.index_select(0, groups.order)
    q = q.transpose(0, 1).reshape(1, kv_heads, -1, size)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, K, T, D)
    parts = [
        _softmax_values(q.narrow(2, *rows), k.narrow(2, *trunk), v.narrow(2, *trunk), bias)
        for rows, trunk, bias in groups.members
    ]
    if q.shape[2] < n * rep:  # some branches see no trunk
        out, lse = (x.new_zeros(1, kv_heads, rep, *x.shape[3:]) for x in parts[0])
        parts.append((out, lse.fill_(_nothing(lse))))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts))
    out, lse = (x[0].unflatten(1, (-1, rep)).transpose(0, 1) for x in (out, lse))
    if groups.back is not None:
        out, lse = out.index_select(0, groups.back), lse.index_select(0, groups.back)
    return out, lse


def _attend_own(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same over k, v (n, K, L, D), of which branch i sees the first length[i]."""
    out, lse = _softmax_values(q, k, v, bias)
    if bias is None:
        return out, lse
    if out.sum().isnan():  # 0 · nan is nan: unwritten memory may hold one
        hidden = bias[:, :, :1].mT.isinf()  # (n, 1, L, 1)
        out, lse = _softmax_values(q, *(x.masked_fill(hidden, 0.0) for x in (k, v)), bias)
    return out, lse.masked_fill((length == 0)[:, None, None], _nothing(lse))


def _softmax_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weighted values (B, K, M, D) and log-sum-exp (B, K, M); rows without a key have 0.

    q (B, K, M, D), k and v (B, K, S, D) with S > 0, bias (B or 1, 1, M, S).
    """
    if bias is not None and q.dtype == torch.float64:
        bias = bias.double()  # PyTorch 2.13 accepts an fp32 bias with fp64, but misreads it
    if q.device.type != "cpu":
        return _softmax_values_in_steps(q, k, v, bias)
    # The operator behind scaled_dot_product_attention: it returns the log-sum-exp, too.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, attn_mask=bias)


def _softmax_values_in_steps(q, k, v, bias):
    """Compute the same on a GPU without Triton."""
    batch, heads = k.shape[:2]
    scores = matmul(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores.view(batch, heads, *scores.shape[1:])  # (B, K, M, S)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp(min=_nothing(lse))[..., None]).exp().to(v.dtype)
    return matmul(weights.flatten(0, 1), v.flatten(0, 1)).view(q.shape), lse


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Merge the weighted values over each set of keys into those over both."""
    out, lse = first
    if second is None:
        return out
    weight = torch.sigmoid(second[1] - lse)[..., None]
    return torch.lerp(out.to(weight.dtype), second[0].to(weight.dtype), weight)


def _nothing(lse: Tensor) -> float:
    """Return the log-sum-exp of no key: finite, as −inf − −inf is nan if both sets are empty."""
    return torch.finfo(lse.dtype).min
