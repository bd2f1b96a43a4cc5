"""Every number of docs/method.md that can be checked without a model."""

import math

import numpy as np
import pytest
import torch

from rmt.budget import (
    budget_at,
    budget_of_position,
    budget_sentence,
    length_reward,
)
from rmt.config.config import Config
from rmt.config.validate import response_needed
from rmt.curriculum import (
    Curriculum,
    assign_tiers,
    low_entropy,
    quantile_thresholds,
    tier_probabilities,
)
from rmt.data.order import document_order
from rmt.engine.step_metrics import length_share
from rmt.grpo import advantage_scale, advantages
from rmt.rewards import total_reward

EARLY, LATE = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)
BUDGETS = {
    0: 800, 0.1: 681, 0.2: 579, 0.25: 534, 0.3: 493, 0.4: 420, 0.5: 357, 0.6: 304, 0.7: 259,
    0.75: 239, 0.8: 220, 0.9: 187, 1: 160,
}  # fmt: skip
# Config field -> the value that docs/method.md gives it.
DEFAULTS = dict(
    batch_size=128, epochs=10.0, learning_rate=1e-6, ntp_weight=0.1, group_size=8,
    budget_start=800, budget_min=1, budget_decay=0.2, curriculum_start=0.3, curriculum_end=0.7,
    max_response=2048, entropy_top_k=16, tiers="absolute", tier_thresholds=(0.5, 1.0, 1.5),
    min_context=16, length_reward_max=1.0, curriculum_early=EARLY, curriculum_late=LATE,
    positions_per_document=1, length_weight=0.1, advantage_delta=1e-4, kl_beta=0.0,
    clip_low=0.2, clip_high=0.2, aggregation="token-mean", temperature=0.8,
    length_reward_gate="none", advantage_norm="group", zero_variance_groups="keep",
    ntp_scope="not_in_C", ntp_reduction="mean", adam_betas=(0.9, 0.999), weight_decay=0.01,
    grad_clip=1.0, warmup_steps=10, updates_per_batch=1, budget=True, curriculum=True, ntp=True,
    data=("KbsdJames/Omni-MATH",), method="rmt", task="next-token", match="token", holdout=200,
    difficulty_model="", resample_from=-1,
    budget_entropy=0.0, eval_decoding="sampled",
)  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_is_that_of_the_method(name):
    assert getattr(Config(), name) == DEFAULTS[name]


@pytest.mark.parametrize("progress, budget", BUDGETS.items())
def test_budget_follows_the_schedule(progress, budget):
    assert budget_at(int(progress * 100), 100, start=800, decay=0.2, floor=1) == budget


def test_a_budget_that_is_whole_is_not_rounded_down():
    assert budget_at(1, 1, start=100, decay=0.29, floor=1) == 29


def test_budget_never_falls_below_its_floor():
    assert budget_at(9, 10, start=800, decay=0.001, floor=7) == 7


@pytest.mark.parametrize(
    "entropy, exponent, budget",
    [
        (0.1, 0.0, 100), (3.0, 0.0, 100), (0.1, 1.0, 50), (0.7, 1.0, 70), (1.0, 1.0, 100),
        (1.5, 1.0, 150), (9.0, 1.0, 200), (0.25, 0.5, 70), (2.0, 0.5, 141),
    ],
)  # fmt: skip
def test_the_budget_of_a_position_follows_its_entropy(entropy, exponent, budget):
    assert budget_of_position(100, entropy, exponent) == budget
    assert budget_of_position(1, entropy, exponent) >= 1


def test_budget_sentence_is_the_one_printed_in_the_paper():
    assert budget_sentence(493) == "Please use exactly 493 tokens within <think></think>."


@pytest.mark.parametrize(
    "length, reward", [(0, 0), (50, 0.5), (100, 1), (150, 0.5), (200, 0), (201, 0), (5000, 0)]
)
def test_length_reward_is_a_triangle_around_the_budget(length, reward):
    assert length_reward(length, 100) == pytest.approx(reward)
    assert length_reward(length, 100, maximum=3.0) == pytest.approx(3 * reward)


@pytest.mark.parametrize(
    "progress, expected",
    [(0, EARLY), (0.29, EARLY), (0.3, EARLY), (0.4, (0.475, 0.3, 0.225)), (0.5, (0.35, 0.3, 0.35)),
     (0.6, (0.225, 0.3, 0.475)), (0.7, LATE), (0.99, LATE)],
)  # fmt: skip
def test_tier_probabilities_ramp_from_early_to_late(progress, expected):
    assert tier_probabilities(progress, EARLY, LATE, 0.3, 0.7) == pytest.approx(expected)


