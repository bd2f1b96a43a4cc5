"""Checks with models that need more care: a begin token, two ends, rows of padding that would win;
and of the settings that an evaluation takes from a run. See tests/method_checks.py.
"""

import json
from unittest.mock import patch

import numpy as np
import torch
from method_step import assert_by_hand, budget, doubled, watched
from toy_forests import alone, full_logits
from toy_runs import WORLD, begins_with, prepared, stepped, write_thinker

import rmt.engine.held_out
import rmt.engine.step_metrics
import rmt.evaluation.evaluate
import rmt.report.probe
import rmt.rollout
import train
from models.tokenizer import Tokenizer
from rmt.config.presets import METHODS
from rmt.engine.held_out import evaluate_held_out
from rmt.engine.log import RunLog
from rmt.engine.protocol import protocol
from rmt.evaluation.evaluate import nats_per_token, predict_plainly, predict_thinking
from rmt.evaluation.positions import Position
from rmt.report.probe import ask_probes
from rmt.sampling import PURPOSES, Rollout, Sampling


def begun(place):
    """A model whose texts begin with a token, and whose responses end with either of two."""
    write_thinker(place / "begun")
    begins_with(place / "begun", "<|im_start|>")
    ends = Tokenizer(place / "begun").encode_with_control("<|im_end|>b")
    path = place / "begun/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ends}))
    return str(place / "begun")


def check_begin(place) -> None:
    """Raw text is learnt and predicted after its begin token; padding is never predicted."""
    run, initial = doubled(place, model=begun(place))
    (begin,), vocabulary = run.tokenizer.begin_ids, run.tokenizer.vocab_size
    assert_by_hand(watched(run, 0, initial))
    with torch.no_grad():  # so that what stands before matters
        for layer in run.model.model.layers:
            layer.self_attn.o_proj.weight *= 40
        run.model.head.normal_(generator=torch.Generator().manual_seed(2))
        run.model.head[vocabulary:] *= 9
    texts = [document.tokens.tolist() for document in run.documents[:4]]
    asked = [(d, p) for d, text in enumerate(texts) for p in range(8, len(text))]
    known = (run.model, run.tokenizer, run.documents[:4])
    positions = [Position(d, p, 1.0, "hard", texts[d][p]) for d, p in asked]
    items = predict_plainly(*known, positions, 100, WORLD)
    logits = [full_logits(run.model, [begin, *text], vocabulary).detach() for text in texts]
    assert [i["predicted"] for i in items] == [int(logits[d][p].argmax()) for d, p in asked]
    assert [i["match"] for i in items] == [i["predicted"] == texts[d][p]
                                           for i, (d, p) in zip(items, asked)]  # fmt: skip
    every = torch.cat([
        alone(run.model, [begin, *text], np.arange(len(text) + 1) > 0, vocabulary=vocabulary)
        for text in texts
    ])  # fmt: skip
    assert abs(nats_per_token(*known, 100, WORLD) + float(every.detach().mean())) < 1e-9


def check_stops(place) -> None:
    """Every end of a response, the run's seed, and its budgets by position reach the sampler."""
    run = prepared(place, model=begun(place), eval_data=(str(place / "data.jsonl"),), seed=5,
                   eval_positions=3, budget_entropy=0.7, max_response=24)  # fmt: skip
    asked, found, generate = [], [], rmt.evaluation.evaluate.generate

    def watching(model, trees, samples, sampling):
        groups = generate(model, trees, samples, sampling)
        asked.append((sampling, [r for group in groups for r in group]))
        return groups

    def keeping(*given):
        found.extend(predict_thinking(*given))
        return found

    class Log:
        def evaluation(self, *_):
            pass

        message = evaluation

    with patch.object(rmt.rollout, "generate", watching), \
            patch.object(rmt.report.probe, "generate", watching), \
            patch.object(rmt.evaluation.evaluate, "generate", watching), \
            patch.object(rmt.engine.held_out, "predict_thinking", keeping):  # fmt: skip
        stepped(run, 0)
        evaluate_held_out(*run, Log())
        ask_probes(*run)
    ends = set(run.tokenizer.stop_ids)
    assert len(ends) == 2 and {sampling.purpose for sampling, _ in asked} == set(PURPOSES)
    for sampling, rollouts in asked:
        assert (set(sampling.stop_ids), sampling.seed) == (ends, 5)
        assert {r.tokens[-1] for r in rollouts if r.finished} <= ends
        assert not any(ends & set(r.tokens[:-1]) for r in rollouts)
    wanted = [budget(run.config, run.total_steps, run.total_steps, i["entropy"]) for i in found]
    assert [i["budget"] for i in found] == wanted and 4 not in wanted, "B_T is 4 for all"


