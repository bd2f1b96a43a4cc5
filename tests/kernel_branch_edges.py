"""What must be right, or be refused, at the edges of attention of branches. See kernel_edges.py."""

import dataclasses
import importlib
import os
from contextlib import contextmanager

import torch
from kernel_branches import attend, case_of, seen_of
from kernel_inputs import DEVICE

looked_at = DEVICE == "cpu"  # wrong values are refused; on a GPU they are assertions, and end it


@contextmanager
def refused(*said, by=ValueError):
    try:
        yield
    except by as error:
        assert all(part in str(error) for part in said), f"{error} does not say {said}"
    else:
        raise AssertionError(f"not refused, but should say {said}")


def close(name, given, expected, tolerance=1e-5):
    error = (given.detach().double() - expected.detach().double()).abs()
    error = float(error.max()) if len(error.flatten()) else 0.0
    assert given.shape == expected.shape and error <= tolerance, f"{name}: off by {error:.3g}"


def part(kernels, name):
    return importlib.import_module(f"{kernels.__name__}.{name}")


def few(kernels, dtype=torch.float32):
    """Branches 0, 1 and 3 on a trunk and 2 on another, whose counts may be changed."""
    case = case_of("few", dtype)
    case = case._replace(**{name: getattr(case, name).clone() for name in case._fields[5:]})
    return case, seen_of(kernels, case)


def check_counts(kernels):
    """What counts is what start, fork and length hold at the call, not when tiles were made."""
    case, seen = few(kernels)
    whole = [x.nan_to_num() for x in case[:5]]
    kernels.branch_attention(*case[:5], seen)
    for name in ("length", "fork"):
        getattr(case, name).sub_(1)
        expected = kernels.reference.branch_attention(*whole, *case[5:])
        close(f"{name} changed in place", kernels.branch_attention(*case[:5], seen), expected)
    case.length.add_(1)  # back to what a cache by value has seen
    expected = kernels.reference.branch_attention(*whole, *case[5:])
    close("changed back", kernels.branch_attention(*case[:5], seen), expected)


def check_strides(kernels):
    """Queries, keys and values may lie in memory each in a way of its own."""
    case, seen = few(kernels)
    plain = [torch.cat((x, x / 2), dim=-2) for x in case[:5]]  # more heads than one of keys
    wide = lambda x, n: torch.stack([x, *[torch.full_like(x, 9.0)] * n], dim=-2)[..., 0, :]
    expected = kernels.branch_attention(*plain, seen)
    for gaps in ((1, 0, 2, 3, 1), (0, 1, 0, 1, 2)):
        tensors = [wide(x, n) for x, n in zip(plain, gaps)]
        close("strides", kernels.branch_attention(*tensors, seen), expected, 0.0)


def check_bounds(kernels):
    """What is not there is refused by all tiers alike: memory of others would be read."""
    if not looked_at:
        return
    tokens, room = (few(kernels)[0][i].shape[j] for i, j in ((1, 0), (3, 1)))
    for field, value, said in (
        ("length", room + 1, f"from 0 to {room}"),
        ("length", -1, f"from 0 to {room}"),
        ("fork", tokens, f"its {tokens} tokens"),
        ("fork", -1, f"its {tokens} tokens"),
        ("start", -1, f"its {tokens} tokens"),
        ("start", 4, "a tile has one start"),
    ):
        case, seen = few(kernels)
        kernels.branch_attention(*case[:5], seen)
        getattr(case, field)[1] = value
        with refused("branch ", said):
            kernels.branch_attention(*case[:5], seen)
    for place, value in (((0, 0), 4), ((0, 0), -1), ((0, 0), 1), ((0, -1), 4)):
        case, seen = few(kernels)
        kernels.branch_attention(*case[:5], seen)
        seen.tiles.table[place] = value
        with refused("one tile"):
            kernels.branch_attention(*case[:5], seen)
    case, seen = few(kernels)
    away = kernels.Seen(*(x.to("meta") for x in case[5:]), seen.tiles)
    with refused("seen.start is on meta", "move"):
        kernels.branch_attention(*case[:5], away)
    away = dataclasses.replace(seen.tiles, table=seen.tiles.table.to("meta"))
    with refused("seen.tiles.table is on meta", "move"):
        kernels.branch_attention(*case[:5], kernels.Seen(*case[5:], away))
    three = kernels.Seen(*(x[:3] for x in case[5:]), seen.tiles)
    with refused("4 branches", "lengths of 3"):
        kernels.branch_attention(case.q[:3], *case[1:5], three)


