"""Attention of branches against fp64: trunks shared by some, own caches, memory nobody wrote to.

On a CPU Triton's interpreter runs the Triton kernels; with a GPU they are compiled.
"""

import math
import random
import sys

import pytest
import torch
from kernel_branches import DEVICE, PLANS, Case, case_of, check_branches, check_layouts, seen_of
from toy_models import assert_holds

import kernels

PAIRS = [("reference", torch.float64)] + [
    (kind, dtype) for kind in ("reference", "triton") for dtype in (torch.float32, torch.bfloat16)
]
in_each_dtype = pytest.mark.parametrize(
    "kind, dtype", PAIRS, ids=lambda value: str(value).removeprefix("torch.")
)
both_tiers = pytest.mark.parametrize("kind", ["reference", "triton"])


@pytest.fixture(autouse=True)
def choose_kernels(request, monkeypatch):
    if "kind" in request.fixturenames:
        monkeypatch.setenv("RMT_KERNELS", request.getfixturevalue("kind"))


@pytest.mark.parametrize("name", PLANS)
@in_each_dtype
def test_branch_attention_is_its_specification(kind, dtype, name):
    check_branches(kernels, name, dtype)


@in_each_dtype
def test_any_layout_of_the_caches_will_do(kind, dtype):
    check_layouts(kernels, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gpu_without_triton_computes_the_same(monkeypatch, dtype):
    monkeypatch.setenv("RMT_KERNELS", "reference")
    module = sys.modules["kernels.branch_attention"]
    monkeypatch.setattr(module, "_softmax_values", module._softmax_values_in_steps)
    for name in PLANS:
        check_branches(kernels, name, dtype)


@both_tiers
def test_no_branches_are_no_rows(kind):
    case = Case(*(x[:0] for x in case_of("one branch", torch.float32)))
    assert kernels.branch_attention(*case[:5], seen_of(kernels, case)).shape == (0, 1, 64)


@pytest.mark.parametrize(
    "heads, kv_heads, width", [(4, 4, 64), (9, 3, 16), (40, 8, 8), (128, 1, 1)]
)
def test_tiles_hold_each_slot_once_with_the_others_on_its_trunk(heads, kv_heads, width):
    start = [random.Random(i).choice((5, 90, 700)) for i in range(150)]
    fork = [i % 7 for i in range(150)]
    tiles = kernels.TrunkGroups.of(start, fork, DEVICE, heads, kv_heads)
    assert tiles.table.shape[1] == width and tiles.table.dtype == torch.int32
    rows = [[slot for slot in row if slot >= 0] for row in tiles.table.tolist()]
    assert sorted(slot for row in rows for slot in row) == list(range(150))
    assert all(len({start[slot] for slot in row}) == 1 for row in rows)
    full = sum(math.ceil(start.count(trunk) / width) for trunk in set(start))
    assert len(rows) == full <= kernels.TrunkGroups.most(150, 3, heads, kv_heads)


@pytest.mark.parametrize("branches, trunks", [(1, 1), (1, 9), (9, 4), (16, 1), (17, 1), (35, 3)])
def test_most_tiles_are_reached_and_never_passed(branches, trunks):
    most = kernels.TrunkGroups.most(branches, trunks, 9, 3)
    counts = set()
    for spread in range(branches + 1):  # one trunk has all but `spread`, which lie on the others
        start = [1 + i % max(1, trunks - 1) if i < spread else 0 for i in range(branches)]
        if len(set(start)) <= trunks:
            counts.add(len(kernels.TrunkGroups.of(start, [1] * branches, "cpu", 9, 3).table))
    assert max(counts) == most


def test_tiles_are_padded_or_refused():
    tiles = kernels.TrunkGroups.of([0, 8], [8, 2], DEVICE, 9, 3, rows=4)
    assert tiles.table.shape == (4, 16) and (tiles.table[2:] == -1).all()
    with pytest.raises(ValueError) as error:
        kernels.TrunkGroups.of([0, 8], [8, 2], DEVICE, 9, 3, rows=1)
    assert_holds(error, "2 branches on 2 trunks", "2 tiles", "rows = 1", "TrunkGroups.most")


@pytest.mark.parametrize(
    "changes, said",
    [
        (lambda c: dict(q=c.q[:, :4]), ["multiple of K", "(13, 4, 64)", "(122, 3, 64)"]),
        (lambda c: dict(q=c.q[1:]), ["q is (12, 9, 64)", "13 branches"]),
        (
            lambda c: dict(trunk_k=c.trunk_k.to("meta")),
            ["trunk_k is torch.float32 on meta", "q is"],
        ),
        (
            lambda c: {k: x.nan_to_num().int() for k, x in zip(c._fields[:5], c[:5])},
            ["q is torch.int32", "one floating dtype"],
        ),
        (lambda c: dict(own_v=c.own_v[:5]), ["own_v is (5,", "at least 13 slots"]),
        (lambda c: dict(trunk_v=c.trunk_v[1:]), ["trunk_v is (121, 3, 64)", "(T, 3, 64)"]),
        (lambda c: dict(own_k=c.own_k.half()), ["own_k is torch.float16", "convert"]),
        (lambda c: dict(q=c.q.mT.contiguous().mT), ["q has strides", "q.contiguous()"]),
        (lambda c: dict(fork=c.fork.int()), ["fork must be (13,) int64", "torch.int32"]),
        (lambda c: dict(fork=c.fork.repeat(2)[::2]), ["fork has stride (2,)", "fork.contiguous()"]),
        (lambda c: dict(length=c.length[1:]), ["length must be (13,)", "(12,)"]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, said):
    case = case_of("three queries a key", torch.float32)
    with pytest.raises(ValueError) as error:
        tiles = seen_of(kernels, case).tiles
        case = case._replace(**changes(case))
        kernels.branch_attention(*case[:5], kernels.Seen(*case[5:], tiles))
    assert_holds(error, *said)


def test_tiles_of_other_branches_are_refused(monkeypatch):
    monkeypatch.setenv("RMT_KERNELS", "reference")
    case = case_of("one branch", torch.float32)
    tiles = seen_of(kernels, case_of("odd heads", torch.float32)).tiles
    with pytest.raises(ValueError) as error:
        kernels.branch_attention(*case[:5], kernels.Seen(*case[5:], tiles))
    assert_holds(error, "4 branches", "lengths of 1", "make tiles again")


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("kind", ["triton"])
def test_a_captured_step_is_replayed_with_other_lengths(kind):
    case = case_of("three queries a key", torch.bfloat16)
    seen = seen_of(kernels, case)
    short = case._replace(fork=case.fork // 2, length=case.length // 2)
    expected = [
        kernels.branch_attention(*x[:5], kernels.Seen(*x[5:], seen.tiles)) for x in (case, short)
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = kernels.branch_attention(*case[:5], seen)
    for state, wanted in zip((case, short), expected):
        case.fork.copy_(state.fork)
        case.length.copy_(state.length)
        graph.replay()
        assert torch.equal(given, wanted)
