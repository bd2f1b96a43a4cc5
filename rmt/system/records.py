"""What a run writes as it goes: JSON lines that end at "\\n" and nowhere else, and whole files.

A run that goes on from a checkpoint takes the steps after it again. What it had written about them
is moved to FILE.replaced.jsonl, so that a file has one record of a step and none is lost.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def as_json(value: Any) -> Any:
    """JSON has no nan and no infinity: what was not measured or overflowed is null."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Lines at the end of a file; OSError that says how the run goes on."""
    text = "".join(json.dumps(as_json(r), ensure_ascii=False) + "\n" for r in records)
    try:
        with path.open("ab") as file:
            file.write(_encoded(text))
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); free some space, then --resume {path.parent} "
            "continues from the newest checkpoint"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file: none without a file, and no line that a kill cut short."""
    return [record for _, record in _lines(path) if record is not None]


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Whatever fails while a file's content is used is a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} has what no run of ours writes ({type(error).__name__}: {error}); mend it or "
            "move it away"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deep; mend it or move it away") from None


def set_aside(path: Path, step: int) -> None:
    """Leave the records of steps before `step`; the others, and torn ones, go to FILE.replaced.

    They are there before they are gone here, whenever a kill comes.
    """
    kept, replaced, size = [], [], 0
    for line, record in _lines(path):
        before = record is not None and record["step"] < step
        (kept if before else replaced).append(line + b"\n")
        size += len(line) + 1
    if replaced:
        with path.with_suffix(f".replaced{path.suffix}").open("ab") as file:
            file.writelines(replaced)
            file.flush()
            os.fsync(file.fileno())
    if replaced or (kept and size != path.stat().st_size):  # or the last had no end of line
        write_whole(path, b"".join(kept))


def write_whole(path: Path, content: str | bytes) -> None:
    """A file in UTF-8 that is never half there (a pipe or a terminal is just written to).

    OSError that names it.
    """
    content = content if isinstance(content, bytes) else _encoded(content)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        aside.write_bytes(content)
        os.replace(aside, path.resolve() if path.is_symlink() else path)
    except OSError as error:  # a full disk's names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            aside.unlink()


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(as_json(value), indent=1, ensure_ascii=False))


def check_writable(name: str, path: Path) -> None:
    """ValueError unless `write_whole` can write the file that the flag `name` gives.

    To be asked before the work whose result it is for. Makes the folder, but not the file.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a directory", path)
        tried = path.with_name(f".{path.name}.{os.getpid()}.tried")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():
            tried.touch()
            tried.unlink()
    except OSError as error:
        raise ValueError(
            f"{name} {path} cannot be written ({error.strerror}: {error.filename}); give a file's "
            "path in a folder that is yours"
        ) from None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line without its end, with the record of a step that it is, if it is one."""
    content = path.read_bytes() if path.is_file() else b""
    for line in content.removesuffix(b"\n").split(b"\n") if content else ():
        try:
            record = parse(line.decode("utf-8"))
            whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        except (ValueError, RecursionError):
            whole = False
        yield line, record if whole else None


def parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)  # nan is no JSON and no browser reads it


def _encoded(text: str) -> bytes:
    """Half a surrogate pair, which no UTF-8 has, is written as JSON writes it: \\udc80."""
    return text.encode("utf-8", "backslashreplace")
