"""Metrics of a step: responses, speed and memory. docs/metrics.md is the glossary."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import ModelConfig
from rmt.config.config import Config
from rmt.curriculum import TIERS
from rmt.data.judge import take_failures
from rmt.engine.balance import idle_share
from rmt.engine.run import Run, Setup
from rmt.forest import tree_calls
from rmt.grpo import centred, has_both_outcomes
from rmt.questions import RolloutBatch
from rmt.system.dist import gather_objects
from rmt.system.env import device_name
from rmt.system.metrics import Metrics, peak_memory
from rmt.trees import Tree
from rmt.update import Updated

PHASES = ("rollout", "update", "forward", "backward", "optimizer", "communication", "checkpoint")

# Dense bf16 operations per second, from NVIDIA's data sheets: A100 (2021), H100, H200 and L40S
# (2023), HGX B200 and GB200 NVL72 (2024). The first name that is part of the GPU's counts.
PEAKS = {
    "MIG": None,  # a slice of a GPU
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
    "GH200": 989e12, "H200": 989e12, "GB200": 2500e12, "B200": 2250e12, "L40S": 362e12,
}  # fmt: skip


def add_response_metrics(
    metrics: Metrics, c: Config, batch: RolloutBatch, scale: Tensor, drawn: Sequence[tuple]
) -> None:
    """Add rewards, lengths and tiers of this rank's responses: P groups of G.

    scale: the divisor of advantages, see grpo.advantage_scale; drawn: results of `draw_positions`
    for this rank's documents.
    """
    empty = sum(empty for _, empty in drawn)
    metrics.add("share/empty_tier_draws", empty, len(drawn) * c.positions_per_document)
    rewards, questions = batch.rewards, batch.questions
    count = rewards["match"].numel()
    rollouts = [rollout for group in batch.responses for rollout in group]
    answers = [answer for group in batch.answers for answer in group]
    thought = [(r, a) for r, a in zip(rollouts, answers) if a.thinking_length is not None]
    for name, total in (("mean", "total"), ("match", "match"), ("length", "length")):
        metrics.add(f"reward/{name}", rewards[total].sum(), count)
    mixed = has_both_outcomes(rewards["match"])
    kept = mixed if c.zero_variance_groups == "drop" else torch.ones_like(mixed)
    paid = rewards["total"][kept], rewards["length"][kept]
    shares = length_share(*paid, c.length_weight, scale[kept])
    metrics.add("share/advantage_from_length", *shares)
    metrics.add("length/response", batch.tokens, count)
    metrics.add("length/thinking", sum(a.thinking_length for _, a in thought), len(thought))
    # Tokens from </think> on: neither reward nor budget counts them.
    after = sum(len(r.tokens) - a.thinking_length for r, a in thought)
    metrics.add("length/answer", after, len(thought))
    off = [
        abs(answer.thinking_length - q.budget) / q.budget
        for q, group in zip(questions, batch.answers) for answer in group
        if q.budget is not None and answer.thinking_length is not None
    ]  # fmt: skip
    metrics.add("length/budget_error", sum(off), len(off))
    metrics.add("share/well_formed", sum(a.text is not None for a in answers), count)
    metrics.add("share/zero_variance_groups", (~mixed).sum(), len(questions))
    metrics.add("share/cut_off", sum(not r.finished for r in rollouts), count)
    metrics.add("share/judge_failed", take_failures(), count)
    for tier, name in enumerate(TIERS):
        rows = torch.tensor([q.tier == tier for q in questions], dtype=torch.bool)
        metrics.add(f"draw/{name}", rows.sum(), len(questions))
        match = rewards["match"][rows]
        metrics.add(f"match/{name}", match.sum(), match.numel())


def add_speed_metrics(
    metrics: Metrics, run: Run, setup: Setup, sampled: int, dropped: int, updated: Updated,
    started: float,
) -> None:  # fmt: skip
    """Add seconds, tokens per second, model FLOPs utilisation and memory of a finished step.

    sampled, dropped: tokens, of responses that are trained on and that were replaced. started: of
    time.perf_counter. All ranks.
    """
    c, world, seconds = run.config, setup.world, setup.clock.read()
    updates = updated.count + updated.refused
    trained = sum(map(len, updated.trees)) * updates
    for phase in PHASES:
        metrics.add(f"time/{phase}", seconds.get(phase, 0.0), 1)
    # Tokens are summed over ranks, seconds are not: each rank adds seconds / ranks.
    generated = sampled + dropped
    metrics.add("speed/rollout_tokens_per_second", generated, seconds["rollout"] / world.size)
    metrics.add("speed/train_tokens_per_second", trained, seconds["update"] / world.size)
    # A backward pass costs two forward passes, of frozen weights one; scoring is a forward pass.
    scored = (c.kl_beta > 0) + (c.updates_per_batch > 1)
    passes = (2 if c.lora_rank else 3) * updates + scored
    flops = passes * forward_flops(run.model.config, updated.trees)
    gpu = world.device.type == "cuda"
    peak = peak_flops(device_name(world.device), setup.compute) if gpu else None
    metrics.add("speed/mfu", flops if peak else 0.0, peak * seconds["update"] if peak else 0.0)
    sampling, work = zip(*gather_objects((seconds["sampling"], flops), world))
    metrics.add("share/waiting", idle_share(sampling, work, seconds["update"]), 1)
    took = time.perf_counter() - started
    metrics.add("time/step", took, 1)
    metrics.add("speed/tokens_per_second", trained, took / world.size)
    metrics.add_sum("tokens/step", sampled + trained)
    metrics.add_sum("tokens/dropped", dropped)
    metrics.add_max("memory/peak_gb", peak_memory(world.device) / 1e9)


def length_share(
    rewards: Tensor, length_rewards: Tensor, length_weight: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the advantage variance due to the length reward, and all of it, as sums over (P, G).

    A = A_match + A_len, so Σ A² = Σ A·A_match + Σ A·A_len; the share is the second over the whole.
    In a group of equal r_match it is 1 whatever w is: the normalisation cancels the scale.
    """
    whole = centred(rewards) / scale
    from_length = length_weight * centred(length_rewards) / scale
    return (whole * from_length).sum(), whole.square().sum()


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Return the peak operations per second of a GPU by its name; None when it is not known."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def visible_pairs(tree: Tree) -> int:
    """Count the (i, j) in a tree such that token i sees token j (Eq. 11)."""
    size = lambda span: span.stop - span.start
    return sum(
        size(rows) * (size(rows) + 1) // 2 if rows == keys else size(rows) * size(keys)
        for rows, keys in tree_calls(tree, 0)
    )


def forward_flops(config: ModelConfig, trees: Sequence[Tree]) -> int:
    """Count the model FLOPs of one forward pass over trees; a backward pass has twice as many.

    These are the operations that the method needs, not those that were spent (PaLM, arXiv
    2204.02311, appendix B): a trunk counts once, padding and recomputed activations do not count.
    A weight costs 2 operations per token; attention 4 H D per layer and pair of tokens that see
    each other. Norms, rotary and softmax are left out.
    """
    c = config
    tokens, pairs = sum(map(len, trees)), sum(map(visible_pairs, trees))
    targets = sum(t.trunk_targets + sum(len(b.response) for b in t.branches) for t in trees)
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # of q and o, of k and v
    weights = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)  # of a layer
    layer = 2 * weights * tokens + 4 * c.num_attention_heads * c.head_dim * pairs
    return c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size * targets
