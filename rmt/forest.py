"""Trunks and branches: the one place that defines who sees whom, the shift, and the masks.

A document and everything that is thought about it form a tree. The trunk is the document; a branch
leaves it at the position to be predicted and holds the rest of the prompt and one response. Trees
are packed in one row of N tokens, described by four integers per token:

    tree      which tree of the row
    branch    0 on a trunk, 1 + Branch.id on a branch
    fork      how many trunk tokens this token's branch sees (its own depth on the trunk: all)
    position  rotary position: index on the trunk, or fork + offset on the branch

    sees(i, j) = tree_i = tree_j  and  position_j ≤ position_i
                 and (branch_j = branch_i  or  (branch_j = 0 and position_j < fork_i))      Eq. 11

So a branch sees exactly what it would see as an ordinary sequence trunk[:fork] + branch, and the
trunk is computed once for all of them. Shapes: N tokens, H heads, K key/value heads, D head dim.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A continuation of trunk[:fork]: prompt tokens (only seen), then response tokens (targets)."""

    id: int  # which rollout of the step; unique within a forest
    fork: int
    prompt: Sequence[int]
    response: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Tree:
    """One trunk and its branches. `targets` marks the trunk tokens that are training targets."""

    document: int
    trunk: Sequence[int]
    branches: Sequence[Branch] = ()
    targets: Sequence[bool] | None = None

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def trunk_targets(self) -> int:
        """How many trunk tokens are targets; the first has no predecessor and never is one."""
        return 0 if self.targets is None else int(np.count_nonzero(self.targets[1:]))


