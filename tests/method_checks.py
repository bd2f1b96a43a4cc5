"""Checks of every knob through real steps; tests/test_knobs.py runs them on the code as it is, and
tests/method_mutants.py on broken copies of it. Each takes a folder with a toy model and its text.
"""

import json
import math
from unittest.mock import patch

import numpy as np
import torch
from method_step import assert_by_hand, copied, doubled, watched
from toy_forests import full_logits
from toy_runs import WORLD, prepared, write_thinker

import rmt.ask
import train
from rmt.metrics import Metrics
from rmt.presets import METHODS
from rmt.rollout import Rollout

MIXED = dict(temperature=1.0, group_size=3)  # some groups have right and wrong answers
QUANTILE = dict(tiers="quantile", tier_thresholds=(0.3, 0.6, 0.8))
LOSS = {  # settings of a step whose loss and gradient are checked by hand
    "loss": {},
    "step 2 of 3": dict(step=2),
    "micro-batches": dict(tokens_per_micro_batch=300),
    "kl_beta": dict(kl_beta=0.3, temperature=1.3, noise=0.05),
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
    "advantage_delta": dict(advantage_delta=0.3),
    "drop": dict(zero_variance_groups="drop", **MIXED),
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
    c = run.config
    assert seen.row["sampler_gap/max"] < 1e-9
    assert (seen.row["loss/ntp"] is not None) == c.ntp
    if c.updates_per_batch > 1:
        assert 0 < seen.row["policy/clipped"] < 1
    if c.zero_variance_groups == "drop":
        assert 0 < seen.row["share/zero_variance_groups"] < 1
    if c.kl_beta:
        assert seen.row["policy/kl"] > 1e-3
    lengths = [len(r.tokens) for group in seen.groups for r in group]
    assert len(lengths) == c.batch_size * c.group_size * c.positions_per_document
    assert c.max_response >= max(lengths) >= min(6, c.max_response)
    assert math.isclose(seen.row["length/response"], sum(lengths) / len(lengths))
    cut = [not r.finished for group in seen.groups for r in group]
    assert math.isclose(seen.row["share/cut_off"], sum(cut) / len(cut))


def check_matches(place) -> None:
    """Which answers are right, by each rule."""

    def said(run, text):
        tokens = run.tokenizer.encode_with_control(f"</think>\\boxed{{{text}}}")
        return Rollout(tokens, [-1.0] * len(tokens), True)

    for rule, wanted in (("token", [1, 0, 0, 0]), ("prefix", [1, 1, 1, 0])):
        run = prepared(place, match=rule, batch_size=2)
        _, questions = rmt.ask.draw_questions(run, 0, Metrics())
        groups = []
        for q in questions:
            text = run.tokenizer.decode(run.documents[q.document].tokens.tolist())[q.position :]
            other = "b" if text[0] == "a" else "a"
            groups.append([said(run, text[:n]) for n in (1, 2, 3)])
            groups[-1].append(said(run, other))
        with patch.object(rmt.ask, "generate", lambda *_: groups):  # noqa: B023
            rewards = rmt.ask.respond(run, run.model, questions, 0).rewards
        assert rewards["match"].tolist() == [wanted] * len(questions)


def check_optimizer(place) -> None:
    """Three updates are AdamW's by hand: betas, decay, clipped gradients, a warm-up of updates."""
    c = dict(adam_betas=(0.5, 0.7), weight_decay=0.3, grad_clip=0.2, learning_rate=0.01,
             warmup_steps=4, updates_per_batch=2, steps=3)  # fmt: skip
    run, _ = doubled(place, **c)
    first = {name: torch.zeros_like(p) for name, p in run.model.named_parameters()}
    second, number = {name: p.clone() for name, p in first.items()}, 0
    for step in range(3):
        seen = watched(run, step)
        after = [u.weights for u in seen.updates[1:]] + [copied(run)]
        for update, result in zip(seen.updates, after):
            number += 1
            norm = sum(g.square().sum() for g in update.gradient.values()) ** 0.5
            rate = 0.01 * min(1, number / 4)
            for name, g in update.gradient.items():
                g = g * min(1, 0.2 / float(norm + 1e-6))
                first[name] = 0.5 * first[name] + 0.5 * g
                second[name] = 0.7 * second[name] + 0.3 * g * g
                m, v = first[name] / (1 - 0.5**number), second[name] / (1 - 0.7**number)
                wanted = update.weights[name] * (1 - rate * 0.3) - rate * m / (v.sqrt() + 1e-8)
                assert (result[name] - wanted).abs().max() < 1e-9, (number, name)
            assert norm > 0.2 and seen.row["update/refused"] == 0


# ---- difficulty and curriculum


def tiers_by_hand(run):
    """Of each document that the run meets, from the entropies that it measured."""
    c, found = run.config, run.entropies
    cuts = c.tier_thresholds
    if c.tiers == "quantile":
        cuts = np.quantile(np.concatenate([e[c.min_context :] for e in found.values()]), cuts)
    tiers = {i: np.digitize(e, cuts) - 1 for i, e in found.items()}
    for each in tiers.values():
        each[: c.min_context] = -1
    return tiers


def check_tiers(place) -> None:
    for changes in (QUANTILE, dict(tiers="absolute", tier_thresholds=(3.2, 3.3, 3.36)),
                    dict(min_context=11)):  # fmt: skip
        run = prepared(place, **changes)
        wanted = tiers_by_hand(run)
        assert all((run.tiers[i] == each).all() for i, each in wanted.items())
        assert {-1, 0, 1, 2} <= set(np.concatenate(list(wanted.values())).tolist())
        _, questions = rmt.ask.draw_questions(run, 0, Metrics())
        assert all(q.tier == wanted[q.document][q.position] for q in questions)


def check_entropies(place) -> None:
    """Of the likeliest tokens, after the begin token, under --difficulty-model."""
    for name, seed in (("begun", 0), ("judge", 5)):
        write_thinker(place / name)
        path = place / name / "tokenizer_config.json"
        begin = dict(bos_token="<|im_start|>", add_bos_token=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | begin))
        if seed:
            scaled(place / name)
    for top, judge in ((0, ""), (5, ""), (5, str(place / "judge"))):
        changes = dict(model=str(place / "begun"), entropy_top_k=top, difficulty_model=judge)
        run = prepared(place, out=str(place / f"run{top}{bool(judge)}"), **changes)
        model = prepared(place, model=judge).model if judge else run.model
        (begin,) = run.tokenizer.begin_ids
        for index in (0, 3):
            tokens = [begin, *run.documents[index].tokens.tolist()]
            logits = full_logits(model, tokens, run.tokenizer.vocab_size).detach()[:-1]
            p = (logits.topk(top).values if top else logits).softmax(dim=-1)
            wanted = -(p * p.log()).sum(dim=-1)
            assert np.abs(run.entropies[index] - wanted.numpy()).max() < 1e-4


