"""Group-relative policy optimisation: advantages and the policy-gradient term.

Departures: the paper prints neither ratio nor clip, which is exact for one on-policy update per
batch: there the ratio is 1, and its gradient is that of log π. With more updates the clipped
surrogate applies. The KL term (β > 0) uses the k3 estimator of Schulman (2020), as GRPO does: its
value is KL(π‖π_ref), its gradient that of KL(π_ref‖π), which is the same to first order.

Shapes: P questions, G responses to each, n tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def has_both_outcomes(match: Tensor) -> Tensor:
    """Mark groups with right and wrong responses: (P, G) matches -> (P,) bool."""
    return (match != match[:, :1]).any(dim=1)


def centred(x: Tensor) -> Tensor:
    """Subtract the mean of each group (P, G); exactly 0 where a group's values are all equal."""
    x = x - x[:, :1]  # so that equal rewards give exactly 0, whatever the mean rounds to
    return x - x.mean(dim=1, keepdim=True)


def advantages(rewards: Tensor, scale: Tensor) -> Tensor:
    """Return advantages (P, G) of rewards (P, G), with mean 0 in each group."""
    return centred(rewards) / scale  # Eq. 7


def advantage_scale(rewards: Tensor, norm: str, delta: float, batch: Sequence[Tensor]) -> Tensor:
    """Return the divisor of centred rewards, broadcastable to (P, G).

    norm "group" is the group's population standard deviation + delta (paper), "batch" that of all
    groups' centred rewards, "none" (Dr. GRPO, arXiv 2503.20783) and "right" are 1. batch holds the
    rewards of the whole batch, in one or more parts (P', G), so that world size does not change
    the scale.
    """
    if norm == "group":
        return centred(rewards).square().mean(dim=1, keepdim=True).sqrt() + delta
    if norm == "batch":
        everyone = torch.cat([centred(part) for part in batch])
        return (everyone.square().mean().sqrt() + delta).expand(rewards.shape)
    return torch.ones_like(rewards)


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate per token, negated, and where the clip is active. (n,) each

    With old_logprob = logprob.detach() this is −A with the gradient of −A·log π.
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)  # Eq. 8
    return loss, (-advantage * clipped > -advantage * ratio).detach()


def kl_estimate(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Return k3 ≥ 0, in value unbiased for KL(π‖π_ref) on samples of π, in nats. (n,)"""
    difference = reference_logprob - logprob
    return difference.exp() - difference - 1  # Eq. 9


def rollout_weights(
    lengths: Tensor, kept: Tensor, aggregation: str, tokens: int, rollouts: int, max_tokens: int
) -> Tensor:
    """Return the weight (R,) of each token of each rollout in the policy term.

    lengths (R,) in tokens; kept (R,) bool; tokens and rollouts are *global* counts over the kept
    rollouts of all ranks, so that neither packing nor world size changes the loss.
    """
    rollouts, tokens = max(1, rollouts), max(1, tokens)
    weight = {
        "token-mean": torch.full(lengths.shape, 1.0 / tokens, dtype=torch.float64),
        "sequence-mean": 1.0 / (lengths.clamp(min=1).double() * rollouts),
        "constant": torch.full(lengths.shape, 1.0 / (rollouts * max_tokens), dtype=torch.float64),
        "sequence-sum": torch.full(lengths.shape, 1.0 / rollouts, dtype=torch.float64),
    }[aggregation]
    return weight * kept
