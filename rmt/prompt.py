"""Build prompts, and read the answer in a response.

Departures: the paper does not print its prompt. The wording follows the template of RPT
(arXiv 2506.08007): ask for the next token of the text under "### Context", reasoning step by
step, final answer in \\boxed{}; then the paper's budget sentence. The order is ours: everything
that depends on the step comes after the document, so that the document is computed once.

    trunk    <user> INSTRUCTION ### Context ⏎ document tokens ...
    branch                            ... fork ⏎⏎ ### End of context ⏎⏎ budget sentence <assistant>

A small model predicts the text worse behind a chat template. With `--text-in thought`, ours, the
thought begins with the document; an invisible mark, MARK, says where that ends:

    trunk    <user> INSTRUCTION budget sentence <assistant> <think> ⏎ document tokens ...
    branch                                                                  ... fork MARK
"""

from dataclasses import dataclass
from itertools import accumulate

from models.tokenizer import THINK_CLOSE, Tokenizer
from rmt.budget import budget_sentence

INSTRUCTION = r"""Predict the next token of the text under "### Context". Reason step by step \
about what comes next, then give the one most probable next token as your final answer in \boxed{}.\
 A token may begin with a space: write \boxed{ para} or \boxed{ =}, not \boxed{para} or \boxed{=}. \
Write a newline as \n and a tab as \t.

### Context
""".replace("\\\n", "")

END = "\n\n### End of context"  # else the request reads as part of the text
IN_THOUGHT = INSTRUCTION.removesuffix("\n\n### Context\n").replace(
    'under "### Context"', "that your thought begins with"
)
MARK = "\u200e"  # a left-to-right mark: it may stand anywhere in a text and changes nothing in it
THINK = "<think>"
BOXED = r"\boxed{"


@dataclass(frozen=True)
class PromptIds:
    """Ids around a document."""

    header: tuple[int, ...]  # on the trunk, before the document
    footer: tuple[int, ...]  # on each branch, after the context; may be empty

    def __len__(self) -> int:
        return len(self.header) + len(self.footer)


def next_token_prompt(
    tokenizer: Tokenizer, budget: int | None, text_in: str = "question"
) -> PromptIds:
    """Return the ids around a text; budget None leaves the budget sentence out.

    The document's own ids go between header and footer and are never decoded. text_in: "question",
    or "thought".
    """
    before, after = tokenizer.chat_parts()
    if text_in == "thought":
        request = "" if budget is None else " " + budget_sentence(budget)
        asked = tokenizer.encode(IN_THOUGHT + request)
        header = (*before, *asked, *after, *think_ids(tokenizer))
        return PromptIds(header, tuple(tokenizer.encode(MARK)))
    request = "" if budget is None else "\n\n" + budget_sentence(budget)
    return PromptIds(
        header=tuple(before + tokenizer.encode(INSTRUCTION)),
        footer=tuple(tokenizer.encode(END + request) + after),
    )


def think_ids(tokenizer: Tokenizer, text_in: str = "question") -> list[int]:
    """Return the ids with which a response opens its thought; none where the prompt has."""
    _, after = tokenizer.chat_parts()
    opened = text_in == "thought" or THINK in tokenizer.decode(after)
    return [] if opened else tokenizer.encode_with_control(THINK + "\n")


def prompt_for(
    task: str, tokenizer: Tokenizer, budget: int | None, request: str, text_in: str = "question"
) -> PromptIds:
    """Return the prompt of a task.

    request: what to do with a problem, may be empty; text_in: of next tokens.
    """
    if task == "nothing":
        return PromptIds((), ())
    if task == "next-token":
        return next_token_prompt(tokenizer, budget, text_in)
    before, after = tokenizer.chat_parts()
    sentences = [request] * bool(request) + [budget_sentence(budget)] * (budget is not None)
    asked = "\n\n" + " ".join(sentences) if sentences else ""
    return PromptIds(header=tuple(before), footer=tuple(tokenizer.encode(asked) + after))


