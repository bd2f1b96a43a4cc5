"""Data sets of Hugging Face by their names: read like files, or refused with the remedy."""

import json
import sys

import pytest
from small_run import arguments, metrics, refusal, run_here, write_corpus, write_small_model

import train
from models.tokenizer import Tokenizer
from rmt.data import corpus, hub

FAKE = """
asked = []

def load_dataset(path, subset, split):
    asked.append((path, subset, split))
    if path == "an/unknown":
        raise ConnectionError("no network\\nand more")
    return [{"text": f"{i}: a text that is long enough to be asked about"} for i in range(12)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    return place


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What a fake of the package `datasets` is asked for."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/datasets.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    import datasets

    yield datasets.asked
    sys.modules.pop("datasets", None)


def test_a_run_reads_a_data_set_by_its_name_beside_files(place, tmp_path, asked):
    both = ("an/example:some", str(place / "train.jsonl"))
    weighted = dict(data_weights=(1, 1), batch_size=4, steps=2, probe_documents=0)
    run_here(*arguments(place, out=tmp_path / "run", data=both, samples_per_step=4, **weighted))
    assert asked == [("an/example", "some", "train")]
    rows = map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
    sources = {row["document"].rpartition(":")[0] for row in rows}
    assert sources == set(both) and len(metrics(tmp_path / "run")) == 2


def test_its_rows_are_named_and_held_out_like_lines(place, tmp_path, asked):
    path = tmp_path / "same.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in hub.rows("an/example")))
    tokenizer, texts = Tokenizer(place / "model"), []
    for data in ("an/example", str(path)):
        read = corpus.read([data], tokenizer, (), 64, 4, "train", 1).documents
        texts.append([(d.source.removeprefix(data), d.tokens.tolist()) for d in read])
    assert texts[0] == texts[1] and len(texts[0]) == 11


def test_one_that_is_not_fetched_is_refused_with_the_remedy(place, capsys, asked):
    fragments = ("--data an/unknown does not exist here", "(no network)", "hf download", "DIR")
    refusal(train, arguments(place, data="an/unknown"), fragments, capsys)


def test_without_the_package_a_name_is_refused(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fragments = ("--data an/example does not exist here", "`pip install datasets`")
    refusal(train, arguments(place, data="an/example"), fragments, capsys)


def test_a_file_or_a_folder_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an/example").mkdir(parents=True)
    for path in ("an/example", "an/a.jsonl", "an/a.txt.gz", "/an/a", "an/a/b", "./a", "../a", "an"):
        assert not hub.is_name(path), path
    assert hub.is_name("an/other") and hub.is_name("a-n/Other-7B_v0.1:with.parts")


def test_the_package_itself_reads_a_folder(tmp_path, monkeypatch):
    """It takes a folder of that name, too, so that this needs no network."""
    pytest.importorskip("datasets", reason="pip install --target DIR datasets, PYTHONPATH=DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "an/example").mkdir(parents=True)
    path = write_corpus(tmp_path / "an/example/train.jsonl")
    assert list(hub.rows("an/example")) == [json.loads(x) for x in path.read_text().splitlines()]
