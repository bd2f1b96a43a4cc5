"""What a response is worth, and what an evaluation makes of it."""

import math

import pytest
import torch

from rmt.curriculum import TIERS
from rmt.evaluate import summarise, wilson
from rmt.prompt import Answer, boxed_content
from rmt.rewards import match_reward, reward_groups, thinking_reward, total_reward


def answer(text, length=10):
    return Answer("a thought", text, length)


@pytest.mark.parametrize(
    "text, truth, reward",
    [
        (" para", b" para", 1), ("para", b" para", 0), (" para ", b" para", 0),
        (" Para", b" para", 0), ("=", b" =", 0), ("", b"x", 0), (None, b"x", 0),
        ("café", "café".encode(), 1), ("cafe\u0301", "café".encode(), 0),
        ("\n", b"\n", 1), (r"\n", b"\n", 1), (r"\xe2", b"\xe2", 1), ("4", b"42", 0),
    ],
)  # fmt: skip
def test_match_compares_bytes_without_stripping(text, truth, reward):
    assert match_reward(answer(text), [truth, b"!"]) == reward


COMING = (
    b" na",
    b"\xc3",
    b"\xaf",
    b"ve{",
    b"}",
    b"\n",
    b" end",
)  # " naïve{}\n end", ï in two tokens


@pytest.mark.parametrize(
    "text, reward",
    [
        (" na", 1), (" naïve{}", 1), (" naïve{}\n", 1), (" naïve{}\n end", 1),  # one token or more
        ("na", 0), (" n", 0), (" naïv", 0), (" naïve{}\n en", 0),  # no boundary, or another text
        (" naï", 1), (r" na\xc3", 1), (r"\xc3", 0),  # half a character ends a token as well
        (r" naïve\x7b", 1), (" naïve{", 1), (r" naïve{}\n", 1),  # lone braces, and a newline
        ("", 0), (None, 0), (" naïve{}\n end.", 0),
    ],
)  # fmt: skip
def test_a_prefix_is_right_where_a_token_ends(text, reward):
    """Bytes of tokens are counted: a decoded prefix would break inside a character."""
    assert match_reward(answer(text), COMING, "prefix") == reward


@pytest.mark.parametrize(
    "response, said",
    [
        (r"</think>\boxed{a}, no: \boxed{ b}", " b"), (r"</think>\boxed{}", ""),
        (r"</think>\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{a}</think>", None),
        (r"</think>\boxed{a", None),
    ],
)  # fmt: skip
def test_the_answer_of_several_nested_empty_and_open_boxes(response, said):
    _, close, after = response.partition("</think>")
    assert (boxed_content(after) if close else None) == said


def groups(answers, truth=b"x", budget=100, **options):
    settings = dict(length_weight=0.1, maximum=1.0, gate="none") | options
    return reward_groups([answers], [[truth]], len(answers), [budget], **settings)


def test_without_the_end_of_thinking_all_rewards_are_zero():
    rewards = groups([Answer("boxed{x}", None, None), answer("x", 100)])
    assert {name: value[0].tolist() for name, value in rewards.items()} == {
        "match": [0, 1], "length": [0, 1], "total": [0, 1],
    }  # fmt: skip


def test_an_unreadable_answer_is_paid_for_its_length_only():
    rewards = groups([answer(None, 50)])
    assert rewards["match"].item() == 0 and rewards["total"].item() == pytest.approx(0.05)


def test_gate_correct_only_pays_the_length_of_right_answers_only():
    rewards = groups([answer("x", 50), answer("y", 50)], gate="correct_only")
    assert rewards["length"].tolist() == [[0.5, 0]]
    assert thinking_reward(answer("y", 50), 0.0, 100, 1.0, "none") == 0.5


def test_without_a_budget_the_reward_is_the_match():
    rewards = groups([answer("x", 50), answer("y", 50)], budget=None)
    assert rewards["total"].tolist() == [[1, 0]]
    assert rewards["length"].tolist() == [[0, 0]]


def test_no_question_gives_empty_rewards():
    rewards = reward_groups([], [], 8, [], 0.1, 1.0, "none")
    assert all(value.shape == (0, 8) for value in rewards.values())


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 0.49])
def test_a_length_weight_below_one_half_keeps_right_above_wrong(weight):
    worst_right, best_wrong = total_reward(1.0, 0.0, weight), total_reward(0.0, 1.0, weight)
    assert worst_right > best_wrong


def test_total_reward_mixes_match_and_length_by_weight():
    assert total_reward(1.0, 0.5, 0.1) == pytest.approx(0.95)
    mixed = total_reward(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 0.2)
    torch.testing.assert_close(mixed, torch.tensor([0.2, 1.0]))


@pytest.mark.parametrize("right, n", [(0, 10), (5, 10), (10, 10), (1, 200), (118, 200)])
def test_wilson_interval_ends_where_the_score_test_rejects(right, n):
    for end in wilson(right, n):
        distance = 1.959964 * math.sqrt(end * (1 - end) / n)
        assert abs(right / n - end) == pytest.approx(distance, abs=1e-6)


def test_wilson_interval_has_its_textbook_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert all(math.isnan(end) for end in wilson(0, 0))


def item(match, tier="easy", entropy=0.7, well_formed=True, length=8, budget=None):
    return dict(
        match=match, tier=tier, entropy=entropy, well_formed=well_formed, thinking_length=length,
        tokens=9, budget=budget,
    )  # fmt: skip


def test_an_unparseable_response_counts_as_wrong():
    items = [item(True, budget=10), item(False, well_formed=False, length=None, budget=10)]
    row = summarise(items)[0]
    assert (row["n"], row["accuracy"], row["well_formed"]) == (2, 0.5, 0.5)
    assert row["thinking_length"] == 8, "the length of thoughts that ended"
    assert row["budget_error"] == pytest.approx(0.2)


def test_a_length_is_compared_with_the_budget_of_its_own_position():
    row = summarise([item(True, budget=16), item(True, budget=10)])[0]
    assert row["budget_error"] == pytest.approx((0.5 + 0.2) / 2)


def test_the_average_is_the_mean_of_the_tiers_not_of_the_items():
    items = [item(True)] * 8 + [item(False, "medium", 1.2)] * 2 + [item(True, "hard", 2.0)] * 2
    rows = {row["tier"]: row for row in summarise(items)}
    assert [rows[tier]["accuracy"] for tier in TIERS] == [1, 0, 1]
    assert rows["average"]["accuracy"] == pytest.approx(2 / 3)
    assert 0 < rows["average"]["low"] < 2 / 3 < rows["average"]["high"] <= 1


def test_nested_sets_hold_all_items_above_their_threshold():
    items = [item(True)] * 3 + [item(False, "medium", 1.2)] * 2 + [item(True, "hard", 2.0)]
    rows = {row["tier"]: row for row in summarise(items)}
    assert [rows[f"H > {h}"]["n"] for h in (0.5, 1.0, 1.5)] == [6, 3, 1]
    assert rows["H > 1.0"]["accuracy"] == pytest.approx(1 / 3)


def test_a_tier_without_items_is_not_part_of_the_average():
    rows = {row["tier"]: row for row in summarise([item(True)])}
    assert math.isnan(rows["hard"]["accuracy"]) and rows["average"]["accuracy"] == 1
