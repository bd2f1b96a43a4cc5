"""RMT's baselines, each a set of knobs: what they ask, what they learn, and when they end."""

import json
import time

import pytest
import torch
import toy_runs
from toy_runs import WORLD, draw, prepared, resampled, respond, stepped, write_thinker

import rmt.questions
import train
from models.tokenizer import Tokenizer
from rmt.config.config import in_repository, parse
from rmt.config.presets import METHODS, PRESETS
from rmt.data import corpus
from rmt.engine.log import RunLog
from rmt.engine.run import prepare, resolve
from rmt.grpo import has_both_outcomes
from rmt.questions import prompts_of, reward_responses

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "What is 2 + 3?\n\nAnswer: with care."
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def run_of(place, method, **changes):
    return prepared(place, method=method, **METHODS[method] | changes)


def whole(run):
    """All steps of a run: its rows."""
    with RunLog(run.out, run.config, 0, run.total_steps, WORLD) as log:
        said = train.run_to_end(*run, log)
    assert said.startswith("wrote"), said
    return [
        json.loads(line) for line in (run.out / "metrics.jsonl").read_text().strip().split("\n")
    ]


def test_the_papers_settings_are_the_published_ones():
    """RPT: prompts of 4,096 tokens at most; post-training: responses of 4,096."""
    rpt = dict(match="prefix", budget=False, curriculum=False, ntp=False, batch_size=256,
               group_size=8, learning_rate=1e-6, temperature=0.8, kl_beta=0.0, max_response=8192,
               document_tokens=3584, steps=1000, resample_from=500, entropy_top_k=16,
               model="r1-distill-qwen-14b", difficulty_model="r1-distill-qwen-1.5b")  # fmt: skip
    ntp = dict(task="nothing", ntp=True, ntp_weight=1.0, budget=False, curriculum=False)
    skywork = dict(task="problems", match="answer", ntp=False, budget=False, curriculum=False,
                   max_response=4096, data=("Skywork/Skywork-OR1-RL-Data",))  # fmt: skip
    for flags, wanted in (
        (["--preset", "rpt"], rpt), (["--method", "ntp"], ntp), (["--preset", "skywork"], skywork),
    ):  # fmt: skip
        config = parse(flags, "", "")
        assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_with_every_preset(method, preset):
    config = parse(["--preset", preset, "--method", method], "", "")
    assert config.method == method
    assert all(getattr(config, name) == value for name, value in METHODS[method].items())


def test_a_flag_beats_the_method_and_the_method_the_preset():
    rpt = parse(["--preset", "rpt"], "", "")
    assert (rpt.method, rpt.match, rpt.ntp, rpt.batch_size) == ("rpt", "prefix", False, 256)
    assert parse(["--preset", "rpt", "--ntp", "--batch-size", "3"], "", "").ntp
    demo = parse(["--preset", "demo", "--method", "rft"], "", "")
    assert (demo.advantage_norm, PRESETS["demo"]["advantage_norm"]) == ("right", "batch")


def test_data_of_a_preset_are_found_wherever_a_script_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(in_repository(path).is_file() for path in PRESETS["demo"]["data"])


def test_rpt_asks_for_no_length_and_learns_from_no_text(tmp_path):
    rows = whole(run_of(tmp_path, "rpt"))
    assert all(row["budget"] is None and row["loss/ntp"] is None for row in rows)
    assert all(row["reward/length"] == 0 for row in rows)
    assert any(row["loss/rl"] != 0 for row in rows)


def test_ntp_asks_nothing_and_trains_on_every_position(tmp_path):
    run = run_of(tmp_path, "ntp")
    before = run.model.head.detach().clone()
    rows = whole(run)
    assert all(row["reward/match"] is None and row["loss/ntp"] > 0 for row in rows)
    lengths = [len(run.documents[i].tokens) for i in run.order.flatten()]
    assert sum(row["tokens/step"] for row in rows) == sum(lengths)
    assert not torch.equal(run.model.head, before)


def asked(run, step=0):
    questions = draw(run, step)
    before = respond(run, questions, step)
    after, _ = resampled(run, before, step)
    return questions, after.questions, after