def check_prefix(place) -> None:
    """An answer of several tokens is wrong by token, and right by prefix."""
    run = prepared(place)
    text = run.documents[0].tokens.tolist()
    said = run.tokenizer.decode(text[9:11])
    tokens = run.tokenizer.encode_with_control(f"</think>\\boxed{{{said}}}")
    positions = [Position(0, 9, 1.0, "hard", text[9])]
    sampling = Sampling(16, run.tokenizer.stop_ids, run.tokenizer.vocab_size)
    groups = [[Rollout(tokens, [-1.0] * len(tokens), True)]]
    with patch.object(rmt.evaluation.evaluate, "generate", lambda *_: groups):
        known = (run.model, run.tokenizer, run.documents, positions, None, 0.0)
        (item,) = predict_thinking(*known, sampling, WORLD)
    assert (item["match"], item["prefix_match"], item["predicted"]) == (False, True, None)


def check_requests(place) -> None:
    """An evaluation asks a problem in the words of its run, or in those that are typed, and knows
    every end of a response.
    """
    import eval as script

    path = place / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"problem": "ab" * n, "answer": "a"}) for n in (4, 5)))
    data, words = (str(path),), "Now solve it."
    run = prepared(place, method="grpo", **METHODS["grpo"], data=data, eval_data=data,
                   batch_size=2, problem_request=words, model=begun(place))  # fmt: skip
    asked, generate = [], rmt.evaluation.evaluate.generate

    def watching(model, trees, samples, sampling):
        assert len(sampling.stop_ids) == 2
        asked.extend(run.tokenizer.decode(list(b.stem)) for t in trees for b in t.branches)
        return generate(model, trees, samples, sampling)

    with patch.object(rmt.evaluation.evaluate, "generate", watching):
        with RunLog(run.out, run.config, 0, 1, WORLD) as log:
            evaluate_held_out(*run, log)
        given = ["--model", run.config.model, "--data", str(path), "--mode", "problems",
                 "--problem-request", words, "--document-tokens", "128", "--max-response", "16",
                 "--max-branches", "4"]  # fmt: skip
        typed, options = script.read_arguments(given)
        script.evaluate(typed, protocol(typed, options.mode), options, WORLD)
        typed, options = script.read_arguments([*given, "--limit", "1"])
        script.evaluate(typed, protocol(typed, options.mode), options, WORLD)
    assert len(asked) == 5 and all(words in prompt for prompt in asked)


def check_taken(place) -> None:
    """What eval.py takes of the run that made a model; what is typed wins."""
    import eval as script

    write_thinker(place / "judge")
    taken = dict(
        weights=str(place), text_fields=("text",), document_tokens=90, min_context=9,
        entropy_top_k=3, tiers="quantile", tier_thresholds=(0.1, 0.4, 0.7), max_response=91,
        temperature=1.1, problem_request="Say it.", budget_entropy=1.0,
        difficulty_model=str(place / "judge"),
    )  # fmt: skip
    run = prepared(place, out=str(place / "made"), steps=1, probe_documents=0,
                   budget_start=40, **taken)  # fmt: skip
    with RunLog(run.out, run.config, 0, 1, WORLD) as log:
        train.run_to_end(*run, log)
    typed = dict(model=str(run.out / "model"), data=(str(place / "data.jsonl"),))
    config = protocol(typed, "").config
    assert {name: getattr(config, name) for name in taken} == taken
    for name, value in dict(temperature=0.3, min_context=11, difficulty_model="x").items():
        assert getattr(protocol(typed | {name: value}, "").config, name) == value
    flags = ["--model", typed["model"], "--data", *typed["data"], "--per-tier", "3",
             "--positions", str(place / "positions.json")]  # fmt: skip
    own, options = script.read_arguments(flags)
    shared = {name: value for name, value in own.items() if name != "per_tier"}
    found = script.evaluate(own, protocol(shared, ""), options, WORLD)
    wanted = [budget(run.config, 1, 1, item["entropy"]) for item in found["items"]]
    assert [item["budget"] for item in found["items"]] == wanted and max(wanted) > 20


