"""JSON lines: they end at "\n" and nowhere else, whatever separators a text holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"


def json_lines(content: bytes) -> Iterator[tuple[int, Any, str]]:
    """(line number, value, what is wrong with it) of each line that is not blank."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removeprefix(BOM)
        if line.strip():
            yield number, *_parse(line)


def read_lines(path: Path) -> list[Any]:
    """Values of a file that we wrote: none without a file, and no line that a kill cut short."""
    content = path.read_bytes() if path.is_file() else b""
    return [value for _, value, trouble in json_lines(content) if not trouble]


def _parse(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(
            line.decode("utf-8"),
            parse_int=_integer,
            parse_constant=lambda _: None,  # nan is no JSON and no browser reads it
            object_pairs_hook=_object,
        ), ""
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits at most
        return digits


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found
