"""Trunks and branches: the one place that defines who sees whom, the shift, and the masks.

A document and everything that is thought about it form a tree. The trunk is the document; a branch
leaves it at the position to be predicted and holds the rest of the prompt and one response.
Branches that continue the same prompt share its tokens, their stem. Trees are packed in one row of
N tokens, described by five integers per token:

    tree      which tree of the row
    branch    0 on a trunk, 1 + Branch.id on a response, −1 − Branch.id on a stem (its first branch)
    stem      the stem that a response continues; elsewhere the token's own branch
    fork      how many trunk tokens a stem and its responses see (on a trunk, its own depth: all)
    position  rotary position: index on the trunk, or fork + offset in prompt and response

    sees(i, j) = tree_i = tree_j  and  position_j ≤ position_i  and  (branch_j = branch_i
                 or  branch_j = stem_i  or  (branch_j = 0 and position_j < fork_i))         Eq. 11

So a branch sees exactly what it would see as an ordinary sequence trunk[:fork] + prompt + response,
and what several of them see is computed once. Shapes: N tokens, H heads, K key/value heads,
D head dim.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rmt.attention import Call, attend_by_call, attend_flex

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
        """Tokens in a row; those of a stem count once."""
        size = lambda group: len(group[0].prompt) + sum(len(b.response) for b in group)
        return len(self.trunk) + sum(map(size, self.stems))

    @cached_property
    def stems(self) -> list[list[Branch]]:
        """Adjacent branches that share a stem; a prompt without a response is a stem of its own."""
        stem = lambda b: (b.fork, tuple(b.prompt), None if len(b.response) else b.id)
        return [list(group) for _, group in groupby(self.branches, key=stem)]

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
    stem: Tensor
    fork: Tensor
    position: Tensor
    predecessor: Tensor  # index of the token whose hidden state predicts this one; -1: none
    mask: Tensor  # True where the token is a training target

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether token i attends to token j (broadcasts)."""
        own = (self.branch[j] == self.branch[i]) | (self.branch[j] == self.stem[i])
        shared = (self.branch[j] == 0) & (self.position[j] < self.fork[i])
        past = self.position[j] <= self.position[i]
        return (self.tree[i] == self.tree[j]) & past & (own | shared)  # Eq. 11

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the forest: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        if q.is_cuda:
            return attend_flex(self.block_mask, q, k, v)
        return attend_by_call(self.calls, q, k, v)

    @cached_property
    def block_mask(self) -> BlockMask:
        n = len(self)
        see = lambda _batch, _head, i, j: self.sees(i, j)
        return create_block_mask(see, None, None, n, n, device=self.tokens.device)

    @cached_property
    def calls(self) -> list[Call]:
        """Eq. 11 as calls of attention, see rmt/attention.py."""
        calls, start = [], 0
        for tree in self.trees:
            calls += _tree_calls(tree, start)
            start += len(tree)
        return [call for call in calls if all(span.start < span.stop for span in call)]


def pack(
    trees: Sequence[Tree], device: torch.device | str = "cpu", pad: bool | None = None
) -> Forest:
    """Lay trees out in one row: each trunk, then its stems, each with the responses to it.

    With `pad` (default: on a GPU) the row gets a `padded_length`, with tokens that no tree sees and
    that are no targets.
    ValueError if a branch leaves its trunk where there is nothing to see.
    """
    if pad is None:
        pad = torch.device(device).type == "cuda"
    columns = [_tree_columns(number, tree) for number, tree in enumerate(trees)]
    starts = np.cumsum([0] + [len(column["tokens"]) for column in columns])
    for column, start in zip(columns, starts):
        column["predecessor"][column["predecessor"] >= 0] += start
    total = int(starts[-1])
    padding = dict(tokens=0, tree=-1, branch=0, stem=0, fork=0, position=0, predecessor=-1, mask=0)
    vectors = {}
    for name, fill in padding.items():
        row = np.full(padded_length(total) if pad else total, fill, dtype=np.int64)
        row[:total] = np.concatenate([column[name] for column in columns]) if columns else 0
        vectors[name] = torch.from_numpy(row).to(device)
    vectors["mask"] = vectors["mask"].bool()
    return Forest(trees=tuple(trees), **vectors)


