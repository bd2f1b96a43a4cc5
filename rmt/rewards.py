"""Rewards of one response: did it name the next token, and did it think as long as asked?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmt.budget import length_reward
from rmt.prompt import Answer, escape


def match_reward(answer: Answer, truth: bytes) -> float:
    """1 if the boxed answer is the ground-truth token byte for byte, nothing stripped; else 0.

    A token that cannot be written as it is (a newline, half a character, a lone brace) may be
    given as its escape.
    """
    if answer.text is None:
        return 0.0
    return float(answer.text.encode("utf-8") == truth or answer.text == escape(truth))  # Eq. 5


def thinking_reward(
    answer: Answer, match: float, budget: int | None, maximum: float, gate: str
) -> float:
    """The length reward, 0 without </think> or without a budget.

    gate "correct_only" pays it for right answers only; "none" is the paper.
    """
    if answer.thinking_length is None or budget is None:
        return 0.0
    if gate == "correct_only" and not match:
        return 0.0
    return length_reward(answer.thinking_length, budget, maximum)


def total_reward(match: float, length: float, length_weight: float) -> float:
    """(1 − w)·r_match + w·r_len; w < 1/2 keeps every right answer above every wrong one."""
    return (1 - length_weight) * match + length_weight * length  # Eq. 6


def reward_groups(
    answers: Sequence[Sequence[Answer]],
    truths: Sequence[bytes],
    group_size: int,
    budget: int | None,
    length_weight: float,
    maximum: float,
    gate: str,
) -> dict[str, Tensor]:
    """Rewards of P groups of G answers: "match", "length" and "total", (P, G) fp64 each.

    Without a budget the reward is the match alone.
    """
    match, length = [], []
    for group, truth in zip(answers, truths):
        match.append([match_reward(answer, truth) for answer in group])
        length.append(
            [thinking_reward(a, m, budget, maximum, gate) for a, m in zip(group, match[-1])]
        )
    match = torch.tensor(match, dtype=torch.float64).view(len(truths), group_size)
    length = torch.tensor(length, dtype=torch.float64).view(len(truths), group_size)
    weight = 0.0 if budget is None else length_weight
    return {"match": match, "length": length, "total": total_reward(match, length, weight)}
