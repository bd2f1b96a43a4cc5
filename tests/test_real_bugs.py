"""The bugs that good codebases really had, each with the test that is its.

stop token dropped and so never trained     here, and test_rollout: ..._the_end_token_is_kept
top-k sampled but full softmax scored       test_rollout: ..._follow_the_softmax_at_the_...,
                                            ..._are_the_ones_that_training_scores
label tensor zeroed through a view          here, and test_objective: ..._as_it_was
denominator per rank or per micro-batch     test_objective: ..._micro_batches_of_any_size_...,
                                            test_distributed: ..._do_not_depend_on_world_size
logged loss = last micro-batch              here
first token shared by a whole group         test_rollout: ..._does_not_share_its_first_token
gradient clipped before synchronised        test_distributed: ..._after_it_was_synchronised
random numbers off by one on resume         here
padded vocabulary rows sampled              test_rollout: ..._rows_are_never_sampled
cache reused after a weight update          test_rollout: ..._leaves_nothing_of_the_old_cache
gradient silently zero                      here
evaluation on rank 0 while others wait      test_distributed: ..._runs_on_all_ranks_...
eval() of model text                        here
"""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_structure import SOURCES
from toy_runs import draw, learn, prepared, stepped

from rmt.engine.run import save
from rmt.forest import pack
from rmt.objective import Targets
from rmt.prompt import next_token_prompt
from rmt.questions import question_trees, text_trees
from rmt.sampling import Rollout
from rmt.system.metrics import Metrics

CLOCK = ("time/", "speed/", "memory/")


def without_clock(row):
    return {name: value for name, value in row.items() if not name.startswith(CLOCK)}


def answered_trees(run, response):
    """Trees of step 0 in which every rollout is `response`, and their rollouts."""
    questions = draw(run)
    groups = [[Rollout(response, [0.0] * len(response))] * 4 for _ in questions]
    prompts = [next_token_prompt(run.tokenizer, 8)] * len(questions)
    return questions, question_trees(questions, run.documents, prompts, groups), groups


def test_the_stop_token_of_a_response_is_trained(tmp_path):
    run = prepared(tmp_path)
    response = [*run.tokenizer.encode("ab"), run.tokenizer.stop_ids[0]]
    _, trees, groups = answered_trees(run, response)
    targets = Targets.of(pack(trees))
    assert targets.token.tolist() == response * sum(map(len, groups))


def test_masking_next_token_targets_changes_neither_texts_nor_tiers(tmp_path):
    run = prepared(tmp_path)
    questions, _, _ = answered_trees(run, [1])
    indices = run.order[0].tolist()
    state = lambda: [
        x[i].copy() for i in indices for x in ([d.tokens for d in run.documents], run.tiers)
    ]
    before = state()
    for scope in ("not_in_C", "low_entropy", "all"):
        trees = text_trees(indices, run.documents, [], questions, scope, run.tiers, 4)
        counts = [int(torch.as_tensor(tree.targets).sum()) for tree in trees]
        assert (
            counts
            == [tree.trunk_targets for tree in trees]
            == [int(pack([tree]).is_target.sum()) for tree in trees]
        ), "denominator and mask disagree"
    assert all((a == b).all() for a, b in zip(before, state()))


def test_logged_losses_are_those_of_all_micro_batches(tmp_path):
    rows = []
    for limit in (100_000, 700):
        run = prepared(tmp_path, tokens_per_micro_batch=limit)
        rows.append(without_clock(stepped(run, 0)[0]))
    whole, split = rows
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        expected = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
        assert split[name] == expected, name


def test_a_resumed_run_draws_the_random_numbers_of_one_that_never_stopped(tmp_path):
    run = prepared(tmp_path, steps=4)
    expected = []
    for step in range(4):
        if step == 2:
            save(*run)
        row, samples = stepped(run, step)
        run.step += 1
        expected.append((without_clock(row), samples))
    resumed = prepared(tmp_path, resume=str(tmp_path / "out"))
    assert resumed.step == 2
    for step in (2, 3):
        row, samples = stepped(resumed, step)
        assert (without_clock(row), samples) == expected[step]


@pytest.mark.parametrize("ntp", [False, True], ids=["rl-only", "rl-and-ntp"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied-head", "tied-head"])
def test_every_parameter_has_a_gradient_after_a_real_step(tmp_path, ntp, tied):
    run = prepared(tmp_path, shape={"tie_word_embeddings": tied}, ntp=ntp)
    row, _ = stepped(run, 0)
    assert row["share/zero_variance_groups"] < 1, "no group holds right and wrong responses"
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_every_parameter_changes_in_a_real_step(tmp_path):
    run = prepared(tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    stepped(run, 0)
    for name, parameter in run.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_padded_rows_of_the_head_get_no_gradient_in_a_real_step(tmp_path):
    run = prepared(tmp_path, shape={"tie_word_embeddings": False})
    stepped(run, 0)
    used = run.tokenizer.vocab_size
    gradient = run.model.lm_head.weight.grad
    assert len(gradient) > used and gradient[used:].abs().max() == 0


def test_dropped_groups_count_neither_in_the_loss_nor_in_its_denominator(tmp_path):
    run = prepared(tmp_path, zero_variance_groups="drop", ntp=False, grad_clip=1e9)
    answer = run.tokenizer.encode("ab")
    questions, trees, groups = answered_trees(run, answer)
    match = torch.zeros(len(questions), 4)
    match[0, 0] = 1  # the only group with right and wrong responses
    advantage = torch.arange(match.numel(), dtype=torch.float64).view(match.shape) + 1
    gradients = []
    for count in (len(questions), 1):
        run = run.having(model=prepared(tmp_path, ntp=False).model)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0)
        kept = [t for t in trees if any(b.id < 4 * count for b in t.branches)]
        kept = [replace(t, branches=[b for b in t.branches if b.id < 4 * count]) for t in kept]
        learn(run, kept, groups[:count], advantage[:count], match[:count], Metrics())
        gradients.append([p.grad.clone() for p in run.model.parameters()])
    for everything, mixed_only in zip(*gradients):
        torch.testing.assert_close(everything, mixed_only, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_text_is_ever_run_as_code(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in (("pickle", "loads"), ("os", "system"))
