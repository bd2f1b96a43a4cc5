"""Links of the docs to lines of code: [text](../file.py#L12 "what the line holds").

    python -m experiments.links      sets the numbers; a test says when one is out of date

The title of a link is a piece of the line, which one line of the file has and no other.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'\]\(([\w./-]+\.py)#L(\d+) "([^"]+)"\)')


def line_of(file: Path, piece: str) -> int:
    """The number of the line that has this piece; ValueError unless it is exactly one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, start=1) if piece in line]
    if len(found) != 1:
        raise ValueError(f"{file} has {piece!r} in {len(found)} lines, not in one")
    return found[0]


def refreshed(page: Path) -> str:
    """The page with the numbers that its links should have."""

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
