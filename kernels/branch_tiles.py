"""The tokens that each branch sees, and the branches that attend to a trunk together.

Branches of one trunk share a tile of the Triton kernels, or one call in PyTorch. TrunkGroups are
computed on the host when the active branches change; Seen is created once per step. start, fork and
length are read at each call.

Shapes: n branches, m of them in a call, L own tokens at most, H heads, K key/value heads;
H = K · rep.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .refuse import require_counts

ROWS = 64  # query rows of a tile: its branches times rep, rounded up to a power of two
ENOUGH = 8  # branches that fill a CPU's matrix product: so many of one fork get their own call


class Group(NamedTuple):
    """Branches that attend to one trunk in one PyTorch call."""

    rows: tuple[int, int]  # first and count, of the slots in Groups.order times rep
    trunk: tuple[int, int]  # first and count of the tokens that at least one of them sees
    bias: Tensor | None  # (1, 1, m·rep, tokens), −inf beyond a fork; None where all see all tokens


class Groups(NamedTuple):
    members: list[Group]
    order: Tensor | None  # slots of the groups, one after another; None: 0, 1, …
    back: Tensor | None  # place of each slot in `order`; its end for a slot that sees no trunk


@dataclass(frozen=True, eq=False)
class TrunkGroups:
    """Branches grouped by trunk: a trunk's keys are read once for all branches of a tile.

    Create it again when branches come or go, not for every token or layer: only the Triton kernels
    read `table`, and forks and lengths may change meanwhile. Every slot is in exactly one tile,
    even one that sees no trunk.
    """

    table: Tensor  # (tiles, width) int32 slot numbers on the device, -1: none
    branches: int

    @classmethod
    def of(
        cls,
        start: Sequence[int],
        fork: Sequence[int],
        device: torch.device | str,
        heads: int,
        kv_heads: int,
        rows: int | None = None,
    ) -> "TrunkGroups":
        """Put branches of equal start into the same tiles; pad to `rows` tiles for a CUDA graph.

        ValueError if they need more than `rows`; `most` returns how many suffice.
        """
        start, fork = tuple(map(int, start)), tuple(map(int, fork))
        width = width_of(heads, kv_heads)
        # Similar forks share a tile: it reads as far as its longest fork.
        slots = sorted(range(len(start)), key=lambda slot: (start[slot], -fork[slot]))
        tiles = []
        for _, of_trunk in groupby(slots, key=start.__getitem__):
            of_trunk = list(of_trunk)
            tiles += [of_trunk[i : i + width] for i in range(0, len(of_trunk), width)]
        if rows is not None and len(tiles) > rows:
            trunks = len(set(start))
            raise ValueError(
                f"{len(start)} branches on {trunks} trunks are {len(tiles)} tiles, more than "
                f"rows = {rows}; use TrunkGroups.most(branches, trunks, heads, kv_heads)"
            )
        tiles += [[]] * ((rows or 0) - len(tiles))
        table = [tile + [-1] * (width - len(tile)) for tile in tiles]
        table = torch.tensor(table, dtype=torch.int32).reshape(len(tiles), width)
        return cls(table.to(device), len(start))

    @staticmethod
    def most(branches: int, trunks: int, heads: int, kv_heads: int) -> int:
        """Return the most tiles that so many branches on so many trunks can need."""
        trunks = min(trunks, branches)
        return trunks + (branches - trunks) // width_of(heads, kv_heads)


@dataclass(frozen=True, eq=False)
class Seen:
    """The tokens that each branch sees in a step, the same in all layers.

    Branch i sees the fork[i] trunk tokens from start[i] on, and its first length[i] own tokens.
    start, fork, length (n,) int64 on the device may be changed in place between calls.
    tiles must be of the same starts. ValueError for shapes, dtypes and devices that do not fit.
    """

    start: Tensor
    fork: Tensor
    length: Tensor
    tiles: TrunkGroups
    checked: set = field(default_factory=set, repr=False)  # by kernels/refuse.py

    def __post_init__(self):
        require_counts(start=self.start, fork=self.fork, length=self.length)

    def values(self) -> tuple[tuple[int, ...], ...]:
        """Return start, fork and length as they are now; PyTorch reads them at every call."""
        return tuple(tuple(x.tolist()) for x in (self.start, self.fork, self.length))


# Shared by all layers of a step. Cached by value, so changes in place are seen.
@lru_cache(maxsize=8)
def groups_of(
    start: tuple[int, ...], fork: tuple[int, ...], rep: int, device: torch.device
) -> Groups:
    """Group branches into PyTorch calls; rep: query heads per key/value head."""
    runs = list(_runs(start, fork))
    order = [slot for run in runs for slot in run]
    members, first = [], 0
    for run in runs:
        members.append(_group(start[run[0]], [fork[slot] for slot in run], first, rep, device))
        first += len(run)
    slots = list(range(len(start)))
    if order == slots:
        return Groups(members, None, None)
    place = {slot: i for i, slot in enumerate(order)}
    back = [place.get(slot, len(order)) for slot in slots]
    return Groups(members, *(torch.tensor(x, device=device) for x in (order, back)))


def _group(start: int, forks: list[int], first: int, rep: int, device: torch.device) -> Group:
    bias = None
    if min(forks) < max(forks):
        limits = torch.tensor(forks, device=device).repeat_interleave(rep)
        bias = _bias_beyond(limits, max(forks))[None, None]
    return Group((first * rep, len(forks) * rep), (start, max(forks)), bias)


@lru_cache(maxsize=8)
def bias_of(length: tuple[int, ...], rep: int, device: torch.device) -> Tensor | None:
    """Return a bias (n, 1, rep, L), −inf beyond each length; None if all lengths are equal."""
    if min(length) == max(length):
        return None
    bias = _bias_beyond(torch.tensor(length, device=device), max(length))
    return bias[:, None, None].expand(-1, 1, rep, -1)


def _bias_beyond(limit: Tensor, tokens: int) -> Tensor:
    """Return (n, tokens) in fp32: 0 for the first limit (n,) tokens of a row, then −inf."""
    hidden = torch.arange(tokens, device=limit.device) >= limit[:, None]
    return torch.zeros(hidden.shape, device=limit.device).masked_fill_(hidden, -math.inf)


def width_of(heads: int, kv_heads: int) -> int:
    """Return the number of branches of a tile."""
    return max(1, ROWS >> (heads // kv_heads - 1).bit_length())


def _runs(start: Sequence[int], fork: Sequence[int]) -> Iterator[list[int]]:
    """Yield the slots of each call: of one trunk, and of one fork unless it has few."""
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
