"""The head's functions with the signatures of other trainers, to take the place of theirs.

verl    `linear_cross_entropy` of verl/utils/kernel/linear_cross_entropy.py (0.9)
TRL     `selective_log_softmax`, `entropy_from_logits` and `_ChunkedLogProbFunction` of
        trl/trainer/utils.py (1.16). GRPO, RLOO and SFT trainers call the last; three lines before
        one is made put ours in its place, in the whole process (DPO's and KTO's then raise
        ValueError: they want mean logits, which ours does not compute):

            from trl.trainer import utils
            from rmt_kernels.adapters import ChunkedLogProb
            utils._ChunkedLogProbFunction = ChunkedLogProb

What ours does not compute is refused by name: ValueError.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .head import linear_entropy_logprob
from .logits import entropy_logprob
from .reference import IGNORE
from .vocab_parallel import vocab_parallel_entropy_logprob


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """Return log p(label) and entropy (N,) of hidden (…, C) @ weight (V, C).T; labels (…,): N.

    dist_process_group: its ranks hold a part of the weight each; the gradient of hidden is then
    this rank's part, as verl's, whose callers sum it. Under autocast the head is in its dtype.
    A row with label -100, which verl's does not know, has 0 for both.
    """
    if reduction != "none":
        _refuse("reduction", reduction, "none")
    known = _as_autocast(hidden), weight, labels.reshape(hidden.shape[:-1])
    if dist_process_group is None:
        found = linear_entropy_logprob(*known, temperature)
    else:
        found = vocab_parallel_entropy_logprob(
            *known, dist_process_group, temperature, sum_hidden=False
        )
    return found.logprob.flatten(), found.entropy.flatten()


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Return log p(index) of logits (…, V), 0 where row_mask is 0; index (…,).

    In fp32 or wider, as TRL's on a GPU; its own on a CPU rounds to the dtype of the logits.
    """
    if index.shape != logits.shape[:-1]:
        raise ValueError(f"index {tuple(index.shape)} must have one token for each row of logits "
                         f"{tuple(logits.shape)}; take theirs for several")  # fmt: skip
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, IGNORE)
    return entropy_logprob(logits, index, temperature).logprob


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Return the entropy of each row of logits (…, V) in nats, in fp32 or wider."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return entropy_logprob(logits, targets).entropy


class ChunkedLogProb:
    """Has what is called of TRL's autograd function: `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Return log_probs, entropy, None, None and is_top1 of hidden (N, C) @ weight (V, C).T.

        labels (N,). The first two are (N,) in fp32 or wider, the last bool, also True for one of
        several likeliest. outputs: which, beside log_probs; TRL's default asks for two that are
        refused. The weight is rounded to the dtype of hidden, autocast's under autocast, a slice
        at a time; its gradient is not.
        """
        known = ("entropy", "is_top1", "log_probs")
        if unknown := sorted({*outputs} - {*known}):
            _refuse("outputs", unknown, ", ".join(known))
        learns = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if hasattr(weight, "ds_id") and learns and torch.is_grad_enabled():
            raise ValueError("the head is sharded by DeepSpeed ZeRO-3, which frees it before its "
                             "backward pass; use ZeRO-2 or FSDP2, or TRL's own head")  # fmt: skip
        if not logit_scale > 0:
            raise ValueError(f"logit_scale {logit_scale} must be above 0; take TRL's own head")
        hidden = _as_autocast(hidden)
        if bias is not None:  # as one more dimension, where hidden is 1: this copies the head
            # Eight: rows of 16-bit numbers keep the alignment of fast products.
            hidden = torch.cat((hidden, F.pad(hidden.new_ones(len(hidden), 1), (0, 7))), dim=1)
            weight = torch.cat((weight, F.pad(bias[:, None], (0, 7))), dim=1)
        # s · z capped at c, over T, is z capped at c / s, over T / s.
        cap = final_logit_softcapping and final_logit_softcapping / logit_scale
        found = linear_entropy_logprob(
            hidden, weight, labels, temperature / logit_scale, softcap=cap
        )
        entropy = found.entropy if "entropy" in outputs else None
        return found.logprob, entropy, None, None, found.top1 if "is_top1" in outputs else None


def _as_autocast(hidden: Tensor) -> Tensor:
    """Return hidden, under autocast in its dtype; autocast leaves fp64 as it is."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return hidden
    enabled = torch.is_autocast_enabled(device)
    return hidden.to(torch.get_autocast_dtype(device)) if enabled else hidden


def _refuse(name: str, given, known: str) -> None:
    raise ValueError(f"{name} = {given} is not computed here; leave it at {known}, or take the "
                     "function that this one replaces")  # fmt: skip
