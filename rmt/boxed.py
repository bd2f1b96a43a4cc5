r"""The answer in \boxed{}: reading it, and writing a token so that it can be read."""

BOXED = r"\boxed{"


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
