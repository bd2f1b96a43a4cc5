"""Dynamic token budget: how long the model is asked to think, and the reward for doing so."""

import math


def budget_at(step: int, total_steps: int, start: int, decay: float, floor: int) -> int:
    """Thinking tokens asked for at `step` of `total_steps`: B_t."""
    return max(floor, math.floor(start * decay ** (step / total_steps)))  # Eq. 2


def budget_of_position(budget: int, entropy: float, exponent: float) -> int:
    """Thinking tokens asked for at a position of that entropy (nats), from B/2 to 2 B for exponent
    1; exponent 0 is the paper, one budget for all.
    """
    return max(1, math.floor(budget * min(2.0, max(0.5, entropy)) ** exponent))  # Eq. 14


def budget_sentence(budget: int) -> str:
    """The sentence of the prompt that asks for the budget, as the paper prints it."""
    return f"Please use exactly {budget} tokens within <think></think>."


def length_reward(length: int, budget: int, maximum: float = 1.0) -> float:
    """A triangle over the thinking length: 0 at 0, `maximum` at the budget, 0 from twice it on."""
    return maximum * max(0.0, 1.0 - abs(length - budget) / budget)  # Eq. 3
