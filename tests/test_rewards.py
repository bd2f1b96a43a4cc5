"""What a response is worth, and what an evaluation makes of it."""

import pytest
import torch

from rmt.prompt import Answer, boxed_content
from rmt.rewards import gated_length_reward, match_reward, reward_groups, total_reward


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
    assert gated_length_reward(answer("y", 50), 0.0, 100, 1.0, "none") == 0.5


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
