"""The unified objective: −J_RL + λ·L_NTP over one forest, in one pass over the head.

    loss = Σ_{response tokens} w_i (surrogate + β·KL)  −  λ/N Σ_{trunk targets} log p       Eq. 10

The weights w_i and the count N are global (all micro-batches, all ranks), so the loss of a step is
the plain sum of what this file returns for its forests. Shapes: n target tokens, R rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import linear_entropy_logprob, linear_objective
from rmt.forest import Forest
from rmt.grpo import kl_estimate, policy_loss


@dataclass(frozen=True)
class Objective:
    """The constants of one update: per-rollout tensors are (R,), on the CPU."""

    advantage: Tensor
    weight: Tensor  # of each token of a rollout, see grpo.rollout_weights
    ntp_weight: float  # λ / N, or λ for the paper's literal sum
    temperature: float  # of the rollouts; trunk tokens are scored at 1
    vocab_size: int
    clip_low: float
    clip_high: float
    kl_beta: float


@dataclass(frozen=True)
class Targets:
    """The target tokens of a forest: where to read them, what they are, whose they are. (n,)"""

    predecessor: Tensor  # index of the hidden state that predicts the token
    token: Tensor
    rollout: Tensor  # id of the branch; -1 for a trunk token
    tree: Tensor

    @classmethod
    def of(cls, forest: Forest) -> "Targets":
        index = forest.mask.nonzero()[:, 0]
        return cls(
            forest.predecessor[index],
            forest.tokens[index],
            forest.branch[index] - 1,
            forest.tree[index],
        )

    def read(self, hidden: Tensor) -> Tensor:
        """The hidden states that predict the targets: (N, C) -> (n, C)."""
        # index_select, unlike hidden[...], adds gradients in a fixed order on a CPU.
        return hidden.index_select(0, self.predecessor)

    def per_kind(self, response: float, trunk: float) -> Tensor:
        """One number for response tokens, another for trunk tokens. (n,) fp64"""
        # torch.where of two plain numbers would round them to fp32.
        return torch.where(
            self.rollout >= 0, response, torch.full_like(self.rollout, trunk, dtype=torch.float64)
        )

    def in_order(self, per_rollout: Sequence[Sequence[float]]) -> Tensor:
        """Values of each rollout's tokens, laid out along the response targets. (n_rl,)"""
        order = torch.unique_consecutive(self.rollout[self.rollout >= 0]).tolist()
        values = np.concatenate([per_rollout[i] for i in order]) if order else np.zeros(0)
        return torch.from_numpy(values).to(self.token.device)


def score(model, forest: Forest, temperature: float, vocab_size: int) -> Tensor:
    """Log-probabilities (n,) of a forest's targets as `forest_loss` computes them, no gradient."""
    targets = Targets.of(forest)
    scale = targets.per_kind(temperature, 1.0)
    with torch.no_grad():
        return model(
            forest.tokens,
            forest.position,
            forest.attend,
            lambda hidden, head: linear_entropy_logprob(
                targets.read(hidden), head, targets.token, scale, vocab_size
            )[0],
        )


def forest_loss(
    model,
    forest: Forest,
    objective: Objective,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Targets]:
    """This forest's part of the step's loss.

    old_logprob and reference_logprob (n,) belong to the targets (None: on-policy, no KL).
    Returns the loss (scalar, with gradient), sums for the log, the targets' log-probabilities (n,)
    and the targets. All ranks, when the model is sharded.
    """
    targets = Targets.of(forest)
    is_response = targets.rollout >= 0
    device = targets.token.device
    pick = lambda values: values.to(device)[targets.rollout.clamp(min=0)]
    has_rollouts = len(objective.advantage) > 0
    zero = torch.zeros(len(targets.token), dtype=torch.float64, device=device)
    advantage = torch.where(is_response, pick(objective.advantage), zero) if has_rollouts else zero
    weight = torch.where(is_response, pick(objective.weight), zero) if has_rollouts else zero
    ntp_weight = targets.per_kind(0.0, objective.ntp_weight)
    sums = {name: zero.sum() for name in ("loss/rl", "loss/ntp", "kl", "clipped", "entropy")}

    def token_loss(logprob, entropy, index):
        rl, w = is_response[index], weight[index].to(logprob.dtype)
        old = logprob.detach() if old_logprob is None else old_logprob[index].to(logprob.dtype)
        old = torch.where(rl, old, logprob.detach())
        a = advantage[index].to(logprob.dtype)
        policy, clipped = policy_loss(logprob, old, a, objective.clip_low, objective.clip_high)
        policy_term = (w * policy).sum()
        if reference_logprob is not None:
            kl = kl_estimate(logprob, reference_logprob[index].to(logprob.dtype))
            policy_term = policy_term + objective.kl_beta * (w * kl).sum()
            sums["kl"] += kl.detach()[rl].double().sum()
        ntp_term = -(ntp_weight[index].to(logprob.dtype) * logprob).sum()
        sums["loss/rl"] += policy_term.detach().double()
        sums["loss/ntp"] -= logprob.detach()[~rl].double().sum()
        sums["clipped"] += clipped[rl].sum()
        sums["entropy"] += entropy.detach()[rl].double().sum()
        return policy_term + ntp_term

    def readout(hidden, head):
        scale = targets.per_kind(objective.temperature, 1.0)
        return linear_objective(
            targets.read(hidden), head, targets.token, token_loss, scale, objective.vocab_size
        )  # fmt: skip

    loss, logprob, _ = model(forest.tokens, forest.position, forest.attend, readout)
    return loss, sums, logprob, targets