def check_kernel_bounds(kernels):
    """Where values cannot be looked at, the Triton kernel stays in its memory and gives nan."""
    if os.environ["RMT_KERNELS"] != "triton":
        return
    kernel = part(kernels, "branch_parts").branch_attention
    case, seen = few(kernels)
    # Were memory beyond the caches read, it would be of numbers.
    beyond = lambda x: torch.cat([x.nan_to_num(), torch.ones_like(x)])[: len(x)]
    numbers = [case.q, *map(beyond, case[1:5])]
    expected = kernel(*numbers, seen)
    tokens, room = len(case.trunk_k), case.own_k.shape[1]
    for field, value in (("length", room + 1), ("length", -1), ("fork", tokens), ("start", 2)):
        case, seen = few(kernels)
        getattr(case, field)[1] = value
        given = kernel(*numbers, seen)
        assert given[1].isnan().all(), f"{field} {value} gives no nan"
        assert torch.equal(given[2], expected[2]), f"{field} {value} changes another branch"
    case, seen = few(kernels)
    seen.tiles.table[0, -1] = 10**6  # no branch
    assert torch.equal(kernel(*numbers, seen), expected)
    # A tile without empty places, all of whose branches begin before the trunk; and no tokens.
    cache = torch.ones(40, 1, 16, device=DEVICE)
    q, own = torch.ones(64, 1, 16, device=DEVICE), torch.ones(64, 9, 1, 16, device=DEVICE)
    for trunk, mine, counts in (
        (cache[8:], own, (-5, 4, 0)), (cache[:0], own, (0, 3, 9)), (cache, own[:, :0], (0, 3, 9)),
    ):  # fmt: skip
        counts = [torch.full((64,), count, device=DEVICE) for count in counts]
        tiles = kernels.TrunkGroups.of([0] * 64, [4] * 64, DEVICE, 1, 1)
        assert (tiles.table >= 0).all()
        given = kernel(q, trunk, trunk, mine, mine, kernels.Seen(*counts, tiles))
        assert given.isnan().all(), "tokens that are not there give no nan"


def check_room(kernels):
    """No token anywhere is 0; a head dim too wide for the Triton kernels is refused."""
    case = case_of("nothing to see", torch.float32)
    zeros = [torch.zeros_like(x) for x in case[5:]]
    empty = case._replace(
        trunk_k=case.trunk_k[:0], trunk_v=case.trunk_v[:0], own_k=case.own_k[:, :0],
        own_v=case.own_v[:, :0], start=zeros[0], fork=zeros[1], length=zeros[2],
    )  # fmt: skip
    assert not attend(kernels, empty).any()
    q, cache, own = (
        torch.ones(s, device=DEVICE) for s in ((1, 1, 512), (2, 1, 512), (1, 2, 1, 512))
    )
    counts = [torch.full((1,), x, device=DEVICE) for x in (0, 1, 2)]
    seen = kernels.Seen(*counts, kernels.TrunkGroups.of([0], [1], DEVICE, 1, 1))
    run = lambda: kernels.branch_attention(q, cache, cache, own, own, seen)
    if os.environ["RMT_KERNELS"] != "reference":
        with refused("512", "256", "RMT_KERNELS=reference"):
            run()
    else:
        close("head dim 512", run(), torch.ones_like(q))
