"""Attention of branches: cases, and each promise as a function that raises AssertionError.

test_kernels_branch_attention.py runs them on our kernels, kernel_mutants.py on broken copies:
`kernels` is the package, or a mutant of it.
"""

import importlib
import math
import os
import random
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_checks import assert_values, distance
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 130)  # of steps of 16, 32 and 64


class Case(NamedTuple):
    """Arguments of `branch_attention`; all that no branch sees is nan."""

    q: Tensor
    trunk_k: Tensor
    trunk_v: Tensor
    own_k: Tensor
    own_v: Tensor
    start: Tensor
    fork: Tensor
    length: Tensor


class Plan(NamedTuple):
    """What a case is made of. Branches are (trunk, fork, length), in the order of their slots."""

    branches: list[tuple[int, int, int]]
    kv_heads: int
    rep: int
    size: int
    programs: int | None = None  # into how many the Triton tier cuts the work
    loud: float = 1.0  # factor of q


def spread(n: int, trunks: int, forks: tuple[int, ...], lengths: tuple[int, ...]):
    choose = random.Random(n)
    return [
        (choose.randrange(trunks), choose.choice(forks), choose.choice(lengths)) for _ in range(n)
    ]


EDGE = [(0, fork, EDGES[-1 - i]) for i, fork in enumerate(EDGES)]
PLANS = {  # slow ones last
    "one branch": Plan([(0, 70, 5)], 1, 1, 64),
    "nothing to see": Plan([(0, 0, 0), (0, 3, 0), (0, 0, 2), (1, 0, 0), (0, 3, 1)], 1, 3, 16),
    "no trunk": Plan([(0, 0, 4), (1, 0, 4)], 2, 1, 16),
    "nothing of their own": Plan([(1, 40, 0), (0, 20, 0), (1, 40, 0)], 1, 3, 16),
    "few": Plan([(0, 5, 3), (0, 4, 2), (1, 6, 1), (0, 3, 4)], 1, 2, 16),
    "pieces": Plan([(0, 500, 3), (0, 130, 400), (1, 300, 64), (0, 65, 0)], 1, 3, 16, 10**6),
    "pieces of one branch": Plan([(0, 300, 300)], 1, 4, 64, 10**6),
    "huge scores": Plan(spread(5, 2, (9, 66), (1, 65)), 2, 3, 16, 10**6, loud=3e4),
    "odd heads": Plan(spread(4, 2, (5, 20), (3, 9)), 2, 2, 24),
    "edges of steps": Plan(EDGE, 1, 1, 16),
    "five queries a key": Plan(spread(9, 2, (30, 66), (7, 33)), 2, 5, 128),
    "three queries a key": Plan(spread(13, 3, (0, 9, 65, 80), (0, 1, 40)), 3, 3, 64),
    "eight queries a key": Plan(spread(19, 1, (0, 5, 70), (1, 9)), 2, 8, 16),
    "257 branches": Plan(spread(257, 3, (0, 1, 20), (0, 0, 0, 1, 4)), 1, 1, 16),
}


@cache
def drawn(name: str) -> Case:
    """In fp64 on a CPU, q and caches exact in bf16. Trunks lie 7 tokens apart, from 3 on."""
    plan, generator = PLANS[name], torch.Generator().manual_seed(len(name))
    branches, kv_heads, size = plan.branches, plan.kv_heads, plan.size

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().double()

    start, end = {}, 3
    for trunk in sorted({trunk for trunk, _, _ in branches}):
        start[trunk] = end
        end += max(fork for t, fork, _ in branches if t == trunk) + 7
    n, longest = len(branches), max(length for *_, length in branches)
    caches = [torch.full((end, kv_heads, size), math.nan).double() for _ in range(2)]
    caches += [torch.full((n + 2, longest + 5, kv_heads, size), math.nan).double() for _ in "kv"]
    for slot, (trunk, fork, length) in enumerate(branches):
        for x in caches[:2]:  # drawn again for each branch: any is as good
            x[start[trunk] : start[trunk] + fork] = draw(fork, kv_heads, size)
        for x in caches[2:]:
            x[slot, :length] = draw(length, kv_heads, size)
    starts, forks, lengths = zip(*((start[t], fork, length) for t, fork, length in branches))
    q = plan.loud * draw(n, kv_heads * plan.rep, size)
    return Case(q.bfloat16().double(), *caches, *map(torch.tensor, (starts, forks, lengths)))


def case_of(name: str, dtype: torch.dtype) -> Case:
    numbers = [x.to(DEVICE, dtype) for x in drawn(name)[:5]]
    return Case(*numbers, *(x.to(DEVICE) for x in drawn(name)[5:]))


