"""Files become the same documents whoever reads them, and their difficulty is measured once."""

import gzip
import json
import os

import numpy as np
import pytest
import torch
from small_run import CONTROL, arguments, write_corpus, write_small_model
from toy_runs import Prepared, draw, prepared

from models.tokenizer import Tokenizer
from models.weights import cache_directory
from rmt.config.config import parse
from rmt.data import corpus
from rmt.difficulty import document_entropies
from rmt.engine.balance import own_documents
from rmt.engine.run import prepare
from rmt.engine.tiers import cached_entropies
from rmt.system.dist import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("inputs") / "model")


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(model)


@pytest.fixture
def texts_of(tokenizer):
    """Decoded documents of paths, with the defaults of a run."""

    def read(*paths, fields=(), length=2048, shortest=1):
        loaded = corpus.read([str(p) for p in paths], tokenizer, fields, length, shortest).documents
        assert [document.index for document in loaded] == list(range(len(loaded)))
        return [tokenizer.decode(document.tokens.tolist()) for document in loaded]

    return read


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- what is read


def test_every_line_of_jsonl_is_a_document_named_by_its_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\r\n\n{"text": "two"}')
    loaded = corpus.read([str(path)], tokenizer, (), 2048, 1).documents
    assert [document.source for document in loaded] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_text_file_is_one_document_to_the_last_byte(tmp_path, texts_of, suffix):
    text = "# naïve 🤔\r\n\n  two\n"
    (tmp_path / f"a{suffix}").write_bytes(text.encode())
    assert texts_of(tmp_path / f"a{suffix}") == [text]


def test_folder_is_read_with_its_subfolders_in_the_order_of_names(tmp_path, texts_of):
    (tmp_path / "c").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c/d.md").write_text("d")
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "ignored.csv").write_text("1,2")
    (tmp_path / "folder.txt").mkdir()
    assert texts_of(tmp_path) == ["a", "b", "d"]


@pytest.mark.parametrize("name", ["a.jsonl", "A.TXT"])
def test_gzip_is_what_is_inside(tmp_path, texts_of, name):
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    packed.write_bytes(
        gzip.compress(plain.read_bytes()[:20]) + gzip.compress(plain.read_bytes()[20:])
    )
    wanted = texts_of(plain)
    plain.unlink()
    assert texts_of(packed) == texts_of(tmp_path) == wanted


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-9], lambda x: x[:30] + b"?" + x[31:], lambda x: b"text"]
)
def test_a_damaged_gzip_file_is_named(tmp_path, texts_of, damage):
    content = gzip.compress(bytes(range(256)) * 9)
    (tmp_path / "a.txt.gz").write_bytes(damage(content))
    with pytest.raises(
        ValueError, match=r"1 of 1 records are unreadable[^$]*a\.txt\.gz: not a whole gzip"
    ):
        texts_of(tmp_path / "a.txt.gz")


def test_several_paths_are_read_in_the_order_given(tmp_path, texts_of):
    a, b = jsonl(tmp_path / "a.jsonl", {"text": "a"}), jsonl(tmp_path / "b.jsonl", {"text": "b"})
    assert texts_of(b, a) == ["b", "a"]


def test_problem_and_solution_are_joined_by_a_blank_line(tmp_path, texts_of):
    record = {"text": "t", "solution": "s", "problem": "p"}
    assert texts_of(jsonl(tmp_path / "a.jsonl", record)) == ["p\n\ns"]


def test_without_a_problem_the_field_is_text(tmp_path, texts_of):
    assert texts_of(jsonl(tmp_path / "a.jsonl", {"text": "t", "solution": "s"})) == ["t"]


def test_named_fields_come_before_the_defaults_in_the_order_named(tmp_path, texts_of):
    record = {"text": "t", "problem": "p", "solution": "s", "title": "n"}
    path = jsonl(tmp_path / "a.jsonl", record)
    assert texts_of(path, fields=("title", "text")) == ["n\n\nt"]


# ---- what it becomes


def test_pieces_of_a_long_text_hold_all_of_its_tokens(tmp_path, tokenizer):
    text = "abcdefghijklmnopqrstuvw"
    (tmp_path / "a.txt").write_text(text)
    loaded = corpus.read([str(tmp_path / "a.txt")], tokenizer, (), 5, 1).documents
    assert [len(document.tokens) for document in loaded] == [5, 5, 5, 5, 3]
    assert np.concatenate([d.tokens for d in loaded]).tolist() == tokenizer.encode(text)


