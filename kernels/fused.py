"""The head's matrix product and the tile arithmetic of kernels/tiles.py in one Triton kernel.

Each program of `linear_statistics` computes a block of logits z = x @ head.T, BLOCK_N tokens by
WIDTH columns. It stores for each row of the block, a tile with x_v = (z_v − m)/T ≤ 0 as in
kernels/tile_math.py,

    m = max_v z_v      r = Σ exp(x_v), without the likeliest      s = Σ exp(x_v) x_v

and the target's logit; optionally also SCALE · exp(x), from which the gradient is computed. The
logits exist in registers only and are never stored.

**A matrix product in Triton.** Each program loops over the hidden dimension C in steps of BLOCK_K:
load a block of x (BLOCK_N, BLOCK_K) and a block of the head (BLOCK_K, WIDTH), multiply, add to the
sums z. `tl.dot` compiles to the GPU's matrix instruction (wgmma, tcgen05, mma or mfma), and the
compiler prefetches the loads of the next `stages` − 1 steps into shared memory. After the loop
comes the epilogue: here `statistics` of kernels/tiles.py, for several rows.

**Order of programs.** A GPU runs some hundred programs at a time. If these had the same tokens,
they would all read different parts of the head, and the next block of tokens would read each part
again. So programs are numbered in groups of GROUP blocks of tokens: neighbours have the same
columns and other tokens, and share their reads of the head through the L2 cache.

**Savings.** Without fusion (kernels/slices.py) cuBLAS writes z in fp32 and kernels/tiles.py reads
it: for T = 8192 and V = 151,936 that is 2 · 5.0 GB, 2.3 ms at 4.3 TB/s where the L2 cache does not
hold them, and 2 · 38 launches a chunk instead of one. Fused, only exp(x) in fp16 (2.5 GB, 0.6 ms,
overlapped with the arithmetic of other blocks) and 12 bytes per WIDTH are written.

Roofline (compute): 2·T·V·C = 12.7 TFLOP with C = 5120, 16.1 ms at 790 TFLOP/s. A block of 128 · 256
reads 768 bytes for 65,536 operations: at that rate 9.3 TB/s from the L2 cache, the next limit after
the arithmetic. Fusion pays if Triton's matrix product loses less than 2.3 ms to that of cuBLAS.
On an H200 it gained 3 % or nothing (kernels/README.md), so it is not the default: RMT_KERNELS=fused
selects it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_math import NEGLIGIBLE, SCALE, SLICE, Tiles
from .tiles import launch, stored

GROUP = 16  # blocks of tokens that share the columns they read
ALIGN = 16  # where 16 divides a stride, Triton may store 16 bytes at once


class Blocks(NamedTuple):
    """Block shape, warps and pipeline stages of a program."""

    tokens: int  # BLOCK_N
    width: int  # columns of the vocabulary; divides SLICE
    depth: int  # BLOCK_K: hidden dimensions of one step
    warps: int  # of 32 threads; their registers hold the tokens · width sums
    stages: int  # steps whose loads are in flight, in shared memory


def blocks(architecture: str) -> Blocks:
    """Return the largest blocks that spill no register and fit shared memory (`make aot`)."""
    if architecture == "interpreter":  # its time grows with programs and steps
        return Blocks(32, 2048, 32, warps=4, stages=1)
    if architecture == "sm_90":  # 128 · 256 sums are 128 registers of each thread's 255
        return Blocks(128, 256, 64, warps=8, stages=4)
    if architecture.startswith("gfx"):
        return Blocks(128, 128, 64, warps=8, stages=2)
    return Blocks(128, 128, 64, warps=8, stages=4)


def architecture_of(x: Tensor) -> str:
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(x.device).gcnArchName  # gfx942:…
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


@triton.jit
def _product(
    X, HEAD, row, column,  # pointers, (BLOCK_N,), (WIDTH,)
    hidden, x_row_stride, x_column_stride, head_row_stride, head_column_stride,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the logits (BLOCK_N, WIDTH) in fp32."""
    k = tl.arange(0, BLOCK_K)
    # 64 bits before the product: V · C passes 2³¹ with 419,431 rows of 5120.
    rows = X + row.to(tl.int64)[:, None] * x_row_stride
    columns = HEAD + column.to(tl.int64)[None, :] * head_row_stride
    a_place = rows + k[None, :] * x_column_stride  # (BLOCK_N, BLOCK_K)
    b_place = columns + k[:, None] * head_column_stride  # (BLOCK_K, WIDTH)
    z = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        left = hidden - start
        a = tl.load(a_place, mask=k[None, :] < left, other=0.0)
        b = tl.load(b_place, mask=k[:, None] < left, other=0.0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bf16 numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z)  # bf16 products are exact, their sums fp32
        a_place += BLOCK_K * x_column_stride
        b_place += BLOCK_K * head_column_stride
    return z


