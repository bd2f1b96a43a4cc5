"""Checks of what runs keep and how they evaluate; see tests/method_checks.py."""

from dataclasses import asdict
from unittest.mock import patch

import numpy as np
import torch
from method_step import copied
from toy_runs import WORLD, Prepared, draw, prepared, respond, stepped, write_files

import rmt.evaluation.evaluate
import train
from rmt.config.config import Config
from rmt.engine.held_out import evaluate_held_out
from rmt.engine.protocol import protocol
from rmt.engine.run import prepare, resolve, save


def check_seed(place) -> None:
    """Another seed is another order and other responses; the same is the same."""
    found, questions = [], None
    for seed in (3, 3, 4):
        run = prepared(place, seed=seed, batch_size=2)
        own = draw(run)
        questions = questions or own  # the same for all seeds
        groups = respond(run, questions).responses
        found.append((run.order.tolist(), own, groups))
    for first, same, other in zip(*found):
        assert first == same != other


def check_resume(place) -> None:
    """All that a run knows comes back: weights, moments, curriculum, counts, T, the reference."""
    changes = dict(kl_beta=0.1, steps=5, out=str(place / "kept"))
    run = prepared(place, **changes)
    initial = copied(run)
    for step in range(2):
        stepped(run, step)
        run.step += 1
    run.refused_in_a_row = 2
    save(*run)
    again = Prepared(*prepare(resolve(Config(resume=run.config.out), WORLD)[0], WORLD))
    assert (again.step, again.refused_in_a_row, again.total_steps) == (2, 2, 5)
    assert (again.tokens, again.seconds) == (run.tokens, run.seconds) and run.tokens > 0
    assert np.array_equal(again.curriculum.drawn, run.curriculum.drawn)
    assert run.curriculum.drawn.sum() > 0
    for name, p in again.reference.named_parameters():
        assert torch.equal(p, initial[name])
    assert all(torch.equal(p, copied(run)[name]) for name, p in copied(again).items())
    first, second = (list(r.optimizer.state.values()) for r in (run, again))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    rows = [stepped(r, 2)[0] for r in (run, again)]
    assert rows[0]["loss/rl"] == rows[1]["loss/rl"]
    assert [k for k, v in asdict(run.config).items() if asdict(again.config)[k] != v] == ["resume"]


def check_adapters(place) -> None:
    """All matrices of the layers have an adapter, which starts at 0 and alone is trained."""
    starts = [copied(prepared(place, lora_rank=3, seed=seed)) for seed in (3, 3, 4)]
    run = prepared(place, lora_rank=3, seed=3)
    learnt = [n for n, p in run.model.named_parameters() if p.requires_grad]
    matrices = [n for n, p in run.model.model.layers.named_parameters(prefix="model.layers")
                if p.dim() == 2 and n.endswith("_proj.weight")]  # fmt: skip
    ends = ("lora_A", "lora_B")
    assert len(matrices) == 14
    assert set(learnt) == {n.removesuffix("weight") + e for n in matrices for e in ends}
    for name in learnt:
        first, same, other = (start[name] for start in starts)
        if name.endswith("lora_A"):
            assert torch.equal(first, same) and not torch.equal(first, other)
            most = first.shape[1] ** -0.5
            assert 0.7 * most < first.max() <= most and 0.7 * most < -first.min() <= most
        else:
            assert not first.any()
    stepped(run)
    for name, p in copied(run).items():
        assert torch.equal(p, starts[0][name]) != (name in learnt), name


class Log:
    def __init__(self):
        self.rows = []

    def evaluation(self, step, rows, *rest):
        self.rows.append((step, rows))

    def message(self, text):
        pass


