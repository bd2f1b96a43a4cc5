"""What is sampled is what is scored, and a sample depends on nothing but its own place."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_forests import TOKENS, alone, full_logits, ids, sequences, toy_model, toy_trees

from rmt.forest import pack
from rmt.objective import target_logprobs
from rmt.rollout import generate, stream
from rmt.sampling import PURPOSES, Sampling
from rmt.trees import Branch, Tree

STOPS = tuple(range(10))  # many, so that responses end at different lengths
SAMPLING = Sampling(15, STOPS, TOKENS, temperature=0.8)


def prompts(seed=0):
    """Three trees with three forks each, all with a prompt and no response."""
    trees = [replace(t, branches=[b for b in t.branches if b.stem]) for t in toy_trees(seed)]
    return [
        replace(t, branches=[replace(b, response=()) for b in t.branches])
        for t in trees
        if t.branches
    ]


def answered(trees, groups):
    """The trees with all responses on them, numbered as the training step numbers them."""
    out, index = [], 0
    for tree in trees:
        branches = []
        for branch in tree.branches:
            group = groups[index]
            for number, rollout in enumerate(group):
                branch_id = index * len(group) + number
                branches.append(replace(branch, id=branch_id, response=rollout.tokens))
            index += 1
        out.append(replace(tree, branches=branches))
    return out


def tokens_of(groups):
    return [[rollout.tokens for rollout in group] for group in groups]


def flat(groups):
    return [rollout for group in groups for rollout in group]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sampled_logprobs_are_the_ones_that_training_scores(dtype, tolerance):
    model, trees = toy_model(dtype), prompts()
    groups = generate(model, trees, 4, SAMPLING)
    scored = target_logprobs(model, pack(answered(trees, groups)), 0.8, TOKENS)
    sampled = torch.tensor([x for r in flat(groups) for x in r.logprobs], dtype=torch.float64)
    assert len({len(r.tokens) for r in flat(groups)}) > 4, "all responses are of one length"
    assert (scored.double() - sampled).abs().max() <= tolerance


def test_cached_decoding_equals_a_full_forward_pass_per_token():
    model, trees = toy_model(), prompts()
    groups = generate(model, trees, 3, SAMPLING)
    with torch.no_grad():
        expected = [alone(model, *s[:2], 0.8) for s in sequences(answered(trees, groups))]
    sampled = [torch.tensor(r.logprobs, dtype=torch.float64) for r in flat(groups)]
    torch.testing.assert_close(sampled, expected, rtol=1e-10, atol=1e-10)


def test_greedy_decoding_takes_the_likeliest_token_of_a_full_forward_pass():
    model, trees = toy_model(), prompts()
    greedy = replace(SAMPLING, temperature=0.0)
    groups = generate(model, trees, 1, greedy)
    for (tokens, mask, _), (rollout,) in zip(sequences(answered(trees, groups)), groups):
        with torch.no_grad():
            likeliest = full_logits(model, tokens).argmax(dim=-1)
            logprobs = alone(model, tokens, mask, temperature=1.0)
        index = np.flatnonzero(mask)
        assert likeliest[index - 1].tolist() == np.array(tokens)[index].tolist()
        assert rollout.logprobs == pytest.approx(logprobs.tolist(), abs=1e-10)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_tokens_do_not_depend_on_how_many_branches_decode_at_once(slots):
    model, trees = toy_model(), prompts()
    few = generate(model, trees, 4, replace(SAMPLING, max_branches=slots))
    assert tokens_of(few) == tokens_of(generate(model, trees, 4, SAMPLING))


def test_tokens_do_not_depend_on_the_order_of_trees():
    model, trees = toy_model(), prompts()
    forward = tokens_of(generate(model, trees, 4, SAMPLING))
    backward = tokens_of(generate(model, trees[::-1], 4, SAMPLING))
    sizes = [len(tree.branches) for tree in trees]
    assert (
        forward
        == backward[sizes[2] + sizes[1] :]
        + backward[sizes[2] :][: sizes[1]]
        + (backward[: sizes[2]])
    )


def test_tokens_do_not_depend_on_what_else_is_in_the_batch():
    model, trees = toy_model(), prompts()
    together = tokens_of(generate(model, trees, 4, SAMPLING))
    single = [tokens_of(generate(model, [tree], 4, SAMPLING)) for tree in trees]
    assert together == [group for groups in single for group in groups]


def test_more_samples_leave_the_first_ones_as_they_were():
    model, trees = toy_model(), prompts()
    few, many = (tokens_of(generate(model, trees, count, SAMPLING)) for count in (2, 6))
    assert few == [group[:2] for group in many]


def test_the_end_token_is_kept():
    rollouts = flat(generate(toy_model(), prompts(), 8, SAMPLING))
    for rollout in rollouts:
        assert not set(rollout.tokens[:-1]) & set(STOPS)
        assert (rollout.tokens[-1] in STOPS) == rollout.finished
        assert rollout.finished or len(rollout.tokens) == SAMPLING.max_new_tokens
    assert {r.finished for r in rollouts} == {True, False}


def test_padded_vocabulary_rows_are_never_sampled():
    model = toy_model(tie_word_embeddings=False)
    with torch.no_grad():  # one of each pair has a huge logit whatever the hidden state
        row = torch.ones_like(model.lm_head.weight[0])
        model.lm_head.weight[TOKENS:] = torch.stack((row, -row, row, -row)) * 1000
    for temperature in (0.0, 0.8):
        sampling = replace(SAMPLING, temperature=temperature)
        rollouts = flat(generate(model, prompts(), 4, sampling))
        assert max(max(r.tokens) for r in rollouts) < TOKENS
        assert all(np.isfinite(r.logprobs).all() and min(r.logprobs) > -50 for r in rollouts)


def test_frequencies_of_sampled_tokens_follow_the_softmax_at_the_temperature():
    model, count = toy_model(), 12_000
    tree = Tree(0, [3, 1, 4], [Branch(0, 2, [15])])
    rollouts = generate(model, [tree], count, replace(SAMPLING, max_new_tokens=1))[0]
    counts = np.bincount([r.tokens[0] for r in rollouts], minlength=TOKENS)
    with torch.no_grad():
        logits = full_logits(model, [3, 1, 15])[-1]

    def chi_square(temperature):
        expected = count * (logits / temperature).softmax(dim=-1).numpy()
        bins = np.where(expected >= 5, np.arange(TOKENS), TOKENS)  # rare tokens share the last
        seen, wanted = (np.bincount(bins, x, TOKENS + 1) for x in (counts, expected))
        used = wanted > 0
        return ((seen - wanted)[used] ** 2 / wanted[used]).sum(), used.sum() - 1

    statistic, degrees = chi_square(0.8)
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
    assert chi_square(1.0)[0] > 3 * degrees, "the test could not tell temperatures apart"


def test_a_group_does_not_share_its_first_token():
    for group in generate(toy_model(), prompts(), 8, SAMPLING):
        assert len({rollout.tokens[0] for rollout in group}) > 1


def test_a_weight_update_leaves_nothing_of_the_old_cache():
    model, trees = toy_model(), prompts()
    before = generate(model, trees, 2, SAMPLING)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
    after, fresh = (generate(m, trees, 2, SAMPLING) for m in (model, deepcopy(model)))
    assert after == fresh
    assert after != before


def test_a_finished_branch_makes_room_for_the_next_at_once():
    model, trees, slots = toy_model(), prompts(), 3
    sampling = replace(SAMPLING, max_branches=slots)
    steps = [0]
    model.register_forward_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    free = [0] * slots  # the step at which each slot is free again
    for rollout in flat(generate(model, trees, 4, sampling)):
        first = int(np.argmin(free))
        free[first] += len(rollout.tokens)
    assert steps[0] == 1 + max(free), "prefill, then no step with a slot idle"


def test_the_stream_yields_each_rollout_in_order():
    model, trees = toy_model(), prompts()
    seen = {}
    for request, token, _ in stream(model, trees, 2, SAMPLING):
        seen.setdefault(request, []).append(token)
    expected = [r.tokens for r in flat(generate(model, trees, 2, SAMPLING))]
    assert [seen[request] for request in range(len(expected))] == expected


def test_no_prompt_gives_no_rollout():
    assert generate(toy_model(), [], 4, SAMPLING) == []
    assert generate(toy_model(), [Tree(0, [1, 2])], 4, SAMPLING) == []


def draws(document=0, fork=2, sample=0, **changes):
    """Tokens of a model that finds all tokens equally likely: the random numbers themselves."""
    model = toy_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tree = Tree(document, [7] * 6, [Branch(0, fork, [7])])
    sampling = replace(Sampling(12, (), TOKENS), **changes)
    return generate(model, [tree], sample + 1, sampling)[0][sample].tokens


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"step": 1}, {"document": 1}, {"fork": 3}, {"sample": 1}, {"first": 4}]
    + [{"purpose": purpose} for purpose in PURPOSES if purpose != "train"],
    ids=str,
)
def test_random_numbers_differ_by(change):
    assert draws() == draws()
    same = sum(a == b for a, b in zip(draws(), draws(**change)))
    assert same <= 3, "two streams of 12 draws from 97 tokens should agree by chance only"


def test_global_random_state_changes_no_sample():
    samples = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        samples.append(tokens_of(generate(toy_model(), prompts(), 2, SAMPLING)))
    assert samples[0] == samples[1]


def test_a_branch_that_sees_no_trunk_decodes_its_prompt_alone():
    rng = np.random.default_rng(3)
    trees = [Tree(1, ids(rng, 5), [Branch(0, 0, ids(rng, 4))])]  # fork 0: sees no trunk at all
    group = generate(toy_model(), trees, 2, SAMPLING)
    with torch.no_grad():
        expected = [alone(toy_model(), *s[:2], 0.8) for s in sequences(answered(trees, group))]
    sampled = [torch.tensor(r.logprobs, dtype=torch.float64) for r in flat(group)]
    torch.testing.assert_close(sampled, expected, rtol=1e-10, atol=1e-10)
