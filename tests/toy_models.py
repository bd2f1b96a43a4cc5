"""Directories in Hugging Face format with a few hundred random parameters, for several tests."""

import json

import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from models.config import ModelConfig
from models.transformer import Transformer
from models.weights import INDEX, SINGLE

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def write_config(directory, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


def random_state(seed=0, **changes):
    model = Transformer(ModelConfig.from_dict(CONFIG | changes))
    model.reset_parameters(seed)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_model(directory, **changes):
    """A complete directory in Hugging Face format and the tensors in it."""
    write_config(directory, **changes)
    state = random_state(**changes)
    save_file(state, directory / SINGLE)
    return state


def write_shards(directory):
    """The same in two files with an index."""
    state = write_model(directory)
    (directory / SINGLE).unlink()
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return state


def write_tokenizer(directory, merges=(), special=("<eos>",), **description):
    """A byte-level tokenizer: every byte is a token, and every merge makes one more."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(directory / "tokenizer.json"))
    description = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"} | description
    (directory / "tokenizer_config.json").write_text(json.dumps(description))


def assert_holds(error, *fragments):
    for fragment in fragments:
        assert fragment in str(error.value), f"{fragment!r} is not in: {error.value}"


def causal(layer, query, key, value):
    """The plainest `attend`: one document, every token sees those before it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, N, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)
