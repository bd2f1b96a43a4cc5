"""A run that was killed, stopped or moved ends with the same bits as one that was left alone."""

import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import sys

import pytest
from small_run import (
    STEPS,
    arguments,
    completed,
    equal,
    finish,
    flags,
    metrics,
    run_here,
    start,
    wait_until,
    weights,
    write_corpus,
    write_small_model,
)
from toy_runs import WORLD

from rmt.config.config import Config
from rmt.engine.checkpoint import steps
from rmt.engine.resume import resolve
from rmt.engine.run import prepare
from rmt.system.terminal import SIGNALS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model whose unused vocabulary makes a save take long enough to be interrupted."""
    place = tmp_path_factory.mktemp("inputs")
    write_small_model(place / "model", vocab_size=20_000)
    write_corpus(place / "train.jsonl")
    write_corpus(place / "eval.jsonl", 3)
    return place


def evaluated(place, **changes) -> list[str]:
    return arguments(
        place, eval_data=place / "eval.jsonl", eval_every=4, eval_positions=2, **changes
    )


@pytest.fixture(scope="module")
def uninterrupted(inputs):
    """The run that all others are compared with; it keeps a checkpoint of every second step."""
    run_here(*evaluated(inputs))
    return inputs / "run"


@pytest.fixture
def out(uninterrupted, tmp_path):
    return tmp_path / "run"


def assert_same(out, other) -> None:
    assert metrics(out) == metrics(other)
    assert (out / "eval.jsonl").read_text() == (other / "eval.jsonl").read_text()
    assert equal(weights(out / "model"), weights(other / "model"))


def after(step: int, uninterrupted, out):
    """What a run had left behind `step` steps after its start."""
    name = f"checkpoints/step-{step:06d}"
    shutil.copytree(uninterrupted / name, out / name)
    shutil.copy(uninterrupted / "eval.jsonl", out)  # it resumes by dropping what comes later
    rows = (uninterrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:step]))
    return out


def begun(process, out, lines: int) -> None:
    wait_until(lambda: len(metrics(out)) >= lines, process)


# ---- the reference is worth comparing with


def test_run_learns_from_text_and_from_rewards(uninterrupted, inputs):
    """So every part of the state matters: weights, both moments, warm-up, draws."""
    rows = metrics(uninterrupted)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert not equal(weights(uninterrupted / "model"), weights(inputs / "model"))
    assert any(row["reward/length"] > 0 for row in rows)
    assert len({row["update/learning_rate"] for row in rows}) == 6  # warm-up, then constant


def test_evaluations_are_those_of_their_steps(uninterrupted):
    rows = [
        json.loads(row) for row in (uninterrupted / "eval.jsonl").read_text().strip().split("\n")
    ]
    assert [row["step"] for row in rows] == [0, 4, 8]


# ---- kills


@pytest.mark.slow
def test_run_killed_between_checkpoints_resumes_bit_for_bit(inputs, uninterrupted, out):
    process = start(*evaluated(inputs, out=out))
    begun(process, out, 5)
    wait_until(lambda: 4 in steps(out), process)  # it is written while steps go on
    process.kill()
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert steps(out)[-1] < len(metrics(out)) < STEPS
    completed(*flags(resume=out))
    assert_same(out, uninterrupted)


def killed_during_a_save(out, *arguments) -> bool:
    """Whether the kill came while a checkpoint was half-written."""
    aside = (out / "checkpoints").glob
    process = start(*arguments)
    wait_until(lambda: any(aside(".step-*.saving")), process, pause=0)
    process.kill()
    finish(process)
    return any(aside(".step-*.saving"))


@pytest.mark.slow
def test_run_killed_during_a_save_resumes_bit_for_bit(inputs, uninterrupted, out):
    after(2, uninterrupted, out)
    hit = any(killed_during_a_save(out, *flags(resume=out)) for _ in range(3))
    assert hit, "no kill came during a save"
    assert steps(out)[-1] < STEPS
    run_here(*flags(resume=out))
    assert_same(out, uninterrupted)
    assert not list((out / "checkpoints").glob(".*"))


class Signalling(io.StringIO):
    """A terminal that sends a signal when the first held-out accuracy is printed: after 4 steps."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        if "held-out" in text and self.number:
            os.kill(os.getpid(), self.number)
            self.number = None
        return super().write(text)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(
    uninterrupted, out, number, monkeypatch, heeded_signals
):
    after(2, uninterrupted, out)
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", printed := Signalling(number))
        run_here(*flags(resume=out))
    assert len(metrics(out)) == steps(out)[-1] == 5
    assert f"stopped after step 5; continue with --resume {out}" in printed.getvalue()
    assert not (out / "model").exists()
    run_here(*flags(resume=out))
    assert_same(out, uninterrupted)


