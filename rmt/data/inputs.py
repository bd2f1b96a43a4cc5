"""Read records from files: a text each, or a problem and its answer, or why it is unreadable."""

import codecs
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from models.tokenizer import THINK_CLOSE
from rmt.data import hub
from rmt.data.files import KINDS, Files, find_files, printable, suffix_of

UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
# What DAPO-Math asks for with each problem would contradict --problem-request.
DAPO_REQUEST = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of "
    r"the form Answer: [^\n]*\n\n"
    r'|\n\nRemember to put your answer on its own line after "Answer:"\.$'
)
PROBLEM = ("problem", "question")  # fields by which records of one problem are known
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    source: str  # file:line
    text: str | None  # None: could not be read
    trouble: str = ""  # why it is in no document
    answer: str = ""
    thought: str = ""  # of a trace
    problem: str = ""  # identifies the problem, or else the text, for --holdout
    part: int = 0  # which path of --data it is from


def read_records(
    paths: Sequence[str], make: Callable, fields: Sequence[str], files: Files
) -> Iterator[Record]:
    """Yield the records of files, folders and data sets of the Hub, one at a time.

    make: `as_text`, `as_problem` or `as_trace`. What is left out is added to `files`.
    """
    sources = []  # a file, or the name of a data set, and its path's index
    missing = lambda path: path in hub.FILES and not os.path.exists(path)
    places = [hub.download(path) if missing(path) else path for path in paths]
    for part, place in enumerate(places):
        if hub.is_name(place):
            sources.append((place, part))
        elif os.path.exists(place):
            known = len(files.found)
            find_files(Path(place), files)
            sources += [(file, part) for file in files.found[known:]]
        else:
            raise FileNotFoundError(
                f"--data {printable(place)} does not exist; give files, folders, or a data set of "
                f"Hugging Face, ORG/NAME, such as {' or '.join(hub.FILES)}"
            )
    yield from (Record(name, None, reason) for name, reason in files.unreadable)
    for source, part in sources:
        read, empty = _read_file if isinstance(source, Path) else _read_dataset, True
        for record in read(source, make, fields):
            yield replace(record, part=part)
            empty = False
        if empty:
            files.left_out.append((printable(source), "empty"))


def _read_file(file: Path, make: Callable, fields: Sequence[str]) -> Iterator[Record]:
    name, suffix = printable(file), suffix_of(file)
    known = suffix.removesuffix(".gz")
    parse = {".parquet": dict, ".jsonl": parse_json}.get(known, _parse_text)
    try:
        with gzip.open(file) if suffix.endswith(".gz") else file.open("rb") as stream:
            if suffix.endswith(".gz"):
                _require_whole(stream)
            rows = _read_parquet(file) if known == ".parquet" else _rows_of(name, known, stream)
            yield from _read_rows(rows, parse, make, fields)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Record(name, None, f"not a whole gzip file ({error})")
    except OSError as error:
        yield Record(name, None, f"cannot be read ({error.strerror})")


def _require_whole(stream: gzip.GzipFile) -> None:
    """Read to the end once, so that of a broken file no record is used, and return to the start."""
    while stream.read(2**20):
        pass
    stream.seek(0)