def test_pieces_too_short_to_reason_about_are_left_out(tmp_path, texts_of):
    (tmp_path / "a.txt").write_text("abcdefghijklm")
    assert texts_of(tmp_path / "a.txt", length=5, shortest=4) == ["abcde", "fghij"]


def test_control_tokens_in_a_text_stay_text(tmp_path, tokenizer):
    text = f"Say {CONTROL[1]} or {CONTROL[3]}."
    (tmp_path / "a.txt").write_text(text)
    (document,) = corpus.read([str(tmp_path / "a.txt")], tokenizer, (), 2048, 1).documents
    control = {tokenizer.encode_with_control(name)[0] for name in CONTROL}
    assert not control & set(document.tokens.tolist())
    assert tokenizer.decode(document.tokens.tolist()) == text


def test_documents_do_not_depend_on_the_rank_that_reads_them(tmp_path, model):
    write_corpus(tmp_path / "train.jsonl")
    config = parse(arguments(tmp_path, model=model, batch_size=4), "", "")
    run = Prepared(*prepare(config, ALONE))
    again = Prepared(*prepare(config, ALONE))
    asked = {}
    for question in draw(run):
        asked.setdefault(question.document, []).append(question)
    shares = [
        own_documents(run.config, run.data, asked, World(rank, 2, ALONE.device))
        for rank in range(2)
    ]
    assert all(shares) and not set(shares[0]) & set(shares[1])
    assert shares[0] | shares[1] == asked
    for ours, theirs in zip(run.documents, again.documents):
        assert (ours.index, ours.source) == (theirs.index, theirs.source)
        assert np.array_equal(ours.tokens, theirs.tokens)


# ---- difficulty is measured once


class Measure:
    """Stands for a model: counts how often it is asked."""

    def __init__(self, documents):
        self.documents, self.count = documents, 0

    def __call__(self):
        self.count += 1
        return [np.arange(len(document.tokens)) / 7 for document in self.documents]


@pytest.fixture
def documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = str(write_corpus(tmp_path / "train.jsonl"))
    return corpus.read([data], tokenizer, (), 2048, 1).documents


def kept(place) -> list:
    return [path for path in place.rglob("difficulty/*") if path.is_file()]


def ask(measure, model, documents, top_k=16):
    entropies = cached_entropies(measure, model, documents, f"top-{top_k}", ALONE)
    for entropy, expected in zip(entropies, Measure(documents)(), strict=True):
        assert np.array_equal(entropy, expected)


def test_documents_are_packed_in_parts_to_be_measured(tmp_path, monkeypatch):
    run = prepared(tmp_path)
    known = (run.tokenizer.begin_ids, 0, run.tokenizer.vocab_size, 64, ALONE)
    whole = document_entropies(run.model, run.documents, *known)
    monkeypatch.setattr("rmt.difficulty.PACKED", 2)
    parts = document_entropies(run.model, run.documents, *known)
    for one, other, document in zip(whole, parts, run.documents, strict=True):
        assert len(one) == len(document.tokens) and np.allclose(one, other, atol=1e-5)


def test_second_run_reads_what_the_first_measured(model, documents, tmp_path):
    measure = Measure(documents)
    ask(measure, model, documents)
    ask(measure, model, documents)
    assert measure.count == 1 and kept(tmp_path) == kept(tmp_path / "cache/rmt")


def test_other_model_text_or_method_is_measured_anew(model, documents, tmp_path):
    other = write_small_model(tmp_path / "other", initializer_range=0.3)
    ask(Measure(documents), model, documents)
    for variant in ((other, documents), (model, documents[1:]), (model, documents, 0)):
        measure = Measure(variant[1])
        ask(measure, *variant)
        assert measure.count == 1


@pytest.mark.parametrize("damage", [
    lambda content: content[:-40], lambda content: b"", lambda content: content[:9] + content[8:],
    lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: content + b"0" * 8,
])  # fmt: skip
def test_damaged_cache_is_measured_anew_and_mended(model, documents, tmp_path, damage):
    measure = Measure(documents)
    ask(measure, model, documents)
    (path,) = kept(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    ask(measure, model, documents)
    ask(measure, model, documents)
    assert measure.count == 2


def test_a_cache_that_cannot_be_written_is_told(model, documents, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file is where the cache would be")
    measure = Measure(documents)
    ask(measure, model, documents)
    ask(measure, model, documents)
    assert measure.count == 2 and "difficulty is not kept" in capsys.readouterr().err


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody has this uid
    assert cache_directory().is_absolute()
