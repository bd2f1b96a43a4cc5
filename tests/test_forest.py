"""A packed forest is exactly its branches and texts, each alone as an ordinary sequence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_forests import (
    TOKENS,
    alone,
    assert_same_gradients,
    gradients,
    ids,
    sequences,
    toy_model,
    toy_trees,
)

from kernels import linear_entropy_logprob
from models.weights import build, find
from rmt.attention import attend_flex
from rmt.forest import Branch, Tree, micro_batches, pack
from rmt.objective import Targets

MODELS = {
    "qwen3-tied": {},
    "qwen3-untied": {"tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1},
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4},
}


def packed(model, forest, attend=None, vocabulary=TOKENS):
    """log p of all targets of a forest. (n,)"""
    targets = Targets.of(forest)
    readout = lambda hidden, head: linear_entropy_logprob(
        targets.read(hidden), head, targets.token, vocab_size=vocabulary
    )[0]
    return model(forest.tokens, forest.position, attend or forest.attend, readout)


def weighted(logprobs):
    """A sum in which no two tokens count alike, so that errors cannot cancel."""
    weights = torch.linspace(-1, 1.7, len(logprobs), dtype=logprobs.dtype)
    return (weights * logprobs).sum()


def relative(given, expected):
    return float(((given - expected).norm() / expected.norm()).detach())


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return toy_model(**request.param)


def test_logprobs_equal_each_branch_alone(model):
    trees = toy_trees()
    expected = torch.cat([alone(model, tokens, mask) for tokens, mask, _ in sequences(trees)])
    assert relative(packed(model, pack(trees)), expected) <= 1e-9


def test_gradient_of_every_parameter_equals_each_branch_alone(model):
    trees = toy_trees()
    expected = torch.cat([alone(model, tokens, mask) for tokens, mask, _ in sequences(trees)])
    given = gradients(model, weighted(packed(model, pack(trees))))
    assert_same_gradients(given, gradients(model, weighted(expected)), 1e-9)


def test_float32_stays_close_to_float64():
    trees = toy_trees()
    exact, rough = (packed(toy_model(dtype), pack(trees)) for dtype in (torch.float64, torch.float))
    assert relative(rough.double(), exact) <= 1e-5


def test_the_order_of_trees_changes_no_logprob():
    model, trees = toy_model(), toy_trees()
    forward, backward = (packed(model, pack(order)) for order in (trees, trees[::-1]))
    counts = [sum(mask.sum() for _, mask, _ in sequences([tree])) for tree in trees]
    pieces = backward.split(counts[::-1])[::-1]
    assert relative(torch.cat(pieces), forward) <= 1e-12


@pytest.mark.slow
def test_a_pretrained_model_equals_each_branch_alone():
    try:
        place = find("smollm2-135m", download=False)
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    model, rng = build(place, "cpu", torch.float32), np.random.default_rng(0)
    branches = [Branch(i, fork, ids(rng, 3), ids(rng, 4)) for i, fork in enumerate((9, 24, 20))]
    trees = [
        Tree(0, ids(rng, 24), branches[:2]),
        Tree(1, ids(rng, 30), branches[2:]),
        Tree(2, ids(rng, 20), targets=[True] * 20),
    ]
    logprobs = packed(model, pack(trees), vocabulary=None)
    given = gradients(model, weighted(logprobs))
    expected = []
    for tokens, mask, _ in sequences(trees):
        forest = pack([Tree(0, tokens, targets=mask)])
        expected.append(packed(model, forest, vocabulary=None))
    expected = torch.cat(expected)
    assert relative(logprobs, expected) <= 1e-4
    assert_same_gradients(given, gradients(model, weighted(expected)), 1e-4)


def test_a_token_sees_exactly_its_ordinary_past():
    trees = toy_trees()
    forest, start = pack(trees), 0
    for tree in trees:
        trunk = list(range(start, start + len(tree.trunk)))
        past = {token: trunk[: i + 1] for i, token in enumerate(trunk)}
        start += len(trunk)
        for branch in tree.branches:
            own = list(range(start, start + len(branch)))
            past |= {token: trunk[: branch.fork] + own[: i + 1] for i, token in enumerate(own)}
            start += len(branch)
        for token, seen in past.items():
            sees = forest.sees(torch.tensor(token), torch.arange(len(forest)))
            assert sees.nonzero()[:, 0].tolist() == seen, f"token {token} of {tree.document}"


def dense(forest):
    """Attention with the whole (N, N) mask: the oracle of the other two."""
    index = torch.arange(len(forest))
    mask = forest.sees(index[:, None], index[None])

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def test_attention_by_branch_is_attention_with_the_dense_mask(model):
    forest = pack(toy_trees())
    expected = packed(model, forest, dense(forest))
    assert relative(packed(model, forest), expected) <= 1e-12


def test_flex_attention_is_attention_with_the_dense_mask(model):
    forest = pack(toy_trees())
    flex = lambda layer, q, k, v: attend_flex(forest.block_mask, q, k, v)
    with torch.no_grad():
        expected = packed(model, forest, dense(forest))
        assert relative(packed(model, forest, flex), expected) <= 1e-9


def test_padding_tokens_change_nothing():
    model, trees = toy_model(), toy_trees()
    short, long = pack(trees), pack(trees, multiple=128)
    assert len(short) % 128 and len(long) % 128 == 0
    expected, given = packed(model, short), packed(model, long)
    assert torch.equal(given, expected)
    assert_same_gradients(
        gradients(model, weighted(given)), gradients(model, weighted(expected)), 1e-12
    )


def test_flex_attention_ignores_padding_tokens():
    model, forest = toy_model(), pack(toy_trees(), multiple=128)
    flex = lambda layer, q, k, v: attend_flex(forest.block_mask, q, k, v)
    with torch.no_grad():
        assert relative(packed(model, forest, flex), packed(model, forest)) <= 1e-9


def test_predecessor_is_the_token_before_in_the_ordinary_sequence():
    trees = toy_trees()
    forest = pack(trees)
    for tree in range(len(trees)):
        tokens = (forest.tree == tree).nonzero()[:, 0]
        for i in tokens.tolist():
            seen = tokens[forest.sees(torch.tensor(i), tokens)]
            before = seen[forest.position[seen] < forest.position[i]]
            expected = before[forest.position[before].argmax()] if len(before) else -1
            assert forest.predecessor[i] == expected


def test_mask_marks_responses_and_trunk_targets():
    trees = toy_trees()
    forest = pack(trees)
    expected = [token for tokens, mask, _ in sequences(trees) for token in np.array(tokens)[mask]]
    assert forest.tokens[forest.mask].tolist() == expected


def test_the_first_token_of_a_trunk_is_no_target():
    tree = Tree(0, [3, 4, 5], targets=[True, True, True])
    assert pack([tree]).mask.tolist() == [False, True, True]
    assert tree.trunk_targets == 2


@pytest.mark.parametrize("fork", [-1, 4])
def test_a_fork_off_the_trunk_is_refused(fork):
    with pytest.raises(ValueError, match="trunk of 3"):
        pack([Tree(0, [3, 4, 5], [Branch(0, fork, [1], [2])])])


def test_a_response_with_nothing_before_it_is_refused():
    with pytest.raises(ValueError, match="at least one token before"):
        pack([Tree(0, [3, 4, 5], [Branch(0, 0, [], [2])])])


@pytest.mark.parametrize("limit", [1, 20, 25, 40, 1000])
def test_micro_batches_lose_no_branch_and_no_target(limit):
    trees = toy_trees()
    parts = [tree for batch in micro_batches(trees, limit) for tree in batch]
    branches = lambda trees: [b for tree in trees for b in tree.branches]
    assert branches(parts) == branches(trees)
    assert [tree.document for tree in parts if not tree.branches] == [6, 8]
    assert sum(t.trunk_targets for t in parts) == sum(t.trunk_targets for t in trees)


@pytest.mark.parametrize("limit", [1, 20, 25, 40, 1000])
def test_micro_batches_keep_to_the_limit_unless_one_branch_exceeds_it(limit):
    for batch in micro_batches(toy_trees(), limit):
        smallest = len(batch) == 1 and len(batch[0].branches) <= 1
        assert sum(map(len, batch)) <= limit or smallest


def test_trunk_targets_of_a_split_tree_count_once():
    tree = replace(toy_trees()[0], targets=[True] * 12)
    parts = [part for batch in micro_batches([tree], 20) for part in batch]
    assert len(parts) > 1
    assert [part.trunk_targets for part in parts] == [11] + [0] * (len(parts) - 1)
