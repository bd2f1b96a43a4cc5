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
            calls += _tree_calls(tree, start)
            start += len(tree)
        return [call for call in calls if all(span.start < span.stop for span in call)]


def pack(
    trees: Sequence[Tree], device: torch.device | str = "cpu", pad: bool | None = None
) -> Forest:
    """Lay trees out in one row: each trunk, then its stems, each with the responses to it.

    pad (default: on a GPU): to a `padded_length`, with tokens that no tree sees and no targets.
    ValueError if a branch leaves its trunk where there is nothing to see.
    """
    if pad is None:
        pad = torch.device(device).type == "cuda"
    columns = [_tree_columns(number, tree) for number, tree in enumerate(trees)]
    starts = np.cumsum([0] + [len(column["tokens"]) for column in columns])
    for column, start in zip(columns, starts):
        column["predecessor"][column["predecessor"] >= 0] += start
    total = int(starts[-1])
    padding = dict(
        tokens=0, tree=-1, branch=0, stem=0, fork=0, position=0, predecessor=-1, is_target=0
    )
    vectors = {}
    for name, fill in padding.items():
        row = np.full(padded_length(total) if pad else total, fill, dtype=np.int64)
        row[:total] = np.concatenate([column[name] for column in columns]) if columns else 0
        vectors[name] = torch.from_numpy(row).to(device)
    vectors["is_target"] = vectors["is_target"].bool()
    return Forest(trees=tuple(trees), **vectors)


def padded_length(tokens: int) -> int:
    """Round up to one of a few lengths: whole FlexAttention blocks, at most 32 per doubling."""
    step = FLEX_BLOCK
    while 64 * step <= tokens:
        step *= 2
    # At least two blocks: torch.compile specialises dimensions of size 1.
    return max(2 * FLEX_BLOCK, -(-tokens // step) * step)


def _tree_columns(number: int, tree: Tree) -> dict[str, np.ndarray]:
    """Return the vectors of one tree; predecessors count from its first token."""
    depth = np.arange(len(tree.trunk))
    targets = False if tree.targets is None else np.asarray(tree.targets, dtype=bool) & (depth > 0)
    runs = [_run(tree.trunk, 0, -1, position=0, branch=0, stem=0, fork=depth, is_target=targets)]
    end = len(depth)
    for group in tree.by_stem:
        fork, stem, name = group[0].fork, group[0].stem, -1 - group[0].id
        if not 0 <= fork <= len(depth) or not (fork or len(stem)):
            raise ValueError(
                f"branch {group[0].id} forks after {fork} tokens of a trunk of {len(depth)}; "
                "choose a fork on the trunk, with at least one token before the response"
            )
        same = dict(stem=name, fork=fork)
        # The shift: what follows the trunk is predicted by the trunk's last token that it sees.
        runs.append(_run(stem, end, fork - 1, position=fork, branch=name, is_target=False, **same))
        end += len(stem)
        before, position = end - 1 if len(stem) else fork - 1, fork + len(stem)
        for b in group:
            columns = dict(branch=1 + b.id, is_target=True, **same)
            runs.append(_run(b.response, end, before, position, **columns))
            end += len(b.response)
    columns = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    return columns | dict(tree=np.full(end, number))


def _run(tokens: Sequence[int], start: int, before: int, position: int, **same) -> dict:
    """Return the vectors of consecutive tokens from index `start`; `before` precedes the first."""
    offset = np.arange(len(tokens))
    predecessor = start + offset - 1
    predecessor[:1] = before
    columns = {name: np.broadcast_to(value, offset.shape) for name, value in same.items()}
    own = dict(tokens=np.asarray(tokens, dtype=np.int64), position=position + offset)
    return columns | own | dict(predecessor=predecessor)


def _tree_calls(tree: Tree, start: int) -> list[Call]:
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
