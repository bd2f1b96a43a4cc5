"""Rewards of a response: for the match, for the thinking length, and their sum."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rmt.budget import length_reward
from rmt.data.judge import same_answer
from rmt.prompt import Answer, escape


def match_reward(answer: Answer, coming: Sequence[bytes], rule: str = "token") -> float:
    """Return 1 if the boxed answer is right, else 0.

    coming: bytes of the coming tokens. rule "token" (the paper) and "gain": the first of them,
    nothing stripped. "prefix" (RPT): the first few. A newline, half a character and a brace may be
    written as escapes. "answer": coming[0] is the answer to a problem (rmt/data/judge.py).
    """
    if answer.text is None:
        return 0.0
    if rule == "answer":
        return float(same_answer(answer.text, coming[0].decode("utf-8")))
    right = accumulate(coming) if rule == "prefix" else coming[:1]
    said = answer.text.encode("utf-8")
    named = lambda text: (escape(text), escape(text, braces=True))
    return float(any(said == text or answer.text in named(text) for text in right))  # Eq. 5, Eq. 12


def gated_length_reward(
    answer: Answer, match: float, budget: int | None, maximum: float, gate: str
) -> float:
    """Return the length reward of a response; 0 without </think> or without a budget.

    gate "none" (the paper) pays it to all responses, "correct_only" to right ones.
    """
    if answer.thinking_length is None or budget is None:
        return 0.0
    if gate == "correct_only" and not match:
        return 0.0
    return length_reward(answer.thinking_length, budget, maximum)


def total_reward(match: float, length: float, length_weight: float) -> float:
    """Return (1 − w)·r_match + w·r_len.

    w < 1/2 and w·r_max < 1 − w keep right answers above wrong ones (rmt/config/validate.py).
    """
    return (1 - length_weight) * match + length_weight * length  # Eq. 6


def reward_groups(
    answers: Sequence[Sequence[Answer]], coming: Sequence[Sequence[bytes]], group_size: int,
    budgets: Sequence[int | None], length_weight: float, maximum: float, gate: str,
    rule: str = "token",
) -> dict[str, Tensor]:  # fmt: skip
    """Return "match", "length" and "total" rewards of P groups of G answers, (P, G) fp64 each.

    coming, rule: see `match_reward`. budgets: of each group, or None for all, then the reward is
    the match alone.
    """
    match, length = [], []
    for group, texts, budget in zip(answers, coming, budgets):
        match.append([match_reward(answer, texts, rule) for answer in group])
        length.append(
            [gated_length_reward(a, m, budget, maximum, gate) for a, m in zip(group, match[-1])]
        )
    match = torch.tensor(match, dtype=torch.float64).view(len(coming), group_size)
    length = torch.tensor(length, dtype=torch.float64).view(len(coming), group_size)
    weight = 0.0 if None in budgets else length_weight
    return {"match": match, "length": length, "total": total_reward(match, length, weight)}
