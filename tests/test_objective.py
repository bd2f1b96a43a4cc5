"""One pass over a forest is the unified objective, written out token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_forests import (
    TOKENS,
    alone,
    assert_same_gradients,
    full_logits,
    gradients,
    sequences,
    toy_model,
    toy_trees,
)

from rmt.data.corpus import Document
from rmt.forest import pack
from rmt.grpo import policy_loss, rollout_weights
from rmt.objective import Objective, Targets, forest_loss, target_logprobs
from rmt.questions import Question, text_trees
from rmt.trees import micro_batches

ROLLOUTS = 10  # branches of toy_trees
TEMPERATURE = 0.8


def objective(aggregation="token-mean", **changes):
    """Constants with which no two rollouts count alike."""
    lengths = torch.tensor([len(b.response) for tree in toy_trees() for b in tree.branches])
    assert len(lengths) == ROLLOUTS
    weight = rollout_weights(
        lengths, torch.ones(ROLLOUTS, dtype=bool), aggregation, int(lengths.sum()), ROLLOUTS, 20
    )
    advantage = torch.linspace(-1.5, 1.1, ROLLOUTS, dtype=torch.float64)
    constants = Objective(advantage, weight, 0.1 / 13, TEMPERATURE, TOKENS, 0.2, 0.2, 0.0)
    return replace(constants, **changes)


def total(model, trees, constants, limit=10_000, **given):
    """The step's loss as the sum over micro-batches."""
    batches = micro_batches(trees, limit)
    return sum(forest_loss(model, pack(batch), constants, **given)[0] for batch in batches)


def by_hand(model, trees, constants):
    """−Σ w A log π − λ/N Σ log p with full softmaxes of separate sequences."""
    loss = 0.0
    for tokens, mask, branch in sequences(trees):
        if branch is None:
            loss = loss - constants.ntp_weight * alone(model, tokens, mask).sum()
        else:
            weight = constants.weight[branch.id] * constants.advantage[branch.id]
            loss = loss - (weight * alone(model, tokens, mask, TEMPERATURE)).sum()
    return loss


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant", "sequence-sum"])
def test_on_policy_gradient_is_that_of_reinforce_plus_next_token_prediction(aggregation):
    model, trees, constants = toy_model(), toy_trees(), objective(aggregation)
    expected = gradients(model, by_hand(model, trees, constants))
    assert_same_gradients(gradients(model, total(model, trees, constants)), expected, 1e-9)