def padded_length(tokens: int) -> int:
    """The next of a few lengths: whole blocks of FlexAttention, at most 32 lengths per doubling."""
    step = FLEX_BLOCK
    while 64 * step <= tokens:
        step *= 2
    # Not one block: torch.compile makes a program of its own for arrays with one entry.
    return max(2 * FLEX_BLOCK, -(-tokens // step) * step)


def _tree_columns(number: int, tree: Tree) -> dict[str, np.ndarray]:
    """The vectors of one tree; predecessors count from its first token."""
    depth = np.arange(len(tree.trunk))
    targets = False if tree.targets is None else np.asarray(tree.targets, dtype=bool) & (depth > 0)
    runs = [_run(tree.trunk, 0, -1, position=0, branch=0, stem=0, fork=depth, mask=targets)]
    end = len(depth)
    for stem in tree.stems:
        fork, prompt, name = stem[0].fork, stem[0].prompt, -1 - stem[0].id
        if not 0 <= fork <= len(depth) or not (fork or len(prompt)):
            raise ValueError(
                f"branch {stem[0].id} forks after {fork} tokens of a trunk of {len(depth)}; "
                "choose a fork on the trunk, with at least one token before the response"
            )
        same = dict(stem=name, fork=fork)
        # The shift: what follows the trunk is predicted by the trunk's last token that it sees.
        runs.append(_run(prompt, end, fork - 1, position=fork, branch=name, mask=False, **same))
        end += len(prompt)
        before, position = end - 1 if len(prompt) else fork - 1, fork + len(prompt)
        for b in stem:
            columns = dict(branch=1 + b.id, mask=True, **same)
            runs.append(_run(b.response, end, before, position, **columns))
            end += len(b.response)
    columns = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    return columns | dict(tree=np.full(end, number))


def _run(tokens: Sequence[int], start: int, before: int, position: int, **same) -> dict:
    """Columns of tokens that follow each other from place `start`, the first of them `before`."""
    offset = np.arange(len(tokens))
    predecessor = start + offset - 1
    predecessor[:1] = before
    columns = {name: np.broadcast_to(value, offset.shape) for name, value in same.items()}
    own = dict(tokens=np.asarray(tokens, dtype=np.int64), position=position + offset)
    return columns | own | dict(predecessor=predecessor)


def _tree_calls(tree: Tree, start: int) -> list[Call]:
    """Who sees whom in a tree whose first token is at `start`."""
    end = start + len(tree.trunk)
    calls = [(slice(start, end), slice(start, end))]  # a run with itself: causal
    for fork, stems in groupby(tree.stems, key=lambda stem: stem[0].fork):
        leaves = end
        for group in stems:
            stem = slice(end, end + len(group[0].prompt))
            end = stem.stop
            responses = []
            for branch in group:
                responses.append(slice(end, end + len(branch.response)))
                end = responses[-1].stop
            calls += [(run, run) for run in (stem, *responses)]
            calls.append((slice(stem.stop, end), stem))
        calls.append((slice(leaves, end), slice(start, start + fork)))
    return calls


def micro_batches(trees: Iterable[Tree], token_limit: int) -> list[list[Tree]]:
    """Group trees into rows of at most token_limit tokens, splitting the branches of large trees.

    The longest first, each into the first row with room for it (first-fit decreasing); within a row
    trees stay in order. A branch is never cut: a row that cannot hold even one trunk and one branch
    exceeds the limit.
    """
    parts = [part for tree in trees for part in _split(tree, token_limit)]
    rows: list[list[int]] = []
    room: list[int] = []
    for number, size in sorted(enumerate(map(len, parts)), key=lambda part: -part[1]):
        row = next((i for i, free in enumerate(room) if size <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(token_limit)
        rows[row].append(number)
        room[row] -= size
    return [[parts[number] for number in sorted(row)] for row in rows]


def _split(tree: Tree, token_limit: int) -> list[Tree]:
    """The tree, or several with the same trunk and some of the branches each."""
    parts: list[list[Branch]] = [[]]
    used = len(tree.trunk)
    for stem in tree.stems:
        for branch in stem:
            shared = 0 if branch is stem[0] else len(branch.prompt)
            if parts[-1] and used + len(branch) - shared > token_limit:
                parts.append([])
                used, shared = len(tree.trunk), 0
            parts[-1].append(branch)
            used += len(branch) - shared
    first = replace(tree, branches=tuple(parts[0]))  # trunk targets are counted once
    return [first] + [replace(tree, branches=tuple(p), targets=None) for p in parts[1:]]
