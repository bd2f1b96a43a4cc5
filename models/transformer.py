"""One decoder for Qwen3, Qwen2, Llama, Mistral and OLMo 2, with Hugging Face's parameter names.

Shapes: N packed tokens, C hidden, H heads, K key/value heads, D head dim, V vocabulary.

There is no batch dimension and no mask in this file. A row of N tokens may hold many documents and
many branches of each. The function `attend` decides which token sees which:

    attend(layer, query (N, H, D), key (N, K, D), value (N, K, D)) -> (N, H, D)

The forest (training, scoring, prefill) or the key/value cache (decoding) provides it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import RMSNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.config import ModelConfig
from models.rope import frequencies

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Readout = Callable[[Tensor, Tensor], Any]


def rotary_angles(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple:
    """Return cos and signed sin of the rotary embedding (RoFormer), (N, 1, D), from fp32."""
    rope = config.rope_theta, config.head_dim, config.rope_scaling
    frequency, amplitude = frequencies(*rope, positions.device)  # (D/2,)
    angle = positions[:, None].float() * frequency  # (N, D/2)
    cos, sin = amplitude * angle.cos(), amplitude * angle.sin()  # (N, D/2)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (N, D)
    return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in Hugging Face's half-split layout. x is (N, heads, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)  # roll swaps the halves


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = size
        self.q_proj = nn.Linear(hidden, heads * size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            q_heads, k_heads = (heads, kv_heads) if config.qk_norm == "all" else (1, 1)
            self.q_norm = RMSNorm(q_heads * size, config.rms_norm_eps)
            self.k_norm = RMSNorm(k_heads * size, config.rms_norm_eps)

    def project_qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (N, H, D), key and value (N, K, D); query and key are rotated."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (N, H·D), twice (N, K·D)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in (q, k, v))  # (N, H or K, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: `pre_attention`, then `attend`, which is passed in, then `post_attention`."""

    recompute, compiled = "none", False  # set by Transformer.configure_training

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.post_norm = config.post_norm
        self.input_layernorm = nn.Identity() if config.post_norm else norm()
        self.post_attention_layernorm = norm()
        if config.post_norm:
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, rotary: tuple, attend: Attend, layer: int) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            # Inside the block, so that FSDP's all-gather of this block is outside of it.
            return checkpoint(self._forward, x, rotary, attend, layer, use_reentrant=False)
        return self._forward(x, rotary, attend, layer)

    def _forward(self, x: Tensor, rotary: tuple, attend: Attend, layer: int) -> Tensor:
        q, k, v = self._run(Block.pre_attention, x, *rotary)
        return self._run(Block.post_attention, x, attend(layer, q, k, v))

    def pre_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project_qkv(self.input_layernorm(x), cos, sin)

    def post_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.post_attention_layernorm(self.self_attn.o_proj(attended.flatten(1)))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn.o_proj(attended.flatten(1))  # (N, C)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _run(self, part: Callable, *tensors: Tensor):
        """Run `pre_attention` or `post_attention`, compiled or checkpointed if so configured."""
        if self.compiled:
            return _compiled(part)(self, *tensors)  # the compiler chooses what to recompute
        if self.recompute == "selective" and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, PRODUCTS)
            return checkpoint(part, self, *tensors, use_reentrant=False, context_fn=keep)
        return part(self, *tensors)


# "selective" keeps these. Attention is between the parts, so its output is always kept.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


@cache
def _compiled(part: Callable) -> Callable:
    """Compile a part once for all layers and all lengths of a row."""
    return torch.compile(part, dynamic=True)


class Backbone(nn.Module):
    """All but the head, as a class so that names are `model.layers.0. ...` as in HF."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """Return the head (V, C). Use it inside forward only: elsewhere FSDP holds a shard."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, readout: Readout) -> Any:
        """Run N packed tokens and return readout(hidden (N, C), head (V, C)).

        The readout runs inside this module so that FSDP passes it the whole head, and so that
        logits need not leave it. All ranks, when the model is sharded.
        """
        x = self.model.embed_tokens(tokens)  # (N, C)
        rotary = rotary_angles(positions, self.config, x.dtype)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rotary, attend, index)
        return readout(self.model.norm(x), self.head)

    def configure_training(self, recompute: str = "none", compiled: bool = False) -> None:
        """Set activation checkpointing and compilation.

        recompute: activations that the backward pass computes again instead of keeping them (Chen
        et al. 2016, arXiv 1604.06174): "none"; "selective", all but matrix products and attention;
        "full", a whole layer. Results are the same bits.
        compiled: all but attention runs through torch.compile, which rounds differently and chooses
        by itself what to recompute.
        """
        for layer in self.model.layers:
            layer.recompute, layer.compiled = recompute, compiled

    def reset_parameters(self, seed: int) -> None:
        """Initialise a model that is trained from scratch: N(0, initializer_range²)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                std = self.config.initializer_range
                nn.init.normal_(parameter, std=std, generator=generator)
