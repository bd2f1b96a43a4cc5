"""Generated model directories: the same tokens, prompt and end tokens as transformers, or refused.

More seeds: RMT_SEEDS=2000 pytest tests/test_as_transformers.py
"""

import json
import os
import random
import shutil

import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing
from toy_models import write_model, write_tokenizer

from models.export import export
from models.tokenizer import Tokenizer
from models.tokenizer_files import _QWEN2

SEEDS = range(int(os.environ.get("RMT_SEEDS", "40")))
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("l", "a"), ("Ġ", "la"), ("1", "2"), ("Ġ", "12"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("d", "og")]
MERGES = [("o", "g"), *MERGES]
TEXTS = (
    "la  12\n\n345",
    "Dog, dog's é日 \u2028",
    "  the <think> no",
    "",
    "a<|im_end|>b",
    "covid 12",
)
PLAIN = ("la  12\n\n345", "Dog, dog's é日 \u2028", "", "covid 12")
ARCHITECTURES = {kind.lower(): kind for kind in ("Qwen3", "Qwen2", "Llama", "Mistral", "Olmo2")}
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}",
    "{% if tools is none and documents is none %}{{ messages[-1]['content'] }}{{ pad_token }}"
    "{% endif %}",
    "{{ messages | tojson(indent=2) }}{{ raise_exception('no') if messages[1] is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% break %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1).a }}{{ messages[0].content }}",
    "{{ 1 / 0 }}", "{{ nothing.here }}", "{{ x | tojson }}", "{% for %}",
)  # fmt: skip
CHATS = (
    "<user>\n{{ messages[-1].content | trim }}\n",
    "<user>\n{{ messages[-1].content }}\n<eos>",
)
SPLITS = {
    "qwen2": lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]),
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]),
}  # fmt: skip
CLASSES = (
    None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizerFast",
    "TokenizersBackend", "PreTrainedTokenizer", "CodeLlamaTokenizer",
    *["PreTrainedTokenizerFast"] * 4,
)  # fmt: skip


def write_case(place, rng, kind):
    """A directory whose every file is drawn: a split, names of special tokens, a template, ends."""
    architecture = f"{ARCHITECTURES[kind]}ForCausalLM"
    state = write_model(
        place, architectures=[architecture], model_type=kind, vocab_size=320, sliding_window=None,
        head_dim=4 if kind != "qwen3" else 6, **rng.choice(({}, {"eos_token_id": 3})),
    )  # fmt: skip
    pieces = [*ALPHABET, *(a + b for a, b in MERGES)]
    inner = HFTokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, MERGES))
    split = rng.choice(["qwen2"] * 5 + list(SPLITS))
    inner.pre_tokenizer, inner.decoder = SPLITS[split](), decoders.ByteLevel()
    inner.normalizer = rng.choice((normalizers.NFC(), normalizers.NFC(), None))
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    if rng.random() < 0.3:
        inner.add_tokens([AddedToken("covid", single_word=rng.random() < 0.2)])
    if rng.random() < 0.3:
        begin = ("<s>", inner.token_to_id("<s>"))
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    inner.save(str(place / "tokenizer.json"))
    description = {"tokenizer_class": rng.choice(CLASSES), "add_bos_token": rng.random() < 0.5}
    for name in ("bos_token", "eos_token", "pad_token", "image_token"):
        description[name] = rng.choice(
            (*marks, None, "la", {"__type": "AddedToken", "content": "<s>"})
        )
    if rng.random() < 0.05:
        description["pad_token"] = "<not there>"
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        template = [{"name": "default", "template": template}, {"name": "x", "template": "no"}]
    description["chat_template"] = template
    if rng.random() < 0.3:
        raw = json.loads(inner.to_str())["added_tokens"]
        listed = {str(t.pop("id")): t for t in raw}
        if rng.random() < 0.3:
            del listed[rng.choice(list(listed))]
        description["added_tokens_decoder"] = listed
    (place / "tokenizer_config.json").write_text(json.dumps(description))
    if rng.random() < 0.3:
        named = {"eos_token": rng.choice(marks), "bos_token": "<s>"}
        (place / "special_tokens_map.json").write_text(json.dumps(named))
    if rng.random() < 0.3:
        ends = rng.choice((5, [5, 6], [7, 8, 9], 0, [5.0], 10**6))
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    if rng.random() < 0.3:
        (place / "chat_template.jinja").write_text(rng.choice(TEMPLATES))
    if rng.random() < 0.2:
        (place / "additional_chat_templates").mkdir()
        name = rng.choice(("default", "tool_use"))
        (place / f"additional_chat_templates/{name}.jinja").write_text(rng.choice(TEMPLATES))
    return state


