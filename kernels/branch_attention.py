"""Decode attention of many branches: each sees the beginning of a trunk, then tokens of its own.

A softmax over two sets of keys is made from the softmax over each. With o the weighted values of a
set, and l = log Σ exp(q·k/√D) of it,

    out = w o_trunk + (1 − w) o_own,    w = exp(l_trunk) / (exp(l_trunk) + exp(l_own))

So the keys of a trunk are read once for all branches of a tile (kernels/branch_tiles.py), and stand
in memory once. Here is the PyTorch tier; the Triton kernels are in kernels/branch_parts.py, and
what is meant by all this is `branch_attention` of kernels/reference.py.

Shapes: n branches, T tokens of all trunks one after another, L own tokens, H heads, K key/value
heads, D head dim; H = K · rep. Branch i has slot i of the own cache.
"""

import math

import torch
from torch import Tensor

from kernels.branch_tiles import Groups, Tiles
from kernels.check import require_attention, require_slots
from kernels.dispatch import choice
from kernels.reference import matmul


@torch.no_grad()
def branch_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    start: Tensor,
    fork: Tensor,
    length: Tensor,
    tiles: Tiles,
    longest: int | None = None,
) -> Tensor:
    """Attention of q (n, H, D) to trunk tokens start … start + fork and own tokens 0 … length.

    trunk_k, trunk_v (T, K, D); own_k, own_v (slots ≥ n, capacity, K, D), of which nothing beyond a
    branch's length counts, not even a nan; start, fork and length (n,) int64 on the device. tiles
    are of the same starts and forks. `longest` is a bound of length that the host knows: without
    it the PyTorch tier looks. Softmax of q·k/√D in fp32, or fp64; a branch that sees nothing gets
    0. Returns (n, H, D) in q's dtype, without a gradient.
    """
    require_attention(q, trunk_k, trunk_v, own_k, own_v, start, fork, length)
    if not len(q):
        return torch.empty_like(q)
    if choice(q) != "reference":
        from kernels import branch_parts  # imports triton

        return branch_parts.branch_attention(
            q, trunk_k, trunk_v, own_k, own_v, start, fork, length, tiles.table
        )
    require_slots(len(q), tiles.start)
    n, heads, size = q.shape
    q = q.reshape(n, trunk_k.shape[1], -1, size)  # (n, K, rep, D)
    longest = int(length.max()) if longest is None else longest
    parts = []
    if tiles.groups.members:
        parts.append(_attend_trunk(q, trunk_k, trunk_v, tiles.groups))
    if longest:
        parts.append(_attend_own(q, own_k[:n, :longest], own_v[:n, :longest], length))
    if not parts:
        return q.new_zeros(n, heads, size)
    return _merge(*parts).to(q.dtype).reshape(n, heads, size)


def _attend_trunk(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Weighted values (n, K, rep, D) and log-sum-exp (n, K, rep) over k, v (T, K, D)."""
    n, kv_heads, rep, size = q.shape
    q = q.transpose(0, 1)  # (K, n, rep, D): the rep queries of a key are rows beside each other
    q = q.contiguous() if groups.order is None else q.index_select(1, groups.order)
    outs, lses = [], []
    for rows, trunk, bias in groups.members:
        if bias is not None:
            bias = bias.expand(-1, rep, -1).reshape(1, 1, -1, bias.shape[2])
        keys, values = (x[trunk].transpose(0, 1)[None] for x in (k, v))  # (1, K, tokens, D)
        out, lse = _softmax_values(q[:, rows].flatten(1, 2)[None], keys, values, bias)
        outs.append(out.view(kv_heads, -1, rep, size))
        lses.append(lse.view(kv_heads, -1, rep))
    if groups.back is not None and sum(out.shape[1] for out in outs) < n:
        outs.append(outs[0].new_zeros(kv_heads, 1, rep, size))
        lses.append(lses[0].new_full((kv_heads, 1, rep), _nothing(lses[0])))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (outs, lses))
    if groups.back is not None:
        out, lse = (x.index_select(1, groups.back) for x in (out, lse))
    return out.transpose(0, 1), lse.transpose(0, 1)


def _attend_own(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The same over k, v (n, L, K, D), of which branch i has the first length[i] tokens."""
    hidden = torch.arange(k.shape[1], device=k.device) >= length[:, None]  # (n, L)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (n, K, L, D)
    if not hidden.any():
        return _softmax_values(q, k, v, None)
    bias = torch.zeros(hidden.shape, dtype=torch.float32, device=k.device)
    bias = bias.masked_fill_(hidden, -math.inf)[:, None, None].expand(-1, 1, q.shape[2], -1)
    out, lse = _softmax_values(q, k, v, bias)
    if out.sum().isnan():  # 0 · nan is nan: what nobody wrote may hold one, though it seldom does
        k, v = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (k, v))
        out, lse = _softmax_values(q, k, v, bias)
    return out, lse.masked_fill((length == 0)[:, None, None], _nothing(lse))


def _softmax_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted values (B, K, M, D) of v and log-sum-exp (B, K, M), of q (B, K, M, D) and k, v
    (B, K, S, D) with S > 0, and bias (B or 1, 1, M, S). Rows without a key have values 0.
    """
    if bias is not None and q.dtype == torch.float64:
        bias = bias.double()  # PyTorch 2.13 takes an fp32 bias with fp64, and misreads it
    if q.device.type != "cpu":
        return _softmax_values_in_steps(q, k, v, bias)
    # The operator behind scaled_dot_product_attention, which keeps the log-sum-exp to itself.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, attn_mask=bias)


def _softmax_values_in_steps(q, k, v, bias):
    """The same on a GPU without Triton."""
    batch, heads = k.shape[:2]
    scores = matmul(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores.view(batch, heads, *scores.shape[1:])  # (B, K, M, S)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp(min=_nothing(lse))[..., None]).exp().to(v.dtype)
    return matmul(weights.flatten(0, 1), v.flatten(0, 1)).view(q.shape), lse


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Weighted values over both sets of keys, from those over each."""
    out, lse = first
    if second is None:
        return out
    weight = torch.sigmoid(second[1] - lse)[..., None]
    return torch.lerp(out.to(weight.dtype), second[0].to(weight.dtype), weight)


def _nothing(lse: Tensor) -> float:
    """The log-sum-exp of no key: not −inf, since −inf − −inf is nan where both sets are empty."""
    return torch.finfo(lse.dtype).min
