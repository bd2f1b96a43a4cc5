"""A real `train_step`, watched, and its loss by hand: full softmaxes of separate sequences.

Everything between the sampled tokens and the loss is written out here once more, from the formulas
of docs/method.md and from the run's knobs, in float64. G responses to each of P questions.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from toy_forests import alone
from toy_runs import prepared, stepped

import rmt.system.dist
import rmt.update
import train
from models.transformer import Transformer
from rmt.prompt import parse_response, prompt_for


@dataclass
class Update:
    """One update: weights before it, its loss and its gradient before it was clipped."""

    weights: dict
    loss: float
    gradient: dict


@dataclass
class Seen:
    """What a step did."""

    run: object
    step: int
    initial: dict = field(default_factory=dict)  # weights of the model that the run began with
    questions: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    updates: list = field(default_factory=list)
    clipped: list = field(default_factory=list)  # of each token that teaches, by hand
    row: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)


def copied(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def doubled(place, noise=0.0, **changes):
    """A run in float64 whose model has moved away from the initial one by some noise."""
    run = prepared(place, **dict(grad_clip=1e9, batch_size=3) | changes)
    for model in (run.model, run.reference):
        if isinstance(model, Transformer):  # with adapters the reference is the model without them
            model.double()
    initial, generator = copied(run), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, run.model.parameters()):
            p += noise * torch.randn(p.shape, generator=generator)
    return run, initial


def watched(run, step=0, initial=None) -> Seen:
    """One step, and what it did."""
    seen, loss, run.step = Seen(run, step, initial), [], step
    resample, forest_loss = train.replace_zero_variance, rmt.update.forest_loss
    grad_norm = rmt.system.dist.grad_norm

    def resampling(*given):
        batch, dropped = resample(*given)
        seen.questions, seen.groups = batch.questions, batch.responses
        return batch, dropped

    def losing(*given, **options):
        result = forest_loss(*given, **options)
        loss.append(float(result[0].detach()))
        return result

    def clipping(model, limit):
        learnt = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradient = {name: p.grad.detach().clone() for name, p in learnt}
        seen.updates.append(Update(copied(run), sum(loss), gradient))
        loss.clear()
        return grad_norm(model, limit)

    with ExitStack() as stack:
        for target, name, spy in (
            (train, "replace_zero_variance", resampling), (rmt.update, "forest_loss", losing),
            (rmt.system.dist, "grad_norm", clipping),
        ):  # fmt: skip
            stack.enter_context(patch.object(target, name, spy))
        seen.row, seen.samples = stepped(run, step)
    return seen


def with_weights(run, weights):
    """A model without adapters: where there are any, its matrices are W + 2 B A."""
    model = Transformer(run.model.config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            if (low := name.removesuffix("weight")) + "lora_A" in weights:
                p += 2 * weights[low + "lora_B"] @ weights[low + "lora_A"]
    return model


def gradient_by_hand(model, weights):
    """Of all weights, or of A and B from that of W + 2 B A: 2 Bᵀ G and 2 G Aᵀ."""
    of = {name: p.grad for name, p in model.named_parameters()}
    adapters = {}
    for name in (name for name in weights if name.endswith("lora_A")):
        low = name.removesuffix("lora_A")
        a, b, g = weights[name], weights[low + "lora_B"], of[low + "weight"]
        adapters |= {name: 2 * b.T @ g, low + "lora_B": 2 * g @ a.T}
    return adapters or of


# ---- budget, rewards, advantages


def budget(c, step, total, entropy):
    if not c.budget:
        return None
    everywhere = max(c.budget_min, math.floor(c.budget_start * c.budget_decay ** (step / total)))
    return max(1, math.floor(everywhere * min(2, max(0.5, entropy)) ** c.budget_entropy))


def rewards(seen):
    """(P, G) matches, length rewards and totals."""
    run, c, match, length_reward, total = seen.run, seen.run.config, [], [], []
    end = run.tokenizer.encode_with_control("</think>")[0]
    for question, group in zip(seen.questions, seen.groups):
        text = run.tokenizer.decode(run.documents[question.document].tokens.tolist())
        coming = text[question.position :]
        entropy = run.entropies[question.document][question.position]
        asked = budget(c, seen.step, run.total_steps, entropy)
        if c.traces:  # from B_T to B_0
            assert budget(c, 1, 1, entropy) <= question.budget <= c.budget_start
            asked = question.budget
        assert question.budget == asked
        for rollout in group:
            said = parse_response(run.tokenizer, rollout.tokens).text
            right = bool(said) and (
                said == coming[:1] if c.match == "token" else coming.startswith(said)
            )
            length = rollout.tokens.index(end) if end in rollout.tokens else None
            paid = 0.0
            if asked and length is not None and (right or c.length_reward_gate == "none"):
                paid = c.length_reward_max * max(0, 1 - abs(length - asked) / asked)
            w = c.length_weight if asked else 0
            match.append(float(right))
            length_reward.append(paid)
            total.append((1 - w) * right + w * paid)
    shape = (len(seen.questions), c.group_size)
    return [np.array(x).reshape(shape) for x in (match, length_reward, total)]


def centred(x):
    x = x - x.mean(axis=1, keepdims=True)
    x[np.ptp(x, axis=1) < 1e-12] = 0
    return x


def scale_of(c, total):
    return {
        "group": total.std(axis=1, keepdims=True) + c.advantage_delta,
        "batch": np.sqrt((centred(total) ** 2).mean()) + c.advantage_delta,
        "none": 1.0,
        "right": 1.0,
    }[c.advantage_norm]


def token_weights(c, lengths, kept):
    """Of each token of each response (P, G)."""
    tokens, responses = (lengths * kept).sum(), kept.sum()
    return {
        "token-mean": kept / max(1, tokens),
        "sequence-mean": kept / (lengths * max(1, responses)),
        "constant": kept / (max(1, responses) * c.max_response),
        "sequence-sum": kept / max(1, responses),
    }[c.aggregation]


# ---- the loss


def response_loss(seen, number):
    """Σ w (surrogate + β KL) before update `number`, as a function of the weights it has then."""
    run, c = seen.run, seen.run.config
    match, _, total = rewards(seen)
    advantage, kept = centred(total) / scale_of(c, total), np.ones_like(match)
    if c.traces or c.advantage_norm == "right":
        advantage = np.ones_like(total)
    if c.advantage_norm == "right":
        kept = match.copy()
    if c.zero_variance_groups == "drop":
        kept[np.ptp(match, axis=1) == 0] = 0
    if c.mask_truncated:
        ends = run.tokenizer.stop_ids
        kept *= [[r.tokens[-1] in ends for r in group] for group in seen.groups]
    lengths = np.array([[len(r.tokens) for r in group] for group in seen.groups], dtype=float)
    weight = token_weights(c, lengths, kept)
    model = with_weights(run, seen.updates[number].weights)
    old = with_weights(run, seen.updates[0].weights) if number else model
    first = with_weights(run, seen.initial) if c.kl_beta else None
    loss = torch.zeros((), dtype=torch.float64)
    for i, (question, group) in enumerate(zip(seen.questions, seen.groups)):
        known = (c.problem_request, c.text_in)
        prompt = prompt_for(c.task, run.tokenizer, question.budget, *known)
        text = run.documents[question.document].tokens[: question.position].tolist()
        before = [*prompt.header, *text, *prompt.footer]
        for j, rollout in enumerate(group):
            tokens = [*before, *rollout.tokens]
            mask = np.arange(len(tokens)) >= len(before)
            known = (tokens, mask, c.temperature, run.tokenizer.vocab_size)
            score = lambda m: alone(m, *known)  # noqa: B023
            logprob, a = score(model), float(advantage[i, j])
            before_it = score(old) if number else logprob
            ratio = (logprob - before_it.detach()).exp()
            clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
            term = -torch.minimum(a * ratio, a * clipped)
            if c.kl_beta or a * weight[i, j]:
                seen.clipped += (a * clipped < a * ratio).tolist()
            if c.kl_beta:
                gap = score(first).detach() - logprob
                term = term + c.kl_beta * (gap.exp() - gap - 1)
            loss = loss + float(weight[i, j]) * term.sum()
    return loss, model


def text_loss(seen, model):
    """λ L_NTP of the step's documents, and the mean of its tokens."""
    run, c, parts, begin = seen.run, seen.run.config, [], seen.run.tokenizer.begin_ids
    lowest = c.tier_thresholds[0]
    if c.tiers == "quantile":
        found = np.concatenate([e[c.min_context :] for e in run.entropies.values()])
        lowest = np.quantile(found, lowest)
    asked = {(q.document, q.position) for q in seen.questions}
    for index in run.order[seen.step].tolist():
        tokens = run.documents[index].tokens.tolist()
        place = np.arange(len(tokens))
        mask = place >= (not begin)
        if c.ntp_scope == "low_entropy":
            mask &= (run.entropies[index] < lowest) & (place >= c.min_context)
        if c.ntp_scope != "all":
            mask &= [(index, p) not in asked for p in place.tolist()]
        mask = np.concatenate((np.zeros(len(begin), dtype=bool), mask))
        parts.append(alone(model, [*begin, *tokens], mask, vocabulary=run.tokenizer.vocab_size))
    logprobs = torch.cat(parts)
    loss = -c.ntp_weight * (logprobs.mean() if c.ntp_reduction == "mean" else logprobs.sum())
    return loss, -float(logprobs.detach().mean())


def assert_by_hand(seen) -> None:
    """Loss and gradient of each update are those of the formula."""
    c = seen.run.config
    assert len(seen.updates) == c.updates_per_batch
    for number, update in enumerate(seen.updates):
        loss, model = response_loss(seen, number)
        responses = float(loss.detach())
        assert number or abs(seen.row["loss/rl"] - responses) < 1e-8, (seen.row, responses)
        if c.ntp:
            text, mean = text_loss(seen, model)
            loss = loss + text
            assert number or abs(seen.row["loss/ntp"] - mean) < 1e-8, (seen.row["loss/ntp"], mean)
        loss.backward()
        assert abs(update.loss - float(loss.detach())) < 1e-8, (number, update.loss, loss)
        wanted = gradient_by_hand(model, update.weights)
        assert update.gradient.keys() == wanted.keys()
        off = sum((update.gradient[n] - g).square().sum() for n, g in wanted.items()) ** 0.5
        size = sum(g.square().sum() for g in wanted.values()) ** 0.5
        assert off <= 1e-7 * size and size > 0, (number, float(off), float(size))
