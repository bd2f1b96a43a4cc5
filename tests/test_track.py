"""What a tracker is sent, and that none can end or change a run."""

import importlib
import sys
from pathlib import Path

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

import train
from rmt.system.records import read_lines

FAKE = """
sent = []

class Run:
    def define_metric(self, *given, **named):
        sent.append(("axis", given, named))
    def log(self, numbers):
        sent.append(("log", numbers))
        if len(sent) > ENOUGH:
            raise ConnectionError("no network")
    def finish(self):
        sent.append(("end",))

def init(**given):
    sent.append(("init", given))
    return Run()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tracked")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    run_here(*evaluated(place))
    return place


def evaluated(place, **changes):
    data = dict(eval_data=place / "train.jsonl", eval_every=2, eval_positions=4)
    return arguments(place, steps=3, probe_documents=0, save_every=1, **data | changes)


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A fake that fails after its second call of `log`, when asked to."""

    def made(enough=10**9):
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake/wandb.py").write_text(FAKE.replace("ENOUGH", str(enough)))
        monkeypatch.syspath_prepend(tmp_path / "fake")
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        return importlib.import_module("wandb")

    yield made
    sys.modules.pop("wandb", None)


def numbers(out):
    """Step -> name -> number, as the files have them."""
    found = {}
    for row in read_lines(out / "metrics.jsonl"):
        known = {name: x for name, x in row.items() if x is not None and name != "step"}
        found.setdefault(row["step"], {}).update(known)
    for record in read_lines(out / "eval.jsonl"):
        for row in (
            r for r in record["tiers"] if r["tier"] in ("easy", "medium", "hard", "average")
        ):
            for name in ("accuracy", "thinking_length"):
                if row[name] is not None:
                    found.setdefault(record["step"], {})[f"eval/{name}/{row['tier']}"] = row[name]
        found[record["step"]]["eval/nats_per_token"] = record["nats_per_token"]
    return found


def test_wandb_is_sent_the_numbers_of_the_files(place, tmp_path, wandb):
    fake, out = wandb(), tmp_path / "run"
    run_here(*evaluated(place, out=out, track="wandb"))
    (_, init), axis, *logged, end = fake.sent
    assert (init["name"], init["dir"], init["config"]["batch_size"]) == ("run", str(out), 2)
    assert axis == ("axis", ("*",), {"step_metric": "step"}) and end == ("end",)
    found = {}
    for _, row in logged:
        found.setdefault(row["step"], {}).update(row)
    wanted = {step: row | {"step": step} for step, row in numbers(out).items()}
    assert found == wanted and list(found) == [0, 1, 2, 3]


def test_a_tracker_that_fails_is_named_once_and_changes_nothing(place, tmp_path, wandb, capsys):
    fake, out = wandb(enough=4), tmp_path / "run"
    run_here(*evaluated(place, out=out, track="wandb"))
    said = "".join(capsys.readouterr())
    assert said.count("--track wandb failed (ConnectionError('no network')) and is left") == 1
    assert len(fake.sent) == 5
    assert metrics(out) == metrics(place / "run")
    assert equal(weights(out / "model"), weights(place / "run/model"))


def test_a_tracker_that_does_not_open_ends_no_run(place, tmp_path, wandb, capsys, monkeypatch):
    fake = wandb()
    monkeypatch.delattr(fake, "init")
    run_here(*evaluated(place, out=tmp_path / "run", track="wandb"))
    assert "--track wandb failed (AttributeError" in "".join(capsys.readouterr())
    assert metrics(tmp_path / "run") == metrics(place / "run")


@pytest.mark.parametrize("track", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_an_error_before_anything_is_written(
    place, tmp_path, track, capsys, monkeypatch
):
    empty = tmp_path / "elsewhere"
    (empty / track).mkdir(parents=True)  # a folder is no package: wandb makes one of that name
    monkeypatch.setattr(
        sys, "path", [str(empty), *(p for p in sys.path if not installed(p, track))]
    )
    monkeypatch.delitem(sys.modules, track, raising=False)
    fragments = (f"--track {track}", "not installed", f"`pip install {track}`")
    refusal(train, evaluated(place, out=tmp_path / "run", track=track), fragments, capsys)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def installed(path, track):
    return (Path(path or ".") / track / "__init__.py").exists()


def test_tensorboard_reads_back_the_numbers_of_a_resumed_run(place, tmp_path):
    pytest.importorskip(
        "tensorboard", reason="pip install --target DIR tensorboard, PYTHONPATH=DIR"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    run_here(*evaluated(place, out=out, track="tensorboard"))
    run_here(*flags(resume=out, steps=5))  # the tracker is one of the run's settings
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {}), "a step twice"
            found[event.step][name] = event.value
    wanted = numbers(out)  # but the evaluation at the seam, which is hidden with what is repeated
    assert found.keys() == wanted.keys() == set(range(6))
    for step, row in wanted.items():
        ours = {n: v for n, v in row.items() if not (step == 3 and n.startswith("eval"))}
        assert found[step] == pytest.approx(ours, rel=1e-6)
