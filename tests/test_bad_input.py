"""Files that cannot be used are refused by the real scripts with value, reason and remedy."""

import json
import shutil

import pytest
from safetensors.torch import save_file
from small_run import arguments, refusal, run_here, weights, write_corpus, write_small_model
from toy_models import write_tokenizer
from toy_runs import WORLD

import train
from models.weights import SINGLE
from rmt.config.config import Config
from rmt.engine.loading import (
    _check_context,
    _remark_on_room,
    longest_prompt,
    read_model_directory,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    place = tmp_path_factory.mktemp("originals")
    write_small_model(place / "model")
    write_corpus(place / "train.jsonl")
    return place


@pytest.fixture
def place(originals, tmp_path):
    """A folder with a model and a corpus that may be broken."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def training(place, **changes) -> list[str]:
    return arguments(place, **dict(steps=1) | changes)


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_bad_lines(place, bad: int, of: int) -> list[str]:
    lines = write_corpus(place / "train.jsonl", of).read_text().splitlines()
    for number in range(bad):
        lines[5 * number + 3] = '{"text": "cut sho'
    (place / "train.jsonl").write_text("\n".join(lines))
    return training(place)


# ---- data


def wrong_field(place):
    return training(place, text_fields="body")


def number_for_text(place):
    (place / "train.jsonl").write_text('{"text": 5}\n')
    return training(place)


def missing_file(place):
    return training(place, data=place / "nowhere.jsonl")


def empty_name(place):
    return training(place, data="")


def folder_without_text(place):
    (place / "empty").mkdir()
    return training(place, data=place / "empty")


def wrong_suffix(place):
    return training(place, data=(place / "train.jsonl").rename(place / "train.csv"))


def binary(place):
    (place / "a.txt").write_bytes(b"PK\0\1" * 9)
    return training(place, data=place / "a.txt")


def latin_1(place):
    (place / "a.txt").write_bytes("naïve".encode("latin-1"))
    return training(place, data=place / "a.txt")


def empty(place):
    (place / "train.jsonl").write_text("\n\n")
    return training(place)


def too_short(place):
    (place / "a.md").write_text("brief")
    return training(place, data=place / "a.md")


def half_a_character(place):
    (place / "train.jsonl").write_text(r'{"text": "half: \ud83d and a good deal more"}')
    return training(place)


def deep_nesting(place):
    (place / "train.jsonl").write_text('{"text":' + "[" * 100_000)
    return training(place)


BAD_DATA = {
    "missing-file": (missing_file, "nowhere.jsonl does not exist", "give files, folders"),
    "missing-eval-file": (lambda place: training(place, eval_data=place / "nowhere.jsonl"),
                          "--eval-data", "nowhere.jsonl does not exist"),
    "missing-traces": (lambda place: training(place, method="cold-start", max_response=60,
                                              traces=place / "nowhere.jsonl"),
                       "--traces", "nowhere.jsonl does not exist"),
    "missing-judge": (lambda place: training(place, difficulty_model="nonsense"),
                      "--difficulty-model nonsense is neither"),
    "empty-name": (empty_name, "--data is empty; give a path"),
    "folder-without-text": (folder_without_text, "holds no .jsonl, .txt, .md", "give --data"),
    "wrong-suffix": (wrong_suffix, "train.csv", "only .jsonl, .txt, .md, .parquet, .jsonl.gz"),
    "binary": (binary, "a.txt is a binary file, not text", "give .jsonl"),
    "latin-1": (latin_1, "a.txt: not UTF-8 at byte 2", "mend the file"),
    "empty": (empty, "train.jsonl is empty", "give a file with text"),
    "too-short": (too_short, "none of 1 texts can be used: fewer than 9", "give longer text"),
    "wrong-field": (wrong_field, "train.jsonl:1: no text field 'body'; it has: text",
                    "10 of 10", "--text-fields"),
    "number-for-text": (number_for_text, "train.jsonl:1: no text field 'text'", "--text-fields"),
    "half-a-character": (half_a_character, "train.jsonl:1: half a surrogate pair"),
    "deep-nesting": (deep_nesting, "train.jsonl:1: not JSON", "recursion"),
    "many-bad-lines": (lambda place: with_bad_lines(place, 3, 100), "3 of 100", "more than 1%",
                       "train.jsonl:4: not JSON", "train.jsonl:14:", "mend the file"),
    "batch-larger-than-corpus": (lambda place: training(place, batch_size=11), "11",
                                 "the 10 documents", "--batch-size 10 or less"),
    "longer-than-context": (lambda place: training(place, max_response=900),
                            "--document-tokens 64", "--max-response 900", "of 1024", "lower"),
    "no-position-is-hard": (lambda place: training(place, tiers="absolute",
                                                   tier_thresholds=(7, 8, 9)),
                            "all tiers are empty", "7.00, 8.00, 9.00", "--tiers quantile"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_cannot_be_used_is_refused(place, capsys, case):
    make, *fragments = case
    refusal(train, make(place), fragments, capsys)


def test_one_bad_line_in_a_hundred_is_named_and_skipped(place, capsys):
    run_here(*with_bad_lines(place, 1, 100))
    printed = capsys.readouterr().err
    assert "skipped 1 of 100 records" in printed and "train.jsonl:4: not JSON" in printed


def test_room_for_an_answer_is_that_of_the_tokenizer(originals, capsys):
    """Of bytes an answer has 13, where Config counts 8; RLP puts one behind a response."""
    tokenizer, shape = read_model_directory(originals / "model")
    for most, said in ((24, "use 25 or more"), (25, "")):
        c = Config(budget_start=12, max_response=most)
        _remark_on_room(c, tokenizer, WORLD)
        printed = capsys.readouterr().err
        assert said in printed and bool(said) == bool(printed)
    prompt = len(longest_prompt(Config(budget=False), tokenizer))
    full = dict(budget=False, document_tokens=shape.max_position_embeddings - prompt - 40)
    _check_context(Config(max_response=40, **full), tokenizer, shape)
    rlp = dict(match="gain", **full)
    _check_context(Config(max_response=40 - 13, **rlp), tokenizer, shape)
    with pytest.raises(ValueError, match="exceed the model's context"):
        _check_context(Config(max_response=40 - 12, **rlp), tokenizer, shape)


def test_one_empty_tier_is_a_remark(place, capsys):
    run_here(*training(place, tiers="absolute", tier_thresholds=(0.1, 1.0, 9.0)))
    assert "tier hard is empty: its probability goes to the others" in capsys.readouterr().out


# ---- models


def unknown_model(place):
    return training(place, model="qwen3-14")


def no_config(place):
    (place / "model/config.json").unlink()
    return training(place)


def other_architecture(place):
    change_json(place / "model/config.json", architectures=["GemmaForCausalLM"])
    return training(place)


def scaled_rope(place):
    change_json(place / "model/config.json", rope_scaling={"rope_type": "linear", "factor": 4.0})
    return training(place)


def broken_config(place):
    (place / "model/config.json").write_text('{"vocab_size": 3')
    return training(place)


def no_tokenizer(place):
    (place / "model/tokenizer.json").unlink()
    return training(place)


def small_vocabulary(place):
    change_json(place / "model/config.json", vocab_size=200)
    return training(place)


def no_template(place):
    change_json(place / "model/tokenizer_config.json", chat_template=None)
    return training(place)


def truncated(place):
    path = place / "model" / SINGLE
    path.write_bytes(path.read_bytes()[:-100])
    return training(place)


def missing_tensor(place):
    state = weights(place / "model")
    del state["model.norm.weight"]
    save_file(state, place / "model" / SINGLE)
    return training(place)


def other_tokenizer_judges(place):
    judge = write_small_model(place / "judge")
    write_tokenizer(judge, merges=[("t", "h")])
    return training(place, difficulty_model=judge)


BAD_MODEL = {
    "unknown-name": (unknown_model, "qwen3-14 ", "Did you mean qwen3-14b?"),
    "no-config": (no_config, "model/config.json does not exist", "Hugging Face directory"),
    "architecture": (other_architecture, "GemmaForCausalLM is not supported", "Qwen3ForCausalLM"),
    "rope-scaling": (scaled_rope, "rope scaling of type 'linear'", "remove the scaling"),
    "broken-config": (broken_config, "config.json is not valid JSON", "fetch it again"),
    "no-tokenizer": (no_tokenizer, "tokenizer.json does not exist", "copy tokenizer.json"),
    "small-vocabulary": (small_vocabulary, "has 260 tokens", "vocab_size is 200", "fetch both"),
    "no-template": (no_template, "has no chat template", "add chat_template.jinja"),
    "truncated": (truncated, "model.safetensors is truncated", "download it again"),
    "missing-tensor": (missing_tensor, "tensor model.norm.weight is missing", "fetch both again"),
    "other-tokenizer": (other_tokenizer_judges, "another tokenizer", "the same family"),
}


@pytest.mark.parametrize("case", BAD_MODEL.values(), ids=BAD_MODEL)
def test_model_that_cannot_be_used_is_refused(place, capsys, case):
    make, *fragments = case
    refusal(train, make(place), fragments, capsys)