def test_a_resumed_run_decodes_as_many_branches_as_it_had_planned(uninterrupted, out, monkeypatch):
    after(2, uninterrupted, out)
    planned = resolve(Config(resume=str(out)), WORLD)[0].max_branches
    # No room for a new plan.
    monkeypatch.setattr("rmt.memory.autofit.free_memory", lambda world: 0.0)
    assert prepare(Config(resume=str(out)), WORLD)[0].config.max_branches == planned > 0


# ---- another machine


def test_memory_is_planned_anew_on_another_machine_but_for_what_is_typed(
    uninterrupted, out, monkeypatch, capsys
):
    after(2, uninterrupted, out)
    knobs = lambda c: (c.max_branches, c.tokens_per_micro_batch, c.recompute)
    planned = resolve(Config(resume=str(out)), WORLD)[0]
    assert 0 not in knobs(planned)
    same = dataclasses.replace(WORLD, replicate=1)
    assert knobs(resolve(Config(resume=str(out)), same)[0]) == knobs(planned)
    other = dataclasses.replace(WORLD, replicate=2)
    assert knobs(resolve(Config(resume=str(out)), other)[0]) == (0, 0, "auto")
    monkeypatch.setattr("rmt.engine.resume.device_name", lambda device: "H100")
    assert knobs(resolve(Config(resume=str(out)), WORLD)[0]) == (0, 0, "auto")
    assert "planned anew: the run was on 1 ranks of " in capsys.readouterr().out
    assert knobs(resolve(Config(resume=str(out)), WORLD, {"max_branches": 3})[0])[0] == 3


def test_ranks_that_read_different_files_are_refused(uninterrupted, out, monkeypatch):
    after(2, uninterrupted, out)
    other = lambda found, world: [found, found | {"data": "0123"}]
    monkeypatch.setattr("rmt.engine.resume.gather_objects", other)
    with pytest.raises(
        ValueError, match=r"different files \(data\); give all nodes the same --data"
    ):
        prepare(Config(resume=str(out)), WORLD)


@pytest.mark.slow
def test_memory_knobs_of_the_resumed_command_win(uninterrupted, out):
    after(2, uninterrupted, out)
    run_here(*flags(resume=out, offload=True, recompute="none", tokens_per_micro_batch=300))
    kept = resolve(Config(resume=str(out)), WORLD)[0]
    assert (kept.offload, kept.recompute, kept.tokens_per_micro_batch) == (True, "none", 300)
    assert_same_draws(out, uninterrupted)


@pytest.mark.slow
def test_run_moves_from_one_process_to_two_and_back(uninterrupted, out):
    after(2, uninterrupted, out)
    process = start(*flags(resume=out), ranks=2)
    begun(process, out, 4)
    process.terminate()  # the launcher passes it on
    output = finish(process)
    assert steps(out)[-1] in range(4, STEPS), output
    run_here(*flags(resume=out))
    assert_same_draws(out, uninterrupted)


def assert_same_draws(out, other) -> None:
    """Sums have another order on another number of ranks, but they are the same sums."""
    assert (out / "model/model.safetensors").is_file()
    assert len(metrics(out)) == STEPS
    for ours, theirs in zip(metrics(out), metrics(other)):
        for name in ("step", "budget", "draw/easy", "draw/medium", "draw/hard", "loss/ntp"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


# ---- a full disk


@pytest.mark.slow
def test_failed_save_leaves_the_checkpoint_before_it(uninterrupted, out):
    after(2, uninterrupted, out)
    limit = 1_000_000  # bytes per file: enough for everything but a checkpoint
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    process = start(*flags(resume=out), preexec_fn=small)
    output = finish(process)
    assert process.returncode == 1
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 4 could not be written to"), last
    assert "File too large" in last and "free some space" in last
    assert f"--resume {out} continues from step-000002" in last
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    run_here(*flags(resume=out))
    assert_same(out, uninterrupted)
