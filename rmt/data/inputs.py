"""Files to records: a text each, or a problem and its answer, or why it could not be read."""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmt.data.files import KINDS, find_files, printable, shown

UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
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
PROBLEM = ("problem", "question")  # fields by which records of one problem are known
HALF = "half a surrogate pair, which is no character"


@dataclass(frozen=True)
class Record:
    source: str
    text: str | None  # None: could not be read
    trouble: str = ""  # why it is in no document
    answer: str = ""
    problem: str = ""  # what tells it from other records: its problem, else its text


def read_records(
    paths: Sequence[str], make: Callable, fields: Sequence[str]
) -> tuple[list[Record], list[str]]:
    """Records of files and folders; make(source, object of a line, fields) gives one. Remarks."""
    places = [Path(_download(path) if path in HUB_DATASETS else path) for path in paths]
    for place in places:
        if not os.path.exists(place):
            raise FileNotFoundError(
                f"--data {printable(place)} does not exist; give files, folders, or "
                f"{', '.join(HUB_DATASETS)}"
            )
    files = find_files(places)
    records = [Record(printable(path), None, why) for path, why in files.unreadable]
    for file in files.found:
        before = len(records)
        for source, raw, trouble in _read_file(file):
            bad = Record(source, None, trouble)
            records.append(bad if trouble else make(source, raw, fields))
        if len(records) == before:
            files.pass_over("empty", file)
    remarks = [
        f"left out {len(them):,} files, {why}: {shown([printable(path) for path in them])}"
        for why, them in files.passed_over.items()
    ]
    return records, remarks


def _read_file(file: Path) -> Iterator[tuple[str, Any, str]]:
    """(source, object, what is wrong with it) of each record."""
    name = printable(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        yield name, None, f"cannot be read ({error.strerror})"
        return
    if file.suffix.lower() == ".parquet":
        yield from ((f"{name}:{i}", row, "") for i, row in enumerate(_read_parquet(file), start=1))
        return
    if content.startswith(UTF_16_OR_32):
        raise ValueError(f"--data {name} is UTF-16 or UTF-32; make it UTF-8: iconv -t UTF-8")
    if file.suffix.lower() == ".jsonl":
        for number, raw, trouble in json_lines(content):
            bad = trouble or ("" if isinstance(raw, dict) else "not a JSON object")
            yield f"{name}:{number}", raw, bad
        return
    if b"\0" in content:
        raise ValueError(f"--data {name} is a binary file, not text; give {KINDS}")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        yield from [(name, {"text": text}, "")] if content else []
    except UnicodeDecodeError as error:
        yield name, None, f"not UTF-8 at byte {error.start}"


def json_lines(content: bytes) -> Iterator[tuple[int, Any, str]]:
    """(number, value, what is wrong with it) of each line that is not blank; "\\n" ends lines."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, *_parse(line)


def _parse(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(
            line.decode("utf-8"),
            parse_int=_integer,
            parse_constant=lambda _: None,  # nan, which is no JSON
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


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"--data {printable(file)}: .parquet needs pyarrow; `pip install pyarrow`, or convert "
            "it to .jsonl"
        ) from None
    try:
        return parquet.read_table(file).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"--data {printable(file)} cannot be read as parquet ({error})") from None


def as_text(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    wanted = fields or (("problem", "solution") if "problem" in raw else ("text",))
    missing = [name for name in wanted if not isinstance(raw.get(name), str)]
    if missing:
        return Record(source, None, f"no text field {missing[0]!r}; it has: {_has(raw)}")
    text = "\n\n".join(raw[name] for name in wanted)
    if _half_a_character(text):
        return Record(source, None, HALF)
    told = next((raw[name] for name in PROBLEM if isinstance(raw.get(name), str)), text)
    return Record(source, text, problem=told)


def as_problem(source: str, raw: dict[str, Any], fields: Sequence[str]) -> Record:
    if isinstance(raw.get("reward_model"), dict):  # a data set made for verl
        raw = _from_verl(raw)
    fields = fields or ("question" if "question" in raw else "problem",)
    raw = {k: DAPO_REQUEST.sub("", v.strip()) if k in fields and isinstance(v, str) else v
           for k, v in raw.items()}  # fmt: skip
    record = as_text(source, raw, fields)
    answer = raw.get("answer")
    if record.text is None:
        return record
    if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        return Record(source, None, f"no field 'answer' of text or a number; it has: {_has(raw)}")
    answer = str(answer).rsplit("####")[-1].strip()
    if not answer:
        return Record(source, None, "its answer is empty: every response would be wrong")
    if _half_a_character(answer):
        return Record(source, None, HALF)
    return replace(record, answer=answer)


def _has(raw: dict[str, Any]) -> str:
    return ", ".join(list(raw)[:20]) or "none"


def _half_a_character(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _from_verl(raw: dict[str, Any]) -> dict[str, Any]:
    truth = raw["reward_model"].get("ground_truth")
    with suppress(TypeError, ValueError, RecursionError):  # Skywork's are lists of answers, as JSON
        listed = json.loads(truth)
        if isinstance(listed, list) and [type(x) for x in listed[:1]] == [str]:  # no [1, 2]
            truth = listed[0]
    prompt = raw.get("prompt")
    messages = prompt if isinstance(prompt, list) else []
    said = [m.get("content") for m in messages if isinstance(m, dict)]
    return {"problem": said[-1] if said else None, "answer": truth}


def _download(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, HUB_DATASETS[name], repo_type="dataset")
    except Exception as error:  # requests, httpx and hub errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"data set {name} could not be fetched ({reason}); on a machine with a "
            f"network run `hf download --repo-type dataset {name} --local-dir DIR`, "
            f"then give --data DIR/{HUB_DATASETS[name]}"
        ) from None
