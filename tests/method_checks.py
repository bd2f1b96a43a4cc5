"""Checks of every knob through real steps; tests/test_knobs.py runs them on the code as it is, and
tests/method_mutants.py on broken copies of it. Each takes a folder with a toy model and its text.
"""

import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from method_logged import assert_logged
from method_step import assert_by_hand, centred, copied, doubled, rewards, watched
from toy_models import causal
from toy_runs import draw, prepared, respond, stepped

import rmt.methods.cold_start
from rmt.config.presets import METHODS
from rmt.prompt import escape, next_token_prompt, parse_response
from rmt.questions import reward_responses, spread_budget
from rmt.sampling import Rollout

MIXED = dict(temperature=1.0, group_size=3)  # some groups have right and wrong answers
QUANTILE = dict(tiers="quantile", tier_thresholds=(0.3, 0.6, 0.8))
LOSS = {  # settings of a step whose loss and gradient are checked by hand
    "loss": {},
    "step 2 of 3": dict(step=2),
    "micro-batches": dict(tokens_per_micro_batch=300),
    "kl_beta": dict(kl_beta=0.3, temperature=1.3, noise=0.05),
    "lora_rank": dict(lora_rank=3, kl_beta=0.3, noise=0.05),
    "updates": dict(updates_per_batch=3, learning_rate=0.03, clip_low=0.02, clip_high=0.05),
    "wide clip": dict(updates_per_batch=2, learning_rate=0.1, clip_low=0.5, clip_high=0.01),
    "sequence-mean": dict(aggregation="sequence-mean"),
    "constant": dict(aggregation="constant"),
    "sequence-sum": dict(aggregation="sequence-sum"),
    "low_entropy": dict(ntp_scope="low_entropy", **QUANTILE),
    "all": dict(ntp_scope="all"),
    "ntp_reduction": dict(ntp_reduction="sum"),
    "ntp_weight": dict(ntp_weight=0.7),
    "no ntp": dict(ntp=False),
    "temperature": dict(temperature=1.5),
    "length_weight": dict(length_weight=0.4),
    "length_reward_max": dict(length_reward_max=2.5),
    "gate": dict(length_reward_gate="correct_only", **MIXED),
    "batch norm": dict(advantage_norm="batch", **MIXED),
    "norm none": dict(advantage_norm="none", **MIXED),
    "norm right": dict(advantage_norm="right", budget=False, **MIXED),
    "advantage_delta": dict(advantage_delta=0.3),
    "drop": dict(zero_variance_groups="drop", **MIXED),
    "truncated": dict(mask_truncated=True, group_size=6),
    "truncated mean": dict(mask_truncated=True, group_size=6, aggregation="sequence-mean"),
    "text_in": dict(text_in="thought", **MIXED),
    "traces": dict(traces="own", positions_per_document=3, max_response=90),
    "traces in the thought": dict(traces="own", text_in="thought", group_size=1, max_response=90),
    "no budget": dict(budget=False, **MIXED),
    "budget_start": dict(budget_start=3, step=1),
    "budget_decay": dict(budget_decay=0.8, step=2),
    "budget_min": dict(budget_decay=0.01, budget_min=3, step=2),
    "budget_entropy": dict(budget_entropy=0.7, max_response=24, steps=6, step=3),
}  # fmt: skip


def check_loss(place, name) -> None:
    """Loss and gradient of each update, and what is logged of them, are those of the formula."""
    settings = dict(LOSS[name])
    step, noise = settings.pop("step", 0), settings.pop("noise", 0.0)
    run, initial = doubled(place, noise, **settings)
    seen = watched(run, step, initial)
    assert_by_hand(seen)
    assert_logged(seen)
    c = run.config
    assert seen.row["sampler_gap/max"] < 1e-9
    assert (seen.row["loss/ntp"] is not None) == c.ntp
    if c.updates_per_batch > 1:
        assert 0 < seen.row["policy/clipped"] < 1
    if c.zero_variance_groups == "drop":
        assert 0 < seen.row["share/zero_variance_groups"] < 1
    if c.mask_truncated:
        ended = [r.finished for group in seen.groups for r in group]
        would_teach = centred(rewards(seen)[2]).flatten() != 0
        assert any(ended) and would_teach[np.logical_not(ended)].any()
    if c.kl_beta:
        assert seen.row["policy/kl"] > 1e-3
    lengths = [len(r.tokens) for group in seen.groups for r in group]
    assert len(lengths) == c.batch_size * c.group_size * c.positions_per_document
    assert c.max_response >= max(lengths) >= min(6, c.max_response)
    assert math.isclose(seen.row["length/response"], sum(lengths) / len(lengths))
    cut = [not r.finished for group in seen.groups for r in group]
    assert math.isclose(seen.row["share/cut_off"], sum(cut) / len(cut))