def check_held_out(place) -> None:
    """The positions of an evaluation in a run, its budget, its decoding."""
    held = place / "data.jsonl"
    run = prepared(place, eval_data=(str(held),), eval_positions=3, steps=4, min_context=11)
    positions = run.held_out[1].positions
    assert len(positions) == 9 and min(p.position for p in positions) >= 11
    assert any(p.position in range(11, 30) for p in positions)
    asked, generate = [], rmt.evaluation.evaluate.generate

    def watched(model, trees, samples, sampling):
        asked.append((trees, samples, sampling))
        return generate(model, trees, samples, sampling)

    run.step, log = 1, Log()
    with patch.object(rmt.evaluation.evaluate, "generate", watched):
        evaluate_held_out(*run, log)
        greedy = prepared(place, eval_data=(str(held),), eval_positions=3, eval_decoding="greedy",
                          steps=4, temperature=0.6)  # fmt: skip
        evaluate_held_out(*greedy, Log())
    temperatures = [sampling.temperature for *_, sampling in asked]
    assert set(temperatures) == {0.8, 0.0} and sorted(temperatures)[::-1] == temperatures
    last = f"exactly {max(1, int(8 * 0.5))} tokens"
    for trees, samples, sampling in asked:
        assert samples == 1 and sampling.max_new_tokens == 16
        prompts = [run.tokenizer.decode(list(b.stem)) for tree in trees for b in tree.branches]
        assert all(last in prompt for prompt in prompts)
    assert asked and log.rows[0][0] == 1
    every = prepared(place, eval_data=(str(held),), eval_positions=1, eval_every=2, steps=3,
                     out=str(place / "every"))  # fmt: skip
    noting = lambda run, setup, log: log.append(run.step)
    with patch.object(train, "evaluate_held_out", noting):
        log = EveryStep()
        train.run_to_end(*every, log)
    assert log == [0, 2, 3]


class EveryStep(list):
    """Steps at which a run evaluates; what else it logs is dropped."""

    def step(self, *_):
        pass

    documents = probes = message = evaluation = step


def check_eval_script(place) -> None:
    """eval.py asks what its flags say: mode, budget, positions, decoding."""
    import eval as script

    asked, generate = [], rmt.evaluation.evaluate.generate

    def watched(model, trees, samples, sampling):
        asked.append((trees, samples, sampling))
        return generate(model, trees, samples, sampling)

    write_files(place)
    common = ["--model", place / "thinker", "--data", place / "data.jsonl",
              "--document-tokens", 128, "--tiers", "quantile", "--tier-thresholds", 0, 0.33, 0.66,
              "--entropy-top-k", 0,
              "--min-context", 8, "--max-response", 24, "--max-branches", 64]  # fmt: skip
    warm = ["--decoding", "sampled", "--temperature", 0.7]
    for number, (flags, budget, temperature, seed) in enumerate((
        (["--mode", "rmt", "--budget", 5, "--decoding", "greedy"], 5, 0.0, 3),
        (["--mode", "ntr", "--decoding", "greedy"], None, 0.0, 3),
        (["--mode", "rmt", "--budget", 9, *warm], 9, 0.7, 3),
        (["--mode", "rmt", "--budget", 9, *warm, "--sampling-seed", 6], 9, 0.7, 6),
    )):  # fmt: skip
        asked.clear()
        own = ["--per-tier", 2, "--positions", place / f"positions{number}.json", "--seed", 3]
        given = [str(x) for x in common + own + flags]
        with patch.object(rmt.evaluation.evaluate, "generate", watched):
            typed, options = script.read_arguments(given)
            shared = {name: value for name, value in typed.items() if name != "per_tier"}
            asking = protocol(shared, options.mode)
            found = script.evaluate(typed, asking, options, WORLD)
        assert len(found["items"]) == 6 and found["budget"] == budget
        (sampling,) = {s[2] for s in asked}
        assert (sampling.temperature, sampling.max_new_tokens) == (temperature, 24)
        assert (sampling.seed, sampling.purpose) == (seed, "evaluate")
        assert {item["budget"] for item in found["items"]} == {budget}


def check_budget_of_a_model(place) -> None:
    """eval.py asks a model for B_T of the run that made it."""
    run = prepared(place, out=str(place / "made"), steps=1, budget_decay=0.25, budget_entropy=0.5,
                   max_response=24, probe_documents=0)  # fmt: skip
    with train.RunLog(run.out, run.config, 0, 1, WORLD) as log:
        train.run_to_end(*run, log)
    typed = dict(model=str(run.out / "model"), data=(str(place / "data.jsonl"),))
    asking = protocol(typed, "")
    assert (asking.budget, asking.config.budget_entropy, asking.mode) == (2, 0.5, "rmt")
