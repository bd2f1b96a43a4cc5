"""The dynamic token budget and the length reward."""

import math


def budget_at(step: int, total_steps: int, start: int, decay: float, floor: int) -> int:
    """Return B_t, the thinking tokens asked for at `step` of `total_steps`."""
    exact = start * decay ** (step / total_steps)
    return max(floor, math.floor(exact + 1e-9))  # Eq. 2; 100 · 0.29 is 28.99… in binary


def budget_of_position(budget: int, entropy: float, exponent: float) -> int:
    """Return the budget of a position of that entropy (nats): with exponent 1 from B/2 to 2 B, with
    0 (the paper) the same for all.
    """
    return max(1, math.floor(budget * min(2.0, max(0.5, entropy)) ** exponent))  # Eq. 13


def budget_sentence(budget: int) -> str:
    """Return the prompt's sentence about the budget, as the paper prints it."""
    return f"Please use exactly {budget} tokens within <think></think>."


def length_reward(length: int, budget: int, maximum: float = 1.0) -> float:
    """Return a triangle over the length: 0 at 0, `maximum` at the budget, 0 from twice it on."""
    return maximum * max(0.0, 1.0 - abs(length - budget) / budget)  # Eq. 3