def _rows_of(name: str, suffix: str, stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of .jsonl, or a whole text."""
    if stream.peek(4).startswith(UTF_16_OR_32):
        raise ValueError(f"--data {name} is UTF-16 or UTF-32; make it UTF-8: iconv -t UTF-8")
    if suffix == ".jsonl":
        yield from ((f"{name}:{number}", line) for number, line in split_lines(stream))
    elif content := stream.read():
        if b"\0" in content:
            raise ValueError(f"--data {name} is a binary file, not text; give {KINDS}")
        yield name, content


def _read_dataset(name: str, make: Callable, fields: Sequence[str]) -> Iterator[Record]:
    rows = ((f"{name}:{n}", row) for n, row in enumerate(hub.rows(name), start=1))
    return _read_rows(rows, dict, make, fields)


def _read_rows(
    rows: Iterable[tuple[str, Any]], parse: Callable, make: Callable, fields: Sequence[str]
) -> Iterator[Record]:
    for source, row in rows:
        try:
            record = make(source, parse(row), fields)
            if LONE_SURROGATE.search(record.text + record.answer + record.thought):
                raise ValueError("half a surrogate pair, which is no character")
            yield record
        except ValueError as error:
            yield Record(source, None, str(error))


def split_lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each line that is not blank; only "\\n" ends a line."""
    for number, line in enumerate(stream, start=1):
        line = line.removesuffix(b"\n").removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def parse_json(line: bytes) -> dict[str, Any]:
    """Parse a line of JSON, with NaN as null; ValueError unless it is an object."""
    try:
        value = json.loads(
            line.decode("utf-8"), parse_constant=lambda _: None, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"field {name!r} is there twice")
    return found


def _parse_text(content: bytes) -> dict[str, Any]:
    try:
        return {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"--data {printable(file)}: .parquet needs pyarrow; `pip install pyarrow`, or convert "
            "it to .jsonl"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{printable(file)}:{number}", row
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"--data {printable(file)} cannot be read as parquet ({error})") from None


def as_text(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    """Join text fields by a blank line; ValueError if one is missing."""
    wanted = fields or (("problem", "solution") if "problem" in raw else ("text",))
    for name in wanted:
        if not isinstance(raw.get(name), str):
            raise ValueError(f"no text field {name!r}; it has: {_names(raw)}")
    text = "\n\n".join(raw[name] for name in wanted)
    problem = next((raw[name] for name in PROBLEM if isinstance(raw.get(name), str)), text)
    # The same with its request and without: as a text and as a problem it is on one side.
    return Record(source, text, problem=DAPO_REQUEST.sub("", problem.strip()))


def as_problem(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    """Read a problem and its answer, of MATH, GSM8K, DAPO or verl; ValueError if one is missing."""
    if isinstance(raw.get("reward_model"), dict):  # a data set made for verl
        raw = _from_verl(raw)
    fields = fields or ("question" if "question" in raw else "problem",)
    texts = {name: raw[name] for name in fields if isinstance(raw.get(name), str)}
    raw = raw | {name: DAPO_REQUEST.sub("", text.strip()) for name, text in texts.items()}
    record, answer = as_text(source, raw, fields), raw.get("answer")
    if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        raise ValueError(f"no field 'answer' of text or a number; it has: {_names(raw)}")
    answer = str(answer).rsplit("####")[-1].strip()
    if not answer:
        raise ValueError("its answer is empty: every response would be wrong")
    return replace(record, answer=answer)


def as_trace(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    """Read a text so far, a thought about what comes next, and the answer; ValueError without."""
    for name in ("context", "thought", "answer"):
        if not isinstance(raw.get(name), str) or not raw[name]:
            raise ValueError(f"no text field {name!r}; it has: {_names(raw)}")
    if THINK_CLOSE in raw["thought"]:
        raise ValueError(f"its thought holds {THINK_CLOSE}; give what stands before it alone")
    return Record(source, raw["context"], "", raw["answer"], raw["thought"], raw["context"])


def _names(raw: dict[str, Any]) -> str:
    return ", ".join(list(raw)[:20]) or "none"


def _from_verl(raw: dict[str, Any]) -> dict[str, Any]:
    prompt, truth = raw.get("prompt"), raw["reward_model"].get("ground_truth")
    with suppress(TypeError, ValueError, RecursionError):  # Skywork's are lists of answers, as JSON
        listed = json.loads(truth)
        if isinstance(listed, list) and listed and isinstance(listed[0], str):  # no [1, 2]
            truth = listed[0]
    messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    return {"problem": messages[-1].get("content") if messages else None, "answer": truth}
