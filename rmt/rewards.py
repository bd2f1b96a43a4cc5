"""Rewards of one response: did it name the next token, and did it think as long as asked?"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rmt.budget import length_reward
from rmt.data.math_answers import same_answer
from rmt.prompt import Answer, escape


def match_reward(answer: Answer, coming: Sequence[bytes], rule: str = "token") -> float:
    """1 if the boxed answer is right, else 0.

    rule "token" is the paper: the bytes of the first token of `coming`, nothing stripped. "prefix"
    is RPT: the bytes of the first token or the first few, so that it ends where a token ends.
    What cannot be seen (a newline, half a character) may be given as its escape, and so may a
    brace. "answer": coming[0] is the answer to a problem (rmt/data/math_answers.py).
    """
    if answer.text is None:
        return 0.0
    if rule == "answer":
        return float(same_answer(answer.text, coming[0].decode("utf-8")))
    right = coming[:1] if rule == "token" else accumulate(coming)
    said = answer.text.encode("utf-8")
    return float(
        any(
            said == text or answer.text in (escape(text), escape(text, braces=True))
            for text in right
        )
    )  # Eq. 5, Eq. 12


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
    coming: Sequence[Sequence[bytes]],
    group_size: int,
    budgets: Sequence[int | None],
    length_weight: float,
    maximum: float,
    gate: str,
    rule: str = "token",
) -> dict[str, Tensor]:
    """Rewards of P groups of G answers: "match", "length" and "total", (P, G) fp64 each.

    coming and rule are those of `match_reward`; budgets has one of each group, or None for all:
    then the reward is the match alone.
    """
    match, length = [], []
    for group, texts, budget in zip(answers, coming, budgets):
        match.append([match_reward(answer, texts, rule) for answer in group])
        length.append(
            [thinking_reward(a, m, budget, maximum, gate) for a, m in zip(group, match[-1])]
        )
    match = torch.tensor(match, dtype=torch.float64).view(len(coming), group_size)
    length = torch.tensor(length, dtype=torch.float64).view(len(coming), group_size)
    weight = 0.0 if None in budgets else length_weight
    return {"match": match, "length": length, "total": total_reward(match, length, weight)}
