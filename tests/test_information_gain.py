"""RLP: a thought is worth the log-probability of the true token behind it."""

import json

import pytest
from method_checks import gain_alone
from toy_runs import draw, prepared, respond, stepped

from rmt import forest, naive
from rmt.config.presets import METHODS
from rmt.methods.information_gain import information_gain
from rmt.prompt import Answer
from rmt.rewards import match_reward


def run_of(place, **changes):
    return prepared(
        place, method="rlp", **METHODS["rlp"] | dict(positions_per_document=2) | changes
    )


# One branch in a row, and all of a step.
@pytest.mark.parametrize("pack, limit", [(forest.pack, 200), (naive.pack, 100_000)])
def test_each_thought_is_scored_as_if_it_stood_alone(tmp_path, pack, limit):
    run = run_of(tmp_path, tokens_per_micro_batch=limit)
    batch = respond(run, draw(run))
    gain = information_gain(run.config, run.data, run.model, batch, pack)
    closed = [a.thinking_length is not None for group in batch.answers for a in group]
    assert any(closed) and not all(closed)
    groups = zip(batch.questions, batch.responses, batch.answers)
    wanted = [gain_alone(run, q, *said) for q, *both in groups for said in zip(*both)]
    assert gain.flatten().tolist() == pytest.approx(wanted, abs=1e-4)
    assert (gain.std(dim=1) > 1e-3).any()


def test_advantages_are_differences_of_nats_whatever_is_answered(tmp_path):
    run = run_of(tmp_path)
    row, samples = stepped(run)
    assert row["budget"] is None and row["loss/ntp"] is None and row["reward/length"] == 0
    assert row["reward/mean"] < 0 and 0 <= row["reward/match"] <= 1
    assert row["loss/rl"] != 0 and row["update/grad_norm"] > 0
    assert all(s["reward"]["total"] < 0 for s in samples), json.dumps(samples[0])


def test_a_match_is_the_next_token_alone():
    answer = Answer("", " Mira", 3)
    coming = (b" M", b"ira")
    assert [match_reward(answer, coming, rule) for rule in ("prefix", "token", "gain")] == [1, 0, 0]
    assert match_reward(answer, (b" Mira",), "gain") == 1


@pytest.mark.parametrize(
    "changes", [dict(budget=True), dict(resample_from=0), dict(zero_variance_groups="drop")]
)
def test_flags_that_go_by_matches_are_refused(tmp_path, changes):
    with pytest.raises((SystemExit, ValueError), match="--match gain"):
        run_of(tmp_path, **changes)
