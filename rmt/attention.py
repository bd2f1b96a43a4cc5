"""Attention over a forest: FlexAttention on a GPU; on a CPU, where it has no backward, by calls.

A call attends a span of queries to a span of keys: consecutive tokens to themselves, causally, or
to earlier tokens that all of them see. So no call needs a mask, and nothing is padded or copied.
The results of a token's calls are merged by log-sum-exp (as in ring attention, Liu et al. 2023):

    out = Σ_calls exp(lse_call − lse) · out_call,   lse = log Σ_calls exp(lse_call)

The backward of a call is that of ordinary attention, given the merged out and lse. PyTorch's public
attention returns no log-sum-exp on a CPU, hence the operators of its own flash attention.

Shapes: N packed tokens, H heads, K key/value heads, R = H / K, D head dim.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Call = tuple[slice, slice]  # queries and keys; causal if they are the same tokens

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_flex(
    block_mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, backend: str | None = "inductor"
) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D); blocks that see nothing are skipped.

    One program serves all forests of a model; raises if it cannot be made. backend None: without.
    """
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, heads, N, D)
    for x in heads_first:
        # N alone varies. Left to itself, PyTorch takes dimensions that are equal by chance in the
        # first forest, such as heads and blocks of the mask, for equal always.
        torch._dynamo.mark_static(x, [1, 3])
        if x._base is not None:  # a view made in inference mode does not know its base
            torch._dynamo.mark_static(x._base, list(range(1, x._base.ndim)))
    flex = _compiled_flex(backend) if backend else flex_attention
    out = flex(*heads_first, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@cache
def _compiled_flex(backend: str):
    # fullgraph: what cannot be compiled, or would be too often, raises. Without it PyTorch would go
    # on with the uncompiled function, which makes the whole (N, N) matrix, and say nothing.
    return torch.compile(flex_attention, backend=backend, dynamic=True, fullgraph=True)


def attend_by_call(calls: Sequence[Call], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D); 0 for tokens that are in no call."""
    return _AttendByCall.apply(q, k, v, calls)


class _AttendByCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call]) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=wide)
        qs, ks, vs, outs = _by_head(k.shape[1], q, k, v, out)
        lse = q.new_full(qs.shape[:3], -torch.inf, dtype=wide)  # (K, R, N)
        for rows, keys in calls:
            part, part_lse = _flash(
                qs[:, :, rows], ks[:, :, keys], vs[:, :, keys], is_causal=rows == keys
            )
            total_lse = lse[:, :, rows]
            share = torch.sigmoid(part_lse - total_lse)[..., None]  # 1 in a token's first call
            outs[:, :, rows].lerp_(part.to(wide), share)
            torch.logaddexp(total_lse, part_lse, out=total_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls = calls
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        # fp32 also for bf16: on a CPU the operator's bf16 backward takes twice as long.
        wide = [x.to(lse.dtype) for x in (q, k, v, out, grad)]
        qs, ks, vs, outs, grads = _by_head(k.shape[1], *wide)
        sums = [torch.zeros(q.shape, dtype=lse.dtype) for _ in range(3)]  # (N, H, D)
        dq, dk, dv = _by_head(k.shape[1], *sums)
        for rows, keys in ctx.calls:
            parts = _flash_backward(
                grads[:, :, rows], qs[:, :, rows], ks[:, :, keys], vs[:, :, keys],
                outs[:, :, rows], lse[:, :, rows], dropout_p=0.0, is_causal=rows == keys,
            )  # fmt: skip
            for total, span, part in zip((dq, dk, dv), (rows, keys, keys), parts):
                total[:, :, span] += part
        dk, dv = (x.view(*k.shape[:2], -1, k.shape[2]).sum(2) for x in sums[1:])  # (N, K, D)
        return sums[0].to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _by_head(kv_heads: int, q: Tensor, *others: Tensor) -> list[Tensor]:
    """Views (K, R, N, D) of (N, H, D) and of (N, K, D), each of whose heads serves R heads."""
    repeat = q.shape[1] // kv_heads
    # contiguous: the operators read wrong numbers, silently, where the stride of D is not 1.
    rows = (x.contiguous().unflatten(1, (kv_heads, -1)) for x in (q, *others))  # (N, K, R or 1, D)
    views = (x.permute(1, 2, 0, 3) for x in rows)
    return [x.expand(-1, repeat, -1, -1) for x in views]
