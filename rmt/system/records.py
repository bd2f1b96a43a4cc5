"""Read and write the files of a run: JSON lines, ended by "\\n" alone, and whole files.

A resumed run repeats the steps after its checkpoint. Their old records move to
FILE.replaced.jsonl: a file has one record per step, and none is lost.
"""

import errno
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def as_json(value: Any) -> Any:
    """Replace nan and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON-lines file. OSError that says how to continue the run."""
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
    """Return the records of a JSON-lines file, without torn lines; none if there is no file."""
    return [record for _, record in _lines(path) if record is not None]


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Turn any error in the use of a file's content into a ValueError that names the file."""
    try:
        yield
    except (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} has content that no run writes ({type(error).__name__}: {error}); mend it or "
            "move it away"
        ) from None


def set_aside(path: Path, step: int) -> None:
    """Keep the records of steps before `step`; move all other lines to FILE.replaced.jsonl.

    They are on disk there before they are removed here, so that a kill loses none.
    """
    kept, replaced = [], []
    for line, record in _lines(path):
        before = record is not None and record["step"] < step
        (kept if before else replaced).append(line + b"\n")
    if replaced:
        moved = path.with_suffix(f".replaced{path.suffix}")
        try:
            with moved.open("ab") as file:
                file.writelines(replaced)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # that of a full disk names no file
            raise OSError(error.errno, error.strerror, str(moved)) from None
    if path.is_file() and path.read_bytes() != (content := b"".join(kept)):
        write_whole(path, content)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside and rename it, so that it is never half there. OSError that names it.

    Text is encoded as UTF-8. A pipe or a terminal is written to directly; a link stays one.
    """
    content = content if isinstance(content, bytes) else _encoded(content)
    real = Path(os.path.realpath(path))  # the file behind a link, and its file system
    aside = real.with_name(f".{secrets.token_hex(8)}.new")  # short, and of no other process
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        aside.write_bytes(content)
        os.replace(aside, real)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            aside.unlink()


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(as_json(value), indent=1, ensure_ascii=False))


def check_writable(name: str, path: Path) -> None:
    """Make the folder of the file that the flag `name` gives, but not the file.

    ValueError unless `write_whole` can write it. Call this before the work whose result it is for.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a directory", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except OSError as error:
        raise ValueError(
            f"{name} {path} cannot be written ({error.strerror}: {error.filename}); give a file's "
            "path in a folder that is yours"
        ) from None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line without its end, and its record; None if it is no record of a step."""
    content = path.read_bytes() if path.is_file() else b""
    for line in content.removesuffix(b"\n").split(b"\n") if content else ():
        record = None
        with suppress(ValueError, RecursionError):
            record = parse(line.decode("utf-8"))
        whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield line, record if whole else None


def parse(text: str) -> Any:
    """Return the value of a JSON text; nan and infinity, which browsers refuse, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def _encoded(text: str) -> bytes:
    """Encode as UTF-8, and lone surrogates, which it lacks, as JSON escapes: \\udc80."""
    return text.encode("utf-8", "backslashreplace")
