"""A packed forest is exactly its branches and texts, each alone as an ordinary sequence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_forests import (
    TOKENS,
    assert_same_gradients,
    gradients,
    grouped_trees,
    ids,
    sequences,
    toy_model,
    toy_trees,
)

from kernels import linear_entropy_logprob
from models.weights import build, find
from rmt import naive
from rmt.attention import attend_flex
from rmt.forest import pack
from rmt.objective import Targets
from rmt.trees import Branch, Tree

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


@pytest.fixture(params=[toy_trees, grouped_trees], ids=["alone", "grouped"])
def trees(request):
    """Branches with prompts of their own, and branches that share them."""
    return request.param()


def test_logprobs_equal_each_branch_alone(model, trees):
    expected = packed(model, naive.pack(trees))
    assert relative(packed(model, pack(trees)), expected) <= 1e-9


def test_gradient_of_every_parameter_equals_each_branch_alone(model, trees):
    expected = packed(model, naive.pack(trees))
    given = gradients(model, weighted(packed(model, pack(trees))))
    assert_same_gradients(given, gradients(model, weighted(expected)), 1e-9)


def test_float32_stays_close_to_float64():
    trees = toy_trees()
    exact, rough = (packed(toy_model(dtype), pack(trees)) for dtype in (torch.float64, torch.float))
    assert relative(rough.double(), exact) <= 1e-5


def test_the_order_of_trees_changes_no_logprob(trees):
    model = toy_model()
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


def test_a_token_sees_exactly_its_ordinary_past(trees):
    forest, start = pack(trees), 0
    for tree in trees:
        trunk = list(range(start, start + len(tree.trunk)))
        past = {token: trunk[: i + 1] for i, token in enumerate(trunk)}
        start, last = start + len(trunk), None
        for branch in tree.branches:
            if last != (branch.fork, branch.stem):  # else the prompt is already there
                before = trunk[: branch.fork]
                before += range(start, start + len(branch.stem))
                past |= {token: before[: branch.fork + i + 1]
                         for i, token in enumerate(before[branch.fork :])}  # fmt: skip
                start, last = start + len(branch.stem), (branch.fork, branch.stem)
            own = list(range(start, start + len(branch.response)))
            past |= {token: before + own[: i + 1] for i, token in enumerate(own)}
            start += len(own)
        for token, seen in past.items():
            sees = forest.sees(torch.tensor(token), torch.arange(len(forest)))
            assert sees.nonzero()[:, 0].tolist() == seen, f"token {token} of {tree.document}"
    assert start == len(forest) == sum(map(len, trees))


def test_a_prompt_is_in_the_row_once_for_adjacent_responses():
    group = [Branch(i, 2, [7, 8, 9], [i]) for i in range(4)]
    other = replace(group[0], id=4, stem=[7, 8])
    tree = Tree(0, [3, 4, 5], [*group, other, replace(group[0], id=5)])
    assert pack([tree]).tokens.tolist() == [
        3, 4, 5,  7, 8, 9, 0, 1, 2, 3,  7, 8, 0,  7, 8, 9, 0
    ]  # fmt: skip


def test_prompts_without_response_keep_their_own_tokens():
    tree = Tree(0, [3, 4, 5], [Branch(i, 2, [7, 8]) for i in range(3)])
    assert pack([tree]).tokens.tolist() == [3, 4, 5, 7, 8, 7, 8, 7, 8]
    assert len(tree) == 9


def test_targets_of_responses_name_their_branch(trees):
    targets = Targets.of(pack(trees))
    expected = [
        -1 if branch is None else branch.id
        for _, mask, branch in sequences(trees)
        for _ in range(mask.sum())
    ]
    assert targets.rollout.tolist() == expected


def dense(forest):
    """Attention with the whole (N, N) mask: the oracle of the other two."""
    index = torch.arange(len(forest))
    mask = forest.sees(index[:, None], index[None])

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def test_attention_by_call_is_attention_with_the_dense_mask(model, trees):
    forest = pack(trees)
    expected = packed(model, forest, dense(forest))
    assert relative(packed(model, forest), expected) <= 1e-12


def test_flex_attention_is_attention_with_the_dense_mask(model, trees):
    forest = pack(trees)
    flex = lambda layer, q, k, v: attend_flex(forest.block_mask, q, k, v, backend=None)
    with torch.no_grad():
        expected = packed(model, forest, dense(forest))
        assert relative(packed(model, forest, flex), expected) <= 1e-9


def test_padding_tokens_change_nothing(trees):
    model = toy_model()
    short, long = pack(trees), pack(trees, pad=True)
    assert len(short) % 128 and len(long) % 128 == 0
    expected, given = packed(model, short), packed(model, long)
    assert relative(given, expected) <= 1e-12  # products of other shapes round otherwise
    assert_same_gradients(
        gradients(model, weighted(given)), gradients(model, weighted(expected)), 1e-12
    )


def test_flex_attention_ignores_padding_tokens():
    model, forest = toy_model(), pack(toy_trees(), pad=True)
    flex = lambda layer, q, k, v: attend_flex(forest.block_mask, q, k, v, backend=None)
    with torch.no_grad():
        assert relative(packed(model, forest, flex), packed(model, forest)) <= 1e-9


def test_predecessor_is_the_token_before_in_the_ordinary_sequence(trees):
    forest = pack(trees)
    for tree in range(len(trees)):
        tokens = (forest.tree == tree).nonzero()[:, 0]
        for i in tokens.tolist():
            seen = tokens[forest.sees(torch.tensor(i), tokens)]
            before = seen[forest.position[seen] < forest.position[i]]
            expected = before[forest.position[before].argmax()] if len(before) else -1
            assert forest.predecessor[i] == expected


def test_mask_marks_responses_and_trunk_targets(trees):
    forest = pack(trees)
    expected = [token for tokens, mask, _ in sequences(trees) for token in np.array(tokens)[mask]]
    assert forest.tokens[forest.is_target].tolist() == expected


def test_the_first_token_of_a_trunk_is_no_target():
    tree = Tree(0, [3, 4, 5], targets=[True, True, True])
    assert pack([tree]).is_target.tolist() == [False, True, True]
    assert tree.trunk_targets == 2


@pytest.mark.parametrize("fork", [-1, 4])
def test_a_fork_off_the_trunk_is_refused(fork):
    with pytest.raises(ValueError, match="trunk of 3"):
        pack([Tree(0, [3, 4, 5], [Branch(0, fork, [1], [2])])])


def test_a_response_with_nothing_before_it_is_refused():
    with pytest.raises(ValueError, match="at least one token before"):
        pack([Tree(0, [3, 4, 5], [Branch(0, 0, [], [2])])])
