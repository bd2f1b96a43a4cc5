"""The unified objective: −J_RL + λ·L_NTP over one forest, in one pass over the head.

    loss = Σ_{response tokens} w_i (surrogate + β·KL)  −  λ/N Σ_{trunk targets} log p       Eq. 10

The weights w_i and the count N are global (all micro-batches, all ranks), so the loss of a step is
the sum over its forests. Shapes: n target tokens, R rollouts.
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
    """The target tokens of a forest. (n,)"""

    predecessor: Tensor  # index of the hidden state that predicts the token
    token: Tensor
    rollout: Tensor  # id of the branch; -1 for a trunk token
    tree: Tensor

    @classmethod
    def of(cls, forest: Forest) -> "Targets":
        index = forest.is_target.nonzero()[:, 0]
        columns = forest.predecessor, forest.tokens, forest.branch - 1, forest.tree
        return cls(*(column[index] for column in columns))

    def read(self, hidden: Tensor) -> Tensor:
        """Select the hidden states that predict the targets: (N, C) -> (n, C)."""
        # index_select, unlike hidden[...], adds gradients in a fixed order on a CPU.
        return hidden.index_select(0, self.predecessor)

    def per_kind(self, response: float, trunk: float) -> Tensor:
        """Return one number for response tokens, another for trunk tokens. (n,) fp64"""
        # torch.where of two Python floats returns fp32.
        return torch.where(
            self.rollout >= 0, response, torch.full_like(self.rollout, trunk, dtype=torch.float64)
        )

    def per_rollout(self, values: Tensor) -> Tensor:
        """Spread a value of each rollout (R,) over its tokens; 0 for trunk tokens. (n,)"""
        with_zero = torch.cat((values, values.new_zeros(1))).to(self.rollout.device)
        return with_zero[self.rollout]  # a trunk token has rollout -1: the last entry

    def in_order(self, per_rollout: Sequence[Sequence[float]]) -> Tensor:
        """Lay out values of each rollout's tokens along the response targets. (n_rl,)"""
        order = torch.unique_consecutive(self.rollout[self.rollout >= 0]).tolist()
        values = np.concatenate([per_rollout[i] for i in order]) if order else np.zeros(0)
        return torch.from_numpy(values).to(self.token.device)


def target_logprobs(model, forest: Forest, temperature: float, vocab_size: int) -> Tensor:
    """Return log-probabilities (n,) of a forest's targets as in `forest_loss`, without gradient."""
    targets = Targets.of(forest)
    temperatures = targets.per_kind(temperature, 1.0)
    with torch.no_grad():
        return model(
            forest.tokens, forest.position, forest.attend,
            lambda hidden, head: linear_entropy_logprob(
                targets.read(hidden), head, targets.token, temperatures, vocab_size
            )[0],
        )  # fmt: skip


class TokenLoss:
    """The loss of a chunk of target tokens, and sums over all chunks for the log.

    All tensors are (n,), one entry per target token; `sums` are fp64 scalars.
    """

    def __init__(
        self, objective: Objective, targets: Targets, old: Tensor | None, reference: Tensor | None
    ):
        o = self.objective = objective
        self.old, self.reference = old, reference
        self.response = targets.rollout >= 0
        self.advantage = targets.per_rollout(o.advantage)
        self.weight = targets.per_rollout(o.weight)
        self.ntp_weight = targets.per_kind(0.0, o.ntp_weight)
        zero = self.weight.new_zeros(())
        self.sums = dict.fromkeys(("loss/rl", "loss/ntp", "kl", "clipped", "entropy"), zero)

    def __call__(self, logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        response = self.response[index]
        # On a trunk token the ratio is 1 and the weight 0: it has no policy term.
        old = logprob.detach()
        if self.old is not None:
            old = torch.where(response, self.old[index].to(logprob.dtype), old)
        advantage, weight, ntp_weight = (
            x[index].to(logprob.dtype) for x in (self.advantage, self.weight, self.ntp_weight)
        )
        o = self.objective
        policy, clipped = policy_loss(logprob, old, advantage, o.clip_low, o.clip_high)
        rl = (weight * policy).sum()
        if self.reference is not None:
            reference = self.reference[index].to(logprob.dtype)
            kl = kl_estimate(logprob, torch.where(response, reference, logprob.detach()))
            rl = rl + o.kl_beta * (weight * kl).sum()
            self._add("kl", kl[response])
        self._add("loss/rl", rl)  # with its weights: a part of the loss
        self._add("loss/ntp", -logprob[~response])  # a plain sum, for the mean in nats
        self._add("clipped", clipped[response])
        self._add("entropy", entropy[response])
        return rl - (ntp_weight * logprob).sum()  # Eq. 10

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums[name] + values.detach().double().sum()


def forest_loss(
    model,
    forest: Forest,
    objective: Objective,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Targets]:
    """Return this forest's part of the step's loss.

    old_logprob and reference_logprob (n,) belong to the targets (None: on-policy, no KL); chunk:
    targets whose logits exist at one time, which changes no result.
    Returns the loss (scalar, with gradient), sums for the log, the targets' log-probabilities (n,)
    and the targets. All ranks, when the model is sharded.
    """
    targets = Targets.of(forest)
    token_loss = TokenLoss(objective, targets, old_logprob, reference_logprob)
    temperatures = targets.per_kind(objective.temperature, 1.0)

    def readout(hidden, head):
        return linear_objective(
            targets.read(hidden), head, targets.token, token_loss, temperatures,
            objective.vocab_size, chunk,
        )  # fmt: skip

    loss, logprob, _ = model(forest.tokens, forest.position, forest.attend, readout)
    return loss, token_loss.sums, logprob, targets
