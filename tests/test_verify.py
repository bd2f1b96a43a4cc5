"""Answers to problems: the same value in another spelling is right, anything else is wrong."""

import pytest

from rmt import verify
from rmt.verify import same_answer

SAME = [
    ("42", "42"), (" 42. ", "42"), ("42.0", "42"), ("1,234", "1234"), ("$18$", "18"),
    ("18", r"\$18"), (r"\frac{1}{2}", "1/2"), (r"\dfrac12", "0.5"), (r"-\frac{3}{4}", "-0.75"),
    (r"\text{red}", "red"), ("x + 1", "x+1"), (r"\left(1, 2\right)", "(1,2)"), (r"90^\circ", "90"),
]  # fmt: skip
OTHER = [
    ("42", "43"), ("", "42"), ("", ""), ("4 2.5", "42"), ("1/0", "1"), ("-1", "1"), ("nan", "1"),
    ("(1,2)", "(2,1)"), ("1e", "1"), (r"\frac{1}{2}", "1/3"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    monkeypatch.setattr(verify, "_math_verify", lambda: None)


@pytest.mark.parametrize("given, truth", SAME)
def test_another_spelling_of_an_answer_is_right(given, truth):
    assert same_answer(given, truth) and same_answer(truth, given)


@pytest.mark.parametrize("given, truth", OTHER)
def test_another_value_is_wrong(given, truth):
    assert not same_answer(given, truth)


def test_math_verify_judges_what_spelling_cannot(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert verify.verifier() == "math-verify"
    assert same_answer("x+1", "1+x") and not same_answer("x+1", "x-1")
