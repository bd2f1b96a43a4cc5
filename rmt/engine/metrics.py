"""Metrics of a step as (sum, count) pairs, reduced over ranks once. The README has the glossary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmt.batch import Question
from rmt.curriculum import TIERS
from rmt.objective import Targets
from rmt.prompt import Answer
from rmt.system.dist import World, reduce_max, reduce_sums

PHASES = ("rollout", "update", "forward", "backward", "optimizer", "communication", "checkpoint")


class Metrics:
    """Means over all ranks. Every rank must add the same names, if need be with count 0."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, total, count) -> None:
        for suffix, value in (("sum", total), ("count", count)):
            key = f"{name}|{suffix}"
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def add_max(self, name: str, value) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), float(value))

    def reduce(self, world: World) -> dict[str, float | None]:
        """Name -> mean, None where nothing was counted. All ranks."""
        sums = reduce_sums(self.sums, world)
        maxima = dict(zip(self.maxima, reduce_max(list(self.maxima.values()), world)))
        names = [key.removesuffix("|sum") for key in sums if key.endswith("|sum")]
        means = {
            name: sums[f"{name}|sum"] / sums[f"{name}|count"] if sums[f"{name}|count"] else None
            for name in names
        }
        return means | maxima


def mixed(match: Tensor) -> Tensor:
    """Which groups have both right and wrong responses: (P, G) -> (P,) bool."""
    return (match != match[:, :1]).any(dim=1)


def add_rollout_metrics(
    metrics: Metrics,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    responses: Sequence[Sequence[Sequence[int]]],
    rewards: dict[str, Tensor],
) -> None:
    """What the responses of a step looked like; P groups of G; rewards hold (P, G) tensors."""
    count = rewards["match"].numel()
    generated = sum(len(response) for group in responses for response in group)
    flat = [answer for group in answers for answer in group]
    thinking = [a.thinking_length for a in flat if a.thinking_length is not None]
    metrics.add("reward/mean", rewards["total"].sum(), count)
    metrics.add("reward/match", rewards["match"].sum(), count)
    metrics.add("reward/length", rewards["length"].sum(), count)
    metrics.add("length/response", generated, count)
    metrics.add("length/thinking", sum(thinking), len(thinking))
    # Tokens from </think> on: neither reward nor budget counts them.
    said = [
        len(response) - answer.thinking_length
        for written, group in zip(responses, answers) for response, answer in zip(written, group)
        if answer.thinking_length is not None
    ]  # fmt: skip
    metrics.add("length/answer", sum(said), len(said))
    off = [
        abs(answer.thinking_length - q.budget) / q.budget
        for q, group in zip(questions, answers) for answer in group
        if q.budget is not None and answer.thinking_length is not None
    ]  # fmt: skip
    metrics.add("length/budget_error", sum(off), len(off))
    metrics.add("share/well_formed", sum(a.text is not None for a in flat), count)
    metrics.add("share/zero_variance_groups", (~mixed(rewards["match"])).sum(), len(questions))
    for tier, name in enumerate(TIERS):
        rows = torch.tensor([q.tier == tier for q in questions], dtype=torch.bool)
        metrics.add(f"draw/{name}", rows.sum(), len(questions))
        match = rewards["match"][rows]
        metrics.add(f"match/{name}", match.sum(), match.numel())


def add_loss_metrics(
    metrics: Metrics, sums: dict[str, Tensor], logprob: Tensor, targets: Targets, sampled: Tensor
) -> None:
    """Loss parts of one forest; `sampled` (n_rl,) are the sampler's log-probabilities."""
    response = targets.rollout >= 0
    count = int(response.sum())
    metrics.add("loss/ntp", sums["loss/ntp"], len(response) - count)
    metrics.add("policy/entropy", sums["entropy"], count)
    metrics.add("policy/kl", sums["kl"], count)
    gap = (logprob[response].double() - sampled.double()).abs()
    metrics.add("sampler_gap/mean", gap.sum(), count)
    metrics.add_max("sampler_gap/max", gap.max() if count else 0.0)


def add_speed_metrics(
    metrics: Metrics,
    seconds: dict[str, float],
    generated: int,
    trained: int,
    flops: float,
    peak: float | None,
    world: World,
) -> None:
    """Seconds of a step's phases on this rank, and the tokens and model FLOPs they dealt with.

    peak is what this rank's device could do in a second; None: utilisation is not measured.
    """
    for phase in PHASES:
        metrics.add(f"time/{phase}", seconds.get(phase, 0.0), 1)
    # Tokens add up over ranks, their seconds pass at the same time.
    rollout, update = (seconds[name] / world.size for name in ("rollout", "update"))
    metrics.add("speed/rollout_tokens_per_second", generated, rollout)
    metrics.add("speed/train_tokens_per_second", trained, update)
    metrics.add("speed/mfu", flops if peak else 0.0, peak * seconds["update"] if peak else 0.0)
