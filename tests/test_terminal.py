"""Whatever is behind stdout and stderr, printing goes on, and a run that is to stop saves first."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import arguments, metrics, run_here, write_corpus, write_small_model
from tqdm import tqdm

from rmt.engine.checkpoint import steps
from rmt.system.terminal import SIGNALS, nobody_reads, safe_printing, stop_requests

ROOT = Path(__file__).resolve().parent.parent


class Broken(io.StringIO):
    """A stream that fails, with some reason of the system."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


def latin(errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors=errors)


# ---- printing


@pytest.mark.parametrize("name", ["EPIPE", "ENOSPC", "EIO", "EAGAIN"])
def test_print_goes_on_where_nothing_can_be_written(monkeypatch, name):
    monkeypatch.setattr(sys, "stdout", Broken(getattr(errno, name)))
    with safe_printing():
        print("one", flush=True)
        print("two")
        assert nobody_reads() == (name == "EPIPE")
    assert isinstance(sys.stdout, Broken)


def test_print_goes_on_where_a_stream_is_closed_or_was_never_open(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        with safe_printing():
            print("one", file=sys.stderr, flush=True)
            for _ in tqdm(range(2), mininterval=0):
                pass
            assert not nobody_reads()


def test_character_that_the_terminal_lacks_is_a_question_mark(monkeypatch):
    stream = latin()
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_printing():
        print("ü − \ud800 ℓ")
    assert stream.buffer.getvalue() == b"\xfc ? ? ?\n"


def test_progress_bar_and_its_messages_go_on_as_well(monkeypatch):
    monkeypatch.setattr(sys, "stdout", latin())
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    with safe_printing(), tqdm(total=3, mininterval=0) as bar:
        bar.set_postfix_str("ℓ −")
        bar.update()
        bar.write("held-out −1")
        assert nobody_reads()


SCRIPT = """
import os, sys
from rmt.system.terminal import nobody_reads, safe_printing
with safe_printing():
    for _ in range({times}):
        print("x" * 99)
        print("x" * 99, file=sys.stderr)
    with open("result", "w") as file:
        file.write(f"{{file.fileno()}} {{nobody_reads()}}")
"""


@pytest.mark.parametrize("behind", ["| head -n 1", "2>&1 | head -n 1", ">&-", "2>&-", ">/dev/full"])
def test_process_ends_well_whatever_its_output_goes_to(tmp_path, behind):
    (tmp_path / "script.py").write_text(SCRIPT.format(times=2000))
    command = f"{{ {sys.executable} script.py; echo $? >status; }} {behind}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    assert (tmp_path / "status").read_text() == "0\n"
    number, gone = (tmp_path / "result").read_text().split()
    assert int(number) > 2, "a file has taken the place of stdout: what C prints would go there"
    assert gone == str("head" in behind)


# ---- signals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_is_noted_once_and_the_handler_is_as_before(number, heeded_signals):
    before = signal.getsignal(number)
    with stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        again = signal.getsignal(number)
        assert (again == signal.SIG_DFL) == (number != signal.SIGHUP)
    assert signal.getsignal(number) == before


def test_second_hang_up_does_not_end_the_process(heeded_signals):
    with stop_requests() as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked()


def test_signal_that_was_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- a run


class BrokenLater(io.StringIO):
    """A pipe whose reader goes when the first held-out accuracy is printed, as `| head` does."""

    def write(self, text):
        if "held-out" in text:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_run_whose_reader_is_gone_saves_and_stops(tmp_path, monkeypatch):
    write_small_model(tmp_path / "model")
    data = write_corpus(tmp_path / "train.jsonl")
    monkeypatch.setattr(sys, "stdout", BrokenLater())
    asked = dict(eval_data=data, eval_positions=1, probe_documents=0, save_every=50)
    run_here(*arguments(tmp_path, **asked))
    assert steps(tmp_path / "run") == [len(metrics(tmp_path / "run"))] == [1]
    assert not (tmp_path / "run/model").exists()
