"""sample.py: prompts of any encoding, streams that end anywhere, the budget of the model's run."""

import io
import json
import os
import sys

import pytest
import torch
from small_run import flags, refusal, write_small_model

import sample
from models.tokenizer import Tokenizer
from models.weights import build
from rmt.prompt import next_token_prompt

COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("sample") / "model")


def options(*words, **values):
    return sample.read_options([*flags(**values), *words])


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


# ---- prompts


@pytest.mark.parametrize("content", ["ü ℓ\n", "\ufeffü ℓ\n"], ids=["plain", "byte-order-mark"])
def test_prompt_is_read_as_utf8_whatever_the_terminal_has(monkeypatch, content):
    stdin(monkeypatch, content.encode())
    assert sample.read_prompt(options()) == "ü ℓ\n"
    assert sample.read_prompt(options(prompt=content)) == "ü ℓ\n"


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea\0", b"half \xe2\x88"])
def test_prompt_that_is_not_utf8_is_refused(monkeypatch, model, capsys, content):
    stdin(monkeypatch, content)
    fragments = ("the prompt is not UTF-8 (byte 0x", "give it in UTF-8")
    refusal(sample, flags(model=model), fragments, capsys)
    refusal(sample, flags(model=model, prompt=os.fsdecode(content)), fragments, capsys)


def test_closed_standard_input_is_an_empty_prompt(monkeypatch, model, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    refusal(sample, flags(model=model), ("the prompt is empty",), capsys)


# ---- what is printed


def test_stream_shows_what_was_said_also_when_it_ends_inside_a_character(model):
    tokenizer, network = Tokenizer(model), build(model, "cpu", torch.float32)
    halves = 0
    for seed in range(COUNT):
        pieces = []
        o = options(max_new_tokens=9, temperature=3, seed=seed)
        tokens, _ = sample.complete(network, tokenizer, [5, 6], o, pieces.append)
        spoken = [token for token in tokens if token not in tokenizer.stop_ids]
        assert "".join(pieces) == tokenizer.decode(spoken)
        halves += tokenizer.decode(spoken).endswith("\ufffd")
    assert halves, "no stream ends inside a character"


@pytest.mark.parametrize("cut", [dict(top_k=1), dict(top_p=1e-6)])
def test_a_sample_is_cut_and_scored_within_what_is_left(model, cut):
    tokenizer, network = Tokenizer(model), build(model, "cpu", torch.float32)
    given = [options(**cut), options("--greedy"), options()]
    found = [sample.complete(network, tokenizer, [5, 6], o, lambda piece: None) for o in given]
    assert found[0][0] == found[1][0] != found[2][0]
    assert set(found[0][1]) == {0.0} and max(found[1][1]) < 0


def test_sampling_ends_when_nobody_reads(model, monkeypatch):
    monkeypatch.setattr(sample, "nobody_reads", lambda: True)
    tokenizer, network = Tokenizer(model), build(model, "cpu", torch.float32)
    o = options(max_new_tokens=50, seed=1)
    assert len(sample.complete(network, tokenizer, [5, 6], o, lambda piece: None)[0]) == 1


# ---- budgets

RUN = {"budget_start": 100, "budget_decay": 0.5, "budget": True}


@pytest.mark.parametrize(
    "words, run, budget",
    [
        ([], None, 160), ([], RUN, 50), ([], RUN | {"budget": False}, None),
        (["--budget", "7"], RUN, 7), (["--budget", "7"], RUN | {"budget": False}, 7),
        (["--no-ask-budget"], RUN, None), (["--no-ask-budget"], None, None),
    ],
)  # fmt: skip
def test_budget_asked_for_is_that_of_the_run_or_none(model, tmp_path, words, run, budget):
    if run is not None:
        (tmp_path / "rmt_run.json").write_text(json.dumps({"config": run}))
    tokenizer, o = Tokenizer(model), options("--think-next", *words)
    around = next_token_prompt(tokenizer, budget)
    found = sample.prompt_ids(o, tokenizer, "ab", tmp_path)
    assert found == [*around.header, *tokenizer.encode("ab"), *around.footer]


def test_a_budget_without_room_for_an_answer_is_refused(model, tmp_path):
    tokenizer, ask = (
        Tokenizer(model),
        lambda *words: sample.prompt_ids(
            options("--think-next", *words), tokenizer, "ab", tmp_path
        ),
    )
    for words, said in ((["--budget", "600"], "608 or more"),
                        (["--max-new-tokens", "100"], "168 or more")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ask(*words)
    assert ask("--budget", "504") and ask("--max-new-tokens", "10", "--no-ask-budget")


def test_a_budget_that_is_not_asked_for_is_refused(capsys):
    words = flags(budget=9, ask_budget=False)
    refusal(sample, words, ("--budget 9", "--no-ask-budget", "leave one"), capsys)


def test_the_next_token_is_predicted_with_a_thought_and_without(model, capsys):
    network, tokenizer = build(model, "cpu", torch.float32), Tokenizer(model)
    ids = torch.tensor([tokenizer.encode("ab")])
    row = sample.pack([sample.Tree(0, ids[0].tolist())])
    logits = network(row.tokens, row.position, row.attend, lambda x, head: x[-1] @ head.T)
    p = logits[: tokenizer.vocab_size].softmax(dim=0)
    sample.main(["--think-next", *flags(model=model, prompt="ab", max_new_tokens=200, budget=9)])
    said, probable = capsys.readouterr().out, p.topk(5)
    assert f"entropy {-(p * p.log()).sum():.2f} nats" in said
    for value, token in zip(probable.values, probable.indices.tolist()):
        assert f"{value:6.1%}  {tokenizer.decode([token])!r}" in said
    assert "predicts" in said
