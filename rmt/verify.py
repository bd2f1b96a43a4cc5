r"""Is this the answer to the problem? For post-training on problems with an answer (GRPO).

Answers are compared as numbers, or as text in a plain spelling without the signs of percent,
degrees and dollars: 1/2 is 0.5 and \frac{1}{2}, 1 1/2 is 3/2, 1,500 is 1500; but (1,500) has two
numbers, 1 2 is not 12, and x+1 is not 1+x. Where that does not say yes, math-verify (Kydlíček,
Hugging Face) is asked, if it is installed (rmt/judge.py).

What a model writes is hostile: numbers and texts are bounded before anything is computed.
"""

import os
import re
from fractions import Fraction
from functools import cache, lru_cache
from importlib.util import find_spec

from rmt.judge import Judge

LONGEST = 1000  # characters of an answer; a longer one is compared as it is
LARGEST = 400  # decimal exponent of a number; beyond, it is text
SPELLINGS = (
    (r"\\(?:left|right|displaystyle|!)(?![a-z])|\\?[$%]|°|\^\{?\\circ\}?|\\degree", ""),
    (r"\\(?:[,;: ]|q?quad(?![a-z]))|[~\s]", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac *(\d) *(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\(?:times|cdot)|×|·", "*"),
    (r"−", "-"),
    (r"^ +| +$", ""),
)
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NUMBER = re.compile(rf"({DECIMAL})(?:[eE]([+-]?[0-9]+)| ?\* ?10\^\{{?([+-]?[0-9]+)\}}?)?")
FRACTION = re.compile(rf"([+-]?{DECIMAL}) ?/ ?({DECIMAL})|\\frac\{{([^{{}}]+)\}} ?\{{([^{{}}]+)\}}")
MIXED = re.compile(r"([0-9]+) ?(?:(?<= )([0-9]+) ?/ ?([0-9]+)|\\frac\{([0-9]+)\} ?\{([0-9]+)\})")
THOUSANDS = re.compile(
    r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9,]| [0-9])"
)
NESTED = re.compile(r"\\?[(\[{)\]}]|[0-9][0-9, ]*[0-9]|.", re.DOTALL)


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same; the content of a \\boxed{}, and the truth."""
    if max(len(given), len(truth)) > LONGEST:
        return given.strip() == truth.strip() != ""
    given, truth = _plain(given), _plain(truth)
    numbers = _number(given), _number(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _without_spaces(given) == _without_spaces(truth):
        return truth != ""
    return "" not in (given, truth) and verifier() == "math-verify" and _judged(given, truth)


@cache
def verifier() -> str:
    """Who judges here: what a number from this run depends on."""
    return "numbers and spelling" if find_spec("math_verify") is None else "math-verify"


@lru_cache(1 << 12)  # a group often repeats itself
def _judged(given: str, truth: str) -> bool:
    return _judge(os.getpid()).same(given, truth)


@cache
def _judge(_process: int) -> Judge:
    """One for each process: a fork must not talk through the pipe of another."""
    return Judge()


def _plain(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return _join_thousands(re.sub(" +", " ", text).rstrip(". ").strip())


def _join_thousands(text: str) -> str:
    """1,000 and 1 000 -> 1000; but a comma within parentheses, brackets or a set separates."""
    depth, parts = 0, []
    for part in NESTED.findall(text):
        if part in ("(", "[", "\\(", "\\[", "\\{"):
            depth += 1
        elif part in (")", "]", "\\)", "\\]", "\\}"):
            depth -= 1
        elif not depth and len(part) > 1 and part[0].isdigit():
            part = re.sub("[ ,]", "", part) if THOUSANDS.fullmatch(part) else part
        parts.append(part)
    return "".join(parts)


def _without_spaces(text: str) -> str:
    """Without spaces, except those between digits: 3 4 is not 34."""
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text)


def _number(text: str) -> Fraction | None:
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    text = text.strip()
    value = _decimal(text)
    if value is None and (found := MIXED.fullmatch(text)):
        whole, top, bottom = (int(x) for x in found.groups() if x is not None)
        value = whole + Fraction(top, bottom) if top < bottom else None
    if value is None and (found := FRACTION.fullmatch(text)):
        top, bottom = (_signed(x) for x in found.groups() if x is not None)
        value = top / bottom if top is not None and bottom else None
    return None if value is None else sign * value


def _signed(text: str) -> Fraction | None:
    text = text.strip()
    value = _decimal(text.lstrip("+-").strip()) if len(text.lstrip("+-")) >= len(text) - 1 else None
    return value if value is None or text[:1] != "-" else -value


def _decimal(text: str) -> Fraction | None:
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    exponent = (found[2] or found[3] or "0").lstrip("+")
    if len(exponent) > 6 or abs(int(exponent)) > LARGEST:
        return None
    return Fraction(found[1]) * Fraction(10) ** int(exponent)
