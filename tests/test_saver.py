"""A checkpoint holds the state of its step while later steps go on, or says that it does not."""

import sys
from threading import Event, Thread, Timer

import pytest
import torch
from torch.distributed.tensor import DTensor
from toy_runs import WORLD, prepared, stepped
from two_ranks import whole

from rmt.engine import saver
from rmt.engine.checkpoint import CheckpointError, newest, read, steps
from rmt.engine.run import save
from rmt.system import dist


def learn(run, count=1):
    for _ in range(count):
        stepped(run, run.step)
        run.step += 1


def state(run):
    """Weights, both moments and what was drawn, apart from the run's."""
    moments = {
        f"{name}.{key}": value
        for name, parameter in run.model.named_parameters()
        for key, value in run.optimizer.state[parameter].items()
    }
    found = dict(run.model.named_parameters()) | moments
    found["drawn"] = torch.from_numpy(run.curriculum.drawn)
    return {name: whole(tensor) for name, tensor in found.items()}


def resumed(place):
    return prepared(place, resume=str(place / "out"))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before this is set."""
    opened, write = Event(), saver.dcp.save

    def held(*args, **kwargs):
        assert opened.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(saver.dcp, "save", held)
    yield opened
    opened.set()


@pytest.fixture
def no_process_group():
    """The one that a single process makes for itself to compute in bf16 is taken down."""
    yield
    dist.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_go_on_while_a_save_is_written_and_do_not_change_it(
    dtype, tmp_path, gate, no_process_group
):
    run = prepared(tmp_path, dtype=dtype)
    assert isinstance(run.model.model.norm.weight, DTensor) == (dtype == "bfloat16")
    learn(run)
    wanted = state(run)
    save(*run, wait=False)
    learn(run)
    assert steps(run.out) == [], "the step has waited for the writing"
    later = state(run)
    for name in ("drawn", "model.norm.weight", "model.norm.weight.exp_avg"):
        assert not torch.equal(later[name], wanted[name]), name
    gate.set()
    run.saver.wait()
    again = resumed(tmp_path)
    assert again.step == 1
    assert_equal(state(again), wanted)


def test_at_most_one_save_is_under_way(tmp_path, gate):
    run = prepared(tmp_path)
    learn(run)
    save(*run, wait=False)
    run.step = 2
    second = Thread(target=save, args=(*run,), kwargs={"wait": False})
    second.start()
    second.join(0.5)
    assert second.is_alive() and steps(run.out) == []
    gate.set()
    second.join(60)
    assert steps(run.out)[0] == 1, "the second has begun before the first was complete"
    run.saver.wait()
    assert steps(run.out) == [1, 2]


def test_a_run_that_fails_leaves_its_last_save_complete(tmp_path, gate):
    run = prepared(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with run.saver:
            save(*run, wait=False)
            Timer(0.5, gate.set).start()
            raise ZeroDivisionError
    assert steps(run.out) == [0]


def test_time_that_a_step_waited_is_in_the_row_of_the_next(tmp_path):
    run = prepared(tmp_path)
    first = stepped(run, 0)[0]
    run.step = 1
    save(*run)
    second = stepped(run, 1)[0]
    assert first["time/checkpoint"] == 0 < second["time/checkpoint"]


def test_an_error_in_the_background_is_raised_where_the_save_is_waited_for(tmp_path):
    run = prepared(tmp_path)
    learn(run)
    run.out.mkdir(exist_ok=True)
    (run.out / "checkpoints").write_text("in the way")
    save(*run, wait=False)
    run.saver.thread.join()
    assert run.saver.failed
    with pytest.raises(CheckpointError, match=r"of step 1 could not be written to .*start anew"):
        save(*run)
    (run.out / "checkpoints").unlink()
    save(*run)
    assert steps(run.out) == [1] and not run.saver.failed


def test_a_save_that_another_node_wrote_elsewhere_is_not_complete(tmp_path, monkeypatch):
    run = prepared(tmp_path)
    learn(run)
    mine = saver.checkpoint.checksums
    monkeypatch.setattr(
        saver.checkpoint, "checksums", lambda files: {"__9_0.distcp": "0"} | mine(files)
    )
    with pytest.raises(CheckpointError, match="is not there, another node wrote it"):
        save(*run)
    assert not steps(run.out)


def test_old_checkpoints_stay_when_nobody_can_say_which_is_best(tmp_path, capsys):
    run = prepared(tmp_path, keep=1)
    run.saver.keep_best = True
    run.out.mkdir(exist_ok=True)
    (run.out / "eval.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):
        learn(run)
        save(*run)
    assert steps(run.out) == [1, 2] and not run.saver.failed
    assert "no old checkpoint is deleted" in capsys.readouterr().err


def test_saving_before_the_first_update_changes_no_later_one(tmp_path):
    """torch makes the state of a fresh optimizer by an update of nothing, which must not count."""
    one, other = prepared(tmp_path), prepared(tmp_path, out=str(tmp_path / "other"))
    save(*one)
    learn(one)
    learn(other)
    assert_equal(state(one), state(other))


watchers = []  # told of every touch of a file; Python has no way to take such a hook back


def tell(event, _):
    if watchers and event.split(".")[0] in ("open", "os", "shutil"):
        watcher = watchers.pop()  # it touches files itself
        watcher()
        watchers.append(watcher)


sys.addaudithook(tell)


def test_a_save_cut_off_at_any_point_leaves_a_checkpoint_to_resume(tmp_path):
    """Whenever a file is opened, renamed or deleted, what is there can be read as it is."""
    run, seen = prepared(tmp_path, keep=1), []
    learn(run)
    save(*run)
    run.step = 2
    watchers.append(lambda: seen.append(read(newest(run.out), WORLD)["step"]))
    save(*run)
    watchers.clear()
    assert len(seen) > 20 and seen == sorted(seen) and set(seen) == {1, 2}
    assert steps(run.out) == [2]
