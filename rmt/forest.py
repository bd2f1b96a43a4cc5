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
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rmt.attention import Bundle, attend_by_branch, attend_flex, bundle

FLEX_BLOCK = 128


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
        if q.is_cuda:
            return attend_flex(self.block_mask, q, k, v)
        return attend_by_branch(self.bundles, q, k, v)

    @cached_property
    def block_mask(self) -> BlockMask:
        n = len(self)
        see = lambda _batch, _head, i, j: self.sees(i, j)
        return create_block_mask(see, None, None, n, n, device=self.tokens.device)

    @cached_property
    def bundles(self) -> list[Bundle]:
        """The branches of each tree as a rectangle, for attention on a CPU."""
        bundles, start = [], 0
        for tree in self.trees:
            lengths = [len(branch) for branch in tree.branches]
            bundles.append(bundle(self.sees, start, len(tree.trunk), lengths, self.tokens.device))
            start += len(tree)
        return bundles


def pack(
    trees: Sequence[Tree], device: torch.device | str = "cpu", multiple: int | None = None
) -> Forest:
    """Lay trees out in one row: each trunk, then its branches.

    The row is padded to a `multiple` (default: whole blocks of FlexAttention on a GPU, else 1) with
    tokens that no tree sees and that are no targets.
    ValueError if a branch leaves its trunk where there is nothing to see.
    """
    if multiple is None:
        multiple = FLEX_BLOCK if torch.device(device).type == "cuda" else 1
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