def scaled(directory) -> None:
    """Other weights in a model's directory."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file({name: 1.3 * w for name, w in load_file(path).items()}, path)


def check_schedule(place) -> None:
    """Tiers are drawn by early and late, from t1 to t2."""
    early, late = (0.0, 0.2, 0.8), (1.0, 0.0, 0.0)
    run = prepared(place, steps=20, curriculum_early=early, curriculum_late=late,
                   curriculum_start=0.1, curriculum_end=0.2)  # fmt: skip
    for step, u in ((0, 0), (2, 0), (3, 0.5), (4, 1), (19, 1)):
        wanted = [(1 - u) * a + u * b for a, b in zip(early, late)]
        assert np.allclose(rmt.ask.planned_tiers(run, step), wanted)
    tiers = lambda step: {q.tier for q in rmt.ask.draw_questions(run, step, Metrics())[1]}
    assert all(tiers(step) == {0} for step in range(4, 9))
    assert tiers(0) | tiers(1) | tiers(2) == {1, 2}
    other = prepared(place, steps=20, curriculum=False)
    assert rmt.ask.planned_tiers(other, 0) is None


def check_adaptive(place) -> None:
    """Tiers by their match rates, of late; what was missed often enough is noise."""
    run = prepared(place, curriculum_rule="adaptive", adaptive_floor=0.7, noise_tries=1, **MIXED)
    before = [0.9 * 0.5, 0.9]
    seen = watched(run)
    right = [sum(r == q.truth.decode() for r in said_by(run, group))
             for q, group in zip(seen.questions, seen.groups)]  # fmt: skip
    rates = np.tile(before, (3, 1))
    for q, n in zip(seen.questions, right):
        rates[q.tier] += (n, 3)
    assert np.allclose(run.curriculum.rates, rates) and sum(right) > 0
    p = rates[:, 0] / rates[:, 1]
    worth = 0.7 + 4 * p * (1 - p)
    assert np.allclose(rmt.ask.planned_tiers(run, 1), worth / worth.sum())
    missed = {(q.document, q.position) for q, n in zip(seen.questions, right) if not n}
    assert run.curriculum.noise == len(missed) > 0
    total = sum(len(d.tokens) for d in run.documents)
    assert math.isclose(seen.row["share/noise"], len(missed) / total)
    matched = next(q for q, n in zip(seen.questions, right) if n)
    run.curriculum.observe(matched.document, matched.position, matched.tier, 0, 3)
    assert run.curriculum.noise == len(missed)
    for step in range(50):
        for document, position in missed:
            draws, _ = run.curriculum.draw(step, document, None, 2)
            assert position not in [draw.position for draw in draws]


def said_by(run, group):
    from rmt.prompt import parse_response

    return [parse_response(run.tokenizer, rollout.tokens).text for rollout in group]


def check_counts(place) -> None:
    """Documents, positions, responses and tokens of a step are as many as were asked for."""
    run = prepared(place, batch_size=4, positions_per_document=2, group_size=3, max_response=17,
                   document_tokens=40, samples_per_step=5)  # fmt: skip
    row, samples = train.train_step(run, 0)
    assert max(len(d.tokens) for d in run.documents) == 40 and len(samples) == 5
    asked = Metrics()
    _, questions = rmt.ask.draw_questions(run, 1, asked)
    assert len(questions) == len({(q.document, q.position) for q in questions}) == 8
    assert asked.reduce(WORLD)["share/empty_tier_draws"] < 0.5
    assert len({q.document for q in questions}) == 4
    for document in range(3):  # also where one shuffle ends and the next begins
        eligible = int((run.tiers[document] >= 0).sum())
        run.curriculum.draw(0, document, None, 1)
        draws, missing = run.curriculum.draw(1, document, None, eligible + 2)
        assert len({draw.position for draw in draws}) == len(draws) == eligible
        assert missing == 2
    groups = rmt.ask.respond(run, run.model, questions, 1).groups
    assert {len(group) for group in groups} == {3}
    assert max(len(r.tokens) for group in groups for r in group) == 17
    assert [len(prepared(place, steps=0, epochs=n, batch_size=4).order) for n in (1.0, 2.5)] == [
        3, 8]  # fmt: skip


def check_ends(place) -> None:
    """Tokens and minutes of all steps end a run; a step's own are counted."""
    run = prepared(place, batch_size=2, max_tokens=10**6, max_minutes=60.0)
    row, _ = train.train_step(run, 0)
    trained = row["speed/train_tokens_per_second"] * row["time/update"]
    generated = row["length/response"] * 2 * 4
    assert math.isclose(row["tokens/step"], trained + generated, rel_tol=1e-6)
    assert run.tokens == row["tokens/step"] + row["tokens/dropped"] and not run.over
    assert run.seconds == row["time/step"] > 0
    run.seconds = 61.0
    assert not run.over
    for name, value in (("tokens", 10**6), ("seconds", 3600), ("step", run.total_steps)):
        before = getattr(run, name)
        setattr(run, name, value)
        assert run.over
        setattr(run, name, before)


