"""Where the settings and the model of a run are found: in what it wrote, wherever that went."""

import json
import shutil

import pytest
from small_run import arguments, run_here, write_corpus, write_small_model

from rmt.checkpoint import run_settings

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


def test_settings_of_a_model_that_has_none_are_those_beside_it(place, tmp_path):
    shutil.copytree(place / "run/model", tmp_path / "model")
    (tmp_path / "model/rmt_run.json").unlink()
    assert run_settings(tmp_path / "model") is None
    shutil.copy(place / "run/run.json", tmp_path)
    assert run_settings(tmp_path / "model")["config"]["budget_start"] == 11


def test_models_that_no_run_made_have_no_settings(place):
    assert run_settings(place / "model") is None
    assert run_settings(place / "nowhere") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', "{}"])
def test_damaged_settings_are_refused_by_name(content, tmp_path):
    (tmp_path / "rmt_run.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        run_settings(tmp_path)


def test_newest_checkpoint_decides_over_the_record_of_the_start(place):
    assert json.loads((place / "run/run.json").read_text())["step"] == 0
    assert run_settings(place / "run")["step"] == STEPS
