"""What a run left behind is checked before it is used: checkpoints, positions, prompts."""

import io
import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
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

import eval as evaluation
import sample
import train
from rmt.engine.checkpoint import CHECKSUMS, checksums, run_settings, steps

LAST = "run/checkpoints/step-000004"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of four steps that kept its last three checkpoints, and stored positions."""
    place = tmp_path_factory.mktemp("original")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    write_corpus(place / "held_out.jsonl", 4)
    held_out = dict(eval_data=place / "held_out.jsonl", eval_every=50, eval_positions=1)
    run_here(*arguments(place, steps=4, save_every=1, keep=3, **held_out))
    evaluation.main(evaluating(place))
    return place


@pytest.fixture
def place(original, tmp_path):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    # The run's config names the original data; nothing is written there but the cache.
    return tmp_path


def evaluating(place, **changes) -> list[str]:
    values = dict(
        model=place / "model", data=place / "train.jsonl", mode="ntp", document_tokens=64,
        min_context=8, tiers="quantile", tier_thresholds=(0.2, 0.5, 0.8), max_response=24,
        per_tier=5, positions=place / "positions.json",
    )  # fmt: skip
    return flags(**values | changes)


def flip_byte(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# ---- checkpoints


def test_only_the_newest_checkpoints_stay(original):
    assert steps(original / "run") == [2, 3, 4]
    assert sorted(p.name for p in (original / "run/checkpoints").iterdir()) == [
        "step-000002", "step-000003", "step-000004"
    ]  # fmt: skip


def test_resume_without_checkpoint_is_refused(tmp_path, capsys):
    fragments = (f"--resume {tmp_path / 'run'}", "no checkpoint", "--out of a run", "start anew")
    refusal(train, flags(resume=tmp_path / "run"), fragments, capsys)


def test_new_run_does_not_overwrite_an_old_one(place, capsys):
    before = metrics(place / "run")
    refusal(
        train,
        arguments(place),
        (f"--out {place / 'run'}", "holds a run already", "--resume"),
        capsys,
    )
    assert metrics(place / "run") == before


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "checksums.json"])
def test_flipped_byte_is_refused_until_the_checkpoint_is_deleted(place, capsys, name):
    flip_byte(place / LAST / name)
    fragments = (place / LAST, "is damaged", f"delete {place / LAST}", "the checkpoint before it")
    refusal(train, flags(resume=place / "run"), fragments, capsys)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "checksums.json"])
def test_lost_file_is_refused_by_name(place, capsys, name):
    (place / LAST / name).unlink()
    fragments = (place / LAST / name, "is damaged", f"delete {place / LAST}")
    refusal(train, flags(resume=place / "run"), fragments, capsys)


def test_run_resumes_from_the_checkpoint_before_a_deleted_one(place):
    before = metrics(place / "run")
    shutil.rmtree(place / LAST)
    run_here(*flags(resume=place / "run"))
    assert metrics(place / "run") == before
    assert steps(place / "run") == [2, 3, 4]


@pytest.mark.parametrize("content", ["{}", "[]", "3", "null"])
def test_checksums_of_nothing_are_damaged(place, capsys, content):
    (place / LAST / "checksums.json").write_text(content)
    refusal(train, flags(resume=place / "run"), ("checksums.json is damaged",), capsys)


@pytest.mark.parametrize("name, value", [("step", -1), ("total_steps", -4), ("seconds", -1.5)])
def test_counts_below_0_are_damaged(place, capsys, name, value):
    path = place / LAST / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    sums = json.loads((place / LAST / CHECKSUMS).read_text()) | checksums([path])
    (place / LAST / CHECKSUMS).write_text(json.dumps(sums))
    refusal(train, flags(resume=place / "run"), (path, "is damaged", name), capsys)


@pytest.mark.parametrize("content", ["", "[]", '{"lengths": 3}', '{"lengths": [["a", 1]]}'])
def test_damaged_record_of_the_start_is_named(place, capsys, content):
    (place / "run/run.json").write_text(content)
    fragments = (place / "run/run.json", "mend it or move it away")
    refusal(train, flags(resume=place / "run"), fragments, capsys)


def test_model_of_a_run_without_checkpoints_is_not_replaced(place, capsys):
    shutil.rmtree(place / "run/checkpoints")
    before = weights(place / "run/model")
    refusal(train, arguments(place), ("holds a model already", place / "run/model"), capsys)
    assert equal(weights(place / "run/model"), before)


def test_what_a_run_found_before_it_was_killed_is_not_that_of_the_next(place):
    """It had no checkpoint yet."""
    out = place / "next"
    out.mkdir()
    for name in ("eval", "probes"):
        (out / f"{name}.jsonl").write_text('{"step": 0}\n')
    run_here(*arguments(place, out=out, steps=1, probe_documents=0))
    for name in ("eval", "probes"):
        assert (out / f"{name}.jsonl").read_text() == ""
        assert (out / f"{name}.replaced.jsonl").read_text() == '{"step": 0}\n'


def test_more_documents_than_can_be_drawn_are_refused(place, capsys):
    asked = arguments(place, out=place / "next", steps=0, epochs=1e308)
    refusal(train, asked, ("--batch-size 2", "lower --steps, or else --epochs"), capsys)


def test_stray_folder_among_the_checkpoints_is_no_checkpoint(place):
    (place / LAST).rename(place / (LAST + ".backup"))
    assert steps(place / "run") == [2, 3]


def test_model_whose_weights_have_changed_is_refused(place, original, capsys):
    """Tiers and the reference of KL come from it."""
    path = original / "model/model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, path)
    try:
        fragments = (f"--model {original / 'model'}", "weights have changed", "start anew")
        refusal(train, flags(resume=place / "run"), fragments, capsys)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("flag, file", [("data", "train"), ("eval_data", "held_out")])
def test_resume_after_a_text_has_changed_is_refused(place, original, capsys, flag, file):
    state, path = json.loads((place / LAST / "run.json").read_text()), original / f"{file}.jsonl"
    text = path.read_text()
    path.write_text(text.replace("odd", "even"))
    try:
        fragments = (*state["config"][flag], f"({flags(**{flag: 0})[0]})", "has changed",
                     "put the old text back")  # fmt: skip
        refusal(train, flags(resume=place / "run"), fragments, capsys)
    finally:
        path.write_text(text)


# ---- what cannot be written


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_table_is_printed_when_its_file_cannot_be_written(place, capsys):
    printed = refusal(evaluation, evaluating(place, json="/dev/full"), ("/dev/full",), capsys)
    assert "| average | 15 |" in printed


def test_run_in_a_folder_whose_name_is_no_text_leaves_its_model(place):
    out = place / os.fsdecode(b"caf\xe9")
    run_here(*arguments(place, out=out, steps=1))
    assert run_settings(out / "model")["config"]["out"] == str(out)


def test_result_that_cannot_be_written_leaves_the_checkpoint(place, capsys):
    shutil.rmtree(place / "run/model")
    (place / "run/model").write_text("in the way")
    fragments = ("could not be written", place / "run/model", "checkpoint is intact", "--resume")
    refusal(train, flags(resume=place / "run"), fragments, capsys)
    assert steps(place / "run") == [2, 3, 4]


def test_log_that_cannot_be_written_is_named(place, capsys):
    (place / "other/metrics.jsonl").mkdir(parents=True)
    fragments = ("other/metrics.jsonl could not be written", "--resume", "newest checkpoint")
    refusal(train, arguments(place, out=place / "other"), fragments, capsys)


# ---- stored positions


def test_stored_positions_are_used_again(place, capsys):
    before = (place / "positions.json").read_text()
    evaluation.main(evaluating(place))
    assert (place / "positions.json").read_text() == before
    assert "| average | 15 |" in capsys.readouterr().out


def test_positions_of_other_data_are_refused(place, capsys):
    text = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(text.replace("odd", "even"))
    fragments = ("positions.json", "chosen on other data", "give another file")
    refusal(evaluation, evaluating(place), fragments, capsys)


CORRUPT = {
    "not-json": "[{", "no-list": "3", "list-of-numbers": "[3]", "empty": "[]",
    "no-tier": '[{"document": 0, "position": 9, "entropy": 1.0, "target": 3}]',
    "other-tier": '[{"document": 0, "position": 9, "entropy": 1, "target": 3, "tier": "odd"}]',
    "negative": '[{"document": -1, "position": 9, "entropy": 1, "target": 3, "tier": "hard"}]',
}  # fmt: skip


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_positions_are_refused(place, capsys, content):
    (place / "positions.json").write_text(content)
    refusal(evaluation, evaluating(place), ("--positions", "positions.json", "anew"), capsys)


# ---- prompts


def test_empty_prompt_is_refused(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    fragments = ("the prompt is empty", "give --prompt TEXT or text on standard input")
    refusal(sample, flags(model=place / "model"), fragments, capsys)


def test_prompt_beyond_the_context_is_refused(place, capsys):
    asked = flags(model=place / "model", prompt="a" * 900, max_new_tokens=200)
    fragments = ("900 prompt tokens", "--max-new-tokens 200", "context of 1024", "shorten")
    refusal(sample, asked, fragments, capsys)
