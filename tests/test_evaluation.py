"""eval.py and the evaluations of a run: what is asked, of whom, and what is kept."""

import io
import json
import random
import shutil
import sys

import pytest
import torch
from small_run import flags, refusal, run_here
from toy_runs import SETTINGS, WORLD, Prepared, prepared, write_corpus, write_thinker

import eval as evaluation
import rmt.engine.held_out
import train
from rmt.config.config import Config
from rmt.curriculum import TIERS
from rmt.engine.held_out import evaluate_held_out
from rmt.engine.loading import longest_prompt, read_corpus, read_model_directory
from rmt.engine.protocol import protocol
from rmt.engine.run import prepare
from rmt.evaluation import compare
from rmt.evaluation.evaluate import nats_per_token
from rmt.evaluation.positions import read_positions
from rmt.report import report

LEARNT = dict(steps=2, learning_rate=5e-2, holdout=4, temperature=1.5, seed=3)
DECODED = ("response", "tokens", "predicted")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that has changed its model much, on 40 texts of which it held out four."""
    place = tmp_path_factory.mktemp("evaluation")
    write_thinker(place / "thinker")
    write_corpus(place / "data.jsonl", 40)
    files = dict(model=place / "thinker", data=place / "data.jsonl", out=place / "run")
    run_here(*flags(**SETTINGS | files | LEARNT))
    return place


def evaluated(place, tmp_path, **changes):
    """The report of eval.py about the run, or about another --model."""
    written = dict(json=tmp_path / "report.json", positions=tmp_path / "positions.json")
    given = dict(model=place / "run") | written | changes
    evaluation.main(flags(**given))
    return json.loads(given["json"].read_text(encoding="utf-8"))


def with_settings(place, out, **changes):
    """The run's model, as a run with other settings would have left it."""
    shutil.copytree(place / "run/model", out)
    settings = json.loads((out / "rmt_run.json").read_text())
    settings["config"] |= changes
    (out / "rmt_run.json").write_text(json.dumps(settings))
    return out


def said(found):
    return [[item[name] for name in DECODED] for item in found["items"]]


def stored(tmp_path):
    return json.loads((tmp_path / "positions.json").read_text())


# ---- the protocol: train.py, then eval.py


def test_a_run_is_evaluated_on_what_it_left_out(place, tmp_path, capsys):
    found = evaluated(place, tmp_path)
    config = Config(**SETTINGS | LEARNT)
    tokenizer, shape = read_model_directory(place / "thinker")
    parts = {
        part: read_corpus(config, [str(place / "data.jsonl")], tokenizer, shape, part).documents
        for part in ("all", "train", "held_out")
    }
    assert [len(parts[part]) for part in parts] == [40, 36, 4]
    texts = {part: {tuple(d.tokens) for d in documents} for part, documents in parts.items()}
    assert not texts["train"] & texts["held_out"]
    documents = parts["held_out"]
    for item in found["items"]:
        assert documents[item["document"]].tokens[item["position"]] == item["target"]
    printed = capsys.readouterr().out
    assert "--max-response 16" in printed and "--tiers quantile" in printed
    assert found["budget"] == 4, "B_T: half of B_0 = 8"
    assert {item["budget"] for item in found["items"]} == {4}
    assert all(item["tokens"] <= 16 for item in found["items"])
    assert min(item["position"] for item in found["items"]) >= SETTINGS["min_context"]


def test_typed_data_are_taken_whole_unless_a_holdout_is_typed(place, tmp_path):
    data = dict(data=place / "data.jsonl", mode="ntp")
    documents = lambda found: len({item["document"] for item in found["items"]})
    assert documents(evaluated(place, tmp_path, **data)) > 30
    (tmp_path / "positions.json").unlink()
    assert documents(evaluated(place, tmp_path, **data, holdout=2)) <= 2


def test_a_run_that_held_nothing_out_needs_data(place, tmp_path, capsys):
    fragments = ("held out 4 documents", "trained on", "--data")
    refusal(evaluation, flags(model=place / "run", holdout=9), fragments, capsys)


