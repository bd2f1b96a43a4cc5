"""Raw text files to token documents."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rmt.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt", ".md", ".parquet")
HUB_DATASETS = {
    "KbsdJames/Omni-MATH": "test.jsonl",
    "Skywork/Skywork-OR1-RL-Data": "data/math-00000-of-00001.parquet",
}
# What DAPO-Math asks for with each problem would contradict --problem-request.
DAPO_REQUEST = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of "
    r"the form Answer: [^\n]*\n\n"
    r'|\n\nRemember to put your answer on its own line after "Answer:"\.$'
)
BAD_SHARE = 0.01  # more unreadable records than this are an error


@dataclass(frozen=True)
class Document:
    """One text as ids, without the tokens that a model puts before a text."""

    index: int
    source: str  # file:line
    tokens: np.ndarray  # (T,) int64
    answer: str = ""  # of a problem


@dataclass(frozen=True)
class Record:
    source: str
    text: str | None  # None: could not be read
    trouble: str = ""
    answer: str = ""


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
    records = [record for path in paths for record in _read_path(path, _text, fields)]
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


def load_problems(
    paths: Sequence[str], tokenizer: Tokenizer, fields: Sequence[str], most_tokens: int
) -> list[Document]:
    """Problems: a text (`problem` or `question`, unless `fields` names others) and its `answer`,
    of which what follows the last #### counts (GSM8K); or verl's `prompt` and `reward_model`.

    Problems of more than most_tokens are left out. Errors as of `load`.
    """
    records = [record for path in paths for record in _read_path(path, _problem, fields)]
    _report_bad(records, paths)
    documents: list[Document] = []
    for record in (record for record in records if record.text is not None):
        ids = np.asarray(tokenizer.encode(record.text), dtype=np.int64)
        if len(ids) <= most_tokens:
            documents.append(Document(len(documents), record.source, ids, record.answer))
    if not documents:
        raise ValueError(
            f"{', '.join(map(str, paths))}: each problem has more than {most_tokens} tokens; raise "
            "--document-tokens"
        )
    return documents


def _read_path(path: str, make: Callable, fields: Sequence[str]) -> Iterator[Record]:
    """Records of files and folders; make(source, object of a line, fields) gives one."""
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
        for source, raw, trouble in _read_file(file):
            yield Record(source, None, trouble) if trouble else make(source, raw, fields)


def _read_file(file: Path) -> Iterator[tuple[str, Any, str]]:
    """(source, object, what is wrong with it) of each record."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"--data {file}: only {', '.join(SUFFIXES)} files can be read")
    if file.suffix == ".parquet":
        yield from ((f"{file}:{i}", row, "") for i, row in enumerate(_read_parquet(file), start=1))
        return
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError(f"--data {file} is a binary file, not text; give {', '.join(SUFFIXES)}")
    if file.suffix == ".jsonl":
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                yield f"{file}:{number}", *_parse(line)
        return
    try:
        yield str(file), {"text": content.decode("utf-8")}, ""
    except UnicodeDecodeError as error:
        yield str(file), None, f"not UTF-8 at byte {error.start}"


def _parse(line: bytes) -> tuple[Any, str]:
    try:
        raw = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    return raw, "" if isinstance(raw, dict) else "not a JSON object"


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"--data {file}: reading .parquet needs pyarrow; `pip install pyarrow`, or convert the "
            "file to .jsonl"
        ) from None
    return parquet.read_table(file).to_pylist()


def _text(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    wanted = fields or (("problem", "solution") if "problem" in raw else ("text",))
    missing = [name for name in wanted if not isinstance(raw.get(name), str)]
    if missing:
        has = ", ".join(raw) or "none"
        return Record(source, None, f"no text field {missing[0]!r}; it has: {has}")
    text = "\n\n".join(raw[name] for name in wanted)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return Record(source, None, "half a surrogate pair, which is no character")
    return Record(source, text)


def _problem(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    if isinstance(raw.get("reward_model"), dict):  # a data set made for verl
        raw = _from_verl(raw)
    record = _text(source, raw, fields or ("question" if "question" in raw else "problem",))
    answer = raw.get("answer")
    if record.text is not None and not isinstance(answer, (str, int, float)):
        return Record(source, None, f"no field 'answer'; it has: {', '.join(raw)}")
    text = record.text and DAPO_REQUEST.sub("", record.text.strip())
    return replace(record, text=text, answer=str(answer).rsplit("####")[-1].strip())


def _from_verl(raw: dict[str, Any]) -> dict[str, Any]:
    truth = raw["reward_model"].get("ground_truth")
    with suppress(TypeError, ValueError):  # Skywork's are lists of answers, as JSON
        listed = json.loads(truth)
        truth = listed[0] if isinstance(listed, list) and listed else truth
    said = [m.get("content") for m in raw.get("prompt") or [] if isinstance(m, dict)]
    return {"problem": said[-1] if said else None, "answer": truth}


def _report_bad(records: Sequence[Record], paths: Sequence[str]) -> None:
    bad = [record for record in records if record.text is None]
    if not records:
        raise ValueError(f"--data {', '.join(map(str, paths))} is empty; give a file with text")
    shown = "\n".join(f"  {record.source}: {record.trouble}" for record in bad[:5])
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
