"""Backend selection: RMT_KERNELS=auto | triton | reference.

auto       Triton where the tensors are on a GPU (CUDA or ROCm), PyTorch elsewhere and for fp64
triton     cuBLAS products, Triton tiles (kernels/tiles.py); on a CPU only with TRITON_INTERPRET=1
reference  PyTorch everywhere
"""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import tile_math

CHOICES = ("auto", "triton", "reference")


def choice(x: Tensor) -> str:
    """Return triton or reference: the backend for this tensor on its device."""
    chosen = os.environ.get("RMT_KERNELS", "auto")
    if chosen not in CHOICES:
        raise ValueError(f"RMT_KERNELS={chosen!r} is not one of {', '.join(CHOICES)}; unset it")
    if chosen == "auto":
        return "triton" if x.is_cuda and x.dtype != torch.float64 and _triton() else "reference"
    if chosen != "reference":
        _require_triton(x)
    return chosen


def tiles_of(x: Tensor) -> ModuleType:
    """Return the module whose tile_statistics, gradient_of_… and tile_topk compute for x."""
    if choice(x) == "reference":
        return tile_math
    from . import tiles  # imports triton

    return tiles


def _require_triton(x: Tensor) -> None:
    if not _triton():
        raise ValueError("RMT_KERNELS=triton, but triton is not installed; pip install triton")
    if x.dtype == torch.float64:
        raise ValueError("RMT_KERNELS=triton computes in fp32; use reference for float64")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"RMT_KERNELS=triton with tensors on {x.device}: needs a GPU, or TRITON_INTERPRET=1 "
            "in the environment from the start"
        )


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
