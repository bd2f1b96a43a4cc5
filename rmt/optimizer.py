"""AdamW without decay of norms and biases, and the learning rate of each update."""

import math

import torch


def adamw(
    model: torch.nn.Module, rate: float, betas: tuple[float, ...], decay: float
) -> torch.optim.AdamW:
    """Return AdamW for a model; only matrices decay, not norms and biases, which are vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]  # the adapters of a LoRA run
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def learning_rate(highest: float, schedule: str, warmup: int, done: int, total: int) -> float:
    """Return the rate of the update after `done` of `total`.

    It rises linearly over `warmup` updates. Then it stays, or falls to 0, which it would reach
    after the last update: along a line, or half a cosine.
    """
    if done < warmup:
        return highest * ((done + 1) / warmup)
    left = (total - done) / max(1, total - warmup)  # 1 after the warm-up, 0 after the last update
    falls = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return highest * falls[schedule]
