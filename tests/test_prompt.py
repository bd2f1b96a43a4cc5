r"""What counts as an answer: the last \boxed{} after </think>, spaces and lone braces and all."""

from pathlib import Path

import pytest
from toy_models import write_tokenizer

from models.tokenizer import Tokenizer
from rmt.evaluation.evaluate import answer_kind
from rmt.prompt import Answer, boxed_content, escape, parse_response
from rmt.rewards import match_reward

BOXES = {
    "plain": (r"so \boxed{x}.", "x"),
    "last-of-two": (r"\boxed{a} no, \boxed{b}", "b"),
    "empty": (r"\boxed{}", ""),
    "spaces-are-kept": (r"\boxed{ a b }", " a b "),
    "nested-braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "inner-of-nested-boxes": (r"\boxed{\boxed{a}}", "a"),
    "unbalanced-last-yields-to-the-one-before": (r"\boxed{a} then \boxed{b", "a"),
    "unbalanced-alone": (r"\boxed{a", None),
    "surplus-closing-braces-are-the-answer's": (r"}} \boxed{a}}", "a}"),
    "opened-before-the-box": (r"$\text{it is \boxed{7}}$", "7"),
    "open-brace": (r"\boxed{^{}", "^{"),
    "close-and-open": (r"\boxed{}{}", "}{"),
    "close-and-dollar": (r"so \boxed{}$}.", "}$"),
    "close": (r"\boxed{}}", "}"),
    "space-and-close": (r"\boxed{ }}", " }"),
    "open-brace-behind-the-box": (r"\boxed{x}. Hence {y", "x"),
    "paired-braces-behind-the-box": (r"\boxed{x} for {y}", "x"),
    "no-box": ("x", None),
    "boxed-without-brace": (r"\boxed x", None),
    "fbox-is-no-box": (r"\fbox{x}", None),
    "newline-inside": ("\\boxed{a\nb}", "a\nb"),
}
ESCAPES = {
    "text": (b" para", " para"),
    "space": (b" ", " "),
    "newline": (b"\n", r"\n"),
    "two-newlines-after-a-stop": (b".\n\n", r".\n\n"),
    "tab-and-return": (b"\t\r", r"\t\r"),
    "null": (b"\x00", r"\x00"),
    "half-a-character": ("é".encode()[:1], r"\xc3"),
    "other-half": (b" \xa9", r" \xa9"),
    "whole-character": ("é".encode(), "é"),
    "zero-width-space": ("\u200b".encode(), r"\u200b"),
    "no-break-space-is-not-the-byte-a0": ("\u00a0".encode(), r"\u00a0"),
    "open-brace": (b"{", "{"),
    "close-brace": (b"}", "}"),
    "wrong-way-round": (b"}{", "}{"),
    "between-braces-the-wrong-way-round": (b"a}{b", r"a\x7d\x7bb"),
    "brace-and-newline": (b"}\n", r"}\n"),
    "paired-braces": (b"{}", "{}"),
    "latex": (rb"\frac", r"\frac"),
}


@pytest.mark.parametrize("text, content", BOXES.values(), ids=BOXES)
def test_boxed_content(text, content):
    assert boxed_content(text) == content


