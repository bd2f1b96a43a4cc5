"""Records to token documents: cut, held out, or left out with a word."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.tokenizer import Tokenizer
from rmt.data.files import shown
from rmt.data.inputs import Record, as_problem, as_text, read_records

BAD_SHARE = 0.01  # more unreadable records than this are an error


@dataclass(frozen=True)
class Document:
    """One text as ids, without the tokens that a model puts before a text."""

    index: int
    source: str  # file:line
    tokens: np.ndarray  # (T,) int64
    answer: str = ""  # of a problem


@dataclass(frozen=True)
class Corpus:
    documents: list[Document]
    left_out: list[Record]  # those that are in no document, each with its trouble
    total: int  # records, left out or not
    remarks: list[str]  # what to tell the user, a line each


def load(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    fields: Sequence[str],
    document_tokens: int,
    shortest: int,
) -> list[Document]:
    """The documents of `read`, of all records, as text."""
    return read(paths, tokenizer, fields, document_tokens, shortest).documents


def load_problems(
    paths: Sequence[str], tokenizer: Tokenizer, fields: Sequence[str], most_tokens: int
) -> list[Document]:
    """The documents of `read`, of all records, as problems."""
    return read(paths, tokenizer, fields, most_tokens, None).documents


def read(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    fields: Sequence[str],
    document_tokens: int,
    shortest: int | None,
    part: str = "all",
    holdout: int = 0,
) -> Corpus:
    """All documents of files and folders; with `part`, those held out or those that are not.

    Texts of more than document_tokens are cut into pieces; those of fewer than `shortest` tokens
    are left out. Without `shortest` records are problems, longer ones left out: a text (`problem`
    or `question`, unless `fields` names others) and its `answer`, of which what follows the last
    #### counts (GSM8K); or verl's `prompt` and `reward_model`. More than 1 % unreadable records,
    or nothing left, is a ValueError.
    """
    make, many = (as_text, "texts") if shortest is not None else (as_problem, "problems")
    records, remarks = read_records(paths, make, fields)
    remarks += _report_bad(records, paths)
    records, remark = _part_of(records, part, holdout, many)
    documents, left_out = [], [record for record in records if record.text is None]
    ends = []  # tokens left out of texts that are used
    for record in (record for record in records if record.text is not None):
        ids = np.asarray(tokenizer.encode(record.text), dtype=np.int64)
        pieces, trouble = _pieces(ids, document_tokens, shortest)
        for piece in pieces:
            documents.append(Document(len(documents), record.source, piece, record.answer))
        if not pieces:
            left_out.append(replace(record, trouble=trouble))
        elif (end := len(ids) - sum(map(len, pieces))) > 0:
            ends.append(end)
    if not documents:
        why = left_out[-1].trouble if left_out else "there are none"
        raise ValueError(f"{shown(paths)}: none of {len(records)} {many} can be used: {why}")
    remarks += remark + _name_left_out(left_out, len(records), many)
    if ends:
        remarks.append(
            f"left out the last {sum(ends):,} tokens of {len(ends):,} texts: pieces of fewer than "
            f"{shortest} tokens"
        )
    return Corpus(documents, left_out, len(records), remarks)


def _pieces(ids: np.ndarray, longest: int, shortest: int | None) -> tuple[list[np.ndarray], str]:
    """Pieces of a text, or the problem as a whole; why there are none."""
    if not len(ids):
        return [], "it is empty"
    if shortest is None:
        too_long = f"more than {longest} tokens; raise --document-tokens"
        return ([ids], "") if len(ids) <= longest else ([], too_long)
    pieces = [ids[i : i + longest] for i in range(0, len(ids), longest)]
    too_short = f"fewer than {shortest} tokens (--min-context and one more); give longer text"
    return [piece for piece in pieces if len(piece) >= shortest], too_short


def _part_of(
    records: Sequence[Record], part: str, holdout: int, many: str
) -> tuple[list[Record], list[str]]:
    """The records of a part, and what to say about it.

    Held out are the problems whose hashes come first, whatever the order, the tokenizer or the
    seed; all records of one problem, however it is spaced, are on one side.
    """
    if part == "all" or (part == "train" and not holdout):
        return list(records), []
    if not holdout:
        raise ValueError(
            "no documents are held out (--holdout 0, or --eval-data was given); name some with "
            "--data"
        )
    keys = [_hash(record.problem) for record in records]
    first = sorted({key for key, record in zip(keys, records) if record.text is not None})
    count = min(holdout, len(first) // 10)
    chosen = set(first[:count])
    remark = f"held out by a hash of their text: {count:,} of {len(first):,} {many} (--holdout)"
    if count < holdout:
        remark += f"; {holdout} would be more than a tenth"
    held_out = part == "held_out"
    return [r for r, key in zip(records, keys) if (key in chosen) == held_out], [remark]


def _hash(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


def _name_left_out(left_out: Sequence[Record], total: int, many: str) -> list[str]:
    """A line for each reason, with the first names."""
    named: dict[str, list[str]] = {}
    for record in (record for record in left_out if record.text is not None):
        named.setdefault(record.trouble, []).append(record.source)
    return [
        f"left out {len(sources):,} of {total:,} {many}: {why}: {shown(sources)}"
        for why, sources in named.items()
    ]


def _report_bad(records: Sequence[Record], paths: Sequence[str]) -> list[str]:
    bad = [record for record in records if record.text is None]
    if not records:
        raise ValueError(f"--data {', '.join(map(str, paths))} is empty; give a file with text")
    shown = "\n".join(f"  {record.source}: {record.trouble}" for record in bad[:5])
    if len(bad) > BAD_SHARE * len(records):
        raise ValueError(
            f"{len(bad)} of {len(records)} records are unreadable (more than {BAD_SHARE:.0%}):\n"
            f"{shown}\nmend the file, or name its fields with --text-fields"
        )
    return [f"skipped {len(bad)} of {len(records)} records:\n{shown}"] if bad else []