def gain_alone(run, question, response, answer):
    """log p of the token behind one thought: the whole sequence in one plain forward pass."""
    tokenizer, prompt = run.tokenizer, next_token_prompt(run.tokenizer, None)
    document = run.documents[question.document].tokens.tolist()
    text = bytes(tokenizer.bytes_of([document[question.position]])).decode()
    thought = response.tokens[: answer.thinking_length]
    closed = tokenizer.encode_with_control("</think>") + tokenizer.encode("\n\n\\boxed{")
    known = [*prompt.header, *document[: question.position], *prompt.footer, *thought, *closed]
    ids = torch.tensor(known + tokenizer.encode(text))
    hidden = run.model(ids, torch.arange(len(ids)), causal, lambda h, head: h @ head.T).detach()
    logp = hidden.double()[:, : tokenizer.vocab_size].log_softmax(-1)
    at = torch.arange(len(known), len(ids))
    return logp[at - 1, ids[at]].sum().item()


def check_gain(place) -> None:
    """RLP's reward (Eq. 16): the true token behind each thought, at temperature 1."""
    flags = dict(method="rlp", temperature=1.3, samples_per_step=99, **METHODS["rlp"])
    run, again = (prepared(place, **flags) for _ in range(2))
    batch = respond(run, draw(run))
    firsts = [(q, r[0], a[0]) for q, r, a in zip(batch.questions, batch.responses, batch.answers)]
    wanted = [gain_alone(run, *first) for first in firsts]
    _, samples = stepped(again)
    for sample, gain in zip(samples, wanted, strict=True):
        assert abs(sample["reward"]["total"] - gain) < 1e-4


def check_cold_start(place) -> None:
    """Given responses (Eq. 15): plain guesses, what they repeat, the answer, the budgets."""
    for text_in in ("thought", "question"):
        _assert_given(place, text_in)


def _assert_given(place, text_in) -> None:
    many = 200 if text_in == "thought" else 60
    run = prepared(place, traces="own", text_in=text_in, group_size=many, batch_size=4,
                   budget_start=24, max_response=60, temperature=1.7)  # fmt: skip
    drawn, contexts, draw_guesses = [], [], rmt.methods.cold_start.plain_guesses

    def noting(c, data, sampler, generate, *known):
        def seeing(model, trees, *how):
            branches = [(tree.trunk, branch) for tree in trees for branch in tree.branches]
            contexts.extend([*trunk[: b.fork], *b.stem] for trunk, b in branches)
            return generate(model, trees, *how)

        drawn.append(draw_guesses(c, data, sampler, seeing, *known))
        return drawn[0]

    with patch.object(rmt.methods.cold_start, "plain_guesses", noting):
        seen = watched(run)
    t, c = run.tokenizer, run.config
    end, stop = (t.encode_with_control(x)[0] for x in ("</think>", "<|im_end|>"))
    for question, group, guesses, seen_text in zip(
        seen.questions, seen.groups, drawn[0], contexts, strict=True
    ):
        text = run.documents[question.document].tokens[: question.position].tolist()
        assert seen_text == text  # raw, without a prompt
        logits = run.model(
            torch.tensor(text), torch.arange(len(text)), causal,
            lambda hidden, head: hidden[-1] @ head[: t.vocab_size].T,
        ).detach()  # fmt: skip
        found = torch.bincount(torch.tensor(guesses), minlength=t.vocab_size) / len(guesses)
        assert (found - (logits / 1.7).softmax(-1)).abs().max() < 3 * 0.5 / len(guesses) ** 0.5
        repeated = repeated_by_hand(question.budget, text_in == "thought", 3)
        for number, rollout in enumerate(group):
            own, by_hand = guesses[number :: c.group_size][: len(repeated)], []
            for k, guess in zip(repeated, own):
                control = guess in t.control_ids  # these are spelled in letters
                spelled = t.encode(t.decode([guess])) if control else [guess]
                mark = t.encode("\u200e") if k else []
                by_hand += [*text[len(text) - k :], *mark, *spelled, *t.encode("\n")]
            assert rollout.tokens[: len(by_hand) + 1] == [*by_hand, end]
            assert rollout.tokens[-1] == stop and rollout.finished and not rollout.logprobs
            most = max(own, key=lambda g: (own.count(g), -own.index(g)))
            said = parse_response(t, rollout.tokens).text
            assert said.encode() == t.bytes_of([most]) or said == escape(t.bytes_of([most]))
            if not set(own) & t.control_ids:
                assert len(by_hand) == question.budget
    of_seed = lambda seed: [spread_budget(replace(c, seed=seed), i, 3) for i in range(300)]
    budgets = of_seed(0)
    assert all(budgets[q.document] == q.budget for q in seen.questions)
    assert set(budgets) == set(range(12, 25)) and budgets != of_seed(1)