def check_text_in_taken(place) -> None:
    """Evaluations put the text where the run did."""
    import eval as script

    data = (str(place / "data.jsonl"),)
    run = prepared(place, out=str(place / "made"), steps=1, probe_documents=0, text_in="thought",
                   eval_data=data, eval_positions=2)  # fmt: skip
    prompts, generate = [], rmt.evaluation.evaluate.generate

    def watching(model, trees, samples, sampling):
        prompts.extend(run.tokenizer.decode(list(tree.trunk)) for tree in trees)
        return generate(model, trees, samples, sampling)

    with patch.object(rmt.evaluation.evaluate, "generate", watching):
        with RunLog(run.out, run.config, 0, 1, WORLD) as log:
            train.run_to_end(*run, log)
        known = len(prompts)
        flags = ["--model", str(run.out / "model"), "--data", *data, "--per-tier", "2",
                 "--positions", str(place / "positions.json")]  # fmt: skip
        own, options = script.read_arguments(flags)
        shared = {name: value for name, value in own.items() if name != "per_tier"}
        script.evaluate(own, protocol(shared, ""), options, WORLD)
    assert 0 < known < len(prompts)
    assert all("assistant\n<think>\n" in p and "### Context" not in p for p in prompts)


def check_curriculum_seed(place) -> None:
    """Tiers and positions of a document, and those of an evaluation, are drawn by the seed."""
    found = []
    for seed in (3, 3, 4):
        run = prepared(place, seed=seed, eval_data=(str(place / "data.jsonl"),), eval_positions=3)
        draw, each = run.curriculum.draw, range(len(run.documents))
        easy = [draw(0, d, np.array([1.0, 0.0, 0.0]), 2)[0] for d in each]
        tiers = [run.tiers[d][draw(1, d, np.full(3, 1 / 3), 1)[0][0]] for d in each]
        found.append((easy, tiers, run.held_out[1].positions))
    for first, same, other in zip(*found):
        assert first == same != other
    assert len(set(found[0][1])) == 3, "each document has its own numbers"


def check_dtype(place) -> None:
    """What was measured in one dtype is not taken for what another would measure."""
    runs = [
        prepared(place, dtype=dtype, out=str(place / dtype)) for dtype in ("float32", "bfloat16")
    ]
    exact, rounded = (np.concatenate(list(run.entropies.values())) for run in runs)
    assert (np.isfinite(exact) & (exact != rounded)).mean() > 0.5


def check_work(place) -> None:
    """An update is three passes over its trees, two if weights are frozen; scoring is one."""
    more = dict(updates_per_batch=2)
    for changes, passes in (
        ({}, 3),
        (more, 7),
        (dict(kl_beta=0.1), 4),
        (more | dict(kl_beta=0.1), 8),
        (more | dict(kl_beta=0.1, lora_rank=2), 6),
    ):
        run, found = prepared(place, batch_size=2, **changes), []

        def idle(sampling, flops, update):
            found.extend(flops)  # noqa: B023 - called at once
            return 0.0

        metrics = rmt.engine.step_metrics
        with patch.object(metrics, "idle_share", idle), \
                patch.object(metrics, "forward_flops", lambda *_: 10.0):  # fmt: skip
            stepped(run, 0)
        assert found == [10.0 * passes]
