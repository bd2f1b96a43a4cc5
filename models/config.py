"""The shape of a model, read from a Hugging Face config.json, and the table of names we know."""

import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY = ASSETS / "tiny"  # the model that ships with this repository

# name on the command line -> Hugging Face repository
REPOSITORIES = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "r1-distill-qwen-14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "r1-distill-qwen-32b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}

ARCHITECTURES = {
    "Qwen3ForCausalLM": dict(qk_norm=True, qkv_bias=False),
    "Qwen2ForCausalLM": dict(qk_norm=False, qkv_bias=True),
    "LlamaForCausalLM": dict(qk_norm=False, qkv_bias=False),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything the transformer needs to know; names follow Hugging Face's config.json."""

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
    qk_norm: bool  # RMSNorm on queries and keys before RoPE (Qwen3)
    qkv_bias: bool  # bias on q_proj, k_proj, v_proj (Qwen2)
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face config; ValueError names what this code cannot compute."""
        architecture = (raw.get("architectures") or ["(none)"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{source}: architecture {architecture} is not supported; "
                f"use a model of {', '.join(ARCHITECTURES)}"
            )
        traits = dict(ARCHITECTURES[architecture])
        rope = _rope(raw, source)
        if raw.get("use_sliding_window"):
            raise ValueError(
                f"{source}: use_sliding_window=true is not supported; "
                "only full attention is implemented"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{source}: hidden_act={raw['hidden_act']} is not supported, only silu"
            )
        if raw.get("mlp_bias") or (raw.get("attention_bias") and not traits["qkv_bias"]):
            raise ValueError(f"{source}: attention_bias / mlp_bias are not supported")
        try:
            heads = raw["num_attention_heads"]
            return cls(
                architecture=architecture,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                # Qwen3 has an explicit head_dim: 128 even where hidden_size / heads = 64.
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rope_theta=float(rope),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                initializer_range=raw.get("initializer_range", 0.02),
                **traits,
            )
        except KeyError as missing:
            raise ValueError(f"{source}: the field {missing} is missing") from None

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; --model takes a known name or a Hugging Face "
                "directory with config.json, tokenizer.json and safetensors"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
        return cls.from_dict(raw, str(path))


def _rope(raw: dict, source: str) -> float:
    """rope_theta, after refusing every scaling: positions would silently be wrong."""
    # transformers 5 writes rope_parameters, earlier versions rope_theta + rope_scaling.
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{source}: rope scaling of type {kind!r} is not supported; "
            "remove it if the run stays within the unscaled context"
        )
    return parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0
