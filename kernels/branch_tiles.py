"""Which branches are attended to a trunk together: tiles of Triton's, calls of PyTorch's.

Worked out on the host, once for each change of the branches that are there. Shapes: m branches of a
call, H heads, K key/value heads; H = K · rep.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # query rows of a tile: branches of it times rep, rounded up to a power of two
ENOUGH = 8  # branches that fill a CPU's matrix product; with so many, a fork has its own call


class Group(NamedTuple):
    """Branches that the PyTorch tier attends to a trunk with in one call."""

    rows: slice  # of the slots in Groups.order
    trunk: slice  # tokens that at least one of them sees
    bias: Tensor | None  # (m, 1, tokens) fp32, −inf beyond a fork; None where all see all tokens


class Groups(NamedTuple):
    members: list[Group]
    order: Tensor | None  # slots of the groups, one after another; None: 0, 1, …
    back: Tensor | None  # where each slot is in `order`, at its end if it sees no trunk


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which branches share a trunk: their keys are read once for all branches of a tile.

    To be made again when branches come or go, not with every token or layer. The Triton tier reads
    `table`, the PyTorch tier the rest. Every slot is in one tile, also one that sees no trunk.
    """

    table: Tensor  # (tiles, width) int32 slot numbers on the device, -1: none
    start: tuple[int, ...]  # per slot: first token of its trunk in the flat trunk cache
    fork: tuple[int, ...]  # per slot: how many trunk tokens it sees

    @classmethod
    def of(
        cls,
        start: Sequence[int],
        fork: Sequence[int],
        device: torch.device | str,
        heads: int,
        kv_heads: int,
        rows: int | None = None,
    ) -> "Tiles":
        """Branches of equal start side by side, padded to `rows` tiles for a CUDA graph.

        ValueError if they need more than `rows`; `most` says how many suffice.
        """
        start, fork = tuple(map(int, start)), tuple(map(int, fork))
        width = width_of(heads, kv_heads)
        # Neighbours in fork share a tile: it reads as far as the longest of them.
        slots = sorted(range(len(start)), key=lambda slot: (start[slot], -fork[slot]))
        tiles = []
        for _, of_trunk in groupby(slots, key=start.__getitem__):
            of_trunk = list(of_trunk)
            tiles += [of_trunk[i : i + width] for i in range(0, len(of_trunk), width)]
        if rows is not None and len(tiles) > rows:
            trunks = len(set(start))
            raise ValueError(
                f"{len(start)} branches on {trunks} trunks are {len(tiles)} tiles, more than "
                f"rows = {rows}; take Tiles.most(branches, trunks, heads, kv_heads)"
            )
        tiles += [[]] * ((rows or 0) - len(tiles))
        table = [tile + [-1] * (width - len(tile)) for tile in tiles]
        table = torch.tensor(table, dtype=torch.int32).reshape(len(tiles), width)
        return cls(table.to(device), start, fork)

    @staticmethod
    def most(branches: int, trunks: int, heads: int, kv_heads: int) -> int:
        """How many tiles so many branches on so many trunks can be, however they are spread."""
        trunks = min(trunks, branches)
        return trunks + (branches - trunks) // width_of(heads, kv_heads)

    @cached_property
    def groups(self) -> Groups:
        """Calls of the PyTorch tier."""
        runs = list(_runs(self.start, self.fork))
        order = [slot for run in runs for slot in run]
        members, first = [], 0
        for run in runs:
            members.append(self._group(run, first))
            first += len(run)
        slots, device = list(range(len(self.start))), self.table.device
        if order == slots:
            return Groups(members, None, None)
        place = {slot: i for i, slot in enumerate(order)}
        back = [place.get(slot, len(order)) for slot in slots]
        return Groups(members, *(torch.tensor(x, device=device) for x in (order, back)))

    def _group(self, run: list[int], first: int) -> Group:
        start = self.start[run[0]]
        forks = [self.fork[slot] for slot in run]
        bias = None
        if min(forks) < max(forks):
            hidden = torch.arange(max(forks)) >= torch.tensor(forks)[:, None, None]
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf).to(self.table.device)
        rows = slice(first, first + len(run))
        return Group(rows, slice(start, start + max(forks)), bias)


def width_of(heads: int, kv_heads: int) -> int:
    """Branches of a tile."""
    return max(1, ROWS >> (heads // kv_heads - 1).bit_length())


def _runs(start: Sequence[int], fork: Sequence[int]) -> Iterator[list[int]]:
    """Slots for one call each: of one trunk, and of one fork unless there are few of it."""
    seen = [slot for slot in range(len(start)) if fork[slot] > 0]
    seen.sort(key=lambda slot: (start[slot], -fork[slot]))
    run: list[int] = []
    for (trunk, _), of_fork in groupby(seen, key=lambda slot: (start[slot], fork[slot])):
        if run and (len(run) >= ENOUGH or start[run[0]] != trunk):
            yield run
            run = []
        run += of_fork
    if run:
        yield run