def test_tiers_start_at_their_thresholds_after_the_first_positions():
    entropy = np.array([9.0, 9.0, 0.49, 0.5, 0.99, 1.0, 1.49, 1.5, 30.0, np.inf])
    tiers = assign_tiers(entropy, (0.5, 1.0, 1.5), min_context=2)
    assert tiers.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2, 2]


def test_quantile_thresholds_cut_all_eligible_positions_into_shares():
    rng = np.random.default_rng(0)
    entropies = [rng.exponential(size=n) for n in (300, 700)]
    for e in entropies:
        e[:16] = 1e9  # falsely high: too early in the document
    cuts = quantile_thresholds(entropies, (0.5, 0.7, 0.85), min_context=16)
    tiers = np.concatenate([assign_tiers(e, cuts, 16)[16:] for e in entropies])
    shares = [np.mean(tiers == k) for k in (-1, 0, 1, 2)]
    assert shares == pytest.approx([0.5, 0.2, 0.15, 0.15], abs=0.005)


@pytest.mark.parametrize("documents, batch", [(7, 3), (10, 5), (5, 5), (23, 4), (4, 1)])
def test_document_order_repeats_none_in_a_step_and_covers_all_in_an_epoch(documents, batch):
    order = document_order([0] * documents, (), batch, steps=40, seed=1)
    assert order.shape == (40, batch)
    assert all(len(set(step)) == batch for step in order.tolist())
    epochs = order.flatten()[: 40 * batch // documents * documents].reshape(-1, documents)
    assert all(sorted(epoch) == list(range(documents)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1, "never reshuffled"


def test_document_order_is_decided_by_its_seed():
    first, same, other = (document_order([0] * 20, (), 4, 9, seed).tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_a_source_without_enough_documents_for_a_step_is_refused():
    with pytest.raises(
        ValueError, match=r"up to 3 documents of path 2 of --data, which has 2; lower"
    ):
        document_order([0] * 9 + [1] * 2, (1.0, 1.0), batch=5, steps=4, seed=0)
    assert document_order([0] * 9, (1.0, 1e-9), batch=5, steps=4, seed=0).max() == 8


def curriculum(*counts, seed=0):
    """One document with so many positions of each tier, easiest first."""
    return Curriculum([np.repeat((0, 1, 2), counts)], seed)


def drawn(source, steps, probabilities, count=1):
    """Of each step: positions, their tiers, and draws that met an empty tier."""
    for step in range(steps):
        positions, empty = source.draw(step, 0, probabilities, count)
        yield positions, source.tiers[0][positions].tolist(), empty


def test_tiers_are_drawn_as_often_as_their_probability_says():
    tiers = [tier for _, (tier,), _ in drawn(curriculum(50, 50, 50), 3000, np.array(EARLY))]
    assert np.bincount(tiers, minlength=3) / 3000 == pytest.approx(EARLY, abs=0.03)


def test_an_empty_tier_is_dropped_and_the_others_renormalised():
    draws = drawn(curriculum(50, 0, 50), 3000, np.array((0.2, 0.5, 0.3)))
    tiers, empty = zip(*((tier, dropped) for _, (tier,), dropped in draws))
    assert np.bincount(tiers, minlength=3) / 3000 == pytest.approx([0.4, 0, 0.6], abs=0.03)
    assert sum(empty) / 3000 == pytest.approx(0.5, abs=0.03)


def test_positions_are_drawn_without_replacement_until_reshuffled():
    draws = drawn(curriculum(0, 6, 3), 18, np.array((0, 1.0, 0)))
    positions = [position for (position,), _, _ in draws]
    epochs = [positions[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1, "never reshuffled"


@pytest.mark.parametrize(
    "counts, probabilities, count, found",
    [((3, 2, 2), LATE, 5, 5), ((3, 2, 2), None, 7, 7), ((3, 2, 2), LATE, 9, 7),
     ((9, 9, 27), EARLY, 8, 8), ((4, 0, 3), (0.5, 0.5, 0), 6, 4), ((1, 0, 0), LATE, 1, 1)],
)  # fmt: skip
def test_as_many_distinct_positions_are_asked_as_there_are_and_the_others_counted(
    counts, probabilities, count, found
):
    wanted = None if probabilities is None else np.array(probabilities)
    for positions, _, empty in drawn(curriculum(*counts), 30, wanted, count):
        assert len(set(positions)) == len(positions) == found
        assert count - found <= empty <= count


def test_a_tier_used_up_within_a_step_goes_to_the_others():
    for _, tiers, empty in drawn(curriculum(1, 9, 0), 30, np.array((0.9, 0.1, 0)), count=4):
        assert sorted(tiers)[1:] == [1, 1, 1] and empty > 0


def test_another_attempt_draws_other_positions_with_random_numbers_of_its_own():
    source, tiers = curriculum(40, 40, 40), set()
    for attempt in range(1, 30):
        ((position,), _) = source.draw(3, 0, np.array(LATE), 1, [0, 1], attempt)
        assert position not in (0, 1)
        tiers.add(int(source.tiers[0][position]))
    assert tiers == {0, 1, 2}
    few = curriculum(2, 1, 0)
    assert few.draw(0, 0, np.array(LATE), 2, [0, 2])[0] == [1]
    assert few.draw(0, 0, np.array(LATE), 2, [0, 1, 2]) == ([], 2)


def test_low_entropy_is_below_all_tiers_and_not_too_early_to_tell():
    entropy = np.array([9.0, 0.1, 0.1, 0.5, 0.4, 2.0])
    tiers = assign_tiers(entropy, (0.5, 1.0, 1.5), min_context=2)
    assert np.flatnonzero(low_entropy(tiers, 2)).tolist() == [2, 4]


@pytest.mark.parametrize("exponent, needed", [(0.0, 108), (0.5, 149), (1.0, 208)])
def test_the_shortest_response_has_room_for_the_longest_budget_and_an_answer(exponent, needed):
    assert response_needed(100, exponent) == needed
    Config(budget_start=100, budget_entropy=exponent, max_response=needed)
    with pytest.raises(ValueError, match=f"--max-response {needed} or more"):
        Config(budget_start=100, budget_entropy=exponent, max_response=needed - 1)
    for without in (dict(budget=False), dict(task="nothing")):
        Config(budget_start=100, max_response=4, **without)


def test_a_document_without_tiers_gives_no_position():
    assert curriculum(0, 0, 0).draw(0, 0, np.array(EARLY), 2) == ([], 2)


def test_without_a_curriculum_all_positions_are_equally_likely():
    positions = [position for (position,), _, _ in drawn(curriculum(5, 10, 25), 4000, None)]
    assert np.bincount(positions, minlength=40) / 4000 == pytest.approx(
        np.full(40, 1 / 40), abs=0.01
    )


def scale(rewards, norm="group", delta=1e-4, batch=None):
    return advantage_scale(rewards, norm, delta, batch or [rewards])


def test_group_of_equal_rewards_has_zero_advantage():
    rewards = torch.full((3, 8), 0.37, dtype=torch.float64)
    for norm in ("group", "batch", "none"):
        assert advantages(rewards, scale(rewards, norm)).abs().max() <= 1e-9


def test_group_norm_divides_by_the_population_deviation_plus_delta():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = [
        [x / (math.sqrt(3) / 4 + 0.01) for x in (-0.25, -0.25, -0.25, 0.75)],
        [x / (0.5 + 0.01) for x in (-0.5, 0.5, -0.5, 0.5)],
    ]
    given = advantages(rewards, scale(rewards, delta=0.01))
    torch.testing.assert_close(given, torch.tensor(expected, dtype=torch.float64))


def test_batch_norm_divides_by_the_deviation_within_all_groups():
    rewards = torch.tensor([[0.0, 2.0], [5.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, 1.0], [0, 0], [0, 0]], dtype=torch.float64)
    expected = expected / (math.sqrt(2 / 6) + 1e-4)
    torch.testing.assert_close(advantages(rewards, scale(rewards, "batch")), expected)
    parts = [rewards[1:], rewards[:1]]  # the groups of two ranks
    torch.testing.assert_close(
        advantages(parts[1], scale(parts[1], "batch", batch=parts)), expected[:1]
    )


def test_norm_none_only_centres():
    rewards = torch.tensor([[0.0, 2.0], [5.0, 6.0]], dtype=torch.float64)
    assert advantages(rewards, scale(rewards, "none")).tolist() == [[-1, 1], [-0.5, 0.5]]


@pytest.mark.parametrize("correct, share", [(0.05, 0.65), (0.25, 0.10)])
def test_length_explains_the_share_of_advantage_variance_that_the_method_warns_of(correct, share):
    generator = torch.Generator().manual_seed(0)
    match, noise = torch.rand(2, 4000, 8, generator=generator, dtype=torch.float64)
    match = (match < correct).double()
    length = torch.tensor(
        [[length_reward(int(400 * x), 200) for x in row] for row in noise.tolist()]
    )
    rewards = total_reward(match, length.double(), 0.1)
    part, whole = length_share(rewards, length.double(), 0.1, scale(rewards))
    assert float(part / whole) == pytest.approx(share, abs=0.03)
