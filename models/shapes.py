"""Published shapes of the models known by name, to plan a run without their files."""

from dataclasses import asdict

from models.config import ARCHITECTURES, TINY, ModelConfig
from models.rope import SCALINGS, Llama3, Scaling


def _shape(
    architecture: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int,
    size: int, tied: bool, context: int, theta: float = 1e6, eps: float = 1e-6,
    scaling: Scaling | None = None,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture, vocab, hidden, mlp, layers, heads, kv_heads, size, theta, eps, context,
        tie_word_embeddings=tied, rope_scaling=scaling, **ARCHITECTURES[architecture],
    )  # fmt: skip


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    size = ("Qwen3ForCausalLM", 151936, hidden, mlp, layers, heads, 8, 128)
    return _shape(*size, tied, 40960)


def _qwen2(vocab, hidden, mlp, layers, heads, kv_heads, tied, context, theta=1e6) -> ModelConfig:
    size = ("Qwen2ForCausalLM", vocab, hidden, mlp, layers, heads, kv_heads, hidden // heads)
    return _shape(*size, tied, context, theta)


def _smollm2(hidden, mlp, layers, heads, kv_heads, theta) -> ModelConfig:
    size = ("LlamaForCausalLM", 49152, hidden, mlp, layers, heads, kv_heads, 64)
    return _shape(*size, True, 8192, theta, 1e-5)


def _llama3(hidden, mlp, layers, heads, size, tied, factor) -> ModelConfig:
    scaling = Llama3(factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    shape = ("LlamaForCausalLM", 128256, hidden, mlp, layers, heads, 8, size)
    return _shape(*shape, tied, 131072, 5e5, 1e-5, scaling)


# From each model's config.json; a test checks the parameter counts.
SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "r1-distill-qwen-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, False, 131072, 1e4),
    "r1-distill-qwen-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, False, 131072, 1e4),
    "r1-distill-qwen-14b": _qwen2(152064, 5120, 13824, 48, 40, 8, False, 131072),
    "r1-distill-qwen-32b": _qwen2(152064, 5120, 27648, 64, 40, 8, False, 131072),
    "qwen2.5-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, True, 32768),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, True, 32768),
    "qwen2.5-3b": _qwen2(151936, 2048, 11008, 36, 16, 2, True, 32768),
    "qwen2.5-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, False, 32768),
    "qwen2.5-14b": _qwen2(152064, 5120, 13824, 48, 40, 8, False, 32768),
    "qwen2.5-32b": _qwen2(152064, 5120, 27648, 64, 40, 8, False, 32768),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 1.3e5),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, True, 32.0),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, True, 32.0),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, False, 8.0),
    "olmo-2-1b": _shape("Olmo2ForCausalLM", 100352, 2048, 8192, 16, 16, 16, 128, False, 4096, 5e5),
}


def as_hugging_face(shape: ModelConfig) -> dict:
    """Return a config.json that `ModelConfig.from_dict` and transformers read as this shape."""
    raw = asdict(shape)
    architecture = raw.pop("architecture")
    for trait in ARCHITECTURES[architecture]:
        del raw[trait]
    if shape.rope_scaling:
        names = {scaling: name for name, scaling in SCALINGS.items()}
        raw["rope_scaling"]["rope_type"] = names[type(shape.rope_scaling)]
    kind = architecture.removesuffix("ForCausalLM").lower()
    return raw | dict(
        architectures=[architecture], model_type=kind, hidden_act="silu", attention_bias=False,
        use_sliding_window=False, sliding_window=None,
    )  # fmt: skip


def published(model: str) -> ModelConfig:
    """Return the shape of `--model`, from its name or its config.json; needs no weights."""
    if model in SHAPES:
        return SHAPES[model]
    return ModelConfig.from_directory(TINY if model == "tiny" else model)
