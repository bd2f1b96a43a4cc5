"""The unified objective: −J_RL + λ·L_NTP over one forest, in one pass over the head.

    loss = Σ_{response tokens} w_i (surrogate + β·KL)  −  λ/N Σ_{trunk targets} log p       Eq. 10

The weights w_i and the count N are global (all micro-batches, all ranks), so the loss of a step is
the sum over its forests. Shapes: n target tokens, R rollouts.
"""

from collections import defaultdict
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


def forest_loss(
    model, forest: Forest, objective: Objective, old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Targets]:  # fmt: skip
    """Return this forest's part of the step's loss.

    old_logprob and reference_logprob (n,) belong to the targets (None: on-policy, no KL); chunk:
    targets whose logits exist at one time, which changes no result.
    Returns the loss (scalar, with gradient), sums for the log, the targets' log-probabilities (n,)
    and the targets. All ranks, when the model is sharded.
    """
    o, targets = objective, Targets.of(forest)
    temperatures = targets.per_kind(objective.temperature, 1.0)
    per_token = targets.per_rollout(o.advantage), targets.per_rollout(o.weight)
    per_token += (targets.per_kind(0.0, o.ntp_weight),)
    sums: dict[str, Tensor] = defaultdict(float)

    def token_loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        """Return the loss of a chunk of targets; add to `sums`. All but index are (chunk,)."""
        response, now = targets.rollout[index] >= 0, logprob.detach()
        # On a trunk token the ratio is 1 and the weight 0: it has no policy term.
        old, reference = (
            now if x is None else torch.where(response, x[index].to(now.dtype), now)
            for x in (old_logprob, reference_logprob)
        )
        advantage, weight, ntp_weight = (x[index].to(now.dtype) for x in per_token)
        policy, clipped = policy_loss(logprob, old, advantage, o.clip_low, o.clip_high)
        kl = kl_estimate(logprob, reference)
        rl = (weight * policy).sum() + o.kl_beta * (weight * kl).sum()
        parts = {"kl": kl[response], "clipped": clipped[response], "entropy": entropy[response]}
        # rl with its weights, a part of the loss; ntp a plain sum, for the mean in nats.
        for name, x in (parts | {"loss/rl": rl, "loss/ntp": -logprob[~response]}).items():
            sums[name] += x.detach().double().sum()
        return rl - (ntp_weight * logprob).sum()  # Eq. 10

    def readout(hidden, head):
        return linear_objective(
            targets.read(hidden), head, targets.token, token_loss, temperatures, o.vocab_size, chunk
        )

    loss, logprob, _ = model(forest.tokens, forest.position, forest.attend, readout)
    return loss, sums, logprob, targets
