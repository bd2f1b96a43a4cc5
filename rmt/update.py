"""From the trees of a step to a changed model: global weights, passes, and a guarded update."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rmt.config.config import Config
from rmt.engine.flops import separate_tokens
from rmt.engine.metrics import Metrics, add_loss_metrics, mixed
from rmt.engine.run import Run
from rmt.forest import Forest, Tree, micro_batches, pack
from rmt.grpo import rollout_weights
from rmt.objective import Objective, forest_loss, score
from rmt.rollout import Rollout
from rmt.system import dist


def update(
    run: Run,
    trees: Sequence[Tree],
    groups: Sequence[Sequence[Rollout]],
    advantage: Tensor,
    match: Tensor,
    metrics: Metrics,
) -> list[Tree]:
    """Learn from a step's trees; advantage and match are (P, G). All ranks.

    Returns the trees that were trained on: without the responses that teach nothing. An update
    whose loss or gradient is not finite is refused: the model stays as it was.
    """
    c, clock = run.config, run.clock
    objective = global_objective(run, trees, groups, advantage, match)
    # The divergence from the reference is a lesson of every response.
    trees = list(trees) if c.kl_beta else that_teach(trees, objective.advantage, objective.weight)
    forests = _forests(run, trees)
    known = (c.temperature, run.tokenizer.vocab_size)
    with clock("forward"):
        reference = [score(run.reference, f, *known) for f in forests] if run.reference else None
        # One update per batch is exactly on-policy: there the old policy is the current one.
        old = [score(run.model, f, *known) for f in forests] if c.updates_per_batch > 1 else None
    sampled = [rollout.logprobs for group in groups for rollout in group]
    for number in range(c.updates_per_batch):
        run.optimizer.zero_grad(set_to_none=True)
        culprits: set[int] = set()
        for i, forest in enumerate(forests):
            with clock("forward"):
                loss, sums, logprob, targets = forest_loss(
                    run.model, forest, objective, old and old[i], reference and reference[i]
                )
            with clock("backward"):
                loss.backward()
            culprits |= _broken_documents(run.model, forest, targets.tree, logprob, culprits)
            metrics.add("policy/clipped", sums["clipped"], (targets.rollout >= 0).sum())
            if number == 0:
                metrics.add("loss/rl", sums["loss/rl"], 1 / (len(forests) * run.world.size))
                add_loss_metrics(metrics, sums, logprob, targets, targets.in_order(sampled))
        if not _finish_update(run, number, culprits, metrics):
            break
    metrics.add("update/refused", run.refused_in_a_row > 0, 1)
    metrics.add("share/trained_rollouts", sum(len(t.branches) for t in trees), advantage.numel())
    packed = sum(len(t) for forest in forests for t in forest.trees if t.document >= 0)
    alone = separate_tokens(trees)
    metrics.add("share/forest_saved", alone - packed, alone)
    return trees


def that_teach(trees: Sequence[Tree], advantage: Tensor, weight: Tensor) -> list[Tree]:
    """The trees without what has no gradient: an exact saving, not an approximation.

    Left out are responses whose advantage or weight (R,) is 0, the part of a trunk that only they
    saw, and trees of which nothing remains. Ids of the others stay; no count changes.
    """
    teaches, kept = ((advantage != 0) & (weight != 0)).tolist(), []
    for tree in trees:
        branches = tuple(branch for branch in tree.branches if teaches[branch.id])
        if tree.targets is not None:
            kept.append(replace(tree, branches=branches))
        elif branches:
            seen = max(branch.fork for branch in branches)
            kept.append(replace(tree, trunk=tree.trunk[:seen], branches=branches))
    return kept


def global_objective(
    run: Run,
    trees: Sequence[Tree],
    groups: Sequence[Sequence[Rollout]],
    advantage: Tensor,
    match: Tensor,
) -> Objective:
    """The weight of every target token, from counts over all ranks. All ranks."""
    c: Config = run.config
    kept = torch.ones_like(match, dtype=torch.bool)
    if c.zero_variance_groups == "drop":
        kept &= mixed(match)[:, None]
    lengths = torch.tensor([len(r.tokens) for group in groups for r in group], dtype=torch.int64)
    counts = {
        "tokens": float((lengths * kept.flatten()).sum()),
        "rollouts": float(kept.sum()),
        "text": float(sum(tree.trunk_targets for tree in trees)),
    }
    with run.clock("communication"):
        counts = dist.reduce_sums(counts, run.world)
    weight = rollout_weights(
        lengths, kept.flatten(), c.aggregation, int(counts["tokens"]), int(counts["rollouts"]),
        c.max_response,
    )  # fmt: skip
    denominator = max(1.0, counts["text"]) if c.ntp_reduction == "mean" else 1.0
    return Objective(
        advantage.flatten(), weight, c.ntp_weight / denominator, c.temperature,
        run.tokenizer.vocab_size, c.clip_low, c.clip_high, c.kl_beta,
    )  # fmt: skip


def _forests(run: Run, trees: Sequence[Tree]) -> list[Forest]:
    """Packed micro-batches, equally many on every rank and at least one. All ranks."""
    batches = micro_batches(trees, run.config.tokens_per_micro_batch)
    with run.clock("communication"):
        most = int(dist.reduce_max([len(batches)], run.world)[0])
    # Nothing to learn, but collectives, and gradients of 0 for the optimiser.
    batches += [[Tree(-1, (0,))]] * (max(1, most) - len(batches))
    return [pack(batch, run.world.device) for batch in batches]


def _broken_documents(model, forest: Forest, tree: Tensor, logprob: Tensor, known: set) -> set[int]:
    """Documents to blame if this forest's loss or gradient is not finite."""
    bad = tree[~logprob.isfinite()]
    if len(bad):
        return {forest.trees[i].document for i in bad.unique().tolist()}
    # The gradient of the lowest layer has passed through all others.
    grad = model.model.layers[0].input_layernorm.weight.grad
    grad = grad.to_local() if hasattr(grad, "to_local") else grad
    if known or grad is None or bool(grad.isfinite().all()):
        return set()
    return {tree.document for tree in forest.trees}


def _finish_update(run: Run, number: int, culprits: set[int], metrics: Metrics) -> bool:
    """Clip, then step, unless something was not finite; True if the model changed. All ranks.

    number: of the update in its step.
    """
    c, world = run.config, run.world
    with run.clock("optimizer"):
        norm = dist.grad_norm(run.model, c.grad_clip)
    metrics.add("update/grad_norm", norm, 1)
    updates = run.step * c.updates_per_batch + number + 1
    rate = c.learning_rate * min(1.0, updates / max(1, c.warmup_steps))
    metrics.add("update/learning_rate", rate, 1)
    with run.clock("communication"):
        broken = dist.reduce_max([bool(culprits) or not math.isfinite(norm)], world)[0]
    if broken:
        run.refused_in_a_row += 1
        names = {i for part in dist.gather_objects(culprits, world) for i in part if i >= 0}
        sources = [run.documents[i].source for i in sorted(names)]
        if world.rank == 0:
            print(
                f"step {run.step}: loss or gradient is not finite; no update. "
                f"Documents: {', '.join(sources) or 'unknown'}"
            )
        return False
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with run.clock("optimizer"):
        run.optimizer.step()
    run.refused_in_a_row = 0
    return True
