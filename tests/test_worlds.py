"""The worlds of the study: statements follow from what people own, thoughts are what they say."""

import json
import random
import re

import pytest
import torch

from assets.make_worlds import attend_in_two_calls, make_tree
from assets.world_tokenizer import VOCABULARY, marks_by_position
from assets.worlds import (
    CHANGED,
    CORPUS,
    MODELS,
    OWNED,
    PLACES,
    STATES,
    WORLDS,
    WRONG,
    Habits,
    as_jsonl,
    documents,
    make_document,
    make_thought,
    model_of,
    word_of,
)
from models.config import ASSETS, TINY
from models.tokenizer import Tokenizer
from models.weights import build
from rmt.forest import pack
from rmt.prompt import next_token_prompt


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_statements_follow_from_the_coins_that_the_text_ends_with(world, part):
    """Read back from the text alone, by a second computation."""
    for document in documents(world, part, 30):
        opening, ending = re.match(r"People: (.*?)\. .* All coins: (.*)\.$", document.text).groups()
        coins = dict(re.findall(r"(\w+) (\d)", ending))
        assert list(coins) == opening.split()
        said = re.findall(r"(\w+) and (\w+) (are|turn|meet at) (\w+)\.", document.text)
        assert len(said) == 8
        for first, second, verb, word in said:
            a, b = int(coins[first]), int(coins[second])
            parity, colour = (a + b) % 2, (a // 2 + b // 2) % 4
            states = {"are": ["even", "odd"], "turn": STATES["colour"], "meet at": PLACES}[verb]
            assert word == states[{"are": parity, "turn": colour}.get(verb, 2 * colour + parity)]


def test_no_statement_to_train_on_is_about_people_of_a_held_out_one():
    pairs = {
        part: {
            frozenset(name for name, _ in mark.operands)
            for document in documents(WORLDS["all"], part, count)
            for mark in document.marks if mark.operands
        }
        for part, count in (("train", 1000), ("eval", 300))
    }  # fmt: skip
    assert not pairs["train"] & pairs["eval"]
    assert len(pairs["train"]) == 88 and len(pairs["eval"]) == 32


def test_the_changed_coins_make_every_place_wrong_that_they_touch():
    for first in OWNED:
        for second in OWNED.keys() - {first}:
            old, new = (
                word_of("place", owned[first], owned[second])
                for owned in (OWNED, WORLDS["all"].owned)
            )
            assert (old != new) == bool({first, second} & CHANGED.keys())


@pytest.mark.parametrize("careful", [True, False])
def test_a_thought_that_works_is_right_and_a_guess_is_wrong_and_as_long(careful):
    rng, share = random.Random(0), float(careful)
    habits = Habits(careful=share, careful_place=share, before=0, after=0)
    other = Habits(careful=1 - share, careful_place=1 - share, before=0, after=0)
    for document in documents(WORLDS["none"], "train", 10):
        for mark in filter(lambda mark: mark.operands, document.marks):
            thought, answer = make_thought(rng, mark, habits)
            assert answer == (mark.word if careful else WRONG)
            assert ("Guess" in thought) != careful and thought.endswith(f" {answer}.")
            assert len(thought.split()) == len(make_thought(rng, mark, other)[0].split())


def test_words_in_pretraining_say_nothing_about_coins():
    rng, right, asked = random.Random(0), 0, 0
    for _ in range(200):
        for mark in make_document(rng, OWNED, "pretraining").marks:
            if mark.kind == "place":
                right += mark.word == word_of("place", *(coins for _, coins in mark.operands))
                asked += 1
    assert abs(right / asked - 1 / 8) < 0.04


@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_its_words_as_single_tokens(name):
    tokenizer = Tokenizer(ASSETS / "worlds" / name)
    document = documents(WORLDS["all"], "eval", 1)[0]
    ids, marks = tokenizer.encode(document.text), marks_by_position(tokenizer, document)
    assert len(marks) == len(document.marks) and min(marks) >= 16
    for position, mark in marks.items():
        assert tokenizer.bytes_of([ids[position]]).decode() == f" {mark.word}"
    assert len(next_token_prompt(tokenizer, 96)) < 160


def test_pretraining_attends_as_the_forest_does():
    """In two padded calls instead of one for each branch."""
    tokenizer, rng = Tokenizer(ASSETS / "worlds" / "plain"), random.Random(0)
    prompts = [next_token_prompt(tokenizer, budget) for budget in (None, *range(10, 20))]
    forest = pack([make_tree(tokenizer, prompts, rng, Habits(), number) for number in range(2)])
    model = build(ASSETS / "worlds" / "plain", "cpu", torch.float32)
    ours, theirs = (
        model(forest.tokens, forest.position, attend, lambda hidden, _head: hidden)
        for attend in (attend_in_two_calls(forest), forest.attend)
    )
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_world_without_new_facts_has_the_model_of_its_other_obstacles():
    assert model_of(WORLDS["unused-tokens"]) == model_of(WORLDS["none"]) == "plain"
    assert model_of(WORLDS["all"]) == "both"


def test_the_committed_text_is_that_of_overthinking():
    for part in ("train", "eval"):
        written = (CORPUS / f"{part}.jsonl").read_text("utf-8")
        assert written == as_jsonl(documents(WORLDS["overthinking"], part))


def test_the_tokenizer_has_fewer_ids_than_the_model_has_rows():
    tokenizer = Tokenizer(TINY)
    assert tokenizer.vocab_size < VOCABULARY
    assert json.loads((TINY / "config.json").read_text("utf-8"))["vocab_size"] == VOCABULARY
    assert tokenizer.think_close_id is not None and len(tokenizer.stop_ids) == 2


def test_assets_are_small_enough_for_a_repository():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 16e6
