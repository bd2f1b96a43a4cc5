"""What stands in for a GPU where memory is planned without one.

Of FlexAttention and of the fused RMSNorm, which a CPU does not have, only the tensors that they
keep and make.
"""

import torch
from torch import Tensor, nn

from models.transformer import RMSNorm
from rmt.memory.estimate import MASK_BYTES


def fuse_norms(module: nn.Module) -> nn.Module:
    """The module, whose RMSNorms now keep what the fused one of a GPU keeps; before sharding."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                setattr(parent, name, FusedNorm(child.weight))
    return module


class FusedNorm(nn.Module):
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, self.weight)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def make_block_mask(tokens: int, device: str) -> Tensor:
    """What evaluating the mask of a row holds; to be dropped at once."""
    return torch.empty(MASK_BYTES, tokens, tokens, dtype=torch.uint8, device=device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D), as rmt.attention.attend_flex."""
    return _Flex.apply(q, k, v)


class _Flex(torch.autograd.Function):
    """Its output has the strides of q; saved are q, k, v, it, and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, lse = ctx.saved_tensors
        _products = torch.empty_like(lse)  # Σ grad · out of each row
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
