"""Checks of what is drawn, asked and counted; see tests/method_checks.py."""

import json
import math
from unittest.mock import patch

import numpy as np
from method_checks import QUANTILE
from method_step import watched
from toy_forests import full_logits
from toy_runs import (
    begins_with,
    draw,
    prepared,
    resampled,
    respond,
    stepped,
    write_corpus,
    write_files,
    write_thinker,
)

import rmt.questions
from rmt.config.presets import METHODS
from rmt.questions import prompts_of, reward_responses, tier_schedule


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
        questions = draw(run)
        assert all(q.tier == wanted[q.document][q.position] for q in questions)


def check_entropies(place) -> None:
    """Of the likeliest tokens, after the begin token, under --difficulty-model."""
    for name, seed in (("begun", 0), ("judge", 5)):
        write_thinker(place / name)
        begins_with(place / name, "<|im_start|>")
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
        assert np.allclose(tier_schedule(run.config, step / 20), wanted)
    tiers = lambda step: {q.tier for q in draw(run, step)}
    assert all(tiers(step) == {0} for step in range(4, 9))
    assert tiers(0) | tiers(1) | tiers(2) == {1, 2}
    other = prepared(place, steps=20, curriculum=False)
    assert tier_schedule(other.config, 0.0) is None


def check_counts(place) -> None:
    """Documents, positions, responses and tokens of a step are as many as were asked for."""
    run = prepared(place, batch_size=4, positions_per_document=2, group_size=3, max_response=17,
                   document_tokens=40, samples_per_step=5)  # fmt: skip
    row, samples = stepped(run, 0)
    assert max(len(d.tokens) for d in run.documents) == 40 and len(samples) == 5
    assert row["share/empty_tier_draws"] < 0.5
    questions = draw(run, 1)
    assert len(questions) == len({(q.document, q.position) for q in questions}) == 8
    assert len({q.document for q in questions}) == 4
    for document in range(3):  # also where one shuffle ends and the next begins
        eligible = int((run.tiers[document] >= 0).sum())
        run.curriculum.draw(0, document, None, 1)
        draws, missing = run.curriculum.draw(1, document, None, eligible + 2)
        assert len(set(draws)) == len(draws) == eligible
        assert missing == 2
    groups = respond(run, questions, 1).responses
    assert row["length/response"] <= 17
    assert {len(group) for group in groups} == {3}
    assert max(len(r.tokens) for group in groups for r in group) == 17
    assert [len(prepared(place, steps=0, epochs=n, batch_size=4).order) for n in (1.0, 2.5)] == [
        3, 8]  # fmt: skip


def check_ends(place) -> None:
    """Tokens and minutes of all steps end a run; a step's own are counted."""
    run = prepared(place, batch_size=2, max_tokens=10**6, max_minutes=60.0)
    row, _ = stepped(run, 0)
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
                   group_size=2, match="token", batch_size=2, steps=4))  # fmt: skip
    sample, score, tries = rmt.questions.sampling_at, reward_responses, []

    def sampling(*given):
        tries.append([given[-1]])
        return sample(*given)

    def equal(*given):
        batch = score(*given)
        tries[-1].append(batch.questions)
        batch.rewards["match"][:] = 0
        return batch

    with patch.multiple(rmt.questions, sampling_at=sampling, reward_responses=equal):
        for step, wanted in ((0, [0]), (1, [0, 1, 2, 3]), (2, [0, 1, 2])):
            if step == 2:  # three positions of each document are left
                for tiers in run.tiers:
                    tiers[np.flatnonzero(tiers >= 0)[3:]] = -1
            questions = draw(run, step)
            tries[:] = [[0, questions]]
            batch = respond(run, questions, step)
            batch.rewards["match"][:] = 0
            _, dropped = resampled(run, batch, step)
            assert [attempt for attempt, _ in tries] == wanted
            places = [(q.document, q.position) for _, asked in tries for q in asked]
            assert len(places) == len(set(places)) == 2 * len(wanted)
            assert (dropped > 0) == (len(wanted) > 1)
    draws = [respond(run, questions, 1, attempt=n).responses[0][0].tokens for n in (0, 1)]
    assert draws[0] != draws[1]


def check_task(place) -> None:
    """What is asked: the next token or a problem, in the words given; or nothing."""
    path = place / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"problem": "ab" * n, "answer": "a"}) for n in (4, 5)))
    solve = METHODS["grpo"] | dict(data=(str(path),), batch_size=2, problem_request="Now solve it.")
    run = prepared(place, method="grpo", **solve)
    questions = draw(run)
    assert {q.position for q in questions} == {8, 10}
    assert all(q.coming == (b"a",) and q.budget is None for q in questions)
    prompts = prompts_of(run.config, run.tokenizer, questions)
    prompts = [run.tokenizer.decode(p.footer) for p in prompts]
    assert all("Now solve it." in prompt and "exactly" not in prompt for prompt in prompts)
    row, _ = stepped(run, 0)
    assert row["loss/ntp"] is None and row["reward/length"] == 0
    run = prepared(place, method="ntp", ntp_scope="low_entropy", **METHODS["ntp"], **QUANTILE)
    row, samples = stepped(run, 0)
    assert samples == [] and row["loss/rl"] == 0 and row["loss/ntp"] > 0
    texts = sum(len(run.documents[i].tokens) for i in run.order[0])
    assert math.isclose(row["tokens/step"], texts)


def check_mixture(place) -> None:
    """Steps draw from two files by weight, in epochs of each; what is held out stays."""
    write_files(place)
    write_corpus(place / "more.jsonl", documents=5)
    both = tuple(str(place / name) for name in ("data.jsonl", "more.jsonl"))
    given = dict(data=both, data_weights=(1.0, 3.0), batch_size=6, steps=9)
    run = prepared(place, **given)
    second = [document.source.startswith(both[1]) for document in run.documents]
    assert second == [False] * 13 + [True] * 5
    drawn = [[second[i] for i in step] for step in run.order.tolist()]
    assert all(sum(step) in (4, 5) for step in drawn) and abs(sum(map(sum, drawn)) - 0.75 * 54) < 1
    assert all(len(set(step)) == 6 for step in run.order.tolist())
    of_second = [i for i in run.order.flatten().tolist() if second[i]]
    for first in range(0, len(of_second) - 5, 5):
        assert len(set(of_second[first : first + 5])) == 5
    assert len({tuple(of_second[i : i + 5]) for i in range(0, 40, 5)}) > 1
    longer = prepared(place, **given | dict(steps=20))
    assert longer.order[:9].tolist() == run.order.tolist()
    seen = watched(run, 0)
    assert sorted({q.document for q in seen.questions}) == sorted(run.order[0].tolist())
    held = dict(holdout=2, data=both)
    plain, mixed = prepared(place, **held), prepared(place, **held, data_weights=(5.0, 0.1))
    sources = [{document.source for document in r.documents} for r in (plain, mixed)]
    assert sources[0] == sources[1] and len(plain.documents) < 18