def check_resampling(place) -> None:
    """From its step on, groups of equal matches are drawn anew, so often, with new numbers."""
    run = prepared(place, method="rpt", **METHODS["rpt"] | dict(resample_from=1, resample_tries=3,
                   group_size=2, match="token", min_context=44, batch_size=2))  # fmt: skip
    respond, tries = rmt.ask.respond, []

    def equal(*given, **options):
        said = respond(*given, **options)
        tries.append((options.get("attempt", 0), given[2]))
        said.rewards["match"][:] = 0
        return said

    with patch.object(rmt.ask, "respond", equal):
        for step, wanted in ((0, [0]), (1, [0, 1, 2, 3])):
            tries.clear()
            metrics = Metrics()
            _, questions = rmt.ask.draw_questions(run, step, metrics)
            rmt.ask.ask(run, run.model, questions, step, metrics)
            assert [attempt for attempt, _ in tries] == wanted
            places = [(q.document, q.position) for _, asked in tries for q in asked]
            assert len(places) == len(set(places)) >= len(wanted)
            assert (metrics.reduce(WORLD)["tokens/dropped"] > 0) == (len(wanted) > 1)
    draws = [respond(run, run.model, questions, 1, attempt=n).groups[0][0].tokens for n in (0, 1)]
    assert draws[0] != draws[1]


def check_task(place) -> None:
    """What is asked: the next token or a problem, in the words given; or nothing."""
    path = place / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"problem": "ab" * n, "answer": "a"}) for n in (4, 5)))
    solve = METHODS["grpo"] | dict(data=(str(path),), batch_size=2, problem_request="Now solve it.")
    run = prepared(place, method="grpo", **solve)
    _, questions = rmt.ask.draw_questions(run, 0, Metrics())
    assert {q.position for q in questions} == {8, 10}
    assert all(q.coming == (b"a",) and q.budget is None for q in questions)
    prompts = [run.tokenizer.decode(p.footer) for p in rmt.ask.prompts_of(run, questions)]
    assert all("Now solve it." in prompt and "exactly" not in prompt for prompt in prompts)
    row, _ = train.train_step(run, 0)
    assert row["loss/ntp"] is None and row["reward/length"] == 0
    run = prepared(place, method="ntp", **METHODS["ntp"])
    row, samples = train.train_step(run, 0)
    assert samples == [] and row["loss/rl"] == 0 and row["loss/ntp"] > 0
    texts = sum(len(run.documents[i].tokens) for i in run.order[0])
    assert math.isclose(row["tokens/step"], texts)
