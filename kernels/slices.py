"""The head of a language model and the losses of its tokens, without logits.

hidden (N, C) @ weight (V, C).T would be N·V logits: 5 GB in fp32 for 8,192 tokens of Qwen3. Here
they exist one slice at a time: 17 MB for 1,024 tokens on a CPU, 134 MB for 8,192 on a GPU.

    for each chunk of n tokens:
        for each slice of S rows of the head:
            z = hidden[chunk] @ weight[slice].T          (n, S) fp32, never rounded, then freed
            maximum, r, s and exp(x) of z                (kernels/tiles.py)
        log p and entropy from the tiles                 (tile_math.merge)
        loss of the chunk's tokens, its gradients g, h   (the caller's token_loss, autograd)
        drop the tokens with g = h = 0
        for some slices at a time, of W rows:
            dz from exp(x), g and h                      (n', W) in the dtype of hidden
            grad_hidden[chunk] += dz @ weight[slices]    in fp32
            grad_weight[slices] += dz.T @ hidden[chunk]  in fp32, over all chunks

One GEMM over the head costs 2·N·V·C operations. `linear_objective` does the above: three GEMMs
for a token with a gradient, one for a token without, none for a token without a target. The loss
runs inside the chunk because exp(x) exists only then. A gradient that is known later needs the
logits a second time: `linear_entropy_logprob` does that (four GEMMs), for losses that are no sum
over tokens, such as a ratio of whole sequences.

In memory at one time: exp(x) of one chunk (n·V), a slice of z (n·S) or dz of some (n·W), and the
gradients: that of the weight in fp32, or in its own dtype where one chunk holds all tokens.
Roofline: 8,192 tokens of Qwen3-14B (C = 5120) are 12.7 TFLOP a GEMM, 16.1 ms at 790 TFLOP/s: 48.4
ms in one pass, where computing logits twice needs 64.5. Adding a chunk to grad_weight reads and
writes it (6.2 GB, 1.4 ms), so chunks have some thousand tokens, not some hundred.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dispatch import tiles_of
from .reference import IGNORE, add_matmul, matmul, wide, write_matmul
from .refuse import require_chunk
from .tile_math import SLICE, LossGrads, Tiles

CHUNK = {"cuda": 8192, "cpu": 1024}  # most tokens whose exponentials exist at one time
TOGETHER = {"cuda": 4}  # slices of dz that one product multiplies; elsewhere one


def chunk_of(hidden: Tensor, chunk: int | None) -> int:
    """Return the caller's chunk size, or the device's default."""
    return require_chunk(chunk, CHUNK.get(hidden.device.type, CHUNK["cpu"]))


def chunks(targets: Tensor, size: int) -> list[Tensor]:
    """Split the rows that have a target evenly into chunks of at most `size`."""
    rows = (targets != IGNORE).nonzero()[:, 0]
    count = -(-len(rows) // size)
    return list(rows.tensor_split(count)) if count else []


def chunk_tiles(
    x: Tensor, head: Tensor, y: Tensor, t: Tensor, keep: bool, softcap: float | None = None
) -> Tiles:
    """Compute the tiles of a chunk: x (n, C), head (V, C), y (n,), t = 1/T (n,).

    A head of another dtype is rounded to that of x, a slice at a time, here and below.

    keep: keep exponentials too, in fp16 where hidden states have 16 bits. bf16 has 8 bits of
    precision, fp16 11, and dz is rounded to bf16 again: bf16 would make errors 1.2 times as large.
    softcap: as in `linear_entropy_logprob`.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    dtype = (torch.float16 if half else x.dtype) if keep else None
    parts = [
        tiles_of(x).tile_statistics(_logits(x, part.t(), softcap), y, i * SLICE, t, dtype)
        for i, part in enumerate(head.split(SLICE))
    ]
    return Tiles.join(parts)


def from_exponentials(
    tiles: Tiles, offset: Tensor, rows: Tensor, y: Tensor, slopes: LossGrads, dtype: torch.dtype
):
    """Yield (first, dz (n', W)) of some slices at a time, from the kept exponentials."""

    def write(first: int, e: Tensor, out: Tensor) -> None:
        own = offset[:, first // SLICE]
        tiles_of(e).gradient_of_exponentials(e, own, rows, y, first, slopes, out)

    return _by_slices(tiles.exponentials, len(rows), dtype, write)


def from_logits(
    x: Tensor, head: Tensor, y: Tensor, slopes: LossGrads, softcap: float | None = None
):
    """Yield (first, dz (n, W)) of some slices at a time, from logits that are computed again."""

    def write(first: int, part: Tensor, out: Tensor) -> None:
        z = _logits(x, part, softcap)
        if softcap is None:
            tiles_of(x).gradient_of_logits(z, y, first, slopes, out)
        else:  # d softcap · tanh(a) / da / softcap = 1 − tanh(a)²
            dz = tiles_of(x).gradient_of_logits(z, y, first, slopes, torch.empty_like(z))
            out.copy_(dz.mul_(1 - (z / softcap).square()))

    return _by_slices(head.t().split(SLICE, dim=1), len(x), x.dtype, write)


def _logits(x: Tensor, part: Tensor, softcap: float | None) -> Tensor:
    """Return x (n, C) @ part (C, S) in fp32 or wider, below softcap if there is one."""
    z = matmul(x, part.to(x.dtype))
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _by_slices(slices: Sequence[Tensor], n: int, dtype: torch.dtype, write: Callable):
    """Let write(first, slice, out (n, S)) fill dz; yield (first, dz (n, W)) of some slices."""
    first, many = 0, TOGETHER.get(slices[0].device.type, 1)
    for i in range(0, len(slices), many):
        widths = [part.shape[1] for part in slices[i : i + many]]
        columns = sum(widths)  # rows begin at multiples of 16 bytes, which fast products need
        dz = slices[i].new_empty(n, -(-columns // 8) * 8, dtype=dtype)[:, :columns]
        place = first
        for part, out in zip(slices[i : i + many], dz.split(widths, dim=1)):
            write(place, part, out)
            place += part.shape[1]
        yield first, dz
        del dz  # before the next ones are made
        first = place


def sum_of(weight: Tensor, parts: int) -> Tensor:
    """Return zeros for the sum of `parts` gradients of weight: one alone is rounded only once."""
    return torch.zeros_like(weight, dtype=weight.dtype if parts <= 1 else wide(weight))


def products(gradients, x: Tensor, head: Tensor, want_hidden: bool, grad_weight: Tensor | None):
    """Add Σ dz.T @ x to grad_weight (`sum_of`); return Σ dz @ head (n', C) in fp32 or wider."""
    dx = torch.zeros_like(x, dtype=wide(x)) if want_hidden else None
    for first, dz in gradients:
        rows = slice(first, first + dz.shape[1])
        if want_hidden:
            add_matmul(dx, dz, head[rows].to(dz.dtype))
        if grad_weight is not None:
            add = add_matmul if grad_weight.dtype == wide(grad_weight) else write_matmul
            add(grad_weight[rows], dz.t(), x)
        del dz
    return dx
