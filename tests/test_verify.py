"""Answers to problems: the same value in another spelling is right, anything else is wrong."""

import importlib.util
import signal
import sys
import time

import pytest

from rmt.data import judge, math_answers
from rmt.data.judge import Judge
from rmt.data.math_answers import same_answer

SAME = [
    ("42", "42"), (" 42. ", "42"), ("42.0", "42"), ("1,234", "1234"), ("$18$", "18"), ("+5", "5"),
    ("18", r"\$18"), (r"\frac{1}{2}", "1/2"), (r"\dfrac12", "0.5"), (r"-\frac{3}{4}", "-0.75"),
    (r"\text{red}", "red"), ("x + 1", "x+1"), (r"\left(1, 2\right)", "(1,2)"), (r"90^\circ", "90"),
    (r"75^{\circ}", "75°"), ("1 1/2", "3/2"), (r"1\frac{4}{5}", "9/5"), (r"7 \frac{1}{3}", "22/3"),
    (r"-2\frac12", "-2.5"), (r"1\,000", "1000"), (r"10,\!080", "10080"), ("1{,}000", "1000"),
    ("1 000 000", "1e6"), (r"1.5\times10^3", "1500"), (r"2 \cdot 10^{-2}", "0.02"), (".5", "1/2"),
    (r"50\%", "50"), ("007", "7"), ("−3", "-3"), (r"\frac{-3}{4}", "-3/4"),
    (r"\frac{3}{-4}", "-.75"), (r"\{1,234\}", r"\{1, 234\}"), ("3, 5, 7", "3,5,7"),
    ("1,234.5", "1234.5"), ("1 000/3", "1000/3"), ("x=5", "5"), ("n=3,4", "3, 4"),
    (r"f(x) = 2x", "2x"), (r"5 \text{ cm}", "5"), ("100,200", "100, 200"),
    (r"48 \mathrm{~km} / \mathrm{h}", "48"), (r"25^{\circ} \mathrm{C}", "25"),
    (r"\(1,500\)", "1500"), (r"\frac{270}7\text{ degrees}", "270/7"), (r"1,000\pi", r"1000 \pi"),
    ("(0.5, 1)", r"(\frac12,1.0)"), (r"\left\{0.5, 2\right\}", r"\{1/2,2\}"),
    ("5 125/1000", "5.125"), ("10^3", "1000"), ("€5", "5"), (r"\frac{1,000}{3}", "1000/3"),
    (r"\frac1{12}", "1/12"), ("-1,234.50", "-1234.5"), ("-1 1/2", "-3/2"),
    (r"- \frac{1}{2}", "-.5"), ("(1 000, 5)", "(1000,5)"), ("-10^{-2}", "-0.01"), (r"\[42\]", "42"),
    (r"\sin x", r"\sin  x"), (r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}"), ("4 2.5", "4  2.5"),
    (r"\frac{1/2}{3}", "1/6"),
]  # fmt: skip
OTHER = [
    ("42", "43"), ("", "42"), ("", ""), ("4 2.5", "42"), ("1/0", "1"), ("-1", "1"), ("nan", "1"),
    ("(1,2)", "(2,1)"), ("1e", "1"), (r"\frac{1}{2}", "1/3"), ("1 1/2", "11/2"), ("2 2/3", "22/3"),
    ("1 2", "12"), ("3 4", "34"), ("(1,500)", "(1500)"), ("[1,234]", "[1234]"), ("1 23", "123"),
    (r"\{1,234\}", r"\{1234\}"), ("1,23", "123"), ("12,34,567", "1234567"), ("1 2 3", "123"),
    ("100, 200", "100200"), ("1 0000", "10000"), ("3 5/2", "5.5"), ("1_000", "1000"),
    ("1.2.3", "12.3"), ("(1,000)", "1000"), ("1e999999999", "7"), ("1e-999999999", "0"),
    ("1e4000000", "1e4000001"), ("9" * 100_000, "9"), ("{" * 100_000, "{"),
    (r"\frac{" * 50_000, "1"), ("1," * 50_000, "1"), ("1.234,567", "1.234567"),
    ("1 234/567", "1234/567"), ("--1/2", "1/2"), (r"\frac{1}{2}3", "1/23"), ("x=5", "y=5"),
    (r"5 \text{ cm}", r"5\text{ m}"), ("{1,234}", "1234"), ("a_1,234", "a_1234"), ("x+1=5", "5"),
    ("x=5 or x=7", "7"), ("(1,2)", "[1,2]"), ("1;2", "12"), ("0,500", "500"), ("2 3/4", "23/4"),
    (r"x^\frac{1}{2}", "x^1/2"), ("1/2/3", "1/6"), ("f(1,000)", "f(1000)"),
    ("1 000,000", "1000000"), (r"\text{cm}", ""), ("x=", ""), ("10^999999999", "10"),
    ("1/1e999", "0"), (r"\text{ cm}" * 90, "1"), ("1" + r"\,\text{a}" * 90 + "x", "1"),
    ("1 000" * 190, "1"), ("x=" * 490, "1"), ("(" * 900, ")"), ("1 " * 400, "1"),
    (r"\text{" * 160, "x"), ("." * 900, "."), (r"\$", "$"), ("--1", "1"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    monkeypatch.setattr(math_answers, "verifier", lambda: "numbers and spelling")


@pytest.mark.parametrize("given, truth", SAME)
def test_another_spelling_of_an_answer_is_right(given, truth):
    assert same_answer(given, truth) and same_answer(truth, given)


@pytest.mark.parametrize("given, truth", OTHER, ids=lambda text: text[:20])
def test_another_value_is_wrong(given, truth):
    started = time.perf_counter()
    assert not same_answer(given, truth) and not same_answer(truth, given)
    assert time.perf_counter() - started < 0.5


needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@needs_math_verify
def test_math_verify_judges_what_spelling_cannot(monkeypatch):
    monkeypatch.undo()
    assert math_answers.verifier() == "math-verify"
    assert same_answer("x+1", "1+x") and not same_answer("x+1", "x-1")
    assert not same_answer("(1,500)", "(1500)") and not same_answer("1 2", "12")


@needs_math_verify
def test_a_power_tower_is_wrong_within_the_bound_and_the_next_answer_is_judged(monkeypatch):
    monkeypatch.undo()
    assert same_answer("x+2", "2+x")  # math-verify is imported
    for tower in ("9^{9^{9^{9}}}", "(" * 400 + "1" + ")" * 400):  # computing, parsing
        started = time.perf_counter()
        assert not same_answer(tower, "7")
        assert time.perf_counter() - started < judge.SECONDS + 1
    assert same_answer("x+3", "3+x")


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