@dataclass(frozen=True)
class Answer:
    """The parts of a response; text is None when it is not well-formed."""

    thought: str
    text: str | None  # content of the last \boxed{} after </think>
    thinking_length: int | None  # generated tokens before </think>; None without one


def parse_response(tokenizer: Tokenizer, ids: list[int], thinks: bool = True) -> Answer:
    """Split a response at its first </think> and read the answer behind it.

    Without </think> there is no answer. thinks=False is for problems: then the whole response is
    read, and answers have no unpaired braces.
    """
    position, after = _find_close(tokenizer, ids)
    thought = tokenizer.decode(ids[:position])
    after = thought if position is None and not thinks else after
    return Answer(thought, boxed_content(after, thinks), position)


def _find_close(tokenizer: Tokenizer, ids: list[int]) -> tuple[int | None, str]:
    """Return the index of the first token of </think> and the text after it."""
    if tokenizer.think_close_id is not None:
        if tokenizer.think_close_id not in ids:
            return None, ""
        position = ids.index(tokenizer.think_close_id)
        return position, tokenizer.decode(ids[position + 1 :])
    # Models without the control token spell it; a token that only starts it is part of it.
    pieces = [tokenizer.bytes_of([index]) for index in ids]
    text = b"".join(pieces)
    start = text.find(THINK_CLOSE.encode())
    if start < 0:
        return None, ""
    position = next(i for i, end in enumerate(accumulate(map(len, pieces))) if end > start)
    return position, text[start + len(THINK_CLOSE) :].decode("utf-8", errors="replace")


def boxed_content(text: str, unpaired: bool = True) -> str | None:
    r"""Return the content of the last \boxed{...}, unstripped; None if there is none.

    Examples: \boxed{\frac{1}{2}} is `\frac{1}{2}`, \boxed{^{} is `^{`, \boxed{}$} is `}$`. If the
    braces from the box on pair, the one that closes the box ends the answer; if they do not, or the
    answer would be empty, the last brace of the text does. With unpaired=False the brace that
    closes the box always does: \boxed{5}} is `5`.
    """
    last = text.rfind("}")
    start = text.rfind(BOXED, 0, max(last, 0))
    if start < 0:
        return None
    start += len(BOXED)
    depth, closed, surplus = 1, None, 0
    for index in range(start, last + 1):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}" and depth:
            depth -= 1
            closed = index if depth == 0 and closed is None else closed
        elif text[index] == "}":
            surplus += 1  # closes what was opened before the box, if anything was
    pair = depth == 0 and (surplus == 0 or surplus <= _open_braces(text[: start - len(BOXED)]))
    if closed is not None and (not unpaired or (pair and closed != start)):
        last = closed
    return text[start:last]


def _open_braces(text: str) -> int:
    """Count the braces that are open where the text ends."""
    depth = 0
    for character in text:
        if character in "{}":
            depth = depth + 1 if character == "{" else max(0, depth - 1)
    return depth


def escape(token: bytes, braces: bool = False) -> str:
    r"""Write a token as it stands inside \boxed{}: as it is, except what cannot be seen or parsed.

    Newline, tab and carriage return become \n, \t, \r; other invisible characters and bytes that
    are no character of their own become \xhh or \uhhhh. Braces become \x7b, \x7d where they would
    be read as another answer, as in `a}{b`, or where `braces` asks for it.
    """
    text = token.decode("utf-8", errors="surrogateescape")
    braces = braces or boxed_content(BOXED + text + "}") != text
    return "".join(_escape_character(character, braces) for character in text)


def _escape_character(character: str, braces: bool) -> str:
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
    if character in named:
        return named[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character in "{}":
        return f"\\x{code:02x}" if braces else character
    if character.isprintable():
        return character
    # From 128 on \x is a lone byte, above: the character U+00A0 is not the byte A0.
    return f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}"
