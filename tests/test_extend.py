"""What a run keeps when it goes on, what its new command changes, and that it names the rest."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
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
from toy_runs import WORLD

import train
from models.fingerprint import PART_BYTES, PARTS, fingerprint
from models.weights import INDEX, SINGLE
from rmt.config.config import parse, typed
from rmt.curriculum import tier_probabilities
from rmt.data.order import document_order
from rmt.engine.checkpoint import steps
from rmt.engine.resume import resolve
from rmt.report.report import planned
from rmt.system.records import read_lines

# Nothing in it depends on T: a run that is made longer is the longer run.
LEVEL = dict(budget_decay=1.0, curriculum=False, probe_documents=0, save_every=50)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """model/, train.jsonl and run/ of four steps."""
    place = tmp_path_factory.mktemp("original")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    run_here(*arguments(place, steps=4, eval_data=place / "train.jsonl", eval_every=3, **LEVEL))
    return place


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path / "run"


def resolved(*words):
    return resolve(parse(words, "", ""), WORLD, typed(words))[0]


def told(capsys, *words):
    """The flags that a resumed run says are not applied."""
    resolved(*map(str, words))
    lines = capsys.readouterr().out.splitlines()
    named = [line.split("not applied: ")[1].split(", ") for line in lines if "not applied" in line]
    return set(named[0]) if named else set()


# ---- flags


TYPED = {
    "defaults": (["--learning-rate", "1e-6", "--seed", "0", "--group-size", "8"],
                 {"--learning-rate", "--group-size"}),
    "the-run's-own": (["--learning-rate", "1e-3", "--seed", "0", "--group-size", "4"], set()),
    "off": (["--no-ntp", "--no-budget", "--no-curriculum"], {"--no-ntp", "--no-budget"}),
    "on": (["--ntp", "--curriculum"], {"--curriculum"}),
    "lists": (["--tier-thresholds", "0.2", "0.5", "0.8", "--adam-betas", "0.9", "0.99"],
              {"--adam-betas"}),
    "with-=": (["--batch-size=128"], {"--batch-size"}),
    "the-method": (["--method", "grpo"], {"--method"}),
    "the-same-method": (["--method", "rmt"], set()),
    "a-preset": (["--preset", "demo"], {"--preset"}),
    "the-default-preset": (["--preset", "paper"], set()),
    "refused-by-defaults": (["--max-response", "100", "--budget-start", "3000", "--group-size=1"],
                            {"--max-response", "--budget-start", "--group-size"}),
    "another-out": (["--out", "runs/other"], {"--out"}),
    "of-the-machine": (["--keep", "3", "--save-every", "7", "--profile", "2", "--offload",
                        "--max-minutes", "9", "--recompute", "none", "--timeout", "60"], set()),
}  # fmt: skip


@pytest.mark.parametrize("words, names", TYPED.values(), ids=TYPED)
def test_every_typed_flag_that_differs_and_is_not_applied_is_named(run, capsys, words, names):
    assert told(capsys, "--resume", run, *words) == names


def test_flags_of_the_machine_and_of_what_is_kept_are_applied(run):
    kept = resolved(
        *flags(resume=run, keep=3, save_every=7, max_branches=5, samples_per_step=0, seed=9)
    )
    assert (kept.keep, kept.save_every, kept.max_branches, kept.samples_per_step) == (3, 7, 5, 0)
    assert (kept.seed, kept.learning_rate, kept.recompute) == (0, 1e-3, "full")


# ---- a longer run


@pytest.mark.parametrize("documents, batch", [(10, 3), (7, 7), (64, 5)])
def test_documents_of_a_longer_run_begin_with_those_of_the_shorter(documents, batch):
    parts = [0] * documents
    orders = [document_order(parts, (), batch, steps, seed=3).tolist() for steps in (4, 9, 31)]
    for shorter, longer in pairwise(orders):
        assert longer[: len(shorter)] == shorter


def test_run_that_is_made_longer_is_the_longer_run(original, run, tmp_path, capsys):
    """Four steps and five more are nine, bit for bit, where no schedule depends on their number."""
    place = tmp_path / "whole"
    for name in ("model", "train.jsonl"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(original / name)
    thresholds = json.loads((run / "checkpoints/step-000004/run.json").read_text())["thresholds"]
    # Quantiles are those of the documents that the first four steps met.
    level = LEVEL | dict(tiers="absolute", tier_thresholds=tuple(thresholds))
    run_here(*arguments(place, steps=9, eval_data=original / "train.jsonl", eval_every=3, **level))
    run_here(*flags(resume=run, steps=9))
    assert "the run has 9 steps now, not 4" in capsys.readouterr().out
    assert metrics(run) == metrics(place / "run")
    assert equal(weights(run / "model"), weights(place / "run/model"))
    assert steps(run) == [4, 9]
    # The evaluation after the last step of the shorter run stays; the longer one has none there.
    assert [row["step"] for row in read_lines(run / "eval.jsonl")] == [0, 3, 4, 6, 9]
    assert not (run / "metrics.replaced.jsonl").exists()


def test_what_a_longer_run_does_to_its_schedules(original, tmp_path, capsys):
    falls = dict(lr_schedule="linear", warmup_steps=0, learning_rate=0.001)
    given = dict(steps=2, probe_documents=0, save_every=1) | falls
    run_here(*arguments(original, out=tmp_path / "run", **given))
    capsys.readouterr()
    run_here(*flags(resume=tmp_path / "run", steps=4))
    said = capsys.readouterr().out
    assert "the run has 4 steps now, not 2: its schedules go by the share of the steps" in said
    assert "50% instead of 100%; the budget at step 2 is 5 tokens, not 2" in said
    rows = metrics(tmp_path / "run")
    assert [row["budget"] for row in rows] == [12, 5, 5, 3]
    assert [row["update/learning_rate"] for row in rows] == [0.001, 0.0005, 0.0005, 0.00025]


def test_report_draws_the_schedule_that_a_step_had(original, tmp_path):
    out = tmp_path / "run"
    run_here(*arguments(original, out=out, steps=2, probe_documents=0, save_every=1))
    for total in (4, 4, 8):
        run_here(*flags(resume=out, steps=total))
    assert json.loads((out / "run.json").read_text())["lengths"] == [[0, 2], [2, 4], [4, 8]]
    drawn = [p for _, p in planned(out, range(8))["planned/easy"]]
    shares = [0 / 2, 1 / 2, 2 / 4, 3 / 4, 4 / 8, 5 / 8, 6 / 8, 7 / 8]
    asked = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6), 0.3, 0.7
    assert drawn == pytest.approx([tier_probabilities(x, *asked)[0] for x in shares], abs=1e-4)


def test_epochs_make_a_run_longer_as_steps_do(run, capsys):
    run_here(*flags(resume=run, epochs=1))  # ten documents, two a step
    assert len(metrics(run)) == 5


def test_run_cannot_end_before_the_step_where_it_is(run, capsys):
    fragments = (f"--resume {run}: 3 steps", "has taken 4", "--steps 4 or more")
    refusal(train, flags(resume=run, steps=3), fragments, capsys)


# ---- models


def two_files(source, out):
    """The same tensors in two files."""
    shutil.copytree(source, out)
    tensors = load_file(out / SINGLE)
    (out / SINGLE).unlink()
    names = sorted(tensors)
    halves = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, out / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (out / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return out


def test_fingerprint_is_of_tensors_not_of_files(original, tmp_path):
    assert fingerprint(two_files(original / "model", tmp_path / "two")) == fingerprint(
        original / "model"
    )


@pytest.mark.parametrize("rows", [1, 3, 5000])
def test_fingerprint_sees_a_tensor_that_was_trained(tmp_path, rows, original):
    model = shutil.copytree(original / "model", tmp_path / "model")
    tensors = {"a": torch.zeros(rows, 8), "b": torch.zeros(2)}
    assert (rows * 32 > PARTS * PART_BYTES) == (rows == 5000)
    save_file(tensors, model / SINGLE)
    before = fingerprint(model)
    for change in (
        lambda t: t.add_(1e-7),
        lambda t: t[-1, -1].fill_(1),
        lambda t: t[0, 0].fill_(1),
    ):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed["a"])
        save_file(changed, model / SINGLE)
        assert fingerprint(model)["weights"] != before["weights"]
        assert fingerprint(model) | {"weights": before["weights"]} == before


def test_fingerprint_has_the_configuration_and_how_a_response_ends(original, tmp_path):
    model = shutil.copytree(original / "model", tmp_path / "model")
    before = fingerprint(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=3))
    assert fingerprint(model) == before
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 7}))
    assert fingerprint(model)["config"] != before["config"]
    for name in ("generation_config.json", "special_tokens_map.json"):
        before = fingerprint(model)
        (model / name).write_text('{"eos_token_id": 3}')
        assert fingerprint(model)["tokenizer"] != before["tokenizer"], name
