"""Whatever is in the data: each record is a document, or left out with a word, or refused."""

import io
import json
import os
import random

import pytest
from small_run import write_small_model

from models.tokenizer import Tokenizer
from rmt.data import corpus
from rmt.data.inputs import parse_json, split_lines

GOOD = '{"text": "a text that is long enough"}'
ODD = [
    GOOD,
    '{"text": "with \u2028 and \u0085 and \x0c and \x1c in it"}',
    '{"text": "crlf, long enough"}\r',
    '{"text": ""}',
    '{"text": "a"}',
    '{"text": null}',
    '{"text": 7}',
    '{"text": ["a"]}',
    "null",
    "7",
    '{"text": "twice", "text": "the same field"}',
    '{"text": "number", "id": ' + "9" * 5000 + "}",
    '{"text": "not a number", "x": NaN, "y": -Infinity}',
    '{"text": "half \\ud83d"}',
    "{",
    "[" * 9999,
    '{"text": "\\u0000 escaped, long enough"}',
    '{"text": "raw \x00 nul"}',
    "\ufeff" + GOOD,
    '{"a": 1}',
    '{"text": "' + "long " * 5000 + '"}',
    '{"problem": "only a problem"}',
    '"text"',
    '{"text": "cut',
]
PROBLEMS = [
    '{"problem": "1 + 1?", "answer": "2"}',
    '{"question": "2 + 2?", "answer": "x\\n#### 4"}',
    '{"problem": "p", "answer": 12}',
    '{"problem": "p", "answer": NaN}',
    '{"problem": "", "answer": 1}',
    '{"problem": "p", "answer": true}',
    '{"problem": "p", "answer": "\\ud83d"}',
    '{"problem": "p"}',
    '{"problem": "p", "answer": ' + "9" * 5000 + "}",
    '{"reward_model": {}, "prompt": 5}',
    '{"reward_model": {"ground_truth": "' + "[" * 9999 + '"}, "prompt": [{"content": "q"}]}',
    '{"reward_model": {"ground_truth": "[1]"}, "prompt": [{"content": "q"}, 7]}',
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_small_model(tmp_path_factory.mktemp("inputs") / "model"))


@pytest.mark.parametrize("seed", range(60))
def test_no_record_is_lost_without_a_word(tmp_path, tokenizer, seed, monkeypatch):
    monkeypatch.setattr(corpus, "BAD_SHARE", 1.0)
    rng = random.Random(seed)
    shortest = rng.choice([None, 9])
    kinds, put = PROBLEMS + ODD if shortest is None else ODD, 0
    good = PROBLEMS[0] if shortest is None else GOOD
    for number in range(rng.randint(1, 4)):
        lines = [good, *rng.choices([*kinds, "", " \t\r"], k=rng.randint(0, 8))]
        folder = tmp_path / rng.choice(["", "a", "b.jsonl"])
        folder.mkdir(exist_ok=True)
        content = "\n".join(lines) + rng.choice(["", "\n"])
        name = rng.choice([f"{number}.jsonl", f"{number}.JSONL"])
        (folder / name).write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + content.encode())
        put += sum(bool(line.strip(" \t\r")) for line in lines)
    (tmp_path / "loop").symlink_to(tmp_path)
    found = corpus.read([str(tmp_path)], tokenizer, (), 64, shortest)
    sources = {d.source for d in found.documents}
    left_out = {record.source for record in found.left_out}
    assert len(sources) + len(left_out) == put == found.total and not sources & left_out
    assert all(record.trouble for record in found.left_out)
    for document in found.documents:
        tokenizer.decode(document.tokens.tolist()).encode(), document.answer.encode()
    parts = [corpus.read([str(tmp_path)], tokenizer, (), 64, shortest, "train", 3).total]
    if put - parts[0]:
        parts.append(corpus.read([str(tmp_path)], tokenizer, (), 64, shortest, "held_out", 3).total)
    assert sum(parts) == put


def test_lines_end_at_newline_only():
    text = "".join(map(chr, (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029)))
    line = json.dumps({"text": text}, ensure_ascii=False)
    lines = [line for _, line in split_lines(io.BytesIO(f"{line}\r\n\n{line}".encode()))]
    assert [parse_json(line) for line in lines] == [{"text": text}] * 2


def folder_of(place, tokenizer, *paths):
    found = corpus.read([str(p) for p in paths or [place]], tokenizer, (), 64, 9)
    return [os.path.relpath(d.source, place) for d in found.documents], "\n".join(found.remarks)


def test_folders_are_searched_through_links_once_and_what_is_passed_over_is_named(
    tmp_path, tokenizer
):
    for name in ("z/one.txt", "z/.hidden.txt", "z/.git/two.txt", "y/three.MD", "z/table.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}: a text that is long enough")
    (tmp_path / "z/empty.txt").touch()
    (tmp_path / "z/link").symlink_to(tmp_path / "y")
    (tmp_path / "z/again.txt").symlink_to("one.txt")
    (tmp_path / "y/up").symlink_to(tmp_path / "z")
    names, said = folder_of(tmp_path, tokenizer, tmp_path / "z", tmp_path / "z/one.txt")
    assert names == ["z/again.txt", "z/link/three.MD"]
    for part in (".hidden.txt", ".git", "table.csv", "empty.txt", "z/one.txt"):
        assert part in said
    hidden = folder_of(tmp_path, tokenizer, tmp_path / "z/.git", tmp_path / "z/.hidden.txt")[0]
    assert hidden == ["z/.git/two.txt", "z/.hidden.txt"]


def test_a_pipe_is_refused_and_does_not_hang(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "one.txt").write_text("a text that is long enough")
    with pytest.raises(ValueError, match=r"pipe.jsonl cannot be read.*pipe"):
        folder_of(tmp_path, tokenizer, tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe.jsonl: a pipe"):
        folder_of(tmp_path, tokenizer)


def test_names_that_are_not_utf_8_can_be_printed(tmp_path, tokenizer):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("a text that is long enough")
    (name,), _ = folder_of(tmp_path, tokenizer)
    assert name == "caf\\xe9.txt"


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_other_encodings_are_refused_by_name(tmp_path, tokenizer, codec):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(GOOD.encode(codec))
        with pytest.raises(ValueError, match=f"{name} is UTF-16 or UTF-32"):
            folder_of(tmp_path, tokenizer, tmp_path / name)
