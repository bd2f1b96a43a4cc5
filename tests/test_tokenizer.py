"""The tokenizer agrees with transformers, keeps text apart from control, and is exact in bytes."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing
from toy_models import write_tokenizer

from models import chat_template
from models.tokenizer import Tokenizer
from rmt.prompt import next_token_prompt

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
NAMES = ["qwen3", "r1_distill_qwen"]
CONTROL = ["<|im_end|>", "<|im_start|>", "</think>", "<think>", "<｜User｜>", "<|endoftext|>"]
QUESTION = {"role": "user", "content": "What is 12 + 30?\n\nThink first. 🤔"}
SYSTEM = {"role": "system", "content": "You are terse."}
REPLY = {"role": "assistant", "content": "<think>\n12 + 30\n</think>\n\nIt is 42."}
CHATS = {
    "one-question": [QUESTION],
    "with-system-message": [SYSTEM, QUESTION],
    "multi-turn": [QUESTION, REPLY, {"role": "user", "content": "Sure?"}],
    "multi-turn-with-system-message": [SYSTEM, QUESTION, REPLY, QUESTION],
}


def directory_of(name: str) -> Path:
    directory = DATA / "tokenizers" / name
    if not directory.is_dir():
        pytest.skip(f"shared/data/tokenizers/{name} is not on this machine")
    return directory


@pytest.fixture(scope="module", params=NAMES)
def directory(request):
    return directory_of(request.param)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


def random_text(seed: int) -> str:
    """Code points of every length in UTF-8, unassigned ones too, with joined emoji."""
    generator = random.Random(seed)
    ranges = [(0, 128), (128, 2048), (2048, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FAFF)]
    joined = ["👩‍👩‍👧", "🏳️‍🌈", "é", " ", "\n", "\r\n", "\u200b"]
    pieces = [chr(generator.randrange(*generator.choice(ranges))) for _ in range(60)]
    return "".join(piece + generator.choice(["", *joined]) for piece in pieces)


def ordinary_texts() -> list[str]:
    texts = [
        "",
        " ",
        "Hello  world,\n\n  it's 1234 °C — naïve?",
        "\\frac{a}{b} = $x^2$",
        "日本語\t",
    ]
    path = DATA / "omni-math" / "eval.jsonl"
    if path.is_file():
        records = [json.loads(line) for line in path.read_text("utf-8").strip().split("\n")[:60]]
        texts += [record["problem"] + "\n\n" + record["solution"] for record in records]
    return texts


# ---- against transformers


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "unprompted"])
def test_rendered_chat_is_that_of_transformers(tokenizer, reference, messages, prompted):
    options = {"add_generation_prompt": prompted}
    text = tokenizer.render(messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_with_control(text) == ids


def test_thinking_can_be_switched_off_as_in_transformers(tokenizer, reference):
    options = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.render([QUESTION], **options)
    assert text == reference.apply_chat_template([QUESTION], tokenize=False, **options)
    # R1's template knows no such option.
    assert text.endswith("</think>\n\n") == (tokenizer.directory.name == "qwen3")


def test_chat_parts_around_a_text_are_the_whole_chat(tokenizer, reference):
    before, after = tokenizer.chat_parts()
    whole = reference.apply_chat_template(
        [QUESTION], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert before + tokenizer.encode(QUESTION["content"]) + after == whole


def test_ordinary_text_is_encoded_as_in_transformers(tokenizer, reference):
    for text in ordinary_texts():
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text


def test_a_raw_document_begins_as_in_transformers(tokenizer, reference):
    assert tokenizer.begin_ids + tokenizer.encode("a") == reference.encode("a")
    assert tokenizer.begin_ids == ([151646] if "r1" in tokenizer.directory.name else [])


# ---- text is never control


@pytest.mark.parametrize("text", CONTROL)
def test_text_that_looks_like_control_stays_text(tokenizer, text):
    ids = tokenizer.encode(f"a {text} b")
    assert len(ids) > 3
    assert not set(ids) & set(tokenizer._added)
    assert tokenizer.decode(ids) == f"a {text} b"


def test_control_in_a_template_is_one_token(tokenizer):
    assert tokenizer.encode_with_control("</think>") == [tokenizer.think_close_id]
    assert tokenizer.bytes_of([tokenizer.think_close_id]) == b"</think>"


# ---- exact bytes


@pytest.mark.parametrize("seed", range(20))
def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, seed):
    text = tokenizer._control.normalizer.normalize_str(random_text(seed))  # both use NFC
    ids = tokenizer.encode(text)
    assert tokenizer.bytes_of(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.bytes_of([index]) for index in ids]
    assert b"".join(pieces) == text.encode("utf-8")


def test_an_emoji_may_be_split_over_tokens_that_are_no_text(tokenizer):
    ids = tokenizer.encode("🫨")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.bytes_of(ids) == "🫨".encode()


def test_every_id_of_the_vocabulary_has_bytes(tokenizer):
    assert all(tokenizer.bytes_of([index]) for index in range(tokenizer.vocab_size))
    with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
        tokenizer.bytes_of([tokenizer.vocab_size])


def test_ids_without_a_piece_and_odd_pieces_have_bytes_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["model"]["vocab"] |= {"\u2581pad": 300}  # nothing has the ids 257 to 299
    path.write_text(json.dumps(raw))
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for index in (0, 200, 280, 300):
        assert ours.decode([index]) == theirs.decode([index]), index
    assert ours.bytes_of([280, 300]) == "\u2581pad".encode()


def test_half_a_pair_is_a_message(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"character 1 of the text .* mend the text"):
        Tokenizer(tmp_path).encode("a\udcff")


# ---- directories


TEMPLATES = {
    "raise_exception": (
        "{{ raise_exception('no system') }}",
        ValueError,
        "refuses these .*no system",
    ),
    "dropped-text": ("always the same", ValueError, "0 times instead of once"),
    "repeated-text": ("{{ messages[0].content * 2 }}", ValueError, "2 times instead of once"),
    "none": (None, ValueError, "has no chat template.*add chat_template.jinja"),
}


@pytest.mark.parametrize("template, kind, message", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_cannot_serve_is_refused(template, kind, message, tmp_path):
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(kind, match=message):
        Tokenizer(tmp_path).chat_parts()


def test_templates_have_the_functions_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}\n  {% break %}\n  {% endif %}\n"
        "{{ m | tojson }}{{ messages | tojson(indent=2) }}{% endfor %}{{ strftime_now('%Y') }}"
        "{{ bos_token is defined }}{{ eos_token }}{{ pad_token }}"
    )
    write_tokenizer(tmp_path, chat_template=template, pad_token="<eos>")
    messages = [{"role": "user", "content": "<é&'>"}, QUESTION]
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(tmp_path).render(messages) == expected


def test_a_process_has_one_date(tmp_path):
    """A step renders its prompts twice, before and after sampling: midnight may lie between."""
    write_tokenizer(tmp_path, chat_template="{{ strftime_now('%H:%M:%S.%f') }}")
    first = Tokenizer(tmp_path).render([QUESTION])
    chat_template._compiled.cache_clear()
    assert Tokenizer(tmp_path).render([QUESTION]) == first


def test_truncation_stored_in_the_file_does_not_cut_documents(tmp_path):
    write_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    limits = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"truncation": limits}))
    assert len(Tokenizer(tmp_path).encode("twelve bytes")) == 12
    assert len(Tokenizer(tmp_path).encode_with_control("twelve bytes")) == 12


def test_a_beginning_that_only_the_post_processor_names_is_used(tmp_path):
    """Llama 3: no add_bos_token in tokenizer_config.json."""
    write_tokenizer(tmp_path, special=["<bos>", "<eos>"], bos_token="<bos>")
    assert Tokenizer(tmp_path).begin_ids == []
    inner = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).begin_ids == [inner.token_to_id("<bos>")]
    assert Tokenizer(tmp_path).encode("a") == [inner.token_to_id("a")]


def test_a_vocabulary_with_one_id_for_two_tokens_is_refused(tmp_path):
    """transformers takes the one or the other, by chance."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["model"]["vocab"]["a"] = raw["model"]["vocab"]["!"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"one id to two tokens.*'!'|one id to two tokens.*'a'"):
        Tokenizer(tmp_path)


