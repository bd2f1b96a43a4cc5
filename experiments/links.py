"""Links from the docs to lines of code: [text](../file.py#L12 "piece of the line").

    python -m experiments.links      updates the numbers; a test fails if one is out of date

The title of a link is a piece of the line that occurs in exactly one line of the file.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'\]\(([\w./-]+\.py)#L(\d+) "([^"]+)"\)')


def line_of(file: Path, piece: str) -> int:
    """Return the number of the line that has this piece; ValueError unless exactly one has."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, start=1) if piece in line]
    if len(found) != 1:
        raise ValueError(f"{file} has {piece!r} in {len(found)} lines, not in one")
    return found[0]


def refreshed(page: Path) -> str:
    """Return the page with the right line numbers in its links."""

    def link(match: re.Match) -> str:
        file, _, piece = match.groups()
        return f']({file}#L{line_of((page.parent / file).resolve(), piece)} "{piece}")'

    return LINK.sub(link, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for page in pages():
        page.write_text(refreshed(page), encoding="utf-8")


if __name__ == "__main__":
    main()
