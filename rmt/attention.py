"""Attention over a forest, given who sees whom: FlexAttention on a GPU, per branch on a CPU.

FlexAttention has no backward on a CPU, and one dense mask over the row wastes most of its work.
There, a trunk is one causal call, and the branches of a tree are one padded call over
[trunk keys, own keys].

Shapes: N packed tokens, H heads, K key/value heads, D head dim, T trunk tokens, L branch tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def attend_flex(block_mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D); blocks that see nothing are skipped."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, D)
    attend = _compiled_flex() if q.is_cuda else flex_attention
    out = attend(*heads_first, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=True)


@dataclass(frozen=True)
class Bundle:
    """The branches of one tree as a padded rectangle of `count` rows."""

    trunk: int  # tokens of the trunk, T
    branches: int = 0  # tokens of all branches together
    index: Tensor | None = None  # (count, L) places among those tokens
    kept: Tensor | None = None  # which of the count · L entries are no padding
    mask: Tensor | None = None  # (count, 1, L, T + L)


def bundle(
    sees: Callable[[Tensor, Tensor], Tensor],
    start: int,
    trunk: int,
    lengths: Sequence[int],
    device: torch.device,
) -> Bundle:
    """Lay out a tree that starts at token `start`: its trunk, then branches of these lengths."""
    if not lengths:
        return Bundle(trunk)
    lengths = torch.tensor(lengths)
    column = torch.arange(int(lengths.max()))
    valid = column < lengths[:, None]  # (count, L)
    first = (lengths.cumsum(0) - lengths)[:, None]
    # Padding repeats the branch's first token; its output is dropped.
    index = torch.where(valid, first + column, first).to(device)
    valid = valid.to(device)
    shared = torch.arange(trunk, device=device).expand(len(index), -1)
    real = torch.cat((torch.ones_like(shared, dtype=torch.bool), valid), dim=1)
    keys = start + torch.cat((shared, trunk + index), dim=1)  # (count, T + L)
    mask = sees(keys[:, trunk:, None], keys[:, None, :]) & real[:, None, :]
    mask[:, :, 0] |= ~valid  # a padded row must see something, or its softmax is nan
    kept = valid.flatten().nonzero()[:, 0]
    return Bundle(trunk, int(lengths.sum()), index, kept, mask[:, None])


def attend_by_branch(bundles: Sequence[Bundle], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D), tree by tree."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    # split, unlike slicing, gathers the gradients of all parts in one copy.
    sizes = [size for tree in bundles for size in (tree.trunk, tree.branches)]
    padding = len(q) - sum(sizes)
    parts = list(zip(*(x.split([*sizes, padding]) for x in (q, k, v))))
    outputs = []
    for tree, trunk, branches in zip(bundles, parts[::2], parts[1::2]):
        trunk = [x.transpose(0, 1)[None] for x in trunk]  # (1, H, T, D)
        out = F.scaled_dot_product_attention(*trunk, is_causal=True)
        outputs.append(out[0].transpose(0, 1))
        if tree.branches:
            outputs.append(_attend_bundle(tree, branches, *trunk[1:]))
    outputs.append(torch.zeros_like(q[:padding]))  # of the row's end, which nobody reads
    return torch.cat(outputs)


def _attend_bundle(tree: Bundle, qkv: Sequence[Tensor], trunk_k: Tensor, trunk_v: Tensor):
    """Attention of all branches of a tree: each over the trunk up to its fork and itself."""
    count, longest = tree.index.shape
    # index_select, unlike x[index], adds gradients in a fixed order on a CPU.
    q, k, v = (
        x.index_select(0, tree.index.flatten()).view(count, longest, *x.shape[1:]).transpose(1, 2)
        for x in qkv
    )  # (count, H, L, D)
    k = torch.cat((trunk_k.expand(count, -1, -1, -1), k), dim=2)  # (count, H, T + L, D)
    v = torch.cat((trunk_v.expand(count, -1, -1, -1), v), dim=2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=tree.mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, tree.kept)
