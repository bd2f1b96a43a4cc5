"""Which files `--data` means: folders are searched, each file is read once, the rest is named."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".jsonl", ".txt", ".md", ".parquet")
KINDS = ", ".join(SUFFIXES)


@dataclass
class Files:
    found: list[Path] = field(default_factory=list)  # in the order of paths, then of names
    unreadable: list[tuple[Path, str]] = field(default_factory=list)  # with the reason
    passed_over: dict[str, list[Path]] = field(default_factory=dict)  # reason -> files

    def pass_over(self, reason: str, path: Path) -> None:
        self.passed_over.setdefault(reason, []).append(path)


def printable(path: Path | str) -> str:
    """A path as text, also when its bytes are not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def find_files(paths: Sequence[Path]) -> Files:
    """Files that were named, and those with a known suffix inside folders that were named.

    Links are followed; what begins with a dot is no data unless it is named. ValueError for a
    named path that cannot be read, and for a folder without data.
    """
    files, seen = Files(), set()
    for path in paths:
        unreadable = len(files.unreadable)
        if not path.is_dir() and path.exists() and path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--data {printable(path)}: only {KINDS} files can be read")
        if not _search(path, files, seen):
            reasons = [why for _, why in files.unreadable[unreadable:]]
            reasons += [f"{len(v)} {why}" for why, v in files.passed_over.items()]
            told = f" ({'; '.join(reasons)})" if reasons else ""
            what = f"holds no {KINDS} file" if path.is_dir() else "cannot be read"
            raise ValueError(f"{printable(path)} {what}{told}; give --data another path")
    return files


def _search(path: Path, files: Files, seen: set) -> int:
    """Files of one path, those read already too."""
    count, waiting = 0, [path]
    while waiting:
        path = waiting.pop()
        try:
            status = path.stat()
            folder = stat.S_ISDIR(status.st_mode)
            inside = sorted(path.iterdir(), key=os.fsencode, reverse=True) if folder else []
        except OSError as error:
            files.unreadable.append((path, f"cannot be read ({error.strerror})"))
            continue
        if not folder and not stat.S_ISREG(status.st_mode):
            files.unreadable.append((path, "a pipe, socket or device, not a file"))
            continue
        identity = (status.st_dev, status.st_ino) if status.st_ino else path.resolve()
        count += not folder
        if identity in seen:
            files.pass_over("read once, though reached twice", path)
            count += folder
            continue
        seen.add(identity)
        if not folder:
            files.found.append(path)
        waiting += [entry for entry in inside if _wanted(entry, files)]
    return count


def _wanted(entry: Path, files: Files) -> bool:
    known = os.path.isdir(entry) or entry.suffix.lower() in SUFFIXES
    if entry.name.startswith("."):
        files.pass_over("hidden: its name begins with a dot", entry)
    elif not known:
        files.pass_over(f"neither of {KINDS}", entry)
    return known and not entry.name.startswith(".")
