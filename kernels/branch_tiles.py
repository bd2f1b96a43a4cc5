"""What each branch sees, and which are attended to a trunk together: tiles of Triton's, calls of
PyTorch's.

Tiles are worked out on the host, once for each change of the branches that are there; Seen is made
once for a step. Shapes: n branches, m of them in a call, L own tokens at most, H heads, K key/value
heads; H = K · rep.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.check import require_counts, require_slots

ROWS = 64  # query rows of a tile: branches of it times rep, rounded up to a power of two
ENOUGH = 8  # branches that fill a CPU's matrix product; with so many, a fork has its own call


class Group(NamedTuple):
    """Branches that the PyTorch tier attends to a trunk with in one call."""

    rows: tuple[int, int]  # first and count, of the slots in Groups.order times rep
    trunk: tuple[int, int]  # first and count of the tokens that at least one of them sees
    bias: Tensor | None  # (1, 1, m·rep, tokens), −inf beyond a fork; None where all see all tokens


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
    rep: int  # heads that share a key

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
        return cls(table.to(device), start, fork, heads // kv_heads)

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
        start, rep = self.start[run[0]], self.rep
        forks = [self.fork[slot] for slot in run]
        bias = None
        if min(forks) < max(forks):
            limits = torch.tensor(forks, device=self.table.device).repeat_interleave(rep)
            bias = _bias_beyond(limits, max(forks))[None, None]
        return Group((first * rep, len(run) * rep), (start, max(forks)), bias)


@dataclass(frozen=True, eq=False)
class Seen:
    """What each branch sees in a step, the same in all layers.

    Trunk tokens start … start + fork and own tokens 0 … length: start, fork and length (n,) int64
    on the device; tiles are of the same starts and forks. `longest` is a bound of length that the
    host knows: without it the PyTorch tier looks. Nothing is asked of the device before that tier
    reads, so that a step can be recorded in a CUDA graph. ValueError for what does not fit.
    """

    start: Tensor
    fork: Tensor
    length: Tensor
    tiles: Tiles
    longest: int | None = None

    def __post_init__(self):
        require_counts(start=self.start, fork=self.fork, length=self.length)

    @cached_property
    def own(self) -> tuple[int, Tensor | None]:
        """How many own tokens to attend to, and bias (n, 1, rep, L): −inf beyond a length, or None
        where all are equally long.
        """
        require_slots(len(self.length), self.tiles.start)
        longest = int(self.length.max()) if self.longest is None else self.longest
        if not longest or int(self.length.min()) >= longest:
            return longest, None
        bias = _bias_beyond(self.length, longest)
        return longest, bias[:, None, None].expand(-1, 1, self.tiles.rep, -1)


def _bias_beyond(limit: Tensor, tokens: int) -> Tensor:
    """(n, tokens) in fp32: 0 for the first limit (n,) tokens of a row, −inf for the others."""
    hidden = torch.arange(tokens, device=limit.device) >= limit[:, None]
    return torch.zeros(hidden.shape, device=limit.device).masked_fill_(hidden, -math.inf)


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