@pytest.mark.parametrize(
    "text, content",
    [(r"\boxed{5}}", "5"), (r"\boxed{5}. So {x", "5"), (r"\boxed{}{", ""),
     (r"\boxed{5}. {x}}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
     (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right.")],
)  # fmt: skip
def test_answers_to_problems_have_no_unpaired_braces(text, content):
    assert boxed_content(text, unpaired=False) == content


def test_a_long_row_of_unclosed_boxes_is_read_in_linear_time():
    assert boxed_content(r"\boxed{" * 200_000) is None


@pytest.mark.parametrize("token, written", ESCAPES.values(), ids=ESCAPES)
def test_escape(token, written):
    assert escape(token) == written


@pytest.mark.parametrize("token", [case[0] for case in ESCAPES.values()], ids=ESCAPES)
def test_every_token_survives_its_box(token):
    assert boxed_content(rf"\boxed{{{escape(token)}}}") == escape(token)


KINDS = [
    (b" para", "plain"), (b"{}", "plain"), (b"^{", "brace"), (b"}{", "brace"), (b"a}", "brace"),
    (b"\n", "escaped"), (b"}\n", "escaped"), (b"\xc3", "escaped"), (b"a}{b", "escaped"),
]  # fmt: skip


@pytest.mark.parametrize("token, kind", KINDS)
def test_kind_of_answer(token, kind):
    assert answer_kind(token) == kind


def test_every_token_of_a_real_vocabulary_can_be_answered():
    source = Path(__file__).parents[2] / "shared/data/tokenizers/qwen3"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    tokenizer = Tokenizer(source)
    for index in range(tokenizer.vocab_size):
        token = tokenizer.bytes_of([index])
        written = escape(token)
        if token:
            assert boxed_content(rf"so \boxed{{{written}}}.") == written, token
            assert match_reward(Answer("", written, 0), [token]) == 1, token


@pytest.fixture(scope="module", params=[True, False], ids=["control-token", "spelled-out"])
def tokenizer(request, tmp_path_factory):
    """Bytes as tokens, `</` merged; with and without a control token for </think>."""
    directory = tmp_path_factory.mktemp("tokenizer")
    special = ["<eos>", "</think>"] if request.param else ["<eos>"]
    write_tokenizer(directory, merges=[("<", "/"), ("x", "</")], special=special)
    return Tokenizer(directory)


def response(tokenizer, thought, after):
    return tokenizer.encode_with_control(f"{thought}</think>{after}<eos>")


def test_thinking_length_is_counted_in_tokens(tokenizer):
    answer = parse_response(tokenizer, response(tokenizer, "ab é", r" \boxed{ c}"))
    assert answer.thinking_length == 5  # é is two
    assert answer.thought == "ab é"
    assert answer.text == " c"


def test_an_empty_thought_has_length_zero(tokenizer):
    answer = parse_response(tokenizer, response(tokenizer, "", r"\boxed{c}"))
    assert (answer.thought, answer.text, answer.thinking_length) == ("", "c", 0)


def test_a_box_inside_the_thought_is_no_answer(tokenizer):
    answer = parse_response(tokenizer, response(tokenizer, r"\boxed{a}", "hmm"))
    assert (answer.text, answer.thinking_length) == (None, len(r"\boxed{a}"))


def test_without_the_end_of_thinking_there_is_no_answer_and_no_length(tokenizer):
    answer = parse_response(tokenizer, tokenizer.encode(r"I think \boxed{a} </thin"))
    assert (answer.text, answer.thinking_length) == (None, None)
    assert answer.thought.endswith("</thin")
    assert parse_response(tokenizer, []).thinking_length is None


def test_the_first_end_of_thinking_counts(tokenizer):
    answer = parse_response(tokenizer, response(tokenizer, "a", r"\boxed{b}</think>\boxed{c}"))
    assert (answer.thought, answer.text, answer.thinking_length) == ("a", "c", 1)


def test_half_a_character_in_the_answer_is_not_well_formed_text(tokenizer):
    ids = response(tokenizer, "a", r"\boxed{é}")
    ids.remove(tokenizer.encode("é")[1])
    assert parse_response(tokenizer, ids).text == "\ufffd"


def test_spelling_out_the_control_token_does_not_end_the_thought(tokenizer):
    spelled = tokenizer.encode(r"ab</think>\boxed{c}")
    ends = parse_response(tokenizer, spelled).thinking_length
    assert ends == (None if tokenizer.think_close_id is not None else 2)


def test_a_token_that_ends_the_thought_and_starts_its_end_belongs_to_the_end(tokenizer):
    ids = tokenizer.encode("ax</think>")
    if tokenizer.think_close_id is None:
        assert parse_response(tokenizer, ids).thinking_length == 1
        assert parse_response(tokenizer, ids).text is None
