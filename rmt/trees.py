"""Trees: a document (the trunk) and the responses that branch off it.

The trunk is the document; a branch leaves it at the position to be predicted and holds the rest of
the prompt, its stem, and one response. Branches with the same stem share its tokens. A branch is
the ordinary sequence trunk[:fork] + stem + response: rmt/naive.py computes it as one, and
rmt/forest.py computes shared tokens once. In other terms: trunk[:fork] + stem = prompt, response
(or rollout) = completion; before responses are sampled, a branch is a stem alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np


@dataclass(frozen=True)
class Branch:
    """A continuation of trunk[:fork]: a stem (context), then response tokens (targets)."""

    id: int  # which response of the step, or question before there are any; unique in a forest
    fork: int
    stem: Sequence[int]
    response: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.stem) + len(self.response)


@dataclass(frozen=True)
class Tree:
    """One trunk and its branches. `targets` marks the trunk tokens that are training targets."""

    document: int
    trunk: Sequence[int]
    branches: Sequence[Branch] = ()
    targets: Sequence[bool] | None = None

    def __len__(self) -> int:
        """Tokens in a row; those of a stem count once."""
        size = lambda group: len(group[0].stem) + sum(len(b.response) for b in group)
        return len(self.trunk) + sum(map(size, self.by_stem))

    @cached_property
    def by_stem(self) -> list[list[Branch]]:
        """Adjacent branches that share a stem; one without a response has a stem of its own."""
        stem = lambda b: (b.fork, tuple(b.stem), None if len(b.response) else b.id)
        return [list(group) for _, group in groupby(self.branches, key=stem)]

    @property
    def trunk_targets(self) -> int:
        """Count the trunk tokens that are targets; the first, which nothing precedes, is none."""
        return 0 if self.targets is None else int(np.count_nonzero(self.targets[1:]))


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
    """Split the branches of a tree that is too large over several trees with the same trunk."""
    parts: list[list[Branch]] = [[]]
    used = len(tree.trunk)
    for group in tree.by_stem:
        for branch in group:
            shared = 0 if branch is group[0] else len(branch.stem)
            if parts[-1] and used + len(branch) - shared > token_limit:
                parts.append([])
                used, shared = len(tree.trunk), 0
            parts[-1].append(branch)
            used += len(branch) - shared
    first = replace(tree, branches=tuple(parts[0]))  # trunk targets are counted once
    return [first] + [replace(tree, branches=tuple(p), targets=None) for p in parts[1:]]