def test_budgets_follow_the_entropy_of_their_position(tmp_path):
    """In the prompt, in the reward, in what is logged and in an evaluation."""
    one = run_of(tmp_path, "rmt")
    run = run_of(tmp_path, "rmt", budget_entropy=1.0, positions_per_document=2,
                 max_response=24)  # fmt: skip
    assert {q.budget for q in draw(one)} == {8}
    for entropy in run.entropies.values():
        entropy[:] = 8 * (entropy - 3)
    questions = draw(run)
    wanted = lambda index, position: int(8 * min(2, max(0.5, run.entropies[index][position])))
    assert [q.budget for q in questions] == [wanted(q.document, q.position) for q in questions]
    assert len({q.budget for q in questions}) > 1
    prompts = prompts_of(run.config, run.tokenizer, questions)
    footers = [run.tokenizer.decode(list(p.footer)) for p in prompts]
    assert all(f"exactly {q.budget} tokens" in f for q, f in zip(questions, footers))
    said = respond(run, questions)
    for question, group, worth in zip(questions, said.answers, said.rewards["length"].tolist()):
        lengths = [answer.thinking_length for answer in group]
        paid = [0 if n is None else max(0, 1 - abs(n - question.budget) / question.budget)
                for n in lengths]  # fmt: skip
        assert worth == pytest.approx(paid)
    _, samples = stepped(run, 0)
    assert all(s["budget"] == wanted(s["index"], s["position"]) for s in samples)


def test_dynamic_sampling_replaces_groups_of_equal_matches(tmp_path):
    settings = dict(temperature=1.0, match="token", group_size=3)
    plain = asked(run_of(tmp_path, "rpt", **settings | {"resample_from": 1}))
    run = run_of(tmp_path, "rpt", **settings | {"resample_from": 0, "resample_tries": 30})
    before, after, said = asked(run)
    assert plain[0] == plain[1] == before
    was, now = (has_both_outcomes(x.rewards["match"]) for x in (plain[2], said))
    assert was.any() and not was.all() and now.all()
    assert [q.document for q in after] == [q.document for q in before]
    kept = [i for i, m in enumerate(was.tolist()) if m]
    assert [after[i] for i in kept] == [before[i] for i in kept]
    assert all(after[i] != before[i] for i in set(range(len(before))) - set(kept))
    assert len({(q.document, q.position) for q in (*before, *after)}) == len(before) + sum(~was)
    lengths = [[len(r.tokens) for r in group] for group in said.responses]
    assert [len(a) for a in said.answers] == [len(group) for group in lengths]


def test_each_try_has_random_numbers_of_its_own_and_asks_no_position_twice(tmp_path, monkeypatch):
    settings = dict(match="token", group_size=2, resample_from=0, positions_per_document=3)
    run, seen, score = run_of(tmp_path, "rpt", **settings), [], reward_responses

    def noting(*given):
        batch = score(*given)
        seen.append([(q.document, q.position) for q in batch.questions])
        batch.rewards["match"][:] = 0  # so that all are drawn again
        return batch

    for module in (toy_runs, rmt.questions):
        monkeypatch.setattr(module, "reward_responses", noting)
    asked(run)
    assert len(seen) == 5
    places = [place for places in seen for place in places]
    assert len(places) == len(set(places)) > 3 * 6
    questions = draw(run, 1)
    first, again, other = (respond(run, questions, 1, attempt=n).responses for n in (0, 0, 1))
    tokens = lambda groups: {
        tuple(r.tokens) for group in groups for r in group if len(r.tokens) > 5
    }
    assert tokens(first) == tokens(again) and not tokens(first) & tokens(other)


def test_a_run_that_never_draws_again_says_so(tmp_path, capsys):
    for start, said in ((3, True), (2, False), (-1, False)):
        run_of(tmp_path, "rpt", resample_from=start)
        assert ("--resample-from 3: no group" in capsys.readouterr().out) == said