def test_own_held_out_data_of_a_run_are_taken(tmp_path, capsys):
    write_thinker(tmp_path / "thinker")
    for name, texts in (("data", 12), ("other", 5)):
        write_corpus(tmp_path / f"{name}.jsonl", texts)
    files = dict(model=tmp_path / "thinker", data=tmp_path / "data.jsonl", out=tmp_path / "run")
    more = dict(eval_data=tmp_path / "other.jsonl", method="ntp", steps=1)
    run_here(*flags(**SETTINGS | files | more))
    assert "documents of --eval-data" in (said := capsys.readouterr().err)
    assert f"5 of the 5 documents of --eval-data {tmp_path / 'other.jsonl'}" in said
    found = evaluated(tmp_path, tmp_path)
    assert found["mode"] == "ntp", "what the run taught"
    assert {item["document"] for item in found["items"]} == set(range(5))
    lines = (tmp_path / "run/eval.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    assert {row["tier"]: row["n"] for row in last["tiers"]}["average"] > 0


# ---- flags change what they say


def test_every_flag_of_decoding_changes_the_answers(place, tmp_path):
    evaluated(place, tmp_path, per_tier=8)  # positions that the others answer, too
    sampled = evaluated(place, tmp_path)
    assert sampled["decoding"] == "sampled"
    assert said(sampled) == said(evaluated(place, tmp_path))
    for change in (dict(decoding="greedy"), dict(sampling_seed=8), dict(temperature=0.4),
                   dict(top_p=0.5), dict(top_k=1)):  # fmt: skip
        assert said(sampled) != said(evaluated(place, tmp_path, **change)), change
    greedy = dict(decoding="greedy")
    same = [said(evaluated(place, tmp_path, **greedy, sampling_seed=k)) for k in (1, 2)]
    assert same[0] == same[1]
    cut = evaluated(place, tmp_path, top_p=0.9, top_k=5)
    assert cut["decoding"] == "sampled --top-p 0.9 --top-k 5"
    assert said(evaluated(place, tmp_path, top_k=1)) == same[0]


def test_a_typed_budget_and_length_win(place, tmp_path):
    found = evaluated(place, tmp_path, budget=3, max_response=11)
    assert found["budget"] == 3 and {item["budget"] for item in found["items"]} == {3}
    assert max(item["tokens"] for item in found["items"]) == 11


def test_what_is_cut_off_is_counted(place, tmp_path, capsys):
    found = evaluated(place, tmp_path, budget=3, max_response=11)
    cut = [item["cut_off"] for item in found["items"]]
    assert all(item["tokens"] == 11 for item, off in zip(found["items"], cut) if off)
    ended = [item["response"].endswith("<|im_end|>") for item in found["items"]]
    assert cut == [not end for end in ended] and len(set(cut)) == 2
    rows = {row["tier"]: row for row in found["tiers"]}
    easy = [item["cut_off"] for item in found["items"] if item["tier"] == "easy"]
    assert rows["easy"]["cut_off"] == pytest.approx(sum(easy) / len(easy))
    assert f"| {100 * rows['easy']['cut_off']:.1f} |\n" in capsys.readouterr().out
    plain = evaluated(place, tmp_path, mode="ntp")
    assert plain["tiers"][0]["cut_off"] is None, "a plain token is no response"


def test_the_sentence_about_the_budget_is_counted_in_the_context(place, tmp_path):
    tokenizer, shape = read_model_directory(place / "thinker")
    config = Config(budget=False)
    plain, asked = (len(longest_prompt(config, tokenizer, b)) for b in (None, 8))
    assert asked > plain
    most = shape.max_position_embeddings - 64 - plain
    known = dict(model=place / "thinker", data=place / "data.jsonl", document_tokens=64)
    evaluated(place, tmp_path, mode="ntr", max_response=most, per_tier=1, **known)
    with pytest.raises(SystemExit, match="exceed the model's context"):
        evaluated(place, tmp_path, mode="rmt", budget=8, max_response=most, per_tier=1, **known)


@pytest.mark.parametrize("mode", ["ntr", "ntp"])
def test_a_mode_without_a_budget_refuses_one(place, tmp_path, mode, capsys):
    assert evaluated(place, tmp_path, mode=mode)["budget"] is None
    fragments = ("--budget 7", f"--mode {mode}", "leave it out")
    refusal(evaluation, flags(model=place / "run", mode=mode, budget=7), fragments, capsys)


def test_a_model_that_was_taught_without_a_budget_is_asked_for_none(place, tmp_path):
    settings = json.loads((place / "run/model/rmt_run.json").read_text())
    settings["config"]["budget"] = False
    model = tmp_path / "model"
    model.mkdir()
    for path in (place / "run/model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "rmt_run.json").write_text(json.dumps(settings))
    assert evaluated(place, tmp_path, model=model)["budget"] is None
    assert evaluated(place, tmp_path, model=model, budget=6)["budget"] == 6


def test_flags_that_choose_positions_change_which(place, tmp_path):
    base = dict(mode="ntp", per_tier=9)
    evaluated(place, tmp_path, **base)
    before = stored(tmp_path)
    for change in (dict(per_tier=4), dict(min_context=20), dict(tier_thresholds=(0.1, 0.5, 0.9)),
                   dict(seed=5), dict(entropy_top_k=3)):  # fmt: skip
        (tmp_path / "positions.json").unlink()
        evaluated(place, tmp_path, **base | change)
        after = stored(tmp_path)
        assert after["positions"] != before["positions"], change
        for name, value in change.items():
            assert after["settings"][name] == (list(value) if name == "tier_thresholds" else value)
        assert min(p["position"] for p in after["positions"]) >= change.get("min_context", 8)


def test_a_flag_against_the_stored_positions_is_refused_by_name(place, tmp_path, capsys):
    evaluated(place, tmp_path, mode="ntp", per_tier=9)
    asked = dict(model=place / "run", mode="ntp", positions=tmp_path / "positions.json")
    for change in (dict(per_tier=4), dict(min_context=20), dict(tier_thresholds=(0.1, 0.5, 0.9)),
                   dict(seed=5), dict(entropy_top_k=3), dict(tiers="absolute"),
                   dict(document_tokens=40)):  # fmt: skip
        name = "--" + next(iter(change)).replace("_", "-")
        refusal(evaluation, flags(**asked | change), (name, "were chosen with", "another"), capsys)
    refusal(evaluation, flags(**asked, difficulty_model=place / "run/model"),
            ("--difficulty-model", "were chosen"), capsys)  # fmt: skip
    evaluated(place, tmp_path, mode="ntp", per_tier=9, min_context=8, seed=0)
    evaluated(place, tmp_path, mode="ntp", difficulty_model=place / "thinker")


def test_positions_are_chosen_by_the_model_that_a_run_began_with(place, tmp_path):
    """Whoever is evaluated first, and of a run that went on from another run as well."""
    evaluated(place, tmp_path, mode="ntp")
    by_run = stored(tmp_path)
    model = with_settings(place, tmp_path / "again", model=str(place / "run/model"))
    for changes in (dict(model=model), dict(difficulty_model=place / "thinker")):
        (tmp_path / "positions.json").unlink()
        evaluated(place, tmp_path, mode="ntp", **changes)
        assert stored(tmp_path) == by_run
    (tmp_path / "positions.json").unlink()
    evaluated(place, tmp_path, mode="ntp", difficulty_model=place / "run/model")
    trained = stored(tmp_path)
    assert trained["positions"] != by_run["positions"]
    names = ("difficulty_model", "difficulty_name")
    assert all(trained["settings"][name] != by_run["settings"][name] for name in names)


def test_a_run_with_budgets_by_entropy_answers_problems(place, tmp_path):
    changes = dict(budget_entropy=0.5, budget_start=12, max_response=64)
    model = with_settings(place, tmp_path / "by-entropy", **changes)
    known = dict(model=str(model), data=("x.jsonl",))
    assert protocol(known, "rmt").config.budget_entropy == 0.5
    assert protocol(known, "problems").config.budget_entropy == 0
    assert protocol(known | dict(text_in="thought"), "rmt").config.budget_entropy == 0


# ---- stored positions


def test_stored_positions_need_no_longer_the_model_that_chose_them(place, tmp_path):
    evaluated(place, tmp_path, mode="ntp", difficulty_model=place / "thinker")
    model = with_settings(place, tmp_path / "moved", model=str(tmp_path / "gone"))
    assert evaluated(place, tmp_path, mode="ntp", model=model)["items"]


def test_no_positions_file_is_a_traceback(place, tmp_path):
    evaluated(place, tmp_path, mode="ntp", per_tier=3)
    tokenizer, shape = read_model_directory(place / "thinker")
    config, path = Config(**SETTINGS | LEARNT), tmp_path / "positions.json"
    documents = read_corpus(
        config, [str(place / "data.jsonl")], tokenizer, shape, "held_out"
    ).documents
    assert read_positions(path, documents).positions
    text, rng = path.read_text(), random.Random(0)
    odd = [None, True, -1, 10**400, 1e999, "x", [], {}, "NaN", [[]], {"easy": 1}, "\ud800"]

    def spoiled(value):
        if rng.random() < 0.1:
            return rng.choice(odd)
        if isinstance(value, dict):
            kept = [key for key in value if rng.random() > 0.02]
            return {key: spoiled(value[key]) for key in kept}
        return [spoiled(x) for x in value] if isinstance(value, list) else value

    files = [json.dumps(spoiled(json.loads(text))) for _ in range(200)]
    files += [text[: rng.randrange(len(text))] for _ in range(50)]
    files += ["[" * 100_000, "", "\x00", '{"positions": []}', "NaN", '"x"']
    refused = 0
    for content in files:
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        try:
            read_positions(path, documents, {"seed": 0}).summary([])
        except ValueError as error:
            assert "--positions" in str(error)
            refused += 1
    assert refused > 100


# ---- several responses


def test_each_position_is_answered_so_many_times(place, tmp_path, capsys):
    once = evaluated(place, tmp_path)
    found = evaluated(place, tmp_path, samples=3, json=tmp_path / "three.json")
    assert found["decoding"] == "sampled --samples 3"
    assert said(once) == said(found)[::3], "more responses leave the first as it was"
    assert [item["sample"] for item in found["items"]] == [0, 1, 2] * len(once["items"])
    assert len({item["response"] for item in found["items"]}) > len(once["items"])
    assert not {"sample", "answer"} & once["items"][0].keys() and "maj@" not in str(once["tiers"])
    rows = {row["tier"]: row for row in found["tiers"]}
    own = [item for item in found["items"] if item["tier"] == "easy"]
    right = [any(i["match"] for i in own[k : k + 3]) for k in range(0, len(own), 3)]
    assert rows["easy"]["n"] == len(right) == len(own) // 3
    assert rows["easy"]["any_right"] == pytest.approx(sum(right) / len(right))
    assert rows["easy"]["accuracy"] == pytest.approx(sum(i["match"] for i in own) / len(own))
    assert "| avg@3 % |" in capsys.readouterr().out
    compare.main([str(tmp_path / name) for name in ("report.json", "three.json")])
    printed = capsys.readouterr().out
    assert "note: of the 3 responses to a question the first 1 count" in printed
    assert "| average | 92 |" in printed and "+0.0 (+0.0 to +0.0) | 0 | 0 |" in printed


def test_each_problem_is_answered_so_many_times(place, tmp_path):
    data = tmp_path / "problems.jsonl"
    problems = [{"problem": f"{k} + 1?", "answer": "a"} for k in range(3)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    asked = dict(data=data, mode="problems", samples=4, max_response=40)
    found = evaluated(place, tmp_path, **asked)
    assert [(item["document"], item["sample"]) for item in found["items"]] == [
        (d, k) for d in range(3) for k in range(4)
    ]
    assert all(item["answer"] == item["predicted"] for item in found["items"])
    assert (found["tiers"][0]["n"], found["tiers"][0]["samples"]) == (3, 4)


# ---- in a run


def held_out(place, name, **changes):
    """A run that evaluates, its records, and what it asked."""
    files = dict(data=(str(place / "data.jsonl"),), model=str(place / "thinker"))
    more = dict(eval_data=files["data"], eval_every=1, eval_positions=3, probe_documents=0)
    settings = SETTINGS | dict(steps=2, learning_rate=1e-20) | files | more | changes
    run_here(*flags(**settings, out=place / name))
    return report.read_lines(place / name / "eval.jsonl")


def test_a_run_evaluates_as_it_samples_and_always_the_same(place):
    sampled = held_out(place, "sampled")
    assert [r["step"] for r in sampled] == [0, 1, 2]
    assert sampled[0]["items"] == sampled[1]["items"] == sampled[2]["items"]
    greedy = held_out(place, "greedy", eval_decoding="greedy")
    others = [held_out(place, name, **changes) for name, changes in
              (("longer", dict(max_response=30)), ("hotter", dict(temperature=3.0)))]  # fmt: skip
    lengths = {json.dumps([row["response_length"] for row in records[0]["tiers"]])
               for records in (sampled, greedy, *others)}  # fmt: skip
    assert len(lengths) == 4, "each setting changes the responses"


def test_a_run_evaluates_text_plainly_at_the_same_positions(place, tmp_path, capsys):
    last = held_out(place, "plain")[-1]
    data = dict(model=place / "plain/model", data=place / "data.jsonl", mode="ntp", per_tier=3)
    found = evaluated(place, tmp_path, **data)
    asked = [{(i["document"], i["position"]) for i in x["items"]} for x in (last, found)]
    assert asked[0] == asked[1]
    assert last["plain"] == pytest.approx({r["tier"]: r["accuracy"] for r in found["tiers"]})
    assert last["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    (thought,) = (r["accuracy"] for r in last["tiers"] if r["tier"] == "average")
    said = f"{last['nats_per_token']:.4f} nats per token, {100 * last['plain']['average']:.1f} % "
    said += f"right without a thought, {100 * thought:.1f} % with one"
    assert said in capsys.readouterr().out
    series = report.series_of(place / "plain")
    assert series["held-out-plain/hard"][-1] == (2, pytest.approx(last["plain"]["hard"], rel=1e-5))
    assert len(series["held-out-plain/easy"]) == 3


def test_a_run_asks_for_the_last_budget(place, monkeypatch):
    run = prepared(place, out=str(place / "asks"), eval_data=(str(place / "data.jsonl"),))
    asked = []
    asking = lambda *known: asked.append(known) or []
    monkeypatch.setattr(rmt.engine.held_out, "predict_thinking", asking)
    monkeypatch.setattr(train.RunLog, "evaluation", lambda *_: None)
    log = train.RunLog(run.out, run.config, 0, 3, WORLD)
    evaluate_held_out(*run, log)
    budget, exponent, sampling = asked[0][4:7]
    assert budget == 4 and exponent == 0.0
    assert (sampling.temperature, sampling.purpose, sampling.seed) == (0.8, "evaluate", 0)
    assert min(p.position for p in asked[0][3]) >= SETTINGS["min_context"]


def test_a_resumed_run_asks_the_questions_that_it_began_with(place):
    more = dict(eval_data=str(place / "data.jsonl"), eval_positions=5, learning_rate=5e-2)
    held_out(place, "whole", **more, save_every=1, keep=9)
    run = prepared(place, eval_data=(more["eval_data"],), eval_positions=5)
    again = Prepared(*prepare(Config(resume=str(place / "whole")), WORLD))
    changed = [not torch.equal(a, b) for a, b in zip(run.model.parameters(),
                                                     again.model.parameters())]  # fmt: skip
    assert any(changed), "it goes on with what it has learnt"
    assert again.held_out[1].positions == run.held_out[1].positions


def test_nats_are_those_of_every_token_but_the_first(place):
    run = prepared(place)
    documents = run.documents[:3]
    nats = nats_per_token(run.model, run.tokenizer, documents, 50, WORLD)
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([*run.tokenizer.begin_ids, *document.tokens.tolist()])
        from rmt.forest import pack
        from rmt.trees import Tree

        forest = pack([Tree(0, ids.tolist())], torch.device("cpu"))
        with torch.no_grad():
            logits = run.model(
                forest.tokens, forest.position, forest.attend, lambda hidden, head: hidden @ head.T
            )
        logprobs = logits[:-1, : run.tokenizer.vocab_size].double().log_softmax(-1)
        total -= float(logprobs.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    assert nats == pytest.approx(total / count, rel=1e-5)


# ---- what is kept


def test_a_report_that_cannot_be_written_is_refused_before_any_work(place, tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, flag in ((tmp_path / "file/report.json", "json"), (tmp_path / "file/p", "positions")):
        fragments = (f"--{flag} {name} cannot be written",)
        refusal(evaluation, flags(model=place / "run", **{flag: name}), fragments, capsys)


def test_a_terminal_with_few_characters_loses_nothing(place, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    found = evaluated(place, tmp_path, mode="ntp", per_tier=2)
    assert len(found["items"]) == 6
    assert b"| average | 6 |" in raw.getvalue()


def test_half_a_character_in_a_response_is_kept(tmp_path):
    from rmt.system.records import write_whole

    response = {"response": "a\\\ud800\udc80\udcff"}
    write_whole(tmp_path / "x.json", json.dumps(response, ensure_ascii=False))
    kept = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert kept["response"].encode("utf-16", "surrogatepass") == response["response"].encode(
        "utf-16", "surrogatepass"
    )


def test_what_is_left_out_is_counted_in_table_and_report(place, tmp_path, capsys):
    problems = [{"problem": f"{k} + 1?", "answer": "2"} for k in range(3)]
    problems.append({"problem": "x" * 300, "answer": "7"})
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    found = evaluated(place, tmp_path, data=data, mode="problems")
    assert (found["records"], len(found["left_out"]), found["tiers"][0]["n"]) == (4, 1, 3)
    assert found["left_out"][0]["source"].endswith(":4")
    assert "not in the table: 1 of 4 records" in capsys.readouterr().out


def test_two_reports_are_compared_by_a_command(place, tmp_path, capsys):
    for name in ("before", "after"):
        evaluated(place, tmp_path, json=tmp_path / f"{name}.json", mode="rmt",
                  model=place / ("thinker" if name == "before" else "run"),
                  data=place / "data.jsonl", max_response=12, per_tier=4,
                  tier_thresholds=SETTINGS["tier_thresholds"], tiers="quantile", min_context=8,
                  document_tokens=128, **(dict(budget=4)))  # fmt: skip
    paths = [str(tmp_path / f"{name}.json") for name in ("before", "after")]
    capsys.readouterr()
    compare.main(paths)
    printed = capsys.readouterr().out
    assert "| average | 12 |" in printed and "| hard | 4 |" in printed
    refusal(compare, [paths[0], str(place / "run/run.json")], ("no report of eval.py",), capsys)


def test_tiers_of_a_run_without_a_curriculum_are_not_planned(place, tmp_path):
    described = json.loads((place / "run/run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(described))
    assert set(report.planned(tmp_path, [0, 1])) == {f"planned/{tier}" for tier in TIERS}
    described["config"]["curriculum"] = False
    (tmp_path / "run.json").write_text(json.dumps(described))
    assert report.planned(tmp_path, [0, 1]) == {}
