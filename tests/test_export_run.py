"""A run's settings and its model are found in what it wrote, whether or not it has ended."""

import json
import shutil

import pytest
from small_run import (
    arguments,
    equal,
    flags,
    metrics,
    refusal,
    run_here,
    weights,
    write_corpus,
    write_small_model,
)
from toy_runs import WORLD

import eval as evaluation
import sample
import train
from models.weights import SINGLE
from rmt.engine import export
from rmt.engine.checkpoint import run_settings
from rmt.engine.export import find_model

STEPS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/, train.jsonl and run/, which has ended."""
    place = tmp_path_factory.mktemp("made")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    run_here(*arguments(place, steps=STEPS, save_every=2, budget_start=11, probe_documents=0))
    return place


def test_settings_are_found_from_model_run_and_checkpoint(place):
    run = place / "run"
    for path in (run / "model", run, run / "checkpoints/step-000003"):
        found = run_settings(path)
        assert (found["config"]["budget_start"], found["step"], found["total_steps"]) == (11, 3, 3)


def test_settings_go_with_a_model_that_is_moved(place, tmp_path):
    shutil.copytree(place / "run/model", tmp_path / "elsewhere")
    assert run_settings(tmp_path / "elsewhere")["config"]["budget_start"] == 11


def test_models_that_no_run_made_have_no_settings(place):
    assert run_settings(place / "model") is None
    assert run_settings(place / "nowhere") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', "{}", '{"config": {"data": 3}}'])
def test_damaged_settings_are_refused_by_name(content, tmp_path):
    (tmp_path / "rmt_run.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        run_settings(tmp_path)


def test_newest_checkpoint_decides_over_the_record_of_the_start(place):
    assert json.loads((place / "run/run.json").read_text())["step"] == 0
    assert run_settings(place / "run")["step"] == STEPS


# ---- models


@pytest.fixture
def run(place, tmp_path):
    """A copy of the run, as if it had been stopped: with checkpoints and without a model."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    return tmp_path / "run"


def exported(*words):
    export.main([str(word) for word in words])


def test_model_of_the_newest_checkpoint_is_the_one_that_the_run_wrote(place, run, tmp_path):
    exported(run, tmp_path / "hf")
    ended = place / "run/model"
    assert equal(weights(tmp_path / "hf"), weights(ended))
    names = sorted(path.name for path in ended.iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    for name in set(names) - {SINGLE, "rmt_run.json"}:
        assert (tmp_path / "hf" / name).read_bytes() == (ended / name).read_bytes()
    assert run_settings(tmp_path / "hf")["step"] == STEPS


def test_model_of_an_earlier_checkpoint_is_another_one(place, run, tmp_path):
    exported(run / "checkpoints/step-000002", tmp_path / "hf", "--dtype", "bfloat16")
    assert run_settings(tmp_path / "hf")["step"] == 2
    found, last = weights(tmp_path / "hf"), weights(place / "run/model")
    name = "model.layers.0.mlp.up_proj.weight"
    assert str(found[name].dtype) == "torch.bfloat16"
    assert not equal(found, {k: v.bfloat16() for k, v in last.items()})


def test_what_is_no_run_or_is_in_the_way_is_refused(place, run, tmp_path, capsys):
    new = tmp_path / "hf"
    refusal(export, [place / "model", new], ("neither a run nor a checkpoint",), capsys)
    refusal(export, [tmp_path / "nowhere", new], ("neither a run nor a checkpoint",), capsys)
    refusal(export, [run, run], (f"{run} exists", "choose another"), capsys)
    (run / "checkpoints/step-000003/__0_0.distcp").write_bytes(b"x")
    refusal(export, [run, new], ("__0_0.distcp is damaged",), capsys)
    assert not new.exists()


def test_model_without_the_one_that_it_started_from_is_refused(place, run, tmp_path, capsys):
    source = place / "model"
    template = source / "tokenizer_config.json"
    before = template.read_text()
    template.write_text(before.replace("<|im_start|>", "<|im_end|>"))
    try:
        refusal(export, [run, tmp_path / "hf"], (f"tokenizer of {source}", "old files"), capsys)
    finally:
        template.write_text(before)


def test_scripts_take_a_run_that_was_stopped_and_one_that_has_ended(place, run, capsys):
    asked = flags(prompt="1: the sum", greedy=True, max_new_tokens=8, json=True)
    said = []
    for model in (run, run, run / "checkpoints/step-000003", place / "run", place / "run/model"):
        sample.main([*flags(model=model), *asked])
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    assert said == [said[0]] * 5
    evaluated = dict(
        data=place / "train.jsonl", mode="ntp", document_tokens=64, min_context=8, per_tier=2,
        tiers="quantile", tier_thresholds=(0.2, 0.5, 0.8), max_response=24,
        positions=run / "positions.json",
    )  # fmt: skip
    evaluation.main(flags(model=run, **evaluated))
    assert "| average |" in capsys.readouterr().out


def test_dry_run_of_a_run_needs_no_export(run, capsys):
    train.main(["--model", str(run), "--dry-run"])
    assert "fits: " in capsys.readouterr().out


def test_run_starts_from_the_model_of_a_run(run, tmp_path, place):
    run_here(*arguments(place, model=run, out=tmp_path / "next", steps=1, probe_documents=0))
    assert len(metrics(tmp_path / "next")) == 1


def test_model_of_a_run_that_has_gone_on_is_that_of_its_newest_checkpoint(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    assert find_model(str(tmp_path / "run"), "", WORLD) == tmp_path / "run/model"
    newest = tmp_path / "run/checkpoints/step-000004"
    shutil.copytree(tmp_path / "run/checkpoints/step-000003", newest)
    assert find_model(str(tmp_path / "run"), "", WORLD) == newest / "model"


def test_model_of_a_checkpoint_that_cannot_be_written_to_goes_into_the_cache(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(export.os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(run.rglob("*"))
    found = find_model(str(run), "", WORLD)
    assert (tmp_path / "cache") in found.parents and (found / SINGLE).is_file()
    assert find_model(str(run), "", WORLD) == found
    assert sorted(run.rglob("*")) == before
