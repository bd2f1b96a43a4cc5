"""Raw text files to token documents."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmt.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt", ".md")
HUB_DATASETS = {"KbsdJames/Omni-MATH": "test.jsonl"}
BAD_SHARE = 0.01  # more unreadable records than this are an error


@dataclass(frozen=True)
class Document:
    """One text as ids, without the tokens that a model puts before a text."""

    index: int
    source: str  # file:line
    tokens: np.ndarray  # (T,) int64


@dataclass(frozen=True)
class Record:
    source: str
    text: str | None  # None: could not be read
    problem: str = ""


def load(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    fields: Sequence[str],
    document_tokens: int,
    shortest: int,
) -> list[Document]:
    """All documents of files and folders, longer ones cut into pieces of document_tokens.

    Pieces shorter than `shortest` tokens are left out. Bad records are named on stderr; more than
    1 % of them, or nothing left, is a ValueError.
    """
    records = [record for path in paths for record in _read_path(path, fields)]
    _report_bad(records, paths)
    texts = [record for record in records if record.text is not None]
    documents: list[Document] = []
    for record in texts:
        ids = np.asarray(tokenizer.encode(record.text), dtype=np.int64)
        for piece in (ids[i : i + document_tokens] for i in range(0, len(ids), document_tokens)):
            if len(piece) >= shortest:
                documents.append(Document(len(documents), record.source, piece))
    if not documents:
        raise ValueError(
            f"{', '.join(map(str, paths))}: none of {len(texts)} texts has the {shortest} tokens "
            "that a document needs (--min-context and one more); give longer text"
        )
    return documents


def _read_path(path: str, fields: Sequence[str]) -> Iterator[Record]:
    path = Path(_download(path) if path in HUB_DATASETS else path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise ValueError(
                f"{path} holds no {', '.join(SUFFIXES)} file; give --data another path"
            )
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(
            f"--data {path} does not exist; give files, folders, or {', '.join(HUB_DATASETS)}"
        )
    for file in files:
        yield from _read_file(file, fields)


def _read_file(file: Path, fields: Sequence[str]) -> Iterator[Record]:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"--data {file}: only {', '.join(SUFFIXES)} files can be read")
    raw = file.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"--data {file} is a binary file, not text; give {', '.join(SUFFIXES)}")
    if file.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                yield _read_line(f"{file}:{number}", line, fields)
        return
    try:
        yield Record(str(file), raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Record(str(file), None, f"not UTF-8 at byte {error.start}")


def _read_line(source: str, line: bytes, fields: Sequence[str]) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Record(source, None, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Record(source, None, "not a JSON object")
    wanted = fields or (("problem", "solution") if "problem" in record else ("text",))
    missing = [name for name in wanted if not isinstance(record.get(name), str)]
    if missing:
        has = ", ".join(record) or "none"
        return Record(source, None, f"no text field {missing[0]!r}; it has: {has}")
    text = "\n\n".join(record[name] for name in wanted)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return Record(source, None, "half a surrogate pair, which is no character")
    return Record(source, text)


def _report_bad(records: Sequence[Record], paths: Sequence[str]) -> None:
    bad = [record for record in records if record.text is None]
    if not records:
        raise ValueError(f"--data {', '.join(map(str, paths))} is empty; give a file with text")
    shown = "\n".join(f"  {record.source}: {record.problem}" for record in bad[:5])
    if len(bad) > BAD_SHARE * len(records):
        raise ValueError(
            f"{len(bad)} of {len(records)} records are unreadable (more than {BAD_SHARE:.0%}):\n"
            f"{shown}\nmend the file, or name its fields with --text-fields"
        )
    if bad:
        print(f"skipped {len(bad)} of {len(records)} records:\n{shown}", file=sys.stderr)


def _download(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, HUB_DATASETS[name], repo_type="dataset")
    except Exception as error:  # requests, httpx and hub errors share no base class
        raise FileNotFoundError(
            f"data set {name} could not be fetched ({type(error).__name__}); on a machine with a "
            f"network run `hf download --repo-type dataset {name} --local-dir DIR`, "
            f"then give --data DIR/{HUB_DATASETS[name]}"
        ) from None
