"""The forest: trees packed in one row of N tokens; defines the attention mask, shift and targets.

docs/mask.png draws an example.
Five integers describe a token:

    tree      which tree of the row
    branch    0 on a trunk, 1 + Branch.id on a response, −1 − Branch.id on a stem (its first branch)
    stem      the stem that a response continues; elsewhere the token's own branch
    fork      how many trunk tokens a stem and its responses see (on a trunk, its own depth: all)
    position  rotary position: index on the trunk, or fork + offset in stem and response

    sees(i, j) = tree_i = tree_j  and  position_j ≤ position_i  and  (branch_j = branch_i
                 or  branch_j = stem_i  or  (branch_j = 0 and position_j < fork_i))         Eq. 11

So a branch sees exactly what it would see as an ordinary sequence (rmt/naive.py), and tokens that
several branches see are computed once. Shapes: N tokens, H heads, K key/value heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rmt.attention import Call, attend_by_call, attend_flex
from rmt.trees import Tree

FLEX_BLOCK = 128


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
    is_target: Tensor  # True where the token is a training target

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Return whether token i attends to token j (broadcasts)."""
        own = (self.branch[j] == self.branch[i]) | (self.branch[j] == self.stem[i])
        shared = (self.branch[j] == 0) & (self.position[j] < self.fork[i])
        past = self.position[j] <= self.position[i]
        return (self.tree[i] == self.tree[j]) & past & (own | shared)  # Eq. 11

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in the forest: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
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
        """Express Eq. 11 as calls of attention without a mask, see rmt/attention.py."""
        calls, start = [], 0
        for tree in self.trees:
            calls += tree_calls(tree, start)
            start += len(tree)
        return [call for call in calls if all(span.start < span.stop for span in call)]


def pack(
    trees: Sequence[Tree], device: torch.device | str = "cpu", pad: bool | None = None
) -> Forest:
    """Lay trees out in one row: each trunk, then its stems, each with the responses to it.

    pad (default: on a GPU): to a `padded_length`, with tokens that no tree sees and no targets.
    ValueError if a branch leaves its trunk where there is nothing to see.
    """
    tokens, targets, runs = [], [], []  # a run: consecutive tokens of a trunk, stem or response

    def add(run: Sequence[int], run_targets: Sequence[bool], *first: int) -> None:
        """Append a run. first: position and predecessor of its first token; tree, branch, ..."""
        runs.append((len(run), *first))
        tokens.extend(run)
        targets.extend(run_targets)

    for number, tree in enumerate(trees):
        start, depth = len(tokens), len(tree.trunk)
        marked = depth * [False] if tree.targets is None else tree.targets
        add(tree.trunk, marked, 0, -1, number, 0, 0, 0)
        for group in tree.by_stem:
            fork, stem, name = group[0].fork, group[0].stem, -1 - group[0].id
            if not 0 <= fork <= depth or not (fork or len(stem)):
                raise ValueError(
                    f"branch {group[0].id} forks after {fork} tokens of a trunk of {depth}; "
                    "choose a fork on the trunk, with at least one token before the response"
                )
            # The shift: what follows the trunk is predicted by the trunk's last token that it sees.
            before = start + fork - 1 if fork else -1
            add(stem, len(stem) * [False], fork, before, number, name, name, fork)
            before = len(tokens) - 1 if len(stem) else before
            for b in group:
                known = (len(b.response) * [True], fork + len(stem), before, number, 1 + b.id)
                add(b.response, *known, name, fork)
    length, *first = np.array(runs, dtype=np.int64).reshape(-1, 7).T
    position, before, tree, branch, stem, fork = (np.repeat(x, length) for x in first)  # (N,)
    index = np.arange(len(tokens))
    offset = index - np.repeat(np.cumsum(length) - length, length)  # in its run
    position, before = position + offset, np.where(offset > 0, index - 1, before)
    vectors = dict(
        tokens=np.array(tokens, dtype=np.int64), tree=tree, branch=branch, stem=stem,
        fork=np.where(branch == 0, position, fork), position=position, predecessor=before,
        is_target=np.array(targets, dtype=bool) & (before >= 0),  # nothing precedes a first token
    )  # fmt: skip
    pad = torch.device(device).type == "cuda" if pad is None else pad
    ends = (0, padded_length(len(tokens)) - len(tokens) if pad else 0)
    for name, x in vectors.items():
        x = np.pad(x, ends, constant_values=-1 if name in ("tree", "predecessor") else 0)
        vectors[name] = torch.from_numpy(x).to(device)
    return Forest(trees=tuple(trees), **vectors)


def padded_length(tokens: int) -> int:
    """Round up to one of a few lengths: whole FlexAttention blocks, at most 32 per doubling."""
    step = FLEX_BLOCK
    while 64 * step <= tokens:
        step *= 2
    # At least two blocks: torch.compile specialises dimensions of size 1.
    return max(2 * FLEX_BLOCK, -(-tokens // step) * step)


def tree_calls(tree: Tree, start: int) -> list[Call]:
    """Return the calls of attention of a tree whose first token is at `start`."""
    end = start + len(tree.trunk)
    calls = [(slice(start, end), slice(start, end))]  # a run with itself: causal
    for fork, groups in groupby(tree.by_stem, key=lambda group: group[0].fork):
        leaves = end
        for group in groups:
            stem = slice(end, end + len(group[0].stem))
            end = stem.stop
            responses = []
            for branch in group:
                responses.append(slice(end, end + len(branch.response)))
                end = responses[-1].stop
            calls += [(run, run) for run in (stem, *responses)]
            calls.append((slice(stem.stop, end), stem))
        calls.append((slice(leaves, end), slice(start, start + fork)))
    return calls
