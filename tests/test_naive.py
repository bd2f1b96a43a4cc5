"""The naive twin: ordinary sequences, and the forest changes nothing but time."""

import json

import pytest
import torch
from small_run import equal, flags, run_here, weights
from toy_forests import (
    TOKENS,
    alone,
    assert_same_gradients,
    gradients,
    grouped_trees,
    sequences,
    set_adapters,
    toy_model,
    toy_trees,
)
from toy_runs import SETTINGS, WORLD, learn, prepared, stepped, write_files

from kernels import linear_entropy_logprob
from rmt import naive, rollout
from rmt.objective import Targets
from rmt.sampling import Sampling
from rmt.system.metrics import Metrics

CLOCK = ("time/", "speed/", "memory/")


@pytest.fixture(params=[toy_trees, grouped_trees], ids=["alone", "grouped"])
def trees(request):
    return request.param()


def scored(model, row):
    """log p of all targets of a row. (n,)"""
    targets = Targets.of(row)
    readout = lambda hidden, head: linear_entropy_logprob(
        targets.read(hidden), head, targets.token, vocab_size=TOKENS
    )[0]
    return model(row.tokens, row.position, row.attend, readout)


def test_each_sequence_is_scored_as_if_it_were_alone(trees):
    model = toy_model()
    expected = torch.cat([alone(model, tokens, mask) for tokens, mask, _ in sequences(trees)])
    given = scored(model, naive.pack(trees))
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-12)
    weigh = lambda x: (torch.linspace(-1, 1.7, len(x), dtype=x.dtype) * x).sum()
    both = (gradients(model, weigh(x)) for x in (given, expected))
    assert_same_gradients(*both, 1e-10)


def test_targets_know_their_rollout_and_their_tree(trees):
    targets = Targets.of(naive.pack(trees))
    expected = [
        (-1 if branch is None else branch.id, number)
        for number, tree in enumerate(trees)
        for _, mask, branch in sequences([tree])
        for _ in range(int(mask.sum()))
    ]
    assert list(zip(targets.rollout.tolist(), targets.tree.tolist())) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_responses_are_those_of_the_sampler_with_a_cache(temperature):
    model, trees = toy_model(), [tree for tree in toy_trees() if tree.branches]
    trees = [
        type(tree)(tree.document, tree.trunk, [type(b)(b.id, b.fork, [*b.stem, 7])
                                               for b in tree.branches]) for tree in trees
    ]  # fmt: skip
    sampling = Sampling(12, (3, 5, 11), TOKENS, temperature, max_branches=4, seed=2)
    fast, slow = (module.generate(model, trees, 3, sampling) for module in (rollout, naive))
    assert len(fast) == len(slow) == sum(len(tree.branches) for tree in trees)
    for ours, theirs in zip(fast, slow):
        assert [r.tokens for r in ours] == [r.tokens for r in theirs]
        assert [r.finished for r in ours] == [r.finished for r in theirs]
        for a, b in zip(ours, theirs):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)
    assert temperature == 0 or {r.finished for group in fast for r in group} == {True, False}


def test_nobody_who_is_asked_has_nothing_to_say():
    for module in (rollout, naive):
        assert module.generate(toy_model(), [], 3, Sampling(12, (3,), TOKENS)) == []


@pytest.mark.parametrize("rank", [0, 3])
def test_a_naive_step_is_the_step(tmp_path, rank):
    """Same responses, losses and gradients, in fp64."""
    found, given = [], dict(batch_size=3, updates_per_batch=2, kl_beta=0.1, lora_rank=rank)
    for flag in (False, True):
        run = prepared(tmp_path, naive=flag, **given)
        for model in (run.model, *(() if rank else (run.reference,))):
            model.double()
        set_adapters(run.model)
        row, samples = stepped(run, 0)
        learnt = ((name, p) for name, p in run.model.named_parameters() if p.requires_grad)
        gradient = {name: p.grad.clone() for name, p in learnt}
        found.append((row, samples, gradient))
    (fast, said, ours), (slow, told, theirs) = found
    assert said == told and len(said) == 3
    assert fast.keys() == slow.keys()
    saved = ("share/forest_saved", "sampler_gap/mean", "sampler_gap/max")
    for name, value in fast.items():
        if not name.startswith(CLOCK) and name not in saved:
            expected = None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
            assert slow[name] == expected, name
    assert fast["share/forest_saved"] > 0.2 and slow["share/forest_saved"] == 0
    assert_same_gradients(ours, theirs, 1e-8)


def test_micro_batches_change_no_naive_loss(tmp_path):
    """A row of naive sequences may be longer than the limit, which counts a trunk once."""
    results = []
    for limit in (100_000, 30):
        run = prepared(tmp_path, tokens_per_micro_batch=limit)
        trees = toy_trees()
        groups = [[rollout.Rollout(b.response, [0.0] * len(b.response))]
                  for tree in trees for b in tree.branches]  # fmt: skip
        advantage = torch.linspace(-1, 1, len(groups), dtype=torch.float64)[:, None]
        run.model.double()
        metrics = Metrics()
        learn(run, trees, groups, advantage, torch.zeros_like(advantage), metrics, naive.pack)
        row = metrics.reduce(WORLD)
        results.append((row["loss/rl"], row["loss/ntp"], row["update/grad_norm"]))
    assert results[0][1:] == pytest.approx(results[1][1:], rel=1e-9)


def test_train_py_runs_naively_and_ends_with_the_same_model(tmp_path):
    write_files(tmp_path)
    files = dict(model=tmp_path / "thinker", data=tmp_path / "data.jsonl", probe_documents=0)
    for name, more in (("fast", {}), ("slow", dict(naive=True))):
        run_here(*flags(**SETTINGS | files | more | dict(out=tmp_path / name, steps=2)))
    first, second = (weights(tmp_path / name / "model") for name in ("fast", "slow"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)
    assert not equal(first, weights(tmp_path / "thinker"))
    assert json.loads((tmp_path / "slow/run.json").read_text())["config"]["naive"]
