"""Is this the answer to the problem? For post-training on problems with an answer (GRPO).

math-verify (Kydlíček, Hugging Face) judges where it is installed: it parses LaTeX and compares
values. Otherwise answers are compared as numbers, or as text in a plain spelling without the signs
of percent, degrees and dollars: 1/2 is 0.5 and \\frac{1}{2}, but x+1 is not 1+x.
"""

import re
from fractions import Fraction
from functools import cache

SPELLINGS = (
    (r"\\(?:left|right|displaystyle|,|;|!|quad|%|\$)|[$%°]|\\circ|\^\{?\\circ\}?|\s", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    (r"(?<=\d),(?=\d{3}(?:\D|$))", ""),
)


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same; the content of a \\boxed{}, and the truth."""
    given, truth = _plain(given), _plain(truth)
    if given == truth:
        return bool(truth)
    values = _number(given), _number(truth)
    if None not in values:
        return values[0] == values[1]
    judge = _math_verify()
    return judge is not None and judge(given, truth)


def verifier() -> str:
    """Who judges here: what a number from this run depends on."""
    return "numbers and spelling" if _math_verify() is None else "math-verify"


@cache
def _math_verify():
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def judge(given: str, truth: str) -> bool:
        # No timeouts: they are signals, which only a main thread may set.
        sides = (parse(f"${x}$", parsing_timeout=None) for x in (truth, given))
        return bool(verify(*sides, timeout_seconds=None))

    return judge


def _plain(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.rstrip(".")


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