@dataclass(frozen=True)
class Forest:
    """Trees packed in a row of N tokens; every vector is (N,)."""

    trees: tuple[Tree, ...]
    tokens: Tensor
    tree: Tensor
    branch: Tensor
    fork: Tensor
    position: Tensor
    predecessor: Tensor  # index of the token whose hidden state predicts this one; -1: none
    mask: Tensor  # True where the token is a training target

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether token i attends to token j (broadcasts)."""
        own = self.branch[j] == self.branch[i]
        shared = (self.branch[j] == 0) & (self.position[j] < self.fork[i])
        past = self.position[j] <= self.position[i]
        return (self.tree[i] == self.tree[j]) & past & (own | shared)  # Eq. 11

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the forest: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        return self._attend_flex(q, k, v) if q.is_cuda else self._attend_by_branch(q, k, v)

    def _attend_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, D)
        out = _flex_attention(q.is_cuda)(
            *heads_first, block_mask=self._block_mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)

    @cached_property
    def _block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        n = len(self)
        see = lambda _batch, _head, i, j: self.sees(i, j)
        return create_block_mask(see, None, None, n, n, device=self.tokens.device)

    def _attend_by_branch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """FlexAttention has no backward on a CPU. One causal call per trunk, one per bundle."""
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        # split, unlike slicing, gathers the gradients of all parts in one copy.
        sizes = [size for plan in self._plans for size in (plan.trunk, plan.branches)]
        padding = len(q) - sum(sizes)
        parts = list(zip(*(x.split([*sizes, padding]) for x in (q, k, v))))
        outputs = []
        for plan, trunk, branches in zip(self._plans, parts[::2], parts[1::2]):
            trunk = [x.transpose(0, 1)[None] for x in trunk]  # (1, H, T, D)
            out = F.scaled_dot_product_attention(*trunk, is_causal=True)
            outputs.append(out[0].transpose(0, 1))
            if plan.branches:
                outputs.append(_attend_bundle(plan, branches, *trunk[1:]))
        outputs.append(torch.zeros_like(q[:padding]))  # of the row's end, which nobody reads
        return torch.cat(outputs)

    @cached_property
    def _plans(self) -> list["_BranchPlan"]:
        """Where the trunk and the padded branches of each tree lie in the row."""
        plans, start = [], 0
        for tree in self.trees:
            plans.append(self._plan(tree, start))
            start += len(tree)
        return plans

    def _plan(self, tree: Tree, start: int) -> "_BranchPlan":
        depth = len(tree.trunk)
        if not tree.branches:
            return _BranchPlan(depth)
        device = self.tokens.device
        lengths = torch.tensor([len(branch) for branch in tree.branches])
        column = torch.arange(int(lengths.max()))
        valid = column < lengths[:, None]  # (count, L)
        first = (lengths.cumsum(0) - lengths)[:, None]
        # Padding repeats the branch's first token; its output is dropped.
        index = torch.where(valid, first + column, first).to(device)
        valid = valid.to(device)
        trunk = torch.arange(depth, device=device).expand(len(index), -1)
        real = torch.cat((torch.ones_like(trunk, dtype=torch.bool), valid), dim=1)
        keys = start + torch.cat((trunk, depth + index), dim=1)  # (count, T + L)
        mask = self.sees(keys[:, depth:, None], keys[:, None, :]) & real[:, None, :]
        mask[:, :, 0] |= ~valid  # a padded row must see something, or its softmax is nan
        kept = valid.flatten().nonzero()[:, 0]
        return _BranchPlan(depth, int(lengths.sum()), index, kept, mask[:, None])


@dataclass(frozen=True)
class _BranchPlan:
    """How the branches of one tree are laid out as a padded rectangle of `count` rows."""

    trunk: int  # tokens of the trunk, T
    branches: int = 0  # tokens of all branches together
    index: Tensor | None = None  # (count, L) places among those tokens
    kept: Tensor | None = None  # which of the count · L entries are no padding
    mask: Tensor | None = None  # (count, 1, L, T + L)


def _attend_bundle(plan: _BranchPlan, qkv: Sequence[Tensor], trunk_k: Tensor, trunk_v: Tensor):
    """Attention of all branches of a tree: each over the trunk up to its fork and itself."""
    count, longest = plan.index.shape
    # index_select, unlike x[index], adds gradients in a fixed order on a CPU.
    q, k, v = (
        x.index_select(0, plan.index.flatten()).view(count, longest, *x.shape[1:]).transpose(1, 2)
        for x in qkv
    )  # (count, H, L, D)
    k = torch.cat((trunk_k.expand(count, -1, -1, -1), k), dim=2)  # (count, H, T + L, D)
    v = torch.cat((trunk_v.expand(count, -1, -1, -1), v), dim=2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, plan.kept)


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu", multiple: int = 1) -> Forest:
    """Lay trees out in one row: each trunk, then its branches.

    The row is padded to a `multiple` with tokens that no tree sees and that are no targets.
    ValueError if a branch leaves its trunk where there is nothing to see.
    """
    columns = [_tree_columns(number, tree) for number, tree in enumerate(trees)]
    starts = np.cumsum([0] + [len(tree) for tree in trees])
    for column, start in zip(columns, starts):
        column["predecessor"][column["predecessor"] >= 0] += start
    total = int(starts[-1])
    padding = dict(tokens=0, tree=-1, branch=-1, fork=0, position=0, predecessor=-1, mask=0)
    vectors = {}
    for name, fill in padding.items():
        row = np.full(-(-total // multiple) * multiple, fill, dtype=np.int64)
        row[:total] = np.concatenate([column[name] for column in columns]) if columns else 0
        vectors[name] = torch.from_numpy(row).to(device)
    vectors["mask"] = vectors["mask"].bool()
    return Forest(trees=tuple(trees), **vectors)


def _tree_columns(number: int, tree: Tree) -> dict[str, np.ndarray]:
    """The vectors of one tree; predecessors count from its first token."""
    depth = np.arange(len(tree.trunk))
    targets = np.zeros(len(depth)) if tree.targets is None else np.asarray(tree.targets)
    parts = [dict(tokens=np.asarray(tree.trunk), branch=0 * depth, fork=depth, position=depth,
                  predecessor=depth - 1, mask=targets * (depth > 0))]  # fmt: skip
    start = len(depth)
    for branch in tree.branches:
        if not 0 <= branch.fork <= len(depth) or not (branch.fork or len(branch.prompt)):
            raise ValueError(
                f"branch {branch.id} forks after {branch.fork} tokens of a trunk of {len(depth)}; "
                "choose a fork on the trunk, with at least one token before the response"
            )
        offset = np.arange(len(branch))
        predecessor = start + offset - 1
        predecessor[:1] = branch.fork - 1  # the shift: a branch's first token follows the trunk
        parts.append(dict(
            tokens=np.concatenate((np.asarray(branch.prompt), np.asarray(branch.response))),
            branch=0 * offset + branch.id + 1, fork=0 * offset + branch.fork,
            position=branch.fork + offset, predecessor=predecessor,
            mask=offset >= len(branch.prompt)))  # fmt: skip
        start += len(branch)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return columns | dict(tree=np.full(start, number))


def micro_batches(trees: Iterable[Tree], token_limit: int) -> list[list[Tree]]:
    """Group trees into rows of at most token_limit tokens, splitting the branches of large trees.

    A branch is never cut: a row that cannot hold even one trunk and one branch exceeds the limit.
    """
    batches, room = [], 0
    for tree in trees:
        for part in _split(tree, token_limit):
            if len(part) > room or not batches:
                batches.append([])
                room = token_limit
            batches[-1].append(part)
            room -= len(part)
    return batches


def _split(tree: Tree, token_limit: int) -> list[Tree]:
    """The tree, or several with the same trunk and some of the branches each."""
    parts, current, used = [], [], len(tree.trunk)
    for branch in tree.branches:
        if current and used + len(branch) > token_limit:
            parts.append(current)
            current, used = [], len(tree.trunk)
        current.append(branch)
        used += len(branch)
    parts.append(current)
    first = replace(tree, branches=tuple(parts[0]))  # trunk targets are counted once
    return [first] + [replace(tree, branches=tuple(p), targets=None) for p in parts[1:]]


@cache
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
