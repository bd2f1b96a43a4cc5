"""Answers to problems: the same value in another spelling is right, anything else is wrong."""

import signal
import sys
import time

import pytest

from rmt.data import corpus, judge
from rmt.data.judge import Judge, same_answer

pytest.importorskip("math_verify", reason="math-verify is not installed")

SAME = [
    ("42", "42"), (" 42. ", "42"), ("1,234", "1234"), (r"\frac{1}{2}", "0.5"), ("x+1", "1+x"),
    (r"\text{red}", "red"), (r"90^\circ", "90"), (r"5 \text{ cm}", "5"), ("x=5", "5"), ("∎", "∎"),
]  # fmt: skip
OTHER = [
    ("42", "43"), ("", "42"), ("", ""), (" ", ""), ("-1", "1"), ("(1,2)", "(2,1)"), ("1 2", "12"),
    ("x+1", "x-1"), ("(1,500)", "(1500)"), ("9" * 100_000, "9"), ("{" * 100_000, "{"), ("∎", "∑"),
    ("1e999999999", "7"), ("(" * 900, ")"), (r"\text{" * 160, "x"),
]  # fmt: skip


@pytest.mark.parametrize("given, truth", SAME)
def test_another_spelling_of_an_answer_is_right(given, truth):
    assert same_answer(given, truth) and same_answer(truth, given)


@pytest.mark.parametrize("given, truth", OTHER, ids=lambda text: text[:20])
def test_another_value_is_wrong(given, truth):
    assert not same_answer(given, truth) and not same_answer(truth, given)


def test_a_power_tower_is_wrong_within_the_bound_and_the_next_answer_is_judged():
    assert same_answer("x+2", "2+x")  # math-verify is imported
    for tower in ("9^{9^{9^{9}}}", "(" * 400 + "1" + ")" * 400):  # computing, parsing
        started = time.perf_counter()
        assert not same_answer(tower, "7")
        assert time.perf_counter() - started < judge.SECONDS + 1
    assert same_answer("x+3", "3+x")


def test_without_math_verify_problems_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n')
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; `pip install 'math-verify"):
        corpus.read([str(path)], None, (), 0, None)


STUB = """
import os, signal, sys, threading, time
from rmt.data import judge
judge.SECONDS = 0.3
def same(truth, given):
    if given == "hang": time.sleep(60)
    if given == "compute": 9 ** 9 ** 9
    if given == "deaf": signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)
    if given == "memory": return bool([bytearray(1 << 28) for _ in range(64)])
    if given == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if given == "leave": os._exit(3)
    if given == "raise": raise KeyError
    if given == "recurse": return same(truth, given)
    if given == "later": threading.Timer(0.1, os._exit, [1]).start()
    if given == "print": print("1" * 9, flush=True)
    return given == truth
answers = os.dup(1)
os.dup2(2, 1)
os.write(answers, judge.READY)
judge.serve(same, answers)
"""


@pytest.fixture(scope="module")
def stub():
    yield Judge((sys.executable, "-c", STUB))


@pytest.mark.parametrize(
    "given", ["hang", "compute", "memory", "crash", "leave", "raise", "recurse", "print", "deaf"]
)
def test_whatever_judging_does_it_is_wrong_and_the_next_question_is_answered(
    stub, given, monkeypatch
):
    monkeypatch.setattr(judge, "SECONDS", 0.6)
    assert stub.same("a", "a")
    started = time.perf_counter()
    assert not stub.same(given, "a")
    assert time.perf_counter() - started < 3
    assert stub.same("b", "b") and not stub.same("b", "c")


def test_answers_without_a_verdict_are_counted(stub, monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 0.6)
    before = stub.failed
    assert stub.same("a", "a") and not stub.same("b", "a") and stub.failed == before
    for given in ("raise", "hang", "deaf"):
        assert not stub.same(given, "a")
    assert stub.failed == before + 3


def test_more_questions_than_a_pipe_holds_are_answered(stub):
    assert all(stub.same("a" * 99, "a" * 99) for _ in range(700)), "64 KB have 320 of them"


def test_a_fork_that_dies_between_questions_leaves_no_verdict_behind(stub):
    assert not stub.same("later", "a")
    time.sleep(0.3)
    assert stub.same("b", "b") and not stub.same("b", "c") and stub.same("c", "c")


def test_an_interrupted_question_leaves_no_verdict_behind(stub):
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        stub.same("hang", "a")
    signal.signal(signal.SIGALRM, previous)
    assert stub.same("b", "b") and not stub.same("b", "c") and stub.same("c", "c")


def test_a_judge_that_prints_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 0.3)
    dribble = "import time; print(end='!', flush=True)\nwhile True: print(end='x' * 99, flush=True)"
    started = time.perf_counter()
    assert not Judge((sys.executable, "-c", dribble)).same("a", "a")
    assert time.perf_counter() - started < 3


def test_a_judge_that_was_killed_starts_again(stub):
    assert stub.same("a", "a")
    stub.process.kill(), stub.process.wait()
    assert stub.same("a", "a")


def test_the_judge_ends_with_the_process_that_asks(stub):
    assert stub.same("a", "a")
    process = stub.process
    process.stdin.write(b'["a", "hang"]\n')  # in the middle of a question, too
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    stub.process = None


def test_a_judge_that_cannot_start_says_so():
    with pytest.raises(ChildProcessError, match="does not start"):
        Judge((sys.executable, "-c", "raise SystemExit(1)")).same("a", "a")
