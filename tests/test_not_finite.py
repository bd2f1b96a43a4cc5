"""An update that is not finite is refused; three in a row end the run with its state saved."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from small_run import arguments, metrics, refusal, weights, write_corpus, write_small_model
from toy_runs import Prepared, stepped

import sample
import train
from models.weights import SINGLE
from rmt.config.config import parse
from rmt.engine.checkpoint import steps
from rmt.engine.run import prepare
from rmt.system import dist
from rmt.system.metrics import Clock, Metrics
from rmt.update import clip_and_step

RARE = "Q"  # in one document, and in no response of this seed


@pytest.fixture
def place(tmp_path):
    write_small_model(tmp_path / "model", tie_word_embeddings=False)
    with write_corpus(tmp_path / "train.jsonl", 4).open("a") as file:
        file.write(json.dumps({"text": f"Buzz, fizz and {RARE} are in no other document."}) + "\n")
    return tmp_path


@pytest.fixture(params=[0, 3], ids=["weights", "adapters"])
def poisoned(place, request):
    """A run of five documents a step whose model cannot read one character."""
    short = dict(batch_size=5, group_size=2, max_response=4, budget=False, temperature=0.1,
                 lora_rank=request.param)  # fmt: skip
    run = Prepared(*prepare(parse(arguments(place, **short), "", ""), dist.start()))
    stepped(run, 0)  # so that the optimiser has moments
    run.step = 1
    with torch.no_grad():
        run.model.model.embed_tokens.weight[run.tokenizer.encode(RARE)] = torch.nan
    return run


def test_refused_update_names_the_document_to_blame_and_no_other(place, poisoned, capsys):
    row, _ = stepped(poisoned, 1)
    assert row["update/refused"] == 1
    printed = capsys.readouterr().out
    assert printed.startswith("step 1: loss or gradient is not finite; no update.")
    assert printed.endswith(f"Documents: {place / 'train.jsonl'}:5\n")


def test_documents_of_another_rank_are_not_blamed_for_the_gradient_it_shares(monkeypatch):
    gathered = [(set(), {1, 2}), ({3}, set()), (set(), {4, -1})]
    monkeypatch.setattr(dist, "gather_objects", lambda own, world: gathered)
    monkeypatch.setattr(dist, "grad_norm", lambda model, limit: torch.nan)
    known = (None, None, 0.1, 1.0, gathered[0], dist.World(0, 1, dist.CPU), Clock(dist.CPU))
    assert clip_and_step(*known, Metrics()) == (True, {3})
    gathered[1] = (set(), {3})
    assert clip_and_step(*known, Metrics()) == (True, {1, 2, 3, 4})


def test_refused_update_changes_neither_weights_nor_moments(poisoned):
    before = copy.deepcopy((poisoned.model.state_dict(), poisoned.optimizer.state_dict()))
    stepped(poisoned, 1)
    assert poisoned.refused_in_a_row == 1
    after = (poisoned.model.state_dict(), poisoned.optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_absurd_learning_rate_ends_the_run_with_its_state_saved(place, capsys):
    absurd = arguments(place, learning_rate=1e30, warmup_steps=0, batch_size=2)
    fragments = ("3 updates in a row were not finite", f"state is saved in {place / 'run'}",
                 "lower --learning-rate")  # fmt: skip
    printed = refusal(train, absurd, fragments, capsys)
    assert [row["update/refused"] for row in metrics(place / "run")] == [0, 1, 1, 1]
    assert steps(place / "run") == [2, 4]
    assert printed.count(f"no update. Documents: {place / 'train.jsonl'}:") == 3


@pytest.mark.parametrize(
    "value, fragments",
    [(torch.nan, ("model.norm.weight holds nan", "1 such", "fetch them again")),
     (3e38, ("predicts nan for 5 of 5", "train.jsonl:1", "damaged"))],
)  # fmt: skip
def test_model_that_predicts_nan_is_refused_before_training(place, capsys, value, fragments):
    state = weights(place / "model")
    state["model.norm.weight"][:] = value
    save_file(state, place / "model" / SINGLE)
    refusal(train, arguments(place), (place / "model", *fragments), capsys)


def test_damaged_weights_are_refused_before_anything_is_said(place, capsys):
    state = weights(place / "model")
    state["lm_head.weight"][-1, 0] = torch.inf
    save_file(state, place / "model" / SINGLE)
    words = ["--model", str(place / "model"), "--prompt", "a"]
    printed = refusal(sample, words, ("lm_head.weight holds nan or infinity",), capsys)
    assert printed == ""