def assert_same(place, ours, transformers):
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    for text in PLAIN:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.begin_ids + ours.encode(text) == theirs.encode(text), text
    for text in TEXTS:
        assert ours.encode_with_control(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.bytes_of(ours.encode(text)).decode() == text
    ask = [{"role": "user", "content": "7 <é>?"}]
    try:
        prompt = ours.render(ask)
    except ValueError as error:
        assert str(place) in str(error)
        with pytest.raises(Exception):  # noqa: B017 (of any kind: a template is a program)
            theirs.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    else:
        options = dict(tokenize=False, add_generation_prompt=True)
        assert prompt == theirs.apply_chat_template(ask, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_generated_directory_is_read_as_in_transformers_or_refused(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    place, out = tmp_path / "model", tmp_path / "out"
    state = write_case(place, rng, rng.choice(list(ARCHITECTURES)))
    try:
        ours = Tokenizer(place)
    except ValueError as error:
        assert str(place) in str(error) and ("; " in str(error))
        return
    assert_same(place, ours, transformers)
    export(state, place, out, torch.float32)
    again = Tokenizer(out)
    assert_same(out, again, transformers)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    ends = transformers.GenerationConfig.from_pretrained(out).eos_token_id
    assert again.stop_ids == ours.stop_ids == tuple(ends if isinstance(ends, list) else [ends])


def test_most_generated_directories_are_read():
    """So that the test above compares something."""
    import tempfile
    from pathlib import Path

    read = 0
    for seed in range(30):
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(seed)
            write_case(Path(folder) / "m", rng, rng.choice(list(ARCHITECTURES)))
            try:
                Tokenizer(Path(folder) / "m")
                read += 1
            except ValueError:
                pass
    assert read >= 8, read


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_is_built_anew_is_exported_as_its_tokenizer_json(file, tmp_path, capsys):
    """SmolLM2's files name GPT2Tokenizer, which does not split digits."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(1)
    state = write_case(tmp_path / "m", rng, "llama")
    for name in ("special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "m/additional_chat_templates", ignore_errors=True)
    inner = HFTokenizer.from_file(str(tmp_path / "m/tokenizer.json"))
    inner.pre_tokenizer, inner.normalizer = SPLITS["digits"](), None
    inner.save(str(tmp_path / "m/tokenizer.json"))
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[0]}))
    named = json.loads((tmp_path / "m" / file).read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "m" / file).write_text(json.dumps(named))
    ours = Tokenizer(tmp_path / "m")
    assert "GPT2Tokenizer" in capsys.readouterr().err
    export(state, tmp_path / "m", tmp_path / "out", torch.float32)
    assert_same(tmp_path / "out", ours, transformers)


@pytest.mark.parametrize("template", CHATS)
def test_a_chat_about_a_text_has_the_ids_of_transformers(template, tmp_path):
    """Also where the template trims it, or where its end and the template's share a token."""
    transformers = pytest.importorskip("transformers")
    merges = [("Ċ", "Ċ"), ("l", "a")]
    write_tokenizer(tmp_path, merges, ["<eos>", "<user>"], chat_template=template)
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("la\n", "  la la", "\nlé"):
        chat = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.chat(text) == expected
    before, after = ours.chat_parts()
    assert ours.chat("<eos>") == before + ours.encode("<eos>") + after


def test_named_tokens_of_every_field_are_known_to_templates(tmp_path):
    transformers = pytest.importorskip("transformers")
    fields = {"model_specific_special_tokens": {"image_token": "<image>"},
              "extra_special_tokens": {"user_token": "<user>"}}  # fmt: skip
    template = "{{ image_token }}{{ user_token }}{{ messages[0].content }}"
    named, chat = ["<eos>", "<image>", "<user>"], [{"role": "user", "content": "a"}]
    for name, value in fields.items():
        write_tokenizer(tmp_path, special=named, chat_template=template, **{name: value})
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert Tokenizer(tmp_path).render(chat) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("listed", [{}, None])
def test_a_class_that_would_drop_added_tokens_is_refused(listed, tmp_path):
    """transformers takes an added_tokens_decoder that lists none at its word."""
    inner = HFTokenizer(models.BPE({p: i for i, p in enumerate(ALPHABET)}, []))
    inner.normalizer, inner.pre_tokenizer = normalizers.NFC(), SPLITS["qwen2"]()
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<eos>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<eos>", "pad_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert Tokenizer(tmp_path).stop_ids == (256,)
    named["added_tokens_decoder"] = listed
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"added tokens other ids .* or none; set tokenizer_class"):
        Tokenizer(tmp_path)


def test_a_tokenizer_file_of_another_name_is_refused(tmp_path):
    write_tokenizer(tmp_path, fast_tokenizer_files=["tokenizer.4.0.0.json"])
    with pytest.raises(ValueError, match="fast_tokenizer_files"):
        Tokenizer(tmp_path)
