"""Rows are full, keep to the limit, lose nothing and have few lengths."""

import math
from dataclasses import replace

import numpy as np
import pytest
from toy_forests import grouped_trees, toy_trees
from toy_runs import prepared

from rmt.evaluation.evaluate import predict_thinking
from rmt.evaluation.positions import Position
from rmt.forest import FLEX_BLOCK, pack, padded_length
from rmt.sampling import Sampling
from rmt.trees import Branch, Tree, micro_batches


def realistic_trees(seed, documents=64, trunk=2048, budget=800, group=8):
    """A step of the default configuration: questions with a group of responses, and raw text."""
    rng, trees = np.random.default_rng(seed), []
    for document in range(documents):
        length = int(rng.integers(200, trunk + 1))
        fork = int(rng.integers(16, length))
        lengths = np.clip(rng.normal(budget, budget / 3, group), 10, 2048).astype(int)
        branches = [Branch(group * document + i, fork, (7,) * 60, (3,) * n)
                    for i, n in enumerate(lengths)]  # fmt: skip
        trees.append(Tree(document, (5,) * fork, branches))
        trees.append(Tree(document, (5,) * length, targets=[True] * length))
    return trees


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("limit", "shape"),
    [
        (16384, {}),
        (16384, {"budget": 160}),
        (32768, {"budget": 400, "group": 16}),
        (4096, {"trunk": 512, "budget": 64, "group": 4}),
    ],
    ids=["first-step", "last-step", "groups-of-16", "small"],
)
def test_rows_of_many_trees_are_95_percent_full(limit, shape, seed):
    sizes = [sum(map(len, row)) for row in micro_batches(realistic_trees(seed, **shape), limit)]
    assert sum(sizes) > 5 * limit
    assert max(sizes) <= limit
    assert np.mean(sorted(sizes)[1:]) >= 0.95 * limit  # the emptiest holds what is left
    assert len(sizes) <= math.ceil(sum(sizes) / (0.95 * limit))


def test_micro_batches_are_the_same_every_time():
    assert micro_batches(realistic_trees(0), 16384) == micro_batches(realistic_trees(0), 16384)


@pytest.mark.parametrize("limit", [1, 20, 25, 40, 1000])
@pytest.mark.parametrize("trees", [toy_trees(), grouped_trees()], ids=["alone", "grouped"])
def test_micro_batches_lose_no_branch_and_no_target(trees, limit):
    parts = [tree for batch in micro_batches(trees, limit) for tree in batch]
    branches = lambda trees: [
        (t.document, t.trunk, b)
        for t in sorted(trees, key=lambda t: t.document)
        for b in t.branches
    ]
    by_id = lambda entry: entry[2].id
    assert sorted(branches(parts), key=by_id) == sorted(branches(trees), key=by_id)
    bare = lambda trees: sorted(tree.document for tree in trees if not tree.branches)
    assert bare(parts) == bare(trees)
    assert sum(t.trunk_targets for t in parts) == sum(t.trunk_targets for t in trees)


@pytest.mark.parametrize("limit", [1, 20, 25, 40, 1000])
@pytest.mark.parametrize("trees", [toy_trees(), grouped_trees()], ids=["alone", "grouped"])
def test_micro_batches_keep_to_the_limit_unless_one_branch_exceeds_it(trees, limit):
    for batch in micro_batches(trees, limit):
        smallest = len(batch) == 1 and len(batch[0].branches) <= 1
        assert len(pack(batch)) == sum(map(len, batch))
        assert sum(map(len, batch)) <= limit or smallest


def test_trunk_targets_of_a_split_tree_count_once():
    tree = replace(toy_trees()[0], targets=[True] * 12)
    parts = [part for batch in micro_batches([tree], 20) for part in batch]
    assert len(parts) > 1
    assert sorted(part.trunk_targets for part in parts) == [0] * (len(parts) - 1) + [11]


def test_a_group_on_two_rows_has_its_stem_on_both():
    group = [Branch(i, 2, [7, 8, 9], [i] * 4) for i in range(4)]
    rows = micro_batches([Tree(0, [3, 4], group)], 2 + 3 + 8)
    assert [len(tree) for row in rows for tree in row] == [13, 13]
    assert [[b.id for b in tree.branches] for row in rows for tree in row] == [[0, 1], [2, 3]]


def test_lengths_of_rows_are_few_and_at_most_a_thirtysecond_or_a_block_too_long():
    lengths = {tokens: padded_length(tokens) for tokens in range(1, 40_000)}
    for tokens, length in lengths.items():
        assert length % FLEX_BLOCK == 0
        assert tokens <= length < tokens + max(FLEX_BLOCK, tokens / 32) or length == 2 * FLEX_BLOCK
    for top in (16384, 32768):
        assert len({x for x in lengths.values() if top / 2 < x <= top}) == 32
    assert sorted(lengths.values()) == list(lengths.values())


def test_predictions_with_thinking_do_not_depend_on_how_trees_are_batched(tmp_path, monkeypatch):
    run, results = prepared(tmp_path), []
    positions = [
        Position(d.index, at, 2.0, "hard", int(d.tokens[at]))
        for d in run.documents[:4]
        for at in (len(d.tokens) // 2, len(d.tokens) - 1 - d.index)
    ]
    sampling = Sampling(9, run.tokenizer.stop_ids, run.tokenizer.vocab_size, 0.8, 2)
    for tokens in (1 << 16, 1):
        monkeypatch.setattr("rmt.evaluation.evaluate.CACHED_TOKENS", tokens)
        known = (run.model, run.tokenizer, run.documents, positions, 6, 0.0)
        results.append(predict_thinking(*known, sampling, run.world))
    assert len({item["response"] for item in results[0]}) > 4
    assert results[0] == results[1]
