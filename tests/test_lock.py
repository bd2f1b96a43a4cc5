"""One process at a time works in a directory, and one that is dead does not."""

import errno
import os
import signal
from contextlib import contextmanager

import pytest
from small_run import arguments, flags, refusal

import train
from experiments import study
from rmt.system import lock
from rmt.system.lock import held


@contextmanager
def another_process(out):
    """Holds the directory; yields its number."""
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with held("--out", out):
            os.write(say, b"x")
            signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(say)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_second_run_is_refused_before_it_touches_anything(tmp_path, capsys):
    out = tmp_path / "run"
    with another_process(out) as child:
        (out / "metrics.jsonl").write_text('{"step": 0}\n{"st')
        before = content(out)
        fragments = (f"--out {out} is in use by another run (process {child} on ", "another dir")
        refusal(train, arguments(tmp_path), fragments, capsys)
        assert content(out) == before


def test_run_is_not_continued_while_it_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    (out / "checkpoints/step-000002").mkdir(parents=True)
    with another_process(out):
        refusal(train, flags(resume=out), (f"--resume {out} is in use",), capsys)


def test_second_study_is_refused(tmp_path):
    with another_process(tmp_path), pytest.raises(ValueError, match="is in use by another run"):
        study.Study(tmp_path, tmp_path / "study.jsonl").run(["none/base"], 1)


def test_killed_process_lets_go_at_once(tmp_path):
    with another_process(tmp_path) as child:
        os.kill(child, signal.SIGKILL)
        with held("--out", tmp_path):  # it is not even waited for
            assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} on ")


def test_child_of_a_killed_process_does_not_keep_its_lock(tmp_path):
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with held("--out", tmp_path):
            grandchild = os.fork()
            if grandchild:
                os.write(say, str(grandchild).encode())
            signal.pause()
        os._exit(0)
    grandchild = int(os.read(ready, 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with held("--out", tmp_path):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_directory_is_free_when_its_run_has_ended(tmp_path):
    for _ in range(2):
        with held("--out", tmp_path):
            pass


def test_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with held("--out", tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_directory_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        refusal(train, arguments(tmp_path, out=out), (f"--out {out} cannot be written",), capsys)


def test_nothing_is_made_for_a_run_that_is_not_there(tmp_path, capsys):
    refusal(train, flags(resume=tmp_path / "run"), ("no checkpoint",), capsys)
    assert not (tmp_path / "run").exists()
