"""Find the files that `--data` names: search folders, take each file once, list the others."""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".jsonl", ".txt", ".md", ".parquet", ".jsonl.gz", ".txt.gz")
KINDS = ", ".join(SUFFIXES)


@dataclass
class Files:
    found: list[Path] = field(default_factory=list)  # in the order of paths, then of names
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    seen: set[tuple[int, int]] = field(default_factory=set)  # device and inode of found and folders


def printable(path: Path | str) -> str:
    """Return a path as text, also when its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def suffix_of(path: Path | str) -> str:
    """Return which of SUFFIXES ends a path, or ""."""
    name = os.fspath(path).lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def shown(names: Sequence[str]) -> str:
    """Return the first three names as text."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group names by their reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out:
        names.setdefault(reason, []).append(name)
    return names


def remarks_of(files: Files) -> list[str]:
    """Return a line for each reason for which files were left out."""
    return [
        f"left out {len(names):,} files, {reason}: {shown(names)}"
        for reason, names in by_reason(files.left_out).items()
    ]


def find_files(path: Path, files: Files) -> None:
    """Add the file that is named, or those with a known suffix inside the folder, to `files`.

    Links are followed. Names inside a folder that begin with a dot are left out. ValueError for a
    named path that cannot be read, and for a folder without data.
    """
    if not path.is_dir() and not suffix_of(path):
        raise ValueError(f"--data {printable(path)}: only {KINDS} files can be read")
    if not _search(path, files):
        reasons = by_reason(files.unreadable + files.left_out).items()
        told = "; ".join(f"{reason}: {shown(names)}" for reason, names in reasons)
        what = f"holds no {KINDS} file" if path.is_dir() else "cannot be read"
        told = f" ({told})" if told else ""
        raise ValueError(f"{printable(path)} {what}{told}; give --data another path")


def _search(path: Path, files: Files) -> int:
    """Add the files of one path; return how many it has, those found before too."""
    name = printable(path)
    try:
        status = path.stat()
        folder = stat.S_ISDIR(status.st_mode)
        inside = sorted(path.iterdir(), key=os.fsencode) if folder else []
    except OSError as error:
        files.unreadable.append((name, f"cannot be read ({error.strerror})"))
        return 0
    if not folder and not stat.S_ISREG(status.st_mode):
        files.unreadable.append((name, "a pipe, socket or device, not a file"))
        return 0
    identity = (status.st_dev, status.st_ino)
    if identity in files.seen:
        files.left_out.append((name, "read once, though reached twice"))
        return 1
    files.seen.add(identity)
    if folder:
        return sum([_search(entry, files) for entry in inside if _wanted(entry, files)])
    files.found.append(path)
    return 1


def _wanted(entry: Path, files: Files) -> bool:
    if entry.name.startswith("."):
        reason = "hidden: its name begins with a dot"
    elif not os.path.isdir(entry) and not suffix_of(entry):
        reason = f"not one of {KINDS}"
    else:
        return True
    files.left_out.append((printable(entry), reason))
    return False
