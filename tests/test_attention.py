"""Attention on a CPU by calls, and FlexAttention as one program, against a dense mask."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from toy_forests import grouped_trees, ids, toy_trees

from rmt.attention import attend_by_call, attend_flex
from rmt.forest import pack
from rmt.trees import Branch, Tree


def long_trees(seed=0):
    """Trunks, prompts and responses beyond the kernels' blocks of 512 keys, and short ones."""
    rng, trees, number = np.random.default_rng(seed), [], 0
    for document, (trunk, prompt, lengths) in enumerate(
        ((540, 30, (10, 130, 70)), (33, 520, (9,)))
    ):
        branches = []
        for fork in (trunk, 20):
            footer = ids(rng, prompt)
            for length in lengths:
                branches.append(Branch(number, fork, footer, ids(rng, length)))
                number += 1
        trees.append(Tree(document, ids(rng, trunk), branches))
    return trees


def vectors(forest, heads=4, kv_heads=2, size=8, dtype=torch.float64, seed=0):
    """Queries, keys, values and the gradient of the output, of a scale that makes peaks."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(len(forest), heads, size, generator=generator).double()
    q, k, v, grad = (draw(n) for n in (heads, kv_heads, kv_heads, heads))
    return [x.to(dtype) for x in (2 * q, k, v, grad)]


def dense(forest, q, k, v):
    """The whole (N, N) mask: the oracle. Padding tokens, which see each other, are 0."""
    index = torch.arange(len(forest))
    mask = forest.sees(index[:, None], index[None])
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1) * (forest.tree >= 0)[:, None, None]


def by_call(forest, q, k, v):
    return attend_by_call(forest.calls, q, k, v)


def results(attend, forest, q, k, v, grad):
    """Output and gradients of q, k and v, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(forest, *leaves)
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients)))


def errors(given, exact):
    """Relative in the norm, by name."""
    return {n: float((given[n].double() - x).norm() / x.norm()) for n, x in exact.items()}


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("trees", [toy_trees, grouped_trees, long_trees])
def test_values_and_gradients_are_those_of_the_dense_mask(trees, heads):
    forest = pack(trees(), pad=True)
    inputs = vectors(forest, *heads)
    given, exact = (results(attend, forest, *inputs) for attend in (by_call, dense))
    assert max(errors(given, exact).values()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_at_most_twice_that_of_the_dense_mask(dtype):
    forest = pack(long_trees())
    inputs = vectors(forest, 6, 3, 32, dtype)
    exact = results(dense, forest, *(x.double() for x in inputs))
    given, usual = (results(attend, forest, *inputs) for attend in (by_call, dense))
    assert {x.dtype for x in given.values()} == {dtype}
    ours, theirs = errors(given, exact), errors(usual, exact)
    assert all(ours[name] <= 2 * theirs[name] for name in ours), (ours, theirs)


def test_inputs_may_lie_in_memory_in_any_way():
    forest = pack(grouped_trees())
    inputs = vectors(forest)
    other = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in inputs[:3]]
    other.append(torch.ones(()).double().expand_as(inputs[3]))
    assert not any(x.is_contiguous() for x in other)
    given = results(by_call, forest, *other)
    exact = results(by_call, forest, *inputs[:3], torch.ones_like(inputs[3]))
    assert max(errors(given, exact).values()) <= 1e-14


def test_two_passes_are_equal_bit_for_bit():
    forest = pack(long_trees())
    inputs = vectors(forest, 9, 3, 64, torch.float32)
    first, second = (results(by_call, forest, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputed_activations_change_no_bit():
    forest = pack(grouped_trees())
    inputs = vectors(forest, dtype=torch.float32)
    again = lambda forest, *qkv: checkpoint(by_call, forest, *qkv, use_reentrant=False)
    plain, recomputed = (results(attend, forest, *inputs) for attend in (by_call, again))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_padding_tokens_get_zero():
    forest = pack(grouped_trees(), pad=True)
    given = results(by_call, forest, *vectors(forest))
    assert all(not x[forest.tree < 0].any() for x in given.values())


def test_calls_cover_exactly_the_pairs_that_see_each_other():
    for trees in (toy_trees(), grouped_trees()):
        forest = pack(trees, pad=True)
        index = torch.arange(len(forest))
        times = torch.zeros(len(forest), len(forest), dtype=torch.int64)
        for rows, keys in forest.calls:
            block = times[rows, keys]
            block += torch.ones_like(block).tril() if rows == keys else torch.ones_like(block)
        real = forest.tree >= 0
        assert torch.equal(times, (forest.sees(index[:, None], index[None]) & real).long())


def no_compiler():
    return shutil.which("g++") is None and shutil.which("clang++") is None


@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # only what TorchDynamo decides: how many programs there are
        pytest.param("inductor", marks=[
            pytest.mark.slow,
            pytest.mark.skipif(no_compiler(), reason="needs a C++ compiler, g++ or clang++"),
            pytest.mark.skipif(
                torch.backends.cpu.get_cpu_capability() == "DEFAULT",
                reason="PyTorch compiles FlexAttention for CPUs with AVX2 and up",
            ),
        ]),
    ],
)  # fmt: skip
def test_flex_attention_is_compiled_once_for_all_forests(backend):
    rng, lengths = np.random.default_rng(0), set()
    torch._dynamo.reset()
    counters.clear()
    for size in (0, 3, 1, 4, 0):  # the first has as many blocks as key/value heads
        trees = []
        for document in range(size + 1):
            group = [Branch(10 * document + i, 7, ids(rng, 5), ids(rng, 20)) for i in range(size)]
            trees.append(Tree(document, ids(rng, 150 + 97 * document), group))
        forest = pack(trees, pad=True)
        lengths.add(len(forest))
        with torch.inference_mode():  # vectors made there have no base
            q, k, v, _ = vectors(forest, 4, 2, 16, torch.float32)
            given = attend_flex(forest.block_mask, q, k, v, backend)
        real = forest.tree >= 0
        torch.testing.assert_close(given[real], by_call(forest, q, k, v)[real])
    assert len(lengths) == 4
    assert counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_compiled_raises_and_falls_back_to_nothing():
    def broken(graph, inputs):
        raise NotImplementedError("no such GPU")

    forest = pack(toy_trees(), pad=True)
    q, k, v, _ = vectors(forest, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(Exception, match="no such GPU"):
        attend_flex(forest.block_mask, q, k, v, broken)


def test_one_program_too_many_raises():
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        with pytest.raises(Exception, match="fullgraph"):
            for size in (8, 16):
                forest = pack(toy_trees(), pad=True)
                q, k, v, _ = vectors(forest, size=size, dtype=torch.float32)
                attend_flex(forest.block_mask, q, k, v, "eager")
