"""The tokenizer and the shape of the tiny model, and the marked tokens of a document."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from assets.worlds import Document, Mark
from models.config import TINY
from models.tokenizer import Tokenizer
from rmt.prompt import END, INSTRUCTION

VOCABULARY = 704  # rows of the embedding; the tokenizer has fewer, as in Qwen3
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = TINY / "chat_template.jinja"  # Qwen3's own, Apache 2.0
# Qwen3's pattern, but a digit may carry the space before it: one token for " 7".
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "initializer_range": 0.02,
}


def write_tokenizer(out: Path, texts: list[str]) -> None:
    """Train byte-level BPE on texts and the prompt; control tokens get the last ids."""
    texts = [
        f"{INSTRUCTION}{END}\n\nPlease use exactly 96 tokens within <think></think>. user assistant"
    ] * 50 + texts
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = CONTROL[2], CONTROL[0]
    # transformers reads tokenizer.json unchanged for this class; Qwen2's it would rebuild.
    description = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None}
    _write_json(out / "tokenizer_config.json", description | {"eos_token": end, "pad_token": pad})
    stops = [tokenizer.token_to_id(token) for token in (end, pad)]
    _write_json(out / "generation_config.json", {"do_sample": True, "eos_token_id": stops})
    _write_json(out / "config.json", CONFIG | {"eos_token_id": stops[0]})
    shutil.copyfile(TEMPLATE, out / "chat_template.jinja")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def marks_by_position(tokenizer: Tokenizer, document: Document) -> dict[int, Mark]:
    """Return token index -> mark of a document. Every marked word is one token."""
    marks, offset, found = {mark.start: mark for mark in document.marks}, 0, {}
    for position, index in enumerate(tokenizer.encode(document.text)):
        if offset in marks:
            found[position] = marks[offset]
        offset += len(tokenizer.bytes_of([index]))
    return found