def seen_of(kernels, case: Case, rows: int | None = None):
    heads, kv_heads = case.q.shape[1], case.trunk_k.shape[1]
    where = case.start.tolist(), case.fork.tolist(), case.q.device
    tiles = kernels.TrunkGroups.of(*where, heads, kv_heads, rows)
    return kernels.Seen(case.start, case.fork, case.length, tiles)


def attend(kernels, case: Case, programs: int | None = None, rows: int | None = None) -> Tensor:
    """By the tier that RMT_KERNELS chooses; cut for so many programs where that is Triton."""
    seen = seen_of(kernels, case, rows=rows)
    if programs and os.environ["RMT_KERNELS"] == "triton":
        parts = importlib.import_module("kernels.branch_parts")
        return parts.branch_attention(*case[:5], seen, programs)
    return kernels.branch_attention(*case[:5], seen)


def same_dtype(case: Case) -> Tensor:
    """PyTorch's attention in q's dtype, one branch after another."""
    outs, rep = [], case.q.shape[1] // case.trunk_k.shape[1]
    for i, (start, fork, length) in enumerate(zip(*(x.tolist() for x in case[5:]))):
        pairs = (case.trunk_k, case.own_k), (case.trunk_v, case.own_v)
        k, v = (torch.cat([t[start : start + fork], own[i, :length]]) for t, own in pairs)
        k, v = (x.transpose(0, 1).repeat_interleave(rep, 0) for x in (k, v))  # (H, tokens, D)
        q = case.q[i, :, None]
        out = F.scaled_dot_product_attention(q, k, v) if fork + length else torch.zeros_like(q)
        outs.append(out[:, 0])
    return torch.stack(outs)


def check_branches(kernels, name: str, dtype: torch.dtype) -> None:
    """Against the specification in fp64; in bf16 also against PyTorch's error."""
    case, real = case_of(name, dtype), case_of(name, torch.float64)
    expected = kernels.reference.branch_attention(*real)
    given = attend(kernels, case, PLANS[name].programs)
    assert given.dtype == dtype and not given.requires_grad
    assert_attention(name, given, expected, case, real)


def assert_attention(name, given, expected, case, real):
    # Rounding of a score moves weights between values.
    norms = (x.nan_to_num().norm(dim=-1).max() for x in (real.q, real.trunk_k, real.own_k))
    q, *keys = (float(norm) for norm in norms)
    score = q * max(keys) * case.q.shape[-1] ** -0.5
    unit = {torch.float64: 4e-15, torch.float32: 2e-7, torch.bfloat16: 2**-7}[given.dtype]
    if given.dtype == torch.bfloat16:
        plain = distance(same_dtype(case), expected)
        error = distance(given, expected)
        assert error <= 2 * plain + 1e-6, f"{name}: error {error:.3g}, PyTorch's is {plain:.3g}"
    else:
        assert_values(name, given.flatten(), expected.flatten(), unit * (10 + score), 10 * unit)
    nothing = real.fork + real.length == 0
    assert not given[nothing].any(), f"{name}: something where a branch sees nothing"


def check_layouts(kernels, dtype: torch.dtype) -> None:
    """Other layouts of the caches, a part of a wider q, and tiles of no branch change nothing."""
    case = case_of("odd heads", dtype)
    other = case._replace(
        q=torch.cat([case.q, case.q], dim=2)[:, :, : case.q.shape[2]],
        trunk_k=case.trunk_k.transpose(0, 1).contiguous().transpose(0, 1),
        own_v=case.own_v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not other.q.is_contiguous() and not other.own_v.is_contiguous()
    given, expected = attend(kernels, other, rows=9), attend(kernels, case)
    assert_values("layouts", given.flatten(), expected.flatten(), 2e-6, 1e-2)


def usual_test(kernels) -> bool:
    """What such kernels are tested with: random numbers, whole steps, a tolerance of 5e-2."""
    passes = True
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        cache = (torch.randn(128, 1, 64), torch.randn(128, 1, 64))
        own = (torch.randn(4, 64, 1, 64), torch.randn(4, 64, 1, 64))
        numbers = [x.to(DEVICE, dtype) for x in (torch.randn(4, 4, 64), *cache, *own)]
        counts = [torch.full((4,), x, device=DEVICE) for x in (0, 128, 64)]
        case = Case(*numbers, *counts)
        given, expected = attend(kernels, case), same_dtype(case)
        passes &= torch.allclose(given.float(), expected.float(), atol=5e-2, rtol=5e-2)
    return passes
