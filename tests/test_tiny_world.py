"""The tiny world: its documents follow from their operands, and its thoughts are what they say."""

import json
import random

import pytest

from assets import tiny_report, tiny_world
from assets.tiny_tokenizer import VOCABULARY, marks_by_position
from assets.tiny_world import CAREFUL, COMPUTED, CORPUS, Habits, make_thought
from models.config import ASSETS, TINY
from models.tokenizer import Tokenizer
from rmt.boxed import escape
from rmt.evaluation.positions import Chosen, Position, write_positions
from rmt.prompt import next_token_prompt, parse_response

ALWAYS_CAREFUL = Habits(careful=1.0, hasty=0.0, before=2.0, after=2.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def test_same_seed_writes_the_same_documents():
    assert tiny_world.documents(7, 20) == tiny_world.documents(7, 20)
    assert tiny_world.documents(7, 20) != tiny_world.documents(8, 20)


def test_committed_corpus_is_what_the_generator_writes():
    for name, documents in (
        ("train", tiny_world.train_documents()),
        ("few", tiny_world.train_documents()[:4]),
        ("eval", tiny_world.eval_documents()),
    ):
        assert (CORPUS / f"{name}.jsonl").read_text("utf-8") == tiny_world.as_jsonl(documents)


def test_train_and_eval_share_no_document():
    texts = {}
    for name in ("train", "eval"):
        lines = (CORPUS / f"{name}.jsonl").read_text("utf-8").strip().split("\n")
        texts[name] = {json.loads(line)["text"] for line in lines}
        assert len(texts[name]) == len(lines)
    assert not texts["train"] & texts["eval"]


def test_computed_words_follow_from_the_coins_in_the_text():
    """Read back from the text alone, by a second computation."""
    moduli = {"digit": 10, "colour": 4, "parity": 2}
    for document in tiny_world.documents(9, 50):
        opening = document.text.removeprefix("Coins: ").split(".")[0].split()
        coins = dict(zip(opening[::2], map(int, opening[1::2])))
        for mark in document.marks:
            assert document.text[mark.start :].startswith(f" {mark.word}")
            if mark.kind in COMPUTED:
                statement = document.text[: mark.start].rsplit(". ", 1)[1]
                named = [word for word in statement.replace(",", "").split() if word in coins]
                total = sum(coins[name] for name in named) % moduli[mark.kind]
                assert mark.word == tiny_world.STATES[mark.kind][total]
                assert tuple(named) == tuple(name for name, _ in mark.operands)


def test_careful_thoughts_arrive_at_the_true_word():
    rng = random.Random(0)
    for document in tiny_world.documents(9, 50):
        for mark in document.marks:
            thought, answer = make_thought(rng, mark, ALWAYS_CAREFUL)
            assert (CAREFUL in thought) == bool(mark.operands)
            assert answer == mark.word or not mark.operands


def test_hasty_thoughts_are_often_wrong_and_consistent_with_their_answer():
    rng, right, asked = random.Random(0), 0, 0
    hasty = Habits(careful=0.0, hasty=1.0, before=0.0, after=0.0)
    for document in tiny_world.documents(9, 50):
        for mark in filter(lambda mark: mark.kind == "digit", document.marks):
            thought, answer = make_thought(rng, mark, hasty)
            assert f"= {answer}." in thought
            right, asked = right + (answer == mark.word), asked + 1
    assert right < 0.5 * asked


def test_every_marked_word_is_one_token_behind_the_context_that_is_never_a_target(tokenizer):
    for document in tiny_world.eval_documents()[:50]:
        ids = tokenizer.encode(document.text)
        marks = marks_by_position(tokenizer, document)
        assert len(marks) == len(document.marks)
        assert min(marks) >= 16 and 100 <= len(ids) <= 160
        for position, mark in marks.items():
            assert tokenizer.bytes_of([ids[position]]).decode() == f" {mark.word}"


def test_shortest_full_answer_fits_in_19_thinking_tokens(tokenizer):
    rng, short = random.Random(0), Habits(careful=1.0, hasty=0.0, before=0.0, after=0.0)
    for mark in tiny_world.documents(9, 1)[0].marks:
        lengths = []
        for _ in range(20):
            thought, word = make_thought(rng, mark, short)
            text = f"<think>\n{thought}\n</think>\n\n\\boxed{{{escape(f' {word}'.encode())}}}"
            answer = parse_response(tokenizer, tokenizer.encode_with_control(text))
            assert answer.text == f" {word}"
            lengths.append(answer.thinking_length)
        assert min(lengths) <= 19


def test_tokenizer_has_fewer_ids_than_the_model_has_rows(tokenizer):
    assert tokenizer.vocab_size < VOCABULARY
    assert json.loads((TINY / "config.json").read_text("utf-8"))["vocab_size"] == VOCABULARY
    assert tokenizer.think_close_id is not None and len(tokenizer.stop_ids) == 2
    assert len(next_token_prompt(tokenizer, 96)) < 160


def test_ceiling_of_stored_positions_counts_noise_as_guesses(tokenizer, tmp_path):
    document = tiny_world.eval_documents()[0]
    marks = marks_by_position(tokenizer, document)
    kinds = {mark.kind: position for position, mark in marks.items()}
    sure = next(p for kind, p in kinds.items() if kind not in tiny_world.NOISE)
    chosen = [Position(0, p, 1.0, "easy", 0) for p in (sure, kinds["noise digit"])]
    write_positions(tmp_path / "positions.json", Chosen(chosen))
    guess = (1 + 1 / len(tiny_world.NOISE["noise digit"])) / 2
    shown = tiny_report.ceiling(tmp_path / "positions.json")
    assert shown == f"easy: 2 positions, 1 noise, ceiling {guess:.1%}"


def test_assets_are_small_enough_for_a_repository():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 16e6
