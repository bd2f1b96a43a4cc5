"""Responses that teach nothing leave the update, and the update stays what it was."""

from dataclasses import replace

import pytest
import torch
from toy_forests import toy_trees
from toy_runs import learn, prepared

from models.weights import build
from rmt.grpo import advantage_scale, advantages
from rmt.objective import Objective
from rmt.sampling import Rollout
from rmt.system.metrics import Metrics
from rmt.update import drop_zero_advantage

# toy_trees: rollouts 0-3 are of document 5, 4-6 of document 7, 7-9 of document 9.
ONES = dict.fromkeys(range(10), 1.0)
CASES = {
    "one whole document": ONES | dict.fromkeys((4, 5, 6), 0.0),
    "the deepest fork of a document": ONES | {1: 0.0},
    "all but one": dict.fromkeys(range(10), 0.0) | {8: 1.0},
    "all": dict.fromkeys(range(10), 0.0),
}


def updated(place, advantage, match=None, text=True, **changes):
    """One update in fp64: metrics and the weights after it."""
    run = prepared(place, **changes)
    run.model = build(run.model_dir, torch.device("cpu"), torch.float64)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3, weight_decay=0.1)
    trees = [tree for tree in toy_trees() if text or tree.branches]
    responses = {b.id: b.response for tree in trees for b in tree.branches}
    groups = [[Rollout(responses[i], [0.0] * len(responses[i]))] for i in range(10)]
    if match is None:
        match = torch.zeros(10, 1)
    metrics = Metrics()
    with torch.no_grad():  # so that the optimiser has moments, which a step without gradient uses
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
    run.optimizer.step()
    trained = learn(run, trees, groups, advantage, match, metrics).trees
    return metrics.reduce(run.world), dict(run.model.named_parameters()), trained


def column(values):
    return torch.tensor([[values[i]] for i in range(10)], dtype=torch.float64)


@pytest.mark.parametrize("text", [True, False], ids=["with text", "without text"])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_leaving_out_advantages_of_zero_changes_no_weight(tmp_path, case, updates, text):
    advantage = column(CASES[case])
    options = dict(text=text, updates_per_batch=updates)
    row, weights, trained = updated(tmp_path, advantage, **options)
    # As good as zero, but not zero: these stay in the update.
    tiny = torch.where(advantage == 0, 1e-300, advantage)
    whole, expected, everything = updated(tmp_path, tiny, **options)
    assert sum(map(len, trained)) < sum(map(len, everything))
    assert row["share/trained_rollouts"] == pytest.approx(float(advantage.mean()))
    assert whole["share/trained_rollouts"] == 1
    for name in ("loss/rl", "update/grad_norm", *(["loss/ntp"] if text else [])):
        assert row[name] == pytest.approx(whole[name], rel=1e-12, abs=1e-12), name
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-12)


def test_groups_of_weight_zero_leave_the_update(tmp_path):
    match = torch.zeros(10, 1)  # groups of one are never mixed: all are dropped
    row, _, trained = updated(tmp_path, column(ONES), match, zero_variance_groups="drop")
    assert row["share/trained_rollouts"] == 0
    assert [tree.document for tree in trained] == [6, 8], "only raw text remains"


def test_nothing_is_left_out_under_a_kl_term(tmp_path):
    row, _, trained = updated(tmp_path, column(CASES["all"]), kl_beta=0.1)
    assert row["share/trained_rollouts"] == 1
    assert sum(map(len, trained)) == sum(map(len, toy_trees()))


def test_a_trunk_ends_where_the_last_response_that_teaches_leaves_it():
    trees = toy_trees()
    advantage = column(CASES["the deepest fork of a document"]).flatten()
    objective = Objective(advantage, ones(), 0.1, 1.0, 9, 0.2, 0.2, 0.0)
    kept = drop_zero_advantage(trees, objective)
    before, after = trees[0], kept[0]
    assert [branch.id for branch in after.branches] == [0, 2, 3]
    assert (len(before.trunk), len(after.trunk)) == (12, 5)
    assert list(after.trunk) == list(before.trunk[:5])
    assert kept[1:] == [replace(tree, branches=tuple(tree.branches)) for tree in trees[1:]]


def ones():
    return torch.ones(10, dtype=torch.float64)


@pytest.mark.parametrize("size", range(2, 17))
def test_group_of_equal_rewards_has_an_advantage_of_exactly_zero(size):
    rewards = torch.rand(50, 1, dtype=torch.float64).expand(-1, size).contiguous()
    scale = advantage_scale(rewards, "group", 1e-4, [rewards])
    assert advantages(rewards, scale).count_nonzero() == 0
