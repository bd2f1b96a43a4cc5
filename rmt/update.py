"""The update: global token weights, forward and backward passes over the trees, AdamW."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rmt.config.config import Config
from rmt.forest import Forest
from rmt.grpo import has_both_outcomes, rollout_weights
from rmt.naive import separate_tokens
from rmt.objective import Objective, Targets, forest_loss, target_logprobs
from rmt.questions import RolloutBatch
from rmt.sampling import Rollout
from rmt.system import dist
from rmt.system.dist import World
from rmt.system.metrics import Clock, Metrics
from rmt.trees import Tree, micro_batches


@dataclass
class Updated:
    """What `update` did: updates that were made, and the documents of one that was refused."""

    trees: list[Tree]  # that were trained on
    count: int = 0  # updates that were made
    refused: bool = False  # loss or gradient was not finite: the model stayed as it was
    documents: set[int] = field(default_factory=set)  # with such a loss, on any rank


def global_objective(
    c: Config, trees: Sequence[Tree], batch: RolloutBatch, advantage: Tensor, vocab_size: int,
    world: World,
) -> Objective:  # fmt: skip
    """Set the weight of each target token from global counts. advantage (P, G). All ranks."""
    match = batch.rewards["match"]
    kept = torch.ones_like(match, dtype=torch.bool)
    if c.zero_variance_groups == "drop":
        kept &= has_both_outcomes(match)[:, None]
    rollouts = [rollout for group in batch.responses for rollout in group]
    if c.advantage_norm == "right":
        kept &= match > 0
    if c.mask_truncated:  # Eq. 14
        kept &= torch.tensor([r.finished for r in rollouts], dtype=torch.bool).view_as(kept)
    lengths = torch.tensor([len(r.tokens) for r in rollouts], dtype=torch.int64)
    counts = {
        "tokens": float((lengths * kept.flatten()).sum()),
        "rollouts": float(kept.sum()),
        "text": float(sum(tree.trunk_targets for tree in trees)),
    }
    counts = dist.reduce_sums(counts, world)
    weight = rollout_weights(
        lengths, kept.flatten(), c.aggregation, int(counts["tokens"]), int(counts["rollouts"]),
        c.max_response,
    )  # fmt: skip
    denominator = max(1.0, counts["text"]) if c.ntp_reduction == "mean" else 1.0
    return Objective(
        advantage.flatten(), weight, c.ntp_weight / denominator, c.temperature, vocab_size,
        c.clip_low, c.clip_high, c.kl_beta,
    )  # fmt: skip


def update(
    c: Config, model, optimizer, reference, trees: Sequence[Tree], objective: Objective,
    responses: Sequence[Sequence[Rollout]], pack: Callable, step: int, total_steps: int,
    world: World, clock: Clock, metrics: Metrics,
) -> Updated:  # fmt: skip
    """Train on a step's trees, `updates_per_batch` times. All ranks.

    reference: the frozen initial model (None: no KL); responses: with the sampler's
    log-probabilities, for the log; pack: of rmt/forest.py or rmt/naive.py.
    """
    # With KL a response without advantage has a gradient, too.
    trees = list(trees) if c.kl_beta else drop_zero_advantage(trees, objective)
    forests = _forests(trees, c.tokens_per_micro_batch, pack, world, clock)
    sampled = [rollout.logprobs for group in responses for rollout in group]
    done = Updated(trees)
    known = (c.temperature, objective.vocab_size)
    logprobs = lambda policy: [target_logprobs(policy, f, *known) for f in forests]
    with clock("forward"):
        kl_reference = logprobs(reference) if reference else None
        # One update per batch is exactly on-policy: there the old policy is the current one.
        old = logprobs(model) if c.updates_per_batch > 1 else None
    for number in range(c.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        bad, suspects = set(), set()
        for i, forest in enumerate(forests):
            with clock("forward"):
                loss, sums, logprob, targets = forest_loss(
                    model, forest, objective, old and old[i], kl_reference and kl_reference[i]
                )
            with clock("backward"):
                loss.backward()
            bad |= {forest.trees[i].document for i in targets.tree[~logprob.isfinite()].tolist()}
            if not bad and not suspects and not _lowest_gradient_is_finite(model):
                suspects = {tree.document for tree in forest.trees}
            metrics.add("policy/clipped", sums["clipped"], (targets.rollout >= 0).sum())
            if number == 0:
                metrics.add_sum("loss/rl", sums["loss/rl"])  # the weights hold the global counts
                _add_losses(metrics, sums, logprob, targets, targets.in_order(sampled))
        before, total = step * c.updates_per_batch + number, total_steps * c.updates_per_batch
        rate = learning_rate(c.learning_rate, c.lr_schedule, c.warmup_steps, before, total)
        metrics.add("update/learning_rate", rate, 1)
        done.refused, done.documents = clip_and_step(
            model, optimizer, rate, c.grad_clip, (bad, suspects), world, clock, metrics
        )
        if done.refused:
            break
        done.count += 1
    metrics.add("update/refused", done.refused, 1)
    metrics.add("share/trained_rollouts", sum(len(t.branches) for t in trees), len(sampled))
    real = [forest for forest in forests if forest.trees[0].document >= 0]  # no dummy
    packed = sum(int((forest.tree >= 0).sum()) for forest in real)
    alone = separate_tokens(trees)
    metrics.add("share/forest_saved", alone - packed, alone)
    return done


def drop_zero_advantage(trees: Sequence[Tree], objective: Objective) -> list[Tree]:
    """Drop responses whose advantage or weight is 0, with the trunk tokens that only they saw.

    They have no gradient, so this changes no result. Ids of the others stay; no count changes.
    """
    teaches, kept = ((objective.advantage != 0) & (objective.weight != 0)).tolist(), []
    for tree in trees:
        branches = tuple(branch for branch in tree.branches if teaches[branch.id])
        if tree.targets is not None:
            kept.append(replace(tree, branches=branches))
        elif branches:
            seen = max(branch.fork for branch in branches)
            kept.append(replace(tree, trunk=tree.trunk[:seen], branches=branches))
    return kept


def clip_and_step(
    model, optimizer, rate: float, grad_clip: float, blamed: tuple[set[int], set[int]],
    world: World, clock: Clock, metrics: Metrics,
) -> tuple[bool, set[int]]:  # fmt: skip
    """Clip the gradient, then step, unless loss or gradient was not finite. All ranks.

    blamed: this rank's documents whose loss was not finite; those behind whose pass the gradient
    was not, which may be another rank's doing. Returns whether the step was refused, and the
    documents to blame, of all ranks: the second only where none is known to be bad.
    """
    with clock("optimizer"):
        norm = dist.grad_norm(model, grad_clip)
    metrics.add("update/grad_norm", norm, 1)
    with clock("communication"):
        refused = dist.reduce_max([any(blamed) or not math.isfinite(norm)], world)[0]
    if refused:
        bad, suspects = (set().union(*x) for x in zip(*dist.gather_objects(blamed, world)))
        return True, (bad or suspects) - {-1}  # of dummies
    for group in optimizer.param_groups:
        group["lr"] = rate
    with clock("optimizer"):
        optimizer.step()
    return False, set()


def _forests(
    trees: Sequence[Tree], token_limit: int, pack: Callable, world: World, clock: Clock
) -> list[Forest]:
    """Pack micro-batches, equally many on every rank and at least one. All ranks."""
    batches = micro_batches(trees, token_limit)
    with clock("communication"):
        most = int(dist.reduce_max([len(batches)], world)[0])
    # Dummy batches keep FSDP's collectives aligned, and give the optimizer gradients of 0 (its
    # momentum and weight decay act all the same).
    batches += [[Tree(-1, (0,))]] * (max(1, most) - len(batches))
    return [pack(batch, world.device) for batch in batches]


def _lowest_gradient_is_finite(model) -> bool:
    """Return whether the gradient that has passed through all layers is finite so far."""
    q = model.model.layers[0].self_attn.q_proj
    grad = q.weight.grad if q.weight.requires_grad else q.lora_B.grad
    grad = grad.to_local() if hasattr(grad, "to_local") else grad
    return grad is None or bool(grad.isfinite().all())


def _add_losses(
    metrics: Metrics, sums: dict[str, Tensor], logprob: Tensor, targets: Targets, sampled: Tensor
) -> None:
    """Log the losses of one forest; sampled (n_rl,): the sampler's log-probabilities, if any."""
    response = targets.rollout >= 0
    count = int(response.sum())
    metrics.add("loss/ntp", sums["loss/ntp"], len(response) - count)
    metrics.add("policy/logprob", logprob[response].double().sum(), count)
    metrics.add("policy/entropy", sums["entropy"], count)
    metrics.add("policy/kl", sums["kl"], count)
    gap = sampled.double().abs()  # empty where responses are given
    if len(sampled):
        gap = (logprob[response].double() - sampled.double()).abs()
    metrics.add("sampler_gap/mean", gap.sum(), len(gap))
    metrics.add_max("sampler_gap/max", gap.max() if len(gap) else 0.0)


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