def test_a_run_that_learns_nothing_says_why_once(tmp_path, capsys):
    run = run_of(tmp_path, "rmt")
    row = {"step": 0, "share/well_formed": 0.0, "share/cut_off": 0.6}
    with RunLog(run.out, run.config, 0, 20, WORLD) as log:
        for step, change in enumerate([{}] * 5 + [{"share/well_formed": 0.1}] + [{}] * 9):
            log.step(row | {"step": step} | change, [])
    printed = "".join(capsys.readouterr())
    assert printed.count("no response had a readable answer") == 1
    assert printed.count("cut off at --max-response") == 1


@pytest.mark.parametrize("method, said", [("rmt", 1), ("grpo", 1), ("rlp", 0), ("rft", 0)])
def test_equal_groups_are_blamed_only_where_they_teach_nothing(tmp_path, capsys, method, said):
    data = dict(data=problems(tmp_path)) if method == "grpo" else {}
    run = run_of(tmp_path, method, batch_size=3, **data)
    row = {"share/zero_variance_groups": 1.0, "reward/match": 0.5}
    with RunLog(run.out, run.config, 0, 20, WORLD) as log:
        for step in range(9):
            log.step(row | {"step": step}, [])
    assert "".join(capsys.readouterr()).count("nothing was learnt about tokens") == said


@pytest.mark.parametrize(
    "method, changes",
    [
        ("rmt", {}), ("rmt", dict(updates_per_batch=3, kl_beta=0.1)),
        ("rpt", dict(match="token", group_size=3, resample_from=0)),
        ("cold-start", dict(budget_start=20, max_response=60)),
    ],
)  # fmt: skip
def test_tokens_of_a_step_are_those_sampled_and_trained_on(tmp_path, monkeypatch, method, changes):
    run, drawn, trees = run_of(tmp_path, method, **changes), [], []
    sample, learn = train.rollout.generate, train.update

    def counting(*given):
        groups = sample(*given)
        drawn.append(sum(len(r.tokens) for group in groups for r in group))
        return groups

    def watching(*given):
        done = learn(*given)
        trees.extend(done.trees)
        return done

    monkeypatch.setattr(train.rollout, "generate", counting)
    monkeypatch.setattr(train, "update", watching)
    row, _ = stepped(run, 0)
    trained = sum(map(len, trees)) * run.config.updates_per_batch
    assert row["tokens/step"] + row["tokens/dropped"] == sum(drawn) + trained
    assert (row["tokens/dropped"] > 0) == (method == "rpt")
    rate = row["speed/rollout_tokens_per_second"] * row["time/rollout"]
    assert rate == pytest.approx(sum(drawn))
    assert row["speed/train_tokens_per_second"] * row["time/update"] == pytest.approx(trained)


@pytest.mark.parametrize("match, said", [(0.1, 1), (0.3, 0)])
def test_a_run_that_learns_length_alone_says_so(tmp_path, capsys, match, said):
    run = run_of(tmp_path, "rmt")
    row = {"share/advantage_from_length": 0.6, "reward/match": match}
    with RunLog(run.out, run.config, 0, 20, WORLD) as log:
        for step in range(9):
            log.step(row | {"step": step}, [])
    assert "".join(capsys.readouterr()).count("teaches length instead of the token") == said


def problems(place, answers=("a", "b", "a"), name="problems.jsonl"):
    lines = (json.dumps({"question": "abba" * (2 + i), "answer": f"why #### {answer}"})
             for i, answer in enumerate(answers))  # fmt: skip
    (place / name).write_text("\n".join(lines))
    return (str(place / name),)


def test_grpo_learns_from_the_answers_to_problems(tmp_path):
    data = problems(tmp_path)
    run = run_of(tmp_path, "grpo", batch_size=3, steps=3, group_size=8, data=data,
                 eval_data=data, eval_every=2)  # fmt: skip
    assert [document.answer for document in run.documents] == ["a", "b", "a"]
    before = run.model.head.detach().clone()
    rows = whole(run)
    assert any(0 < row["reward/match"] < 1 for row in rows)
    assert not torch.equal(run.model.head, before)
    evaluations = [json.loads(x) for x in (run.out / "eval.jsonl").read_text().strip().split("\n")]
    assert [[row["tier"] for row in e["tiers"]] for e in evaluations] == [["problems"]] * 3
    assert {e["tiers"][0]["n"] for e in evaluations} == {3}
    samples = [json.loads(x) for x in (run.out / "samples.jsonl").read_text().strip().split("\n")]
    assert {s["tier"] for s in samples} == {"problem"} and {s["truth"] for s in samples} == {
        "a",
        "b",
    }