@triton.jit(do_not_specialize=["n"])  # chunk sizes differ by one token: do not compile again
def linear_statistics(
    X, HEAD, TARGETS, INVERSE_T,  # (n, C), (V, C), (n,), (n,)
    MAXIMUM, REST, WEIGHTED, AT_TARGET, EXPONENTIALS,  # (n, t) three times, (n,), (n, ≥ V) or None
    n, columns, hidden,  # n, V, C
    x_row_stride, x_column_stride, head_row_stride, head_column_stride, kept_stride,
    NEGLIGIBLE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, WIDTH)
    group = tl.program_id(0) // (GROUP * tiles)
    within = tl.program_id(0) % (GROUP * tiles)
    size = tl.minimum(tl.cdiv(n, BLOCK_N) - group * GROUP, GROUP)  # the last group may be smaller
    tile = within // size
    row = (group * GROUP + within % size) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    # Beyond the last token and column the last is read again and ignored: no mask in the loop.
    z = _product(
        X, HEAD, tl.minimum(row, n - 1), tl.minimum(column, columns - 1),
        hidden, x_row_stride, x_column_stride, head_row_stride, head_column_stride,
        BLOCK_N, WIDTH, BLOCK_K, WIDEN,
    )  # fmt: skip

    there = row < n
    row = row.to(tl.int64)
    # Compare within the tile: one number a row; a register for each column would spill.
    within_tile = tl.arange(0, WIDTH)[None, :]
    # Columns beyond the last are −inf, not 0: never the maximum, never counted.
    z = tl.where(within_tile < columns - tile * WIDTH, z, float("-inf"))
    own = tl.load(TARGETS + row, mask=there, other=-1) - tile * WIDTH
    at_target = tl.sum(tl.where(within_tile == own[:, None], z, 0.0), axis=1)
    # At most one program per token has the target.
    tl.store(AT_TARGET + row, at_target, mask=there & (own >= 0) & (own < WIDTH))

    top = tl.max(z, axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)  # a tile of −inf only
    inverse_t = tl.load(INVERSE_T + row, mask=there, other=1.0)
    x = (z - base[:, None]) * inverse_t[:, None]
    x = tl.where(x < NEGLIGIBLE, NEGLIGIBLE, x)  # 0 · −inf is nan
    e = tl.exp(x)
    likeliest = x == 0.0
    ties = tl.sum(likeliest.to(tl.float32), axis=1)
    rest = tl.sum(tl.where(likeliest, 0.0, e), axis=1) + (ties - 1.0)

    out = row * tiles + tile
    tl.store(MAXIMUM + out, top, mask=there)
    tl.store(REST + out, rest, mask=there)
    tl.store(WEIGHTED + out, tl.sum(e * x, axis=1), mask=there)
    if EXPONENTIALS is not None:  # store up to the stride: 16 bytes at a time
        place = EXPONENTIALS + row[:, None] * kept_stride + column[None, :]
        tl.store(place, e * SCALE, mask=there[:, None] & (column < kept_stride)[None, :])


def linear_tile_statistics(
    x: Tensor, head: Tensor, targets: Tensor, inverse_t: Tensor, keep: torch.dtype | None
) -> Tiles:
    """Return `tile_statistics` of x (n, C) @ head (V, C).T, the whole vocabulary in tiles.

    For bf16 and fp16 only: fp32 has no matrix instruction and gains nothing here. targets (n,)
    int64, inverse_t 1/T (n,) fp32. keep: dtype of SCALE · exp(x), returned as views of SLICE
    columns of one (n, V) buffer; None returns none.
    """
    (n, hidden), columns = x.shape, len(head)
    b = blocks(architecture_of(x))
    tiles = triton.cdiv(columns, b.width)
    sums = x.new_empty(3, n, tiles, dtype=torch.float32)
    at_target = x.new_zeros(n, dtype=torch.float32)
    stride = triton.cdiv(columns, ALIGN) * ALIGN
    kept = x.new_empty(n, stride, dtype=stored(keep)) if keep else None
    launch(
        linear_statistics, (triton.cdiv(n, b.tokens) * tiles,),
        x, head, targets, inverse_t, *sums, at_target, kept,
        n, columns, hidden, *x.stride(), *head.stride(), stride,
        NEGLIGIBLE, SCALE, GROUP, b.tokens, b.width, b.depth, triton.knobs.runtime.interpret,
        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    parts = kept[:, :columns].to(keep).split(SLICE, dim=1) if keep else ()
    return Tiles(*sums, at_target, list(parts), b.width)
