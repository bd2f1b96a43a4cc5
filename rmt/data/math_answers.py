r"""Compare an answer to a problem with the true one, for post-training (GRPO).

Answers are compared as numbers. Otherwise both are split at brackets and commas, and the pieces are
compared as numbers or as text in a plain spelling, without signs of percent, degrees and
currencies. 1/2 is 0.5 and \frac{1}{2}, 1 1/2 is 3/2, 1,500 is 1500; but (1,500) has two numbers,
1 2 is not 12, and x+1 is not 1+x. A name ("x =") or a unit ("\text{ cm}") counts only where both
have one. If the answers still differ, math-verify (Kydlíček, Hugging Face) decides, where it is
installed (rmt/data/judge.py).

Model output is hostile: the size of numbers and texts is checked before anything is computed.
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
    """Return True if `given`, the content of a \\boxed{}, equals `truth` in value or spelling."""
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
    """Name the rule that answers are compared by here; match rates depend on it."""
    return "numbers and spelling" if find_spec("math_verify") is None else "math-verify"


@lru_cache(1 << 12)  # a group often repeats itself
def _judged(given: str, truth: str) -> bool:
    return _judge(os.getpid()).same(given, truth)


def take_failures() -> int:
    """Return how many answers were wrong without a verdict since the last call."""
    judge = _judge(os.getpid())
    failed, judge.failed = judge.failed, 0
    return failed


@cache
def _judge(_process: int) -> Judge:
    """Return the judge of this process: a fork must not write to the pipe of its parent."""
    return Judge()


def _plain(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.strip(" ").rstrip(". ")


def _joined(text: str) -> str:
    """1,000 and 1 000 -> 1000, unless the text has brackets: there a comma separates."""
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
    """Remove spaces, except between digits: 3 4 is not 34."""
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", text)


def _number(text: str) -> Fraction | None:
    """Return the value of a signed number, fraction or mixed number; None for any other text."""
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    for spelling in (text.strip(), _join(text.strip())):
        if (value := _unsigned(spelling)) is not None:
            return sign * value
    return None


def _unsigned(text: str) -> Fraction | None:
    if found := NUMBER.fullmatch(text):
        exponent = (found[2] or found[3] or found[4] or "0").lstrip("+")
        if len(exponent) > 6 or abs(int(exponent)) > LARGEST:
            return None
        return Fraction(found[1] or "1") * Fraction(10) ** int(exponent)
    if found := MIXED.fullmatch(text):
        whole, top, bottom = (int(x) for x in found.groups() if x is not None)
        return whole + Fraction(top, bottom) if top < bottom else None
    if found := FRACTION.fullmatch(text):
        top, bottom = (_number(x.strip()) for x in found.groups() if x is not None)
        return top / bottom if top is not None and bottom else None
    return None
