"""A fixed set of problems is held out of training, and no problem is on both sides."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from small_run import write_small_model
from toy_runs import prepared

from rmt.config.config import Config
from rmt.data import corpus
from rmt.data.inputs import Record
from rmt.engine.loading import read_corpus, read_model_directory
from rmt.engine.protocol import _held_out_data, protocol


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("holdout") / "model")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def problems(count):
    return [{"problem": f"What is {i} + {i}?", "solution": f"It is {2 * i}, clearly.",
             "answer": f"{2 * i}"} for i in range(count)]  # fmt: skip


def texts(model, path, part, until=None, **changes):
    tokenizer, shape = read_model_directory(model)
    config = Config(
        **dict(document_tokens=64, min_context=4, budget=False, max_response=8) | changes
    )
    found = read_corpus(config, [str(path)], tokenizer, shape, part, until).documents
    return [tokenizer.decode(document.tokens.tolist()) for document in found]


def test_a_hash_of_the_problem_alone_decides(tmp_path, model):
    records = problems(50)
    path = write(tmp_path / "a.jsonl", records)
    train, held = (set(texts(model, path, part, holdout=5)) for part in ("train", "held_out"))
    assert len(held) == 5 and len(train) == 45 and not train & held
    random.Random(1).shuffle(records)
    path = write(tmp_path / "b.jsonl", records)
    assert set(texts(model, path, "held_out", holdout=5, seed=7, min_context=9)) == held
    as_problems = dict(task="problems", match="answer", ntp=False)
    asked = texts(model, path, "held_out", holdout=5, **as_problems)
    assert {text.split("\n\n")[0] for text in held} == set(asked)  # post-training keeps the split


def test_a_request_around_a_problem_changes_no_side(tmp_path, model):
    """DAPO's: as a text and as a problem, with the request and without, it is one problem."""
    asked = (
        "Solve the following math problem step by step. The last line of your response should "
        "be of the form Answer: $Answer (without quotes).\n\n{}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    plain, wrapped = problems(40), problems(40)
    for record in wrapped:
        record["problem"] = asked.format(record["problem"])
    paths = [write(tmp_path / f"{n}.jsonl", r) for n, r in enumerate((plain, wrapped))]
    number = re.compile(r"What is (\d+)")
    found = [
        {number.search(text)[1] for text in texts(model, path, "held_out", holdout=4, **task)}
        for path in paths
        for task in ({"document_tokens": 512}, dict(task="problems", match="answer", ntp=False))
    ]
    assert all(held == found[0] for held in found) and len(found[0]) == 4


def test_pieces_duplicates_and_other_solutions_of_a_problem_stay_together(tmp_path, model):
    records = problems(40)
    spaced = [
        r | {"problem": r["problem"].replace(" ", " \n "), "solution": "Else."} for r in records
    ]
    long = [r | {"solution": "word " * 60} for r in records]
    path = write(tmp_path / "a.jsonl", records + spaced + long + records)
    tokenizer, shape = read_model_directory(model)
    c = Config(document_tokens=64, min_context=4, budget=False, max_response=8, holdout=4)
    read = lambda part: read_corpus(c, [str(path)], tokenizer, shape, part).documents
    sides = [
        {int(d.source.rsplit(":")[-1]) - 1 for d in read(part)} for part in ("train", "held_out")
    ]  # fmt: skip
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 160
    sides = [{line % 40 for line in side} for side in sides]
    assert not sides[0] & sides[1] and len(sides[1]) == 4


@pytest.mark.parametrize(("records", "held"), [(9, 0), (10, 1), (59, 5), (2100, 200)])
def test_at_most_a_tenth_is_held_out_and_a_line_says_so(tmp_path, model, records, held, capsys):
    path = write(tmp_path / "a.jsonl", problems(records))
    assert len(texts(model, path, "train")) == records - held
    said = capsys.readouterr().err
    assert f"{held} of {records:,} texts" in said
    assert ("more than a tenth" in said) == (held < 200)


def test_so_many_records_are_used_whatever_their_order_and_the_same_are_held_out(tmp_path, model):
    records = problems(300)
    path = write(tmp_path / "a.jsonl", records)
    known = dict(holdout=7, max_records=63, data=(str(path),))
    train, held = (texts(model, path, part, **known) for part in ("train", "held_out"))
    assert len(train) == 63 and len(held) == 7 and not set(train) & set(held)
    assert held == texts(model, path, "held_out", holdout=7)
    fewer = texts(model, path, "held_out", **known | dict(max_records=3))
    assert fewer == held, "what is held out does not depend on how many are used"
    place = {f"{r['problem']}\n\n{r['solution']}": i for i, r in enumerate(records)}
    assert [place[text] for text in train] == sorted(place[text] for text in train)
    more = texts(model, path, "train", **known | dict(max_records=64))
    assert set(train) < set(more) and not set(more) & set(held)
    random.Random(1).shuffle(records)
    again = write(tmp_path / "b.jsonl", records)
    assert set(texts(model, again, "train", **known | dict(data=(str(again),)))) == set(train)
    assert len(texts(model, path, "all", **known)) == 63
    other = write(tmp_path / "c.jsonl", problems(99))  # as --eval-data: all of it
    assert len(texts(model, other, "all", **known)) == 99


def test_an_evaluation_takes_both_numbers_from_the_run():
    run = {"data": ["a"], "holdout": 5, "max_records": 9}
    assert _held_out_data("run", run, {}) == run
    assert _held_out_data("run", run, {"holdout": 3}) == run | {"holdout": 3}


def test_no_text_that_a_run_met_is_held_out_when_its_data_are_fewer(tmp_path, model):
    path = write(tmp_path / "a.jsonl", problems(1000))
    tokenizer, shape = read_model_directory(model)
    known = dict(document_tokens=64, min_context=4, budget=False, max_response=8, holdout=50)
    run = read_corpus(Config(**known), [str(path)], tokenizer, shape, "train")
    met = {tuple(document.tokens) for document in run.documents}
    write(path, problems(700))
    kept = read_corpus(Config(**known), [str(path)], tokenizer, shape, "held_out").documents
    assert {tuple(d.tokens) for d in kept} & met, "or the test shows nothing"
    kept = read_corpus(Config(**known), [str(path)], tokenizer, shape, "held_out", run.held_out)
    assert kept.documents and not {tuple(d.tokens) for d in kept.documents} & met
    assert "not those of the run" in "".join(kept.remarks)


def test_data_of_a_run_that_are_named_again_are_still_its_own(tmp_path):
    known = dict(model=str(tmp_path), holdout=9)
    for kept, eval_data, said in (
        (0, [], "held out 0"),
        (5, ["x"], "held out 0"),
        (5, [], "out 5"),
    ):
        config = {"model": "tiny", "data": ["a"], "holdout": kept, "eval_data": eval_data}
        (tmp_path / "rmt_run.json").write_text(json.dumps({"config": config, "held_out": "7f"}))
        with pytest.raises(ValueError, match=said):
            protocol(known | dict(data=("./a",)), "ntp")
    asked = protocol(known | dict(data=("a", "b"), holdout=3), "ntp")
    assert (asked.part, asked.until) == ("held_out", "7f")
    assert protocol(known | dict(data=("b",)), "ntp").until is None
    (tmp_path / "rmt_run.json").write_text(json.dumps({"config": config | {"eval_data": ["x"]}}))
    with pytest.raises(ValueError, match="--holdout 9 means nothing"):
        protocol(known, "ntp")
    (tmp_path / "rmt_run.json").write_text(json.dumps({"config": {"holdout": 5}}))
    with pytest.raises(ValueError, match="no model and no data"):
        protocol(known, "ntp")


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_too_many_unreadable_records_are_refused_in_either_part(tmp_path, model, part):
    path = write(tmp_path / "a.jsonl", [*problems(40), {"else": 1}])
    with pytest.raises(ValueError, match="1 of 41 records are unreadable"):
        texts(model, path, part, holdout=4)


def test_records_that_are_not_wanted_do_not_stay_in_memory(monkeypatch):
    alive = set()

    class Counted(Record):
        def __init__(self, number):
            super().__init__(f"file:{number}", f"text {number}", problem=str(number))
            alive.add(number)

        def __del__(self):
            alive.discard(int(self.source.split(":")[1]))

    def read(*_):
        for number in range(5000):
            yield Counted(number)
            assert len(alive) <= 2 * (10 * 5) + 1

    monkeypatch.setattr(corpus, "read_records", read)
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    found = corpus.read(["a"], tokenizer, (), 64, 1, "train", holdout=5, most=20)
    assert len(found.documents) == 20 and found.total == 20
    assert "of 5,000 records the first 20 texts" in "".join(found.remarks)


def test_with_evaluation_data_or_a_hold_out_of_0_all_is_trained_on(tmp_path, model):
    path = write(tmp_path / "a.jsonl", problems(20))
    for changes in (dict(eval_data=("x",)), dict(holdout=0)):
        assert len(texts(model, path, "train", **changes)) == 20
        with pytest.raises(ValueError, match="--data"):
            texts(model, path, "held_out", **changes)


def test_a_run_does_not_meet_what_is_held_out(tmp_path):
    everything, run = (prepared(tmp_path, holdout=holdout) for holdout in (0, 200))
    met, all_of_them = ({d.source for d in r.documents} for r in (run, everything))
    assert len(all_of_them) == 13 and len(met) == 12 and met < all_of_them
    evaluated = prepared(tmp_path, holdout=200, eval_data=(str(tmp_path / "data.jsonl"),))
    assert len(evaluated.documents) == len(evaluated.held_out[0]) == 13
