"""What a run keeps besides its newest checkpoints: the best one, and models along the way."""

import json

import pytest
from small_run import arguments, equal, flags, run_here, weights, write_corpus, write_small_model
from toy_runs import prepared

from rmt.engine import export
from rmt.engine.checkpoint import best, steps
from rmt.engine.held_out import _said_of_best
from rmt.engine.run import save
from rmt.system.records import append, read_lines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/, train.jsonl and run/ of six steps, with all that can be kept."""
    place = tmp_path_factory.mktemp("kept")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    keeping = dict(keep=1, keep_best=True, save_every=2, eval_every=2, export_every=3)
    data = dict(eval_data=place / "train.jsonl", eval_positions=20, learning_rate=1e-2)
    run_here(*arguments(place, steps=6, probe_documents=0, **keeping, **data))
    return place


def evaluated(run, step, accuracy):
    rows = [{"tier": "easy", "accuracy": 1 - accuracy}, {"tier": "average", "accuracy": accuracy}]
    run.out.mkdir(exist_ok=True)
    append(run.out / "eval.jsonl", [{"step": step, "tiers": rows}])


def test_best_checkpoint_stays_until_a_better_one_is_there(tmp_path):
    run = prepared(tmp_path, keep=1, keep_best=True, eval_data=(str(tmp_path / "data.jsonl"),),
                   save_every=1, eval_every=1)  # fmt: skip
    kept = []
    for step, accuracy in enumerate((0.9, 0.3, 0.5, 0.2, 0.5, float("nan"), 0.4)):
        if step:
            run.step = step
            save(*run)
            kept.append(steps(run.out))
        evaluated(run, step, accuracy)  # step 0 was evaluated, but has no checkpoint
    assert kept == [[1], [1, 2], [2, 3], [2, 4], [4, 5], [4, 6]]
    assert best(run.out) == (4, 0.5), "nan is no accuracy, and of equals the last is the best"
    assert "50.0% right, is that of step 4" in _said_of_best(run.out)
    (run.out / "eval.jsonl").write_text('{"step": 4, "tiers": 5}\n')
    assert "is not known" in _said_of_best(run.out), "else a run ends before its export"


def test_without_the_flag_only_the_newest_stay(tmp_path):
    run = prepared(tmp_path, keep=1)
    for step in (1, 2):
        run.step = step
        save(*run)
        evaluated(run, step, 1 / step)
    assert steps(run.out) == [2]


def test_run_names_its_best_checkpoint(place, capsys):
    out = place / "run"
    known = {
        record["step"]: next(r["accuracy"] for r in record["tiers"] if r["tier"] == "average")
        for record in read_lines(out / "eval.jsonl")
    }
    assert list(known) == [0, 2, 4, 6]
    step, accuracy = best(out)
    assert accuracy == known[step] == max(known[s] for s in steps(out))
    assert steps(out)[-1] == 6 and len(steps(out)) <= 2
    run_here(*flags(resume=out))  # its steps are over: it evaluates and exports once more
    said = "".join(capsys.readouterr())
    wanted = f"the best checkpoint, {accuracy:.1%} right, is that of step {step}: --model "
    assert wanted + str(out / f"checkpoints/step-{step:06d}") in said


def test_models_along_the_way_are_those_of_their_steps(place, tmp_path):
    out = place / "run"
    assert sorted(p.name for p in out.glob("model*")) == ["model", "model-000003", "model-000006"]
    assert equal(weights(out / "model-000006"), weights(out / "model"))
    assert not equal(weights(out / "model-000003"), weights(out / "model"))
    assert json.loads((out / "model-000003/rmt_run.json").read_text())["step"] == 3
    export.main([str(out / "checkpoints/step-000006"), str(tmp_path / "hf")])
    assert equal(weights(tmp_path / "hf"), weights(out / "model-000006"))