def repeated_by_hand(budget, in_thought, mark):
    """How many tokens of the text each guess repeats: 4, and what is left the first that does."""
    first, line = [0] if in_thought else [], 4 + mark + 2
    room = budget - 2 * len(first)
    count = max(1, room // line)
    return first + [4 + room - count * line] + [4] * (count - 1)


def check_matches(place) -> None:
    """Which answers are right, by each rule."""

    def said(run, text):
        tokens = run.tokenizer.encode_with_control(f"</think>\\boxed{{{text}}}")
        return Rollout(tokens, [-1.0] * len(tokens), True)

    for rule, wanted in (("token", [1, 0, 0, 0]), ("prefix", [1, 1, 1, 0])):
        run = prepared(place, match=rule, batch_size=2)
        questions = draw(run)
        groups = []
        for q in questions:
            text = run.tokenizer.decode(run.documents[q.document].tokens.tolist())[q.position :]
            other = "b" if text[0] == "a" else "a"
            groups.append([said(run, text[:n]) for n in (1, 2, 3)])
            groups[-1].append(said(run, other))
        rewards = reward_responses(run.config, run.tokenizer, questions, groups).rewards
        assert rewards["match"].tolist() == [wanted] * len(questions)


def check_optimizer(place) -> None:
    """Three updates are AdamW's by hand: betas, decay but of norms, clipping, warm-up."""
    c = dict(adam_betas=(0.5, 0.7), weight_decay=0.3, grad_clip=0.2, learning_rate=0.01,
             warmup_steps=4, updates_per_batch=2, steps=3)  # fmt: skip
    run, _ = doubled(place, **c)
    first = {name: torch.zeros_like(p) for name, p in run.model.named_parameters()}
    second, number = {name: p.clone() for name, p in first.items()}, 0
    for step in range(3):
        seen = watched(run, step)
        after, rates = [u.weights for u in seen.updates[1:]] + [copied(run)], []
        for update, result in zip(seen.updates, after):
            number += 1
            norm = sum(g.square().sum() for g in update.gradient.values()) ** 0.5
            rate = 0.01 * min(1, number / 4)
            rates.append(rate)
            for name, g in update.gradient.items():
                g = g * min(1, 0.2 / float(norm + 1e-6))
                first[name] = 0.5 * first[name] + 0.5 * g
                second[name] = 0.7 * second[name] + 0.3 * g * g
                m, v = first[name] / (1 - 0.5**number), second[name] / (1 - 0.7**number)
                decay = 0.0 if name.endswith("norm.weight") else 0.3
                wanted = update.weights[name] * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
                assert (result[name] - wanted).abs().max() < 1e-9, (number, name)
            assert norm > 0.2 and seen.row["update/refused"] == 0
        assert math.isclose(seen.row["update/learning_rate"], sum(rates) / len(rates))


def check_rates(place) -> None:
    """The rate of each update by hand: two rise, and the seventh, after T = 3 steps, would be 0."""
    line = (0.5, 1, 1, 0.75, 0.5, 0.25)
    bow = (0.5, 1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)
    for schedule, wanted in {
        "constant": (0.5, 1, 1, 1, 1, 1),
        "linear": line,
        "cosine": bow,
    }.items():
        run = prepared(place, lr_schedule=schedule, updates_per_batch=2, steps=3, warmup_steps=2,
                       batch_size=1, group_size=2, budget=False, max_response=4)  # fmt: skip
        found = []
        noting = lambda optimizer, *_, found=found: found.append(optimizer.param_groups[0]["lr"])
        run.optimizer.register_step_pre_hook(noting)
        rows = [stepped(run, step)[0] for step in range(3)]
        assert len(found) == 6
        assert all(map(math.isclose, found, (1e-3 * share for share in wanted)))
        logged = [row["update/learning_rate"] for row in rows]
        assert all(
            map(math.isclose, logged, [(a + b) / 2 for a, b in zip(found[::2], found[1::2])])
        )