AGGREGATIONS = {  # naive mean of per-token values x over rollouts of any length, G rollouts
    "token-mean": lambda x: sum(r.sum() for r in x) / sum(len(r) for r in x),
    "sequence-mean": lambda x: sum(r.mean() for r in x) / len(x),
    "constant": lambda x: sum(r.sum() / 20 for r in x) / len(x),
    "sequence-sum": lambda x: sum(r.sum() for r in x) / len(x),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregation_is_its_naive_formula(name):
    rng = np.random.default_rng(0)
    values = [torch.from_numpy(rng.normal(size=n)) for n in (1, 7, 20, 4)]
    kept = torch.tensor([True, True, False, True])
    lengths = torch.tensor([len(v) for v in values])
    weight = rollout_weights(lengths, kept, name, int(lengths[kept].sum()), int(kept.sum()), 20)
    given = sum((w * v).sum() for w, v in zip(weight, values))
    expected = AGGREGATIONS[name]([v for v, k in zip(values, kept) if k])
    assert float(given) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("limit", [1, 25, 60])
def test_micro_batches_of_any_size_give_the_same_gradients(limit):
    model, trees, constants = toy_model(), toy_trees(), objective()
    expected, given = (total(model, trees, constants, size) for size in (10_000, limit))
    assert float(given.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert_same_gradients(gradients(model, given), gradients(model, expected), 1e-9)


def test_micro_batches_of_any_size_give_the_same_gradients_in_float32():
    model, trees, constants = toy_model(torch.float32), toy_trees(), objective()
    expected, given = (gradients(model, total(model, trees, constants, n)) for n in (10_000, 1))
    assert_same_gradients(given, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_kernels_give_the_gradients_of_the_reference(monkeypatch, dtype):
    results = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("RMT_KERNELS", name)
        model = toy_model(dtype)
        loss = total(model, toy_trees(), objective())
        results.append((float(loss.detach()), gradients(model, loss)))
    (expected, wanted), (given, found) = results
    assert given == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(found, wanted, 1e-5 if dtype == torch.float32 else 2e-2)


def test_the_order_of_documents_changes_neither_loss_nor_gradients():
    model, trees, constants = toy_model(), toy_trees(), objective()
    forward, backward = (total(model, order, constants, 60) for order in (trees, trees[::-1]))
    assert float(forward.detach()) == pytest.approx(float(backward.detach()), rel=1e-9)
    assert_same_gradients(gradients(model, backward), gradients(model, forward), 1e-9)


def test_next_token_term_is_cross_entropy_on_the_targets():
    model = toy_model()
    trees = [tree for tree in toy_trees() if tree.targets is not None]
    expected, count = 0.0, 0
    for tokens, mask, _ in sequences(trees):
        index = torch.from_numpy(np.flatnonzero(mask))
        logits = full_logits(model, tokens)[index - 1]
        expected = expected + F.cross_entropy(logits, torch.tensor(tokens)[index], reduction="sum")
        count += len(index)
    none = torch.zeros(0, dtype=torch.float64)
    constants = objective(advantage=none, weight=none, ntp_weight=0.1 / count)
    loss, sums, _, _ = forest_loss(model, pack(trees), constants)
    assert float(loss.detach()) == pytest.approx(0.1 * float(expected.detach()) / count, rel=1e-9)
    assert float(sums["loss/ntp"]) == pytest.approx(float(expected.detach()), rel=1e-9)
    expected = gradients(model, 0.1 * expected / count)
    assert_same_gradients(gradients(model, loss), expected, 1e-9)


def test_kl_term_is_beta_times_k3_against_the_reference():
    model, reference, trees = toy_model(), toy_model(seed=1), toy_trees()
    constants, forest = objective(kl_beta=0.3), pack(trees)
    given, sums, _, _ = forest_loss(
        model,
        forest,
        constants,
        reference_logprob=target_logprobs(reference, forest, TEMPERATURE, TOKENS),
    )
    expected, kl = by_hand(model, trees, constants), 0.0
    for tokens, mask, branch in sequences(trees):
        if branch is not None:
            logprob = alone(model, tokens, mask, TEMPERATURE)
            difference = alone(reference, tokens, mask, TEMPERATURE).detach() - logprob
            k3 = (difference.exp() - difference - 1).sum()
            expected = expected + 0.3 * constants.weight[branch.id] * k3
            kl += float(k3.detach())
    assert_same_gradients(gradients(model, given), gradients(model, expected), 1e-9)
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-9)


def test_a_reference_far_away_on_trunks_changes_nothing():
    model, forest = toy_model(), pack(toy_trees())
    own = target_logprobs(model, forest, TEMPERATURE, TOKENS)
    far = own + 1000 * (Targets.of(forest).rollout < 0)  # e^1000 times a weight of 0 is no number
    given, expected = (
        forest_loss(model, forest, objective(kl_beta=0.3), reference_logprob=reference)[0]
        for reference in (far, own)
    )
    assert_same_gradients(gradients(model, given), gradients(model, expected), 1e-12)


def test_an_old_policy_equal_to_the_current_one_changes_nothing():
    model, trees, constants = toy_model(), toy_trees(), objective()
    old = target_logprobs(model, pack(trees), TEMPERATURE, TOKENS)
    given = gradients(model, total(model, trees, constants, old_logprob=old))
    assert_same_gradients(given, gradients(model, total(model, trees, constants)), 1e-9)


def test_responses_far_outside_the_clip_have_no_policy_gradient():
    model, trees, constants = toy_model(), toy_trees(), objective()
    old = target_logprobs(model, pack(trees), TEMPERATURE, TOKENS)
    positive = replace(constants, advantage=torch.ones(ROLLOUTS, dtype=torch.float64))
    text = [tree for tree in trees if tree.targets is not None]
    loss, sums, _, targets = forest_loss(model, pack(trees), positive, old_logprob=old - 1)
    assert_same_gradients(
        gradients(model, loss), gradients(model, by_hand(model, text, positive)), 1e-9
    )
    assert int(sums["clipped"]) == int((targets.rollout >= 0).sum())  # fmt: skip


def test_policy_loss_clips_only_what_would_move_further_away():
    cases = [  # ratio, advantage -> loss, clipped; clip_low 0.1, clip_high 0.3
        (1.0, 2.0, -2.0, False), (1.5, 2.0, -2.6, True), (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False), (0.5, -2.0, 1.8, True), (1.2, 2.0, -2.4, False),
    ]  # fmt: skip
    ratio, advantage, expected, clipped = (torch.tensor(x) for x in zip(*cases))
    logprob = ratio.double().log().requires_grad_()
    loss, was_clipped = policy_loss(logprob, torch.zeros(6), advantage.double(), 0.1, 0.3)
    torch.testing.assert_close(loss.detach(), expected.double(), rtol=1e-6, atol=1e-6)
    assert was_clipped.tolist() == clipped.tolist()
    loss.sum().backward()
    unclipped = torch.where(clipped, 0.0, -advantage * ratio).double()
    torch.testing.assert_close(logprob.grad, unclipped, rtol=1e-6, atol=1e-6)


def texts(scope, begin=(1,)):
    """Targets of one document of 12 tokens, of which 4 and 9 are reasoned about."""
    documents = [Document(0, "a", np.arange(5)), Document(1, "b", np.arange(20, 32))]
    questions = [Question(1, position, 0, (b"x",)) for position in (4, 9)]
    tiers = [np.zeros(5), np.where(np.arange(12) % 3, 2, -1)]  # 0, 3, 6, 9 are easy to predict
    (tree,) = text_trees([1], documents, list(begin), questions, scope, tiers, 1)
    assert list(tree.trunk) == [*begin, *range(20, 32)]
    return (np.flatnonzero(tree.targets) - len(begin)).tolist()


def test_next_token_prediction_excludes_exactly_the_positions_reasoned_about():
    assert texts("not_in_C") == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]


def test_low_entropy_scope_keeps_low_entropy_outside_the_positions_reasoned_about():
    assert texts("low_entropy") == [3, 6]


def test_scope_all_trains_every_position():
    assert texts("all") == list(range(12))


def test_without_a_begin_token_the_first_token_is_no_target():
    assert texts("all", begin=()) == list(range(1, 12))
