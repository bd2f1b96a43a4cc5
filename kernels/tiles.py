"""The tile arithmetic of kernels/tile_math.py as three Triton kernels, for logits in memory.

`statistics`  reads a tile of one row of logits once; it stores three numbers and the target's
              logit, and optionally exp(x), from which the gradient is computed.
`gradient`    reads that tile (logits or exponentials) once and stores its gradient once.
`topk`        reads a tile of logits once and stores its k largest with their columns.

**A kernel is a Python function that runs once per program.** Here each program computes one row and
one tile of at most TILE columns: program (3, 5) of the launch grid has row 3 and columns 5·TILE to
6·TILE. `tl.load` loads the tile into registers, spread over the threads of the program. After that
a line such as `tl.exp(x)` costs no memory traffic, where eager PyTorch reads and writes (N, V)
numbers for each operator.

**The online softmax.** Softmax needs the maximum of the row before its sum, and the row does not
fit into registers. So each program uses the maximum m of its own tile and stores it with its sums:
(m, r, s). Two tiles a and b, with α = exp(m_a − m) and β = exp(m_b − m), one of which is 1, become

    m = max(m_a, m_b)
    r = α r_a + β r_b + min(α, β)
    s = α (s_a + (m_a − m)(1 + r_a)) + β (s_b + (m_b − m)(1 + r_b))

`tile_math.merge` does that for all tiles of a row at once, on (n, V/TILE) numbers. Programs need no
order, lock or atomic: every run gives the same bits.

**The shift keeps entropy exact.** s is summed over x = z − m, not over z: log Σ exp(z) − Σ p z
would subtract two numbers of the size of the logits to get an entropy of about 1. r leaves out the
likeliest token, whose term is 1, so that log1p(r) stays exact when r is smaller than 1e-7.

**No logit is rounded.** All arithmetic between load and store is fp32. Logits are the fp32 sums of
a matrix product, or in the dtype that the caller passes. exp(x) is rounded, to fp16, only where it
is stored for a gradient, after r and s were summed; the gradient is rounded to bf16 anyway.

Roofline (memory): T tokens cost T·V·b bytes once for statistics, and twice for a gradient (read and
write). At T = 8192, V = 151,936 in bf16 and 4.3 TB/s: 0.58 ms and 1.16 ms, where eager PyTorch
moves 55 GB (12.7 ms) and 80 GB (18.5 ms). Statistics add 12 bytes per 4096 columns.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tile_math
from .reference import IGNORE
from .tile_math import NEGLIGIBLE, SCALE, SLICE, LossGrads, Tiles

TILE = SLICE  # columns of one program: a slice is one tile
LOG2_E = math.log2(math.e)
WARPS = 8  # of 32 threads: 16 columns to a thread
HIGHEST = torch.finfo(torch.float32).max
MOST = 64  # largest k of `topk`, whose time grows with k


@triton.jit
def statistics(
    LOGITS, TARGETS, INVERSE_T,  # (n, S), (n,), (n,)
    MAXIMUM, REST, WEIGHTED, AT_TARGET, EXPONENTIALS,  # (n, t) three times, (n,), (n, S) or None
    row_stride, column_stride, columns, first,
    IGNORE: tl.constexpr, NEGLIGIBLE: tl.constexpr, SCALE: tl.constexpr, LOG2_E: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row · row_stride passes 2³¹ at 14,135 rows
    tile = tl.program_id(1)
    target = tl.load(TARGETS + row)
    if target == IGNORE:
        return  # logits of a token without a target are not read

    column = tile * TILE + tl.arange(0, TILE)
    there = column < columns
    place = LOGITS + row * row_stride + column.to(tl.int64) * column_stride
    # Columns beyond the last are −inf, not 0: never the maximum, never counted.
    z = tl.load(place, mask=there, other=float("-inf")).to(tl.float32)

    top, likeliest = tl.max(z, axis=0, return_indices=True)  # one of the likeliest
    base = tl.where(top == float("-inf"), 0.0, top)  # a tile of −inf only
    x = (z - base) * (tl.load(INVERSE_T + row) * LOG2_E)  # exp(x) = exp2(x log2 e), which is faster
    x = tl.maximum(x, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)  # 0 · −inf is nan
    e = tl.exp2(x)
    rest = tl.sum(tl.where(tl.arange(0, TILE) == likeliest, 0.0, e), axis=0)

    out = row * tl.num_programs(1) + tile
    tl.store(MAXIMUM + out, top)
    tl.store(REST + out, rest)
    tl.store(WEIGHTED + out, tl.sum(e * x, axis=0) / LOG2_E)
    own = target - first
    if own // TILE == tile and own < columns and own >= 0:
        mine = tl.load(LOGITS + row * row_stride + own * column_stride).to(tl.float32)
        tl.store(AT_TARGET + row, mine)
    if EXPONENTIALS is not None:
        tl.store(EXPONENTIALS + row * columns + column, e * SCALE, mask=there)


@triton.jit(do_not_specialize_on_alignment=["OFFSET"])  # a column of a tensor
def gradient(
    VALUES, OUT,  # (n, S), (n', S)
    ROWS, TARGETS, OFFSET,  # (n',), (n',), (n,); ROWS and OFFSET are None with logits
    MAXIMUM, LOG_SUM, ENTROPY, INVERSE_T, G, H, AT_TARGET,  # (n',): tile_math.LossGrads
    row_stride, column_stride, out_stride, columns, first, offset_stride,
    IGNORE: tl.constexpr, NEGLIGIBLE: tl.constexpr, SCALE: tl.constexpr, LOG2_E: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    out_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < columns
    target = tl.load(TARGETS + out_row)
    place = OUT + out_row * out_stride + column
    if target == IGNORE:
        tl.store(place, tl.zeros([TILE], tl.float32), mask=there)
        return

    row = out_row
    if ROWS is not None:
        row = tl.load(ROWS + out_row)  # only some rows have a gradient
    log_sum = tl.load(LOG_SUM + out_row)
    inverse_t, h = tl.load(INVERSE_T + out_row), tl.load(H + out_row)
    source = VALUES + row * row_stride + column.to(tl.int64) * column_stride
    if OFFSET is not None:  # exponentials, relative to the maximum of their tile
        offset = tl.load(OFFSET + row * offset_stride) - log_sum
        e = tl.load(source, mask=there, other=0.0).to(tl.float32) / SCALE
        p = e * tl.exp(offset)
        log_p = tl.zeros([TILE], tl.float32) + offset
        if h != 0.0:  # a logarithm costs as much as all the rest
            log_p += tl.log(tl.where(e > 0.0, e, 1.0))  # where e is 0, p is too
    else:
        z = tl.load(source, mask=there, other=float("-inf")).to(tl.float32)
        log_p = (z - tl.load(MAXIMUM + out_row)) * inverse_t - log_sum
        log_p = tl.maximum(log_p, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp2(log_p * LOG2_E)
    tilt = h * (log_p + tl.load(ENTROPY + out_row))
    dz = -p * (tl.load(G + out_row) + tilt) * inverse_t
    dz = tl.where(column + first == target, tl.load(AT_TARGET + out_row), dz)
    tl.store(place, dz, mask=there)


@triton.jit
def topk(
    LOGITS, VALUES, COLUMNS,  # (n, S), (n, K), (n, K)
    row_stride, column_stride, columns,
    HIGHEST: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    place = LOGITS + row * row_stride + column.to(tl.int64) * column_stride
    there = column < columns
    z = tl.load(place, mask=there, other=0.0).to(tl.float32)
    # nan is first, as in torch.topk. ±inf are ±HIGHEST: only what is not there or taken is lower.
    rank = tl.where(z == z, tl.clamp(z, -HIGHEST, HIGHEST), float("inf"))
    rank = tl.where(there, rank, float("-inf"))
    for i in range(K):
        _, best = tl.max(rank, axis=0, return_indices=True)
        value = tl.load(LOGITS + row * row_stride + best.to(tl.int64) * column_stride)
        tl.store(VALUES + row * K + i, value.to(tl.float32))
        tl.store(COLUMNS + row * K + i, best)
        rank = tl.where(column == best, float("-inf"), rank)


# From here on PyTorch: functions with the names and shapes of those in kernels/tile_math.py.


def tile_statistics(
    logits: Tensor,
    targets: Tensor,
    first: int,
    inverse_t: Tensor,
    keep: torch.dtype | None,
) -> Tiles:
    n, columns = logits.shape
    block = block_of(columns)
    tiles = triton.cdiv(columns, block)
    # Not one tensor for three: Triton compiles a kernel anew for arguments not aligned to 16 bytes.
    sums = [logits.new_empty(n, tiles, dtype=torch.float32) for _ in range(3)]
    at_target = logits.new_zeros(n, dtype=torch.float32)
    kept = logits.new_empty(n, columns, dtype=stored(keep)) if keep else None
    launch(
        statistics, (n, tiles),
        logits, targets, inverse_t, *sums, at_target, kept, *logits.stride(), columns, first,
        IGNORE, NEGLIGIBLE, SCALE, LOG2_E, block, num_warps=WARPS,
    )  # fmt: skip
    return Tiles(*sums, at_target, [kept.to(keep)] if keep else [])


def gradient_of_logits(
    logits: Tensor, targets: Tensor, first: int, slopes: LossGrads, out: Tensor
) -> Tensor:
    return _gradient(logits, out, None, None, targets, first, slopes)


def gradient_of_exponentials(
    exponentials: Tensor,
    offset: Tensor,
    rows: Tensor,
    targets: Tensor,
    first: int,
    slopes: LossGrads,
    out: Tensor,
) -> Tensor:
    return _gradient(exponentials, out, rows, offset, targets, first, slopes)


def _gradient(values, out, rows, offset, targets, first, slopes):
    n, columns = out.shape
    block = block_of(columns)
    given, out = out, out if stored(out.dtype) == out.dtype else out.to(stored(out.dtype))
    launch(
        gradient, (n, triton.cdiv(columns, block)),
        values, out, rows, targets, offset, *slopes,
        *values.stride(), out.stride(0), columns, first, 0 if offset is None else offset.stride(0),
        IGNORE, NEGLIGIBLE, SCALE, LOG2_E, block, num_warps=WARPS,
    )  # fmt: skip
    return given if given is out else given.copy_(out)


def tile_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, columns = logits.shape
    if not 0 < k <= min(columns, MOST) or columns > TILE:
        return tile_math.tile_topk(logits.float(), k)
    values = logits.new_empty(n, k, dtype=torch.float32)
    found = logits.new_empty(n, k, dtype=torch.int64)
    launch(
        topk, (n,), logits, values, found, *logits.stride(), columns,
        HIGHEST, k, block_of(columns), num_warps=WARPS,
    )  # fmt: skip
    return values, found


def launch(kernel, grid: tuple[int, ...], x: Tensor, *arguments, **constants) -> None:
    """Launch a kernel over a grid, with x and the other arguments, on the device of x.

    All launches go through here: Triton uses the current device, which may not be that of x.
    """
    if 0 in grid:
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](x, *arguments, **constants)


def block_of(columns: int) -> int:
    """Return the columns of a program: a power of two, as Triton requires of all shapes."""
    return min(TILE, max(16, triton.next_power_of_2(columns)))


def stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a kernel stores: Triton's interpreter truncates bf16 and does not round."""
    return torch.float32 if triton.knobs.runtime.interpret else dtype
