"""Checks of what other architectures than Qwen3 have: scaled rotary frequencies, norms after
attention and MLP, a window. See tests/method_checks.py.
"""

import torch
from method_step import assert_by_hand, doubled, watched
from toy_forests import CONFIG, toy_model
from toy_models import causal
from toy_runs import write_thinker

from models.config import ModelConfig
from models.rope import frequencies
from models.transformer import rotary_angles

LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=512,
              low_freq_factor=1.0, high_freq_factor=4.0)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)
BETAS = dict(beta_fast=16, beta_slow=2, truncate=False, mscale=0.5, mscale_all_dim=1.5)
FACTOR = dict(factor=8.0, original_max_position_embeddings=8192, attention_factor=0.5, mscale=3.0)
ONE_SCALE = dict(original_max_position_embeddings=64, mscale=3.0)
SCALED = (  # fields, theta; frequencies of 16 dims and factor of cos and sin, of transformers 5.23
    (LLAMA3, 1e4,
     (1.0, 0.31623, 0.1, 0.018497, 0.00125, 0.00039528, 0.000125, 3.9528e-05), 1.0),
    (YARN, 1e4,
     (1.0, 0.31623, 0.1, 0.025694, 0.00625, 0.0013835, 0.00025, 7.9057e-05), 1.1386294),
    (YARN | BETAS, 1e4,
     (1.0, 0.31623, 0.1, 0.031623, 0.0067616, 0.0008251, 0.00025, 7.9057e-05), 0.8852352),
    (YARN | FACTOR, 1e2,
     (1.0, 0.56234, 0.31623, 0.17783, 0.1, 0.056234, 0.031623, 0.01556), 0.5),
    (YARN | ONE_SCALE, 1e4,
     (1.0, 0.23717, 0.05, 0.0079057, 0.0025, 0.00079057, 0.00025, 7.9057e-05), 1.1386294),
)  # fmt: skip


def check_scaled(place) -> None:
    """Frequencies of both scalings are those of transformers, and so are cos and sin."""
    for fields, theta, wanted, amplitude in SCALED:
        config = ModelConfig.from_dict(CONFIG | dict(rope_theta=theta, rope_scaling=fields))
        found, factor = frequencies(theta, 16, config.rope_scaling, "cpu")
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=0)
        assert abs(factor - amplitude) < 1e-6
        cos, sin = rotary_angles(torch.tensor([3]), config, torch.float64)
        angle = 3 * torch.tensor(wanted)
        for part, known in ((cos[0, 0, :8], angle.cos()), (sin[0, 0, 8:], angle.sin())):
            torch.testing.assert_close(part.float(), amplitude * known, rtol=1e-3, atol=1e-4)


def check_post_norm(place) -> None:
    """The hidden states of OLMo 2, computed by the equations of arXiv 2501.00656."""
    model = toy_model(architectures=["Olmo2ForCausalLM"])
    weights, tokens = dict(model.named_parameters()), torch.arange(9)
    size = lambda y: (y.square().mean(-1, True) + 1e-5).sqrt()
    normed = lambda y, name: weights[f"{name}.weight"] * y / size(y)
    turns = torch.arange(9)[:, None, None] * 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)

    def rotated(y):  # (N, heads, D), each half of D a part of a complex number
        z = torch.complex(y[..., :8], y[..., 8:]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((z.real, z.imag), -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in ("model.layers.0.", "model.layers.1."):
        q, k, v, o = (weights[f"{layer}self_attn.{n}_proj.weight"] for n in "qkvo")
        gate, up, down = (weights[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        query = normed(x @ q.T, f"{layer}self_attn.q_norm").view(9, 4, 16)
        key = normed(x @ k.T, f"{layer}self_attn.k_norm").view(9, 2, 16)
        seen = causal(0, rotated(query), rotated(key), (x @ v.T).view(9, 2, 16))
        x = x + normed(seen.flatten(1) @ o.T, f"{layer}post_attention_layernorm")
        y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        x = x + normed(y, f"{layer}post_feedforward_layernorm")
    found = model(tokens, tokens, causal, lambda hidden, head: hidden)
    torch.testing.assert_close(found, normed(x, "model.norm"), rtol=1e-5, atol=1e-5)


def check_refused(place) -> None:
    """A window within the context, and fields that contradict each other, are refused."""
    mistral = dict(architectures=["MistralForCausalLM"], max_position_embeddings=512)
    both = dict(rope_scaling=YARN, rope_parameters=YARN)
    for changes, allowed in (
        (mistral | dict(sliding_window=512), True),
        (mistral | dict(sliding_window=511), False),
        (mistral | dict(sliding_window=None), True),
        (mistral | dict(max_position_embeddings=4097), False),
        (both, True),
        (both | dict(rope_parameters=dict(rope_type="default")), False),
        (both | dict(rope_scaling=dict(rope_type="default")), False),
        (both | dict(rope_parameters=YARN | dict(factor=2.0)), False),
        (both | dict(original_max_position_embeddings=64), False),
        (dict(rope_scaling=YARN | dict(tomorrow=1)), False),
    ):
        try:
            ModelConfig.from_dict(CONFIG | changes)
            read = True
        except ValueError:
            read = False
        assert read == allowed, changes


def check_architectures(place) -> None:
    """A step of each is that of the formula, and what is sampled is what is scored."""
    for name, changes in {
        "llama3": dict(architectures=["LlamaForCausalLM"], rope_scaling=LLAMA3, rope_theta=1e3),
        "yarn": dict(rope_scaling=YARN | dict(original_max_position_embeddings=64)),
        "mistral": dict(architectures=["MistralForCausalLM"], sliding_window=1024),
        "olmo2": dict(architectures=["Olmo2ForCausalLM"]),
    }.items():
        model = write_thinker(place / name, **changes)
        run, initial = doubled(place, 0.05, model=str(model), out=str(place / f"{name}-run"))
        seen = watched(run, 0, initial)
        assert_by_hand(seen)
        assert seen.row["sampler_gap/max"] < 1e-9
