"""Cold start: responses of the model's own guesses, and of traces from a file."""

import json

import pytest
import toy_runs
from small_run import (
    CONTROL,
    TEMPLATE,
    arguments,
    equal,
    metrics,
    refusal,
    run_here,
    weights,
    write_corpus,
    write_small_model,
)
from toy_models import write_tokenizer

import train
from models.config import TINY
from models.tokenizer import Tokenizer
from rmt.config.config import Config
from rmt.methods.cold_start import given_responses, guess_tails, own_response
from rmt.prompt import parse_response
from rmt.rewards import match_reward

COLD = {"method": "cold-start", "max_response": 60, "positions_per_document": 2}
TRACES = [
    {"context": "two and two make", "thought": "they are four", "answer": " four"},
    {"context": "the line ends here", "thought": "so it breaks", "answer": "\n"},
    {"context": "a set is written {1, 2", "thought": "close it", "answer": "}"},
    {"context": "one", "thought": "then two", "answer": " two"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cold")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    return place


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_token_can_be_guessed_and_is_then_right():
    tokenizer = Tokenizer(TINY)
    context = tokenizer.encode("People: Kai Mira Otto Pia. Kai and Mira meet at")
    for token in range(tokenizer.vocab_size):
        said = own_response(tokenizer, context, [0, 4], [token, token], [])
        answer = parse_response(tokenizer, said.tokens)
        assert match_reward(answer, (tokenizer.bytes_of([token]),)), token


@pytest.mark.parametrize("text_in, fewest", [("thought", 7), ("question", 5)])
def test_thoughts_are_as_long_as_the_budget(text_in, fewest):
    c = Config(traces="own", text_in=text_in, group_size=1)
    for budget in range(1, 200):
        tails = guess_tails(c, budget, 0, 2)
        assert budget < fewest or sum(tail + (2 if tail else 0) + 2 for tail in tails) == budget
        assert tails and max(tails) < 12 and tails.count(4) >= len(tails) - 2


def test_a_text_that_closes_thoughts_is_not_repeated(tmp_path):
    spelled = [token for token in CONTROL if token != "</think>"]
    write_tokenizer(tmp_path, special=spelled, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.think_close_id is None
    context, guesses = tokenizer.encode("written </think>"), tokenizer.encode("aa")
    for tails, length in (([0, 3], 10), ([0, 8], 0)):  # the mark has three bytes
        response = own_response(tokenizer, context, tails, guesses, [])
        answer = parse_response(tokenizer, response.tokens)
        assert (answer.text, answer.thinking_length) == ("a", length)


def test_given_responses_do_not_depend_on_the_other_questions(tmp_path):
    c = COLD | dict(traces="own", text_in="thought", group_size=2, budget_start=40)
    run = toy_runs.prepared(tmp_path, **{k: v for k, v in c.items() if k != "method"})
    questions = toy_runs.draw(run)
    assert len({len(guess_tails(run.config, q.budget, 2, 3)) for q in questions}) > 1
    known = run.config, run.data, run.model, toy_runs.generate
    together, _ = given_responses(*known, questions, 0)
    for index in {q.document for q in questions}:
        own = [i for i, q in enumerate(questions) if q.document == index]
        alone, _ = given_responses(*known, [questions[i] for i in own], 0)
        assert alone == [together[i] for i in own]


@pytest.mark.parametrize("text_in", ["thought", "question"])
def test_a_cold_start_teaches_the_form(place, tmp_path, text_in):
    changes = COLD | dict(steps=16, learning_rate=1e-2, text_in=text_in, save_every=16)
    run_here(*arguments(place, out=tmp_path / "run", **changes))
    first, *_, last = metrics(tmp_path / "run")
    assert last["policy/logprob"] > 0.6 * first["policy/logprob"]
    assert first["share/well_formed"] == 1 and first["sampler_gap/mean"] is None
    assert first["loss/rl"] == pytest.approx(-1, abs=1e-5)  # the weights sum to 1
    assert len({row["length/thinking"] for row in metrics(tmp_path / "run")}) > 5


def test_a_cold_start_resumes_with_the_same_bits_and_needs_no_forest(place, tmp_path):
    runs = {name: tmp_path / name for name in ("whole", "stopped", "naive")}
    known = COLD | dict(steps=4, save_every=2, text_in="question", group_size=2)
    run_here(*arguments(place, out=runs["whole"], **known))
    run_here(*arguments(place, out=runs["stopped"], **known, max_minutes=1e-9))
    assert len(metrics(runs["stopped"])) < 4
    run_here("--resume", runs["stopped"], "--max-minutes", 0)
    assert equal(weights(runs["whole"] / "model"), weights(runs["stopped"] / "model"))
    run_here(*arguments(place, out=runs["naive"], **known, naive=True))
    for row, other in zip(metrics(runs["whole"]), metrics(runs["naive"]), strict=True):
        assert row["policy/logprob"] == pytest.approx(other["policy/logprob"], rel=1e-4)


def test_traces_of_a_file_are_given_as_they_are(place, tmp_path, capsys):
    path = write(tmp_path / "traces.jsonl", TRACES * 3)
    changes = COLD | dict(traces=path, batch_size=4, steps=3, text_in="question")
    run_here(*arguments(place, out=tmp_path / "run", samples_per_step=9, **changes))
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    assert len(samples) == 12
    settings = json.loads((tmp_path / "run/model/rmt_run.json").read_text())
    assert settings["held_out"] is None, "it read no --data, so all of that was left out"
    said = {trace["context"]: trace for trace in TRACES}
    for sample in samples:
        trace = said[sample["context"]]
        answer = trace["answer"].replace("\n", r"\n")
        opened = f"<think>\n{trace['thought']}\n</think>\n\n\\boxed{{{answer}}}<|im_end|>"
        assert sample["response"] == opened
        assert sample["budget"] == sample["thinking_length"]
        assert sample["reward"]["match"] == sample["reward"]["length"] == 1
    short = changes | dict(max_response=30, budget_start=12, out=tmp_path / "short")
    run_here(*arguments(place, **short))
    assert "left out 3 of 12 traces: more than --max-response 30" in capsys.readouterr().err


def test_other_traces_are_refused_at_resume(place, tmp_path, capsys):
    path, out = write(tmp_path / "traces.jsonl", TRACES * 3), tmp_path / "run"
    changes = COLD | dict(traces=path, batch_size=4, steps=3, max_minutes=1e-9, out=out)
    run_here(*arguments(place, **changes))
    for name, other in (("thought", "another thought"), ("answer", " five")):
        write(path, [TRACES[0] | {name: other}, *TRACES[1:], *TRACES * 2])
        refusal(train, ["--resume", out], ["--data"], capsys)


BAD = {
    "no-thought": ({"context": "a", "answer": "b"}, "no text field 'thought'", "context, answer"),
    "empty-answer": (TRACES[0] | {"answer": ""}, "no text field 'answer'"),
    "closed": (TRACES[0] | {"thought": "x</think>y"}, "holds </think>", "before it"),
    "long": (TRACES[0] | {"thought": "x" * 300}, "no trace has 60 tokens", "raise --max-response"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_traces_are_refused(place, tmp_path, capsys, name):
    record, *fragments = BAD[name]
    path = write(tmp_path / "traces.jsonl", [record])
    given = arguments(place, out=tmp_path / "run", **COLD, traces=path)
    refusal(train, given, fragments, capsys)


def test_missing_traces_are_refused(place, tmp_path, capsys):
    given = arguments(place, out=tmp_path / "run", **COLD, traces=tmp_path / "none.jsonl")
    refusal(train, given, ["none.jsonl does not exist"], capsys)
