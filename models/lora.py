"""LoRA (Hu et al. 2021, arXiv 2106.09685): train two thin matrices beside each frozen one.

    y = W x + 2 B A x        W (out, in) frozen, A (R, in) and B (out, R) trained

for all linear layers of the blocks, not for embedding and head. A starts uniform as in peft, B at
0, so that training starts at the frozen model. The 2 is peft's lora_alpha / r: lora_alpha is 2 R.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.transformer import Block, Transformer
from models.weights import ADAPTERS, own_rows

SCALE = 2.0


class LoRALinear(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, linear: nn.Linear, rank: int, dtype: torch.dtype):
        super().__init__()
        # False: the frozen layer alone. Not of the class: torch.compile would compile all again
        # when an instance gets its own.
        self.adapted = True
        self.weight, self.bias = linear.weight, linear.bias
        size_out, size_in = self.weight.shape
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, size_in, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(size_out, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (N, out)
        if not self.adapted:
            return y
        # Masters in fp32 are cast here, unless FSDP has done so.
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        # As a batch of one: --recompute selective keeps mm and addmm, y but not the sum as well.
        return torch.baddbmm(y[None], F.linear(x, a)[None], b.t()[None], alpha=SCALE)[0]


def adapt(block: Block, rank: int, dtype: torch.dtype = torch.float32) -> Block:
    """Give each linear layer of a block an adapter, whose values are not set; none for rank 0.

    ValueError when the rank exceeds that of a layer.
    """
    parts = (block.self_attn, block.mlp)
    most = min(min(p.shape) for part in parts for p in part.parameters() if p.dim() == 2)
    if rank > most:
        raise ValueError(
            f"--lora-rank {rank} exceeds {most}, the smallest side of this model's matrices; take "
            f"{most} or less"
        )
    for part in parts:
        for name, child in list(part.named_children()):
            if rank and isinstance(child, nn.Linear):
                setattr(part, name, LoRALinear(child, rank, dtype))
    return block


def add_adapters(model: Transformer, rank: int, dtype: torch.dtype = torch.float32) -> None:
    """Freeze a model and add adapters, whose values are not set; none for rank 0.

    Call it before sharding. ValueError when the rank exceeds that of a layer.
    """
    if rank:
        model.requires_grad_(False)
        for block in model.model.layers:
            adapt(block, rank, dtype)


@torch.no_grad()
def init_adapters(model: Transformer, seed: int) -> None:
    """Set A uniform in ±1/√in, as peft does, and B to 0; the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith(ADAPTERS):
            continue
        first, local = own_rows(parameter)
        local.zero_()
        if name.endswith(ADAPTERS[0]):
            whole = torch.rand(parameter.shape, generator=generator)  # (R, in)
            local.copy_((2 * whole - 1)[first : first + len(local)] / math.sqrt(whole.shape[1]))


def rank_of(model: Transformer) -> int:
    """Return R of a model with adapters, else 0."""
    layer = model.model.layers[0].mlp.up_proj
    return len(layer.lora_A) if isinstance(layer, LoRALinear) else 0


def merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return W + 2 B A, in the dtype of the adapter."""
    return torch.addmm(weight.to(a.dtype), b, a, alpha=SCALE)


def without_adapters(model: Transformer) -> Callable:
    """Return a function that calls the model without its adapters, to score by the frozen one."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]

    def call(*inputs):
        for layer in layers:
            layer.adapted = False
        try:
            return model(*inputs)
        finally:
            for layer in layers:
                layer.adapted = True

    return call
