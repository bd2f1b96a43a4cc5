"""The shape of a model, read from a Hugging Face config.json."""

from dataclasses import dataclass
from pathlib import Path

from models.files import read_json, read_number, read_truth, refuse_adapter
from models.rope import Scaling, read_rope

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY = ASSETS / "worlds" / "overthinking"  # the model of `make demo`, see assets/worlds.py

ARCHITECTURES = {
    "Qwen3ForCausalLM": dict(qk_norm="head", qkv_bias=False, post_norm=False),
    "Qwen2ForCausalLM": dict(qk_norm="", qkv_bias=True, post_norm=False),
    "LlamaForCausalLM": dict(qk_norm="", qkv_bias=False, post_norm=False),
    "MistralForCausalLM": dict(qk_norm="", qkv_bias=False, post_norm=False),
    "Olmo2ForCausalLM": dict(qk_norm="all", qkv_bias=False, post_norm=True),
}
# Defaults of transformers where config.json has no such field (or null).
DEFAULTS = {
    "Qwen3ForCausalLM": dict(
        model_type="qwen3", max_position_embeddings=32768, num_key_value_heads=32, head_dim=128
    ),
    "Qwen2ForCausalLM": dict(
        model_type="qwen2", max_position_embeddings=32768, num_key_value_heads=32
    ),
    "LlamaForCausalLM": dict(model_type="llama", max_position_embeddings=2048),
    "MistralForCausalLM": dict(
        model_type="mistral", max_position_embeddings=131072, num_key_value_heads=8
    ),
    "Olmo2ForCausalLM": dict(model_type="olmo2", max_position_embeddings=2048, rms_norm_eps=1e-5),
}
# Fields that may change the logits, and their values (beside null) that do not.
WITHOUT_EFFECT = {
    "hidden_act": ("silu", "swish"), "mlp_bias": (False,), "use_sliding_window": (False,),
    "attention_dropout": (0,), "partial_rotary_factor": (1,), "quantization_config": (),
    "pretraining_tp": (1,), "is_encoder_decoder": (False,), "auto_map": (), "text_config": (),
    "is_causal": (True,), "transformers_weights": (),
    # Fields of other architectures: transformers ignores them here, but the weights expect them.
    "final_logit_softcapping": (), "attn_logit_softcapping": (), "query_pre_attn_scalar": (),
    "logit_scale": (1,), "logits_scaling": (1,), "embedding_multiplier": (1,),
    "residual_multiplier": (1,), "clip_qkv": (),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer; names follow Hugging Face's config.json."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: str  # RMSNorm of queries and keys before RoPE: of each "head" (Qwen3), "all" (OLMo 2)
    qkv_bias: bool  # bias on q_proj, k_proj, v_proj (Qwen2)
    post_norm: bool  # RMSNorm after attention and MLP, not before (OLMo 2)
    initializer_range: float = 0.02
    rope_scaling: Scaling | None = None

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face config as transformers does.

        ValueError names the field that is missing, damaged or not implemented here.
        """
        architecture = _architecture(raw, source)
        default, traits = DEFAULTS[architecture], ARCHITECTURES[architecture]
        _refuse_effects(raw, traits, source)
        number = lambda name, otherwise=None, kind=int: read_number(
            raw, name, otherwise, kind, source
        )
        heads, hidden = number("num_attention_heads"), number("hidden_size")
        # null means the number of heads; only a missing field has the class's default.
        kv_heads = None if "num_key_value_heads" in raw else default.get("num_key_value_heads")
        theta, scaling = read_rope(raw, source)
        # Qwen3 has an explicit head_dim: 128 even where hidden_size / heads = 64.
        config = cls(
            architecture=architecture,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", kv_heads or heads),
            head_dim=number("head_dim", default.get("head_dim", hidden // heads)),
            rope_theta=theta,
            rms_norm_eps=number("rms_norm_eps", default.get("rms_norm_eps", 1e-6), float),
            max_position_embeddings=number(
                "max_position_embeddings", default["max_position_embeddings"]
            ),
            tie_word_embeddings=read_truth(raw, "tie_word_embeddings", source),
            initializer_range=number("initializer_range", 0.02, float),
            rope_scaling=scaling,
            **traits,
        )
        _check_heads(config, raw, source)
        _check_window(config, raw, source)
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        path = Path(directory) / "config.json"
        refuse_adapter(path.parent)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; --model takes a known name or a Hugging Face "
                "directory with config.json, tokenizer.json and safetensors"
            )
        return cls.from_dict(read_json(path), str(path))


def _architecture(raw: dict, source: str) -> str:
    """Return the class name; model_type, which transformers reads, must mean the same class."""
    named, kind = raw.get("architectures"), raw.get("model_type")
    if named is not None and not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise ValueError(
            f"{source}: architectures is {named!r}, not a list of names; fetch it again"
        )
    by_type = [name for name, default in DEFAULTS.items() if default["model_type"] == kind]
    architecture = named[0] if named else by_type[0] if by_type else "(none)"
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source}: architecture {architecture} is not supported; "
            f"use a model of {', '.join(ARCHITECTURES)}"
        )
    if kind is not None and by_type != [architecture]:
        raise ValueError(
            f"{source}: model_type {kind!r} is not that of architectures, {architecture}: "
            "transformers would build another model; correct one of the two"
        )
    return architecture


def _refuse_effects(raw: dict, traits: dict, source: str) -> None:
    """Refuse fields that ask for what is not implemented here."""
    values = dict(WITHOUT_EFFECT)
    if not traits["qkv_bias"]:  # Qwen2 always has the bias and no such field
        values["attention_bias"] = (False,)
    for name, harmless in values.items():
        value = raw.get(name)
        if value is not None and value not in harmless:
            raise ValueError(
                f"{source}: {name}={value!r} is not supported"
                + (f"; only {harmless[0]!r} is" if harmless else "; take a checkpoint without it")
            )


def _check_heads(config: ModelConfig, raw: dict, source: str) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(
            f"{source}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
            f"{groups}; fetch it again"
        )
    if config.head_dim % 2:
        raise ValueError(f"{source}: head_dim {config.head_dim} must be even, as RoPE pairs it")
    padding = raw.get("pad_token_id")
    if isinstance(padding, int) and not -config.vocab_size <= padding < config.vocab_size:
        raise ValueError(
            f"{source}: pad_token_id {padding} is outside vocab_size {config.vocab_size}; remove "
            "it, or transformers cannot load the model"
        )
    if config.num_hidden_layers > 1000:
        raise ValueError(f"{source}: num_hidden_layers {config.num_hidden_layers}; fetch it again")
    llama = config.architecture == "LlamaForCausalLM"
    if config.hidden_size % heads and (raw.get("head_dim") is None or llama):
        raise ValueError(
            f"{source}: hidden_size {config.hidden_size} must be a multiple of "
            f"num_attention_heads {heads}; fetch it again"
        )


def _check_window(config: ModelConfig, raw: dict, source: str) -> None:
    """Refuse what lets a token see fewer than all tokens before it."""
    kinds = raw.get("layer_types")
    if config.architecture == "LlamaForCausalLM":  # has no such field
        kinds = None
    if kinds and kinds != ["full_attention"] * config.num_hidden_layers:
        raise ValueError(
            f"{source}: layer_types is not full_attention for each of num_hidden_layers; only "
            "full attention is implemented"
        )
    missing = 4096  # transformers' value of Mistral where there is no such field
    if config.architecture != "MistralForCausalLM" or raw.get("sliding_window", missing) is None:
        return
    window = read_number(raw, "sliding_window", missing, int, source)
    if window < config.max_position_embeddings:
        raise ValueError(
            f"{source}: sliding_window={window} is shorter than max_position_embeddings "
            f"{config.max_position_embeddings}; only full attention is implemented: lower "
            "max_position_embeddings to the window, or take a checkpoint whose window is null"
        )
