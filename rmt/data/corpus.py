"""Turn records into token documents: cut, held out, or left out with a remark."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.tokenizer import Tokenizer
from rmt.data.files import Files, by_reason, remarks_of, shown
from rmt.data.inputs import Record, as_problem, as_text, as_trace, read_records
from rmt.data.judge import require_math_verify

BAD_SHARE = 0.01  # more unreadable records than this are an error


@dataclass(frozen=True)
class Document:
    """One text as ids, without the tokens that a model puts before a text."""

    index: int
    source: str  # file:line
    tokens: np.ndarray  # (T,) int64
    answer: str = ""  # of a problem or a trace
    part: int = 0  # which path of --data it is from
    thought: tuple[int, ...] = ()  # of a trace: all ids before </think>


@dataclass(frozen=True)
class Corpus:
    documents: list[Document]
    left_out: list[Record]  # those that are in no document, each with its trouble
    total: int  # records, left out or not
    remarks: list[str]  # lines for the user
    held_out: str = ""  # the last hash of what is held out


def read(
    paths: Sequence[str], tokenizer: Tokenizer, fields: Sequence[str], document_tokens: int,
    shortest: int | None, part: str = "all", holdout: int = 0, most: int = 0,
    traces: bool = False, until: str | None = None,
) -> Corpus:  # fmt: skip
    """Read the documents of files and folders: "all", those to "train" on or those "held_out".

    Records are read one at a time; with `most`, only so many are kept (and those held out). Of
    those held out none is used whose hash is beyond `until`: it may have been trained on.
    Texts of more than document_tokens are cut into pieces; those of fewer than `shortest` tokens
    are left out. Without `shortest` records are problems, longer ones left out: a text (`problem`
    or `question`, unless `fields` names others) and its `answer`, of which what follows the last
    #### counts (GSM8K); or verl's `prompt` and `reward_model`. With `traces` they are `context`,
    `thought` and `answer`. More than 1 % unreadable records, or nothing left, is a ValueError.
    """
    make, many = (as_text, "texts") if shortest is not None else (as_problem, "problems")
    make, many = (as_trace, "traces") if traces else (make, many)
    if make is as_problem:
        require_math_verify()
    files = Files()
    read_ones = read_records(paths, make, fields, files)
    records, unreadable, total, chosen, last = _select(read_ones, part, holdout, most, many, until)
    remarks = remarks_of(files) + _check_readable(unreadable, total, paths)
    if part == "held_out":
        unreadable = []  # they count with the others, once
    documents, left_out, ends = [], [], []  # ends: tokens left out of texts that are used
    for record in records:
        ids = np.asarray(tokenizer.encode(record.text), dtype=np.int64)
        pieces, trouble = _pieces(ids, document_tokens, shortest)
        for piece in pieces:
            thought = tuple(tokenizer.encode(record.thought + "\n") if record.thought else ())
            known = (len(documents), record.source, piece, record.answer, record.part, thought)
            documents.append(Document(*known))
        if not pieces:
            left_out.append(replace(record, trouble=trouble))
        elif (end := len(ids) - sum(map(len, pieces))) > 0:
            ends.append(end)
    count = len(records) + len(unreadable)
    if not documents:
        why = (unreadable + left_out)[-1].trouble if count else "there are none"
        if part == "held_out" and not count:
            why += (
                f"; of {total:,} records a tenth may be held out, and of what a run held out only "
                "what its data had then; give other text with --data"
            )
        raise ValueError(f"{shown(paths)}: none of {count} {many} can be used: {why}")
    remarks += chosen
    for reason, names in by_reason((r.source, r.trouble) for r in left_out).items():
        remarks.append(f"left out {len(names):,} of {count:,} {many}: {reason}: {shown(names)}")
    if ends:
        remarks.append(
            f"left out the last {sum(ends):,} tokens of {len(ends):,} texts: pieces of fewer than "
            f"{shortest} tokens"
        )
    return Corpus(documents, unreadable + left_out, count, remarks, last)


def _check_readable(bad: Sequence[Record], total: int, paths: Sequence[str]) -> list[str]:
    """Return a remark on unreadable records; ValueError if there are too many, or no record."""
    if not total:
        raise ValueError(f"--data {', '.join(map(str, paths))} is empty; give a file with text")
    first = "\n".join(f"  {record.source}: {record.trouble}" for record in bad[:5])
    if len(bad) > BAD_SHARE * total:
        raise ValueError(
            f"{len(bad)} of {total} records are unreadable (more than {BAD_SHARE:.0%}):\n"
            f"{first}\nmend the file, or name its fields with --text-fields"
        )
    return [f"skipped {len(bad)} of {total} records:\n{first}"] if bad else []


def _select(
    records: Iterable[Record], part: str, holdout: int, most: int, many: str, until: str | None
) -> tuple[list[Record], list[Record], int, list[str], str]:
    """Return the records of a part, the unreadable ones, how many there are, remarks, and the last
    hash of what is held out.

    Problems are taken by their hashes, whatever the order, the tokenizer or the seed: the first
    are held out, the next `most` are used (0: all). All records of one problem are on one side,
    however it is spaced. Memory holds those that are still wanted.
    """
    if part == "all":
        holdout = 0
    elif part == "held_out" and not holdout:
        raise ValueError(
            "no documents are held out (--holdout 0, or --eval-data was given); name some with "
            "--data"
        )
    kept: dict[Any, list[tuple[int, Record]]] = {}  # of each problem, with their places
    unreadable, total = [], 0
    wanted = max(10 * holdout, holdout + most)  # so many tell which tenth is held out
    for total, record in enumerate(records, start=1):
        if record.text is None:
            unreadable.append(record)
            continue
        kept.setdefault(_hash(record.problem) if holdout or most else total, []).append(
            (total, record)
        )
        if most and len(kept) >= 2 * wanted:
            kept = {key: kept[key] for key in sorted(kept)[:wanted]}
    keys, remarks = sorted(kept)[: wanted if most else None], []
    count = min(holdout, len(keys) // 10)
    if holdout:
        of = f"{total:,} records" if most else f"{len(keys):,} {many}"
        remark = f"held out by a hash of their text: {count:,} of {of} (--holdout)"
        remarks.append(remark + f"; {holdout} would be more than a tenth" * (count < holdout))
    chosen = keys[:count] if part == "held_out" else keys[count:][: most or None]
    if part == "held_out" and until is not None:
        chosen = [key for key in chosen if key <= until]
        if fewer := count - len(chosen):
            remarks.append(
                f"left out {fewer:,} of these: the data are not those of the run, which did not "
                "hold them out"
            )
    if most and part != "held_out":
        remarks.append(
            f"of {total:,} records the first {len(chosen):,} {many} by a hash of their text "
            "(--max-records)"
        )
    places = sorted((pair for key in chosen for pair in kept[key]), key=lambda pair: pair[0])
    last = str(keys[count - 1]) if count else ""
    return [record for _, record in places], unreadable, total, remarks, last


def _hash(problem: str) -> str:
    return hashlib.sha256("".join(problem.split()).encode("utf-8", "surrogatepass")).hexdigest()


def _pieces(ids: np.ndarray, longest: int, shortest: int | None) -> tuple[list[np.ndarray], str]:
    """Cut a text into pieces, or keep a problem whole; return them, or why there are none."""
    if not len(ids):
        return [], "it is empty"
    if shortest is None:
        too_long = f"more than {longest} tokens; raise --document-tokens"
        return ([ids], "") if len(ids) <= longest else ([], too_long)
    pieces = [ids[i : i + longest] for i in range(0, len(ids), longest)]
    too_short = f"fewer than {shortest} tokens (--min-context and one more); give longer text"
    return [piece for piece in pieces if len(piece) >= shortest], too_short