def test_a_model_that_boxes_power_towers_is_trained_to_the_end(tmp_path, monkeypatch):
    tower = r"\boxed{8^{8^{8^{8}}}}"  # its verdict is not yet known
    right, other = toy_runs.ANSWERS
    likely = {tower if text == other else text: odds for text, odds in toy_runs.LIKELY.items()}
    monkeypatch.setattr(toy_runs, "ANSWERS", (right, tower))
    monkeypatch.setattr(toy_runs, "LIKELY", likely)
    data = problems(tmp_path, answers=("a", "7", "a"))
    started = time.perf_counter()
    rows = whole(run_of(tmp_path, "grpo", batch_size=3, steps=2, group_size=8, data=data,
                        problem_request=""))  # fmt: skip
    assert time.perf_counter() - started < 60
    assert sum(row["share/judge_failed"] for row in rows) == pytest.approx(1 / 24), "judged once"
    assert any(0 < row["reward/match"] < 1 for row in rows)
    assert tower in (tmp_path / "out/samples.jsonl").read_text().replace("\\\\", "\\")


@pytest.mark.parametrize(
    "line, said",
    [
        ({"question": "a"}, "no field 'answer'"),
        ({"text": "a", "answer": "b"}, "no text field 'problem'"),
        ({"question": "a", "answer": "so:\n#### "}, "answer is empty"),
    ],
)
def test_problems_without_an_answer_are_named(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=said):
        run_of(tmp_path, "grpo", data=(str(tmp_path / "bad.jsonl"),))


@pytest.mark.parametrize(
    "line, text, answer",
    [
        ({"problem": "a", "answer": 34}, "a", "34"),
        ({"question": "a", "answer": "2 + 3 = 5\n#### 5"}, "a", "5"),
        ({"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": '["5"]'}},
         "a", "5"),
        ({"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "5"}},
         "a", "5"),
        ({"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "[1, 2]"}},
         "a", "[1, 2]"),
        ({"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "[]"}},
         "a", "[]"),
        ({"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "5"}},
         "What is 2 + 3?\n\nAnswer: with care.", "5"),
        ({"problem": DAPO, "answer": "5"}, "What is 2 + 3?\n\nAnswer: with care.", "5"),
    ],
)  # fmt: skip
def test_problems_of_all_usual_data_sets_are_read(tmp_path, line, text, answer):
    (tmp_path / "problems.jsonl").write_text(json.dumps(line))
    tokenizer = Tokenizer(write_thinker(tmp_path / "thinker"))
    (document,) = corpus.read(
        [str(tmp_path / "problems.jsonl")], tokenizer, (), 999, None
    ).documents
    assert (tokenizer.decode(document.tokens.tolist()), document.answer) == (text, answer)


def test_a_run_ends_when_its_tokens_are_used_up_also_after_it_was_resumed(tmp_path):
    settings = dict(steps=40, max_tokens=900, save_every=1)
    rows = whole(run_of(tmp_path, "ntp", **settings))
    tokens = [row["tokens/step"] for row in rows]
    assert sum(tokens[:-1]) < 900 <= sum(tokens) and len(rows) < 40
    run = run_of(tmp_path, "ntp", **settings | {"out": str(tmp_path / "again")})
    stepped(run, 0)
    run.step = 1
    train.save(*run)
    config, _, _ = resolve(type(run.config)(resume=str(tmp_path / "again")), WORLD)
    again = toy_runs.Prepared(*prepare(config, WORLD))
    assert (again.tokens, again.seconds) == (run.tokens, run.seconds) and run.tokens == tokens[0]


def test_a_run_ends_when_its_minutes_are_used_up(tmp_path):
    run = run_of(tmp_path, "ntp", steps=10**4, max_minutes=1 / 60)
    assert 1 < len(whole(run)) < 10**4 and run.seconds >= 1