def test_stop_ids_are_those_of_generation_config_when_there_is_one(tmp_path):
    write_tokenizer(tmp_path, special=["<pad>", "<eos>"])
    assert Tokenizer(tmp_path).stop_ids == (257,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    assert Tokenizer(tmp_path).stop_ids == (256, 257)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert Tokenizer(tmp_path).stop_ids == (256, 257)
    (tmp_path / "generation_config.json").write_text("{}")
    assert Tokenizer(tmp_path).stop_ids == (3,)
    (tmp_path / "config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<pad>"}')
    assert Tokenizer(tmp_path).stop_ids == (256,)
    (tmp_path / "special_tokens_map.json").unlink()
    write_tokenizer(tmp_path, eos_token=None)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="names no end-of-text token; set eos_token"):
        Tokenizer(tmp_path)


def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist; copy"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)


def test_the_prompt_around_a_document_is_one_chat(tokenizer, reference):
    """Header, document and footer are what transformers makes of the same text."""
    prompt = next_token_prompt(tokenizer, 128)
    text = tokenizer.decode(list(prompt.header)) + "1 + 1" + tokenizer.decode(list(prompt.footer))
    assert "Please use exactly 128 tokens within <think></think>." in text
    content = text[text.index("Predict the next") : text.index("</think>.") + len("</think>.")]
    chat = [{"role": "user", "content": content}]
    assert text == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The budget sentence spells <think></think>; it must not hold the control tokens.
    assert list(prompt.footer).count(tokenizer.think_close_id) == 0
    assert len(next_token_prompt(tokenizer, None)) < len(prompt)
