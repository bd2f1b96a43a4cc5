r"""Is this the answer to the problem? For post-training on problems with an answer (GRPO).

Answers are compared as numbers; else piece by piece between brackets and commas, as numbers or as
text in a plain spelling without the signs of percent, degrees and currencies. 1/2 is 0.5 and
\frac{1}{2}, 1 1/2 is 3/2, 1,500 is 1500; but (1,500) has two numbers, 1 2 is not 12, and x+1 is not
1+x. A name ("x =") or a unit ("\text{ cm}") counts only where both have one. Where that does not
say yes, math-verify (Kydlíček, Hugging Face) is asked, if it is installed (rmt/data/judge.py).

What a model writes is hostile: numbers and texts are bounded before anything is computed.
"""

import os
import re
from fractions import Fraction
from functools import cache, lru_cache
from importlib.util import find_spec

from rmt.data.judge import Judge

LONGEST = 1000  # characters of an answer; a longer one is compared as it is
LARGEST = 400  # decimal exponent of a number; beyond, it is text
SPELLINGS = (
    (r"\\(?:left|right|displaystyle)(?![a-z])|\\[!()\[\]]|\\?[$€£¥%]", ""),
    (r"°|\^ ?(?:\\circ|\{ *\\circ *\})|\\degree", ""),
    (r"\\(?:[,;: ]|q?quad(?![a-z]))|[~\s]", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]?frac *(?:\{([^{}]*)\}|([0-9])) *(?:\{([^{}]*)\}|([0-9]))", r"\\frac{\1\2}{\3\4}"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\(?:times|cdot)(?![a-z])|×|·", "*"),
    (r"−", "-"),
    (r" +", " "),
)
WORD = r"\\(?:text|mathrm|mbox)\{[^{}]*\}"
OPTIONAL = (  # a name before the value, a unit behind it
    re.compile(r"^[\s$]*\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?\s*=(?!.*=)"),
    re.compile(rf"(?<=[0-9}}])(?:(?:\\?[,; ]|[~/])*{WORD}(?:\^\{{?[0-9]\}}?)?)+[.$\s]*$"),
)
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"  # one way to read it, so linear
EXPONENT = r"10\^\{?([+-]?[0-9]+)\}?"
NUMBER = re.compile(rf"({DECIMAL})(?:[eE]([+-]?[0-9]+)| ?\* ?{EXPONENT})?|{EXPONENT}")
FRACTION = re.compile(rf"({DECIMAL}) ?/ ?({DECIMAL})|\\frac\{{([^{{}}]+)\}}\{{([^{{}}]+)\}}")
MIXED = re.compile(r"([0-9]+) ?(?:(?<= )([1-9][0-9]*) ?/ ?([0-9]+)|\\frac\{([0-9]+)\}\{([0-9]+)\})")
THOUSANDS = re.compile(
    r"(?<![A-Za-z0-9_^.,])(?<![0-9] )[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?! ?[0-9]|,)"
)
BRACKET = re.compile(r"[(\[{]")
PIECES = re.compile(r"([()\[\],;]|\\[{}])")


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same; the content of a \\boxed{}, and the truth."""
    if max(len(given), len(truth)) > LONGEST:
        return given.strip() == truth.strip() != ""
    for pattern in OPTIONAL:
        if bool(pattern.search(given)) != bool(pattern.search(truth)):
            given, truth = pattern.sub("", given), pattern.sub("", truth)
    given, truth = _plain(given), _plain(truth)
    if "" in (given, truth):
        return False
    numbers = _number(given), _number(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _same_pieces(given, truth) or _same_pieces(_joined(given), _joined(truth)):
        return True
    return verifier() == "math-verify" and _judged(given, truth)


@cache
def verifier() -> str:
    """Who judges here: what a number from this run depends on."""
    return "numbers and spelling" if find_spec("math_verify") is None else "math-verify"


@lru_cache(1 << 12)  # a group often repeats itself
def _judged(given: str, truth: str) -> bool:
    return _judge(os.getpid()).same(given, truth)


def take_failures() -> int:
    """How many answers were wrong for want of a verdict, since this was asked last."""
    judge = _judge(os.getpid())
    failed, judge.failed = judge.failed, 0
    return failed


@cache
def _judge(_process: int) -> Judge:
    """One for each process: a fork must not talk through the pipe of another."""
    return Judge()


def _plain(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.strip(" ").rstrip(". ")


def _joined(text: str) -> str:
    """1,000 and 1 000 -> 1000; but a comma within brackets separates."""
    return text if BRACKET.search(text) else _join(text)


def _join(text: str) -> str:
    return THOUSANDS.sub(lambda found: re.sub("[ ,]", "", found[0]), text)


def _same_pieces(given: str, truth: str) -> bool:
    given, truth = PIECES.split(given), PIECES.split(truth)
    return len(given) == len(truth) and all(map(_same_piece, given, truth))


def _same_piece(given: str, truth: str) -> bool:
    numbers = _number(given.strip()), _number(truth.strip())
    return numbers[0] == numbers[1] and (
        numbers[0] is not None or _without_spaces(given) == _without_spaces(truth)
    )


def _without_spaces(text: str) -> str:
    """Without spaces, except those between digits: 3 4 is not 34."""
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text)


def _number(text: str) -> Fraction | None:
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    value = _unsigned(text.strip())
    value = _unsigned(_join(text.strip())) if value is None else value
    return None if value is None else sign * value


def _unsigned(text: str) -> Fraction | None:
    value = _decimal(text)
    if value is None and (found := MIXED.fullmatch(text)):
        whole, top, bottom = (int(x) for x in found.groups() if x is not None)
        value = whole + Fraction(top, bottom) if top < bottom else None
    if value is None and (found := FRACTION.fullmatch(text)):
        top, bottom = (_signed(x) for x in found.groups() if x is not None)
        value = top / bottom if top is not None and bottom else None
    return value


def _signed(text: str) -> Fraction | None:
    text = text.strip()
    value = _decimal(text[1:].strip() if text[:1] in ("-", "+") else text)
    return -value if value is not None and text[:1] == "-" else value


def _decimal(text: str) -> Fraction | None:
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    exponent = (found[2] or found[3] or found[4] or "0").lstrip("+")
    if len(exponent) > 6 or abs(int(exponent)) > LARGEST:
        return None
    return Fraction(found[1] or "1") * Fraction(10) ** int(exponent)
