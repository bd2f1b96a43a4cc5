"""Attention of branches to trunks and to their own caches: two Triton kernels, three launches.

`parts`  each program attends from a tile of branches to one piece of the keys of one key/value
         head. Launched over the tiles of the trunks, then over the own caches (a branch is a tile).
`merge`  each program merges the softmax over all pieces, for one head of one branch.

**Decoding is limited by reading keys and values.** One query needs two operations for each number
read, where a GPU has time for some hundred. So all queries that may see a key are rows of one
matrix product: the `rep` heads that share keys, of the branches that share a trunk. Padding rows
(rep to a power of two, the tile to 16 rows, the minimum of `tl.dot`) cost arithmetic only, which is
not the limit.

**Pieces.** Few branches are few tiles and would leave most of a GPU idle. So the keys of a tile are
cut into pieces until there are `programs_of` programs ("flash decoding"). Each piece stores its
weighted values o and the log-sum-exp l of its scores in fp32. From all pieces of a query, with
M = max l,

    out = Σ exp(l_i − M) o_i / Σ exp(l_i − M)

A piece without a key has l = −inf and weight 0.

**No host synchronisation.** The number of pieces depends on shapes only, their contents on start,
fork and length in the GPU's memory: a step can be captured in a CUDA graph and replayed while its
branches grow. (kernels/tiles.py explains Triton and the online softmax.)

Roofline (memory): a token of a cache is 2·K·D·b bytes, 4 KB a layer of Qwen3-14B in bf16 (K = 8,
rep = 5, D = 128). 64 branches of 1000 own tokens on a trunk of 8000 are 8 tiles: 0.26 GB of own
tokens, and 0.03 GB of the trunk where the L2 cache serves the other 7 tiles: 0.07 ms at 4.3 TB/s.
Trunks copied to each branch would be 2.4 GB, 0.55 ms. Measured on an H200 in sampling only
(docs/speed.md): 256 branches of 32 tokens on average on 32 trunks of 256, Qwen3-4B: 37 µs a layer
(49, if 63 steps were counted where there were 48), where reading 67 MB takes 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branch_tiles import Seen
from .refuse import require_head_dim
from .tiles import launch, stored

LEAST_TOKENS = 128  # fewest tokens of a piece: shorter ones are not worth a program
MOST_PIECES = 32  # of one set of keys: `merge` holds the pieces of both sets in registers


def constants(dtype: torch.dtype, rep: int, size: int, width: int) -> tuple[dict, dict]:
    """Return constants and launch options of `parts` that spill no register (`make aot`).

    rep: query heads per key/value head; size: head dim D; width: branches of a tile.
    """
    span = triton.next_power_of_2(rep)
    rows, d = (max(16, triton.next_power_of_2(x)) for x in (width * span, size))
    block, launch = max(16, min(64, 4096 // d)), dict(num_warps=4, num_stages=3)
    if dtype == torch.float32:  # no matrix instruction: registers hold all factors
        block, launch = 16, dict(num_warps=8 if rows > 16 else 4, num_stages=2)
    interpreted = triton.knobs.runtime.interpret  # its time grows with programs and steps
    return dict(
        WIDTH=width, REP=rep, SPAN=span, ROWS=rows, D=size, D_PADDED=d, SCALE=size**-0.5,
        BLOCK=64 if interpreted else block, EXACT=dtype == torch.float32, WIDEN=interpreted,
    ), launch  # fmt: skip


def constants_of_merge(pieces: int, size: int) -> tuple[dict, dict]:
    padded, d = triton.next_power_of_2(pieces), triton.next_power_of_2(size)
    known = dict(PIECES=pieces, PIECES_PADDED=padded, D=size, D_PADDED=d)
    return known, dict(num_warps=4 if pieces > 8 else 1)


def programs_of(x: Tensor) -> int:
    """Return how many programs keep the device of x busy: two per multiprocessor."""
    if not x.is_cuda:
        return 1
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count


@triton.jit(do_not_specialize=["tokens", "branches", "first_piece", "pieces"])
def parts(
    Q, KEYS, VALUES,  # (n, H, D), (T, K, D) or (slots, capacity, K, D) twice
    TABLE, START, LIMIT,  # (tiles, WIDTH) or None: tile i is slot i; (n,) or None: 0; (n,)
    OUT, LSE,  # (n, H, pieces, D), (n, H, pieces)
    q_slot_stride, q_head_stride, k_slot_stride, k_token_stride, k_head_stride,
    v_slot_stride, v_token_stride, v_head_stride, tokens, branches, first_piece, pieces,
    WIDTH: tl.constexpr, REP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # 64 bits: a cache passes 2³¹ numbers at 2,097,152 tokens of 8 · 128, of all slots together.
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)  # SPAN heads of each branch, the first REP real
    member = row // SPAN
    there = member < WIDTH
    slot = tile * WIDTH + member
    if TABLE is not None:
        slot = tl.load(TABLE + slot, mask=there, other=-1).to(tl.int64)
    there = there & (slot >= 0) & (slot < branches) & (row % SPAN < REP)
    head = kv_head * REP + row % SPAN
    limit = tl.load(LIMIT + slot, mask=there, other=0)
    begin = tile * 0  # in 64 bits
    fits = (limit >= 0) & (limit <= tokens)
    if START is not None:  # the same for all branches of a tile
        start = tl.load(START + slot, mask=there & (limit != 0), other=0)
        begin = tl.max(start, axis=0)
        there_is = (begin >= 0) & (start == begin) & (limit <= tokens - begin)
        fits = fits & ((limit == 0) | there_is)
    # Nothing beyond the cache is read; a branch whose limit is beyond it gets nan.
    limit = tl.where(fits, limit, 0).to(tl.int32)
    longest = tl.max(limit, axis=0)

    d = tl.arange(0, D_PADDED)
    q_place = Q + slot * q_slot_stride + head * q_head_stride
    q = tl.load(q_place[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    keys = KEYS + tile * k_slot_stride + kv_head * k_head_stride
    values = VALUES + tile * v_slot_stride + kv_head * v_head_stride
    if WIDEN:  # the interpreter multiplies the bit patterns of bf16 numbers
        q = q.to(tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, D_PADDED), tl.float32)
    # Pieces are whole steps: no two read the same tokens, and only the last step is masked.
    size = tl.cdiv(tl.cdiv(longest, tl.num_programs(2)), BLOCK) * BLOCK
    first = tl.program_id(2) * size
    for step in range(first, tl.minimum(first + size, longest), BLOCK):
        token = step + tl.arange(0, BLOCK)
        place = begin + token
        # Memory beyond the limit is not read: it may hold nan, and 0 · nan is nan.
        read = token < longest
        k = tl.load(
            keys + place[None, :] * k_token_stride + d[:, None],
            mask=read[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            values + place[:, None] * v_token_stride + d[None, :],
            mask=read[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.dot(q, k, input_precision="ieee" if EXACT else None) * SCALE  # (ROWS, BLOCK)
        z = tl.where(token[None, :] < limit[:, None], z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a branch that sees none
        p = tl.exp(z - base[:, None])
        factor = tl.exp(top - base)
        total = total * factor + tl.sum(p, axis=1)
        out = out * factor[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee" if EXACT else None)
        top = new_top

    seen = tl.where(total > 0.0, total, 1.0)
    base = tl.where(total > 0.0, top, float("-inf"))
    part = (slot * tl.num_programs(1) * REP + head) * pieces + first_piece + tl.program_id(2)
    tl.store(LSE + part, base + tl.log(seen), mask=there)
    place = OUT + part[:, None] * D + d[None, :]
    out = tl.where(fits[:, None], out / seen[:, None], float("nan"))
    tl.store(place, out, mask=there[:, None] & (d < D)[None, :])


@triton.jit
def merge(
    OUT, LSE, RESULT,  # (n, H, PIECES, D), (n, H, PIECES), (n, H, D)
    PIECES: tl.constexpr, PIECES_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    piece, d = tl.arange(0, PIECES_PADDED), tl.arange(0, D_PADDED)
    lse = tl.load(LSE + row * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weight = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))  # (PIECES_PADDED,)
    total = tl.sum(weight, axis=0)
    place = OUT + (row * PIECES + piece)[:, None] * D + d[None, :]
    out = tl.load(place, mask=(piece < PIECES)[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(out * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(RESULT + row * D + d, result, mask=d < D)


# From here on PyTorch.


def branch_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    seen: Seen,
    programs: int | None = None,
) -> Tensor:
    """Compute `branch_attention` of kernels/branch_attention.py; programs: default by device."""
    n, heads, size = q.shape
    require_head_dim(size)
    table = seen.tiles.table
    kv_heads = trunk_k.shape[1]
    programs = programs or programs_of(q)
    of_trunk = pieces(len(table), kv_heads, len(trunk_k), programs)
    of_own = pieces(n, kv_heads, own_k.shape[1], programs)
    count = of_trunk + of_own
    out = q.new_empty(n, heads, count, size, dtype=torch.float32)
    lse = q.new_empty(n, heads, count, dtype=torch.float32)
    trunk = (trunk_k[None], trunk_v[None], table, seen.start, seen.fork)
    _parts(q, *trunk, out, lse, 0, of_trunk)
    _parts(q, own_k, own_v, None, None, seen.length, out, lse, of_trunk, of_own)
    result = q.new_empty(q.shape, dtype=stored(q.dtype))
    known, settings = constants_of_merge(count, size)
    launch(merge, (n, heads), out, lse, result, **known, **settings)
    return result.to(q.dtype)


def pieces(tiles: int, kv_heads: int, tokens: int, programs: int) -> int:
    """Return the number of pieces of a tile's keys: a power of two, from shapes alone.

    Keys that are none are a piece, too: it gives nan to a branch that would see one of them.
    """
    if tiles == 0:
        return 1
    most = max(1, triton.cdiv(tokens, LEAST_TOKENS))
    wanted = min(triton.cdiv(programs, tiles * kv_heads), most)
    return min(MOST_PIECES, 1 << (wanted.bit_length() - 1))


def _parts(q, k, v, table, start, limit, out, lse, first, count):
    """Launch `parts` over trunks, k and v (1, T, K, D), or own caches (slots, capacity, K, D)."""
    heads, kv_heads, size = q.shape[1], k.shape[2], q.shape[2]
    tiles, width = len(q), 1
    k_stride, v_stride = k.stride()[:3], v.stride()[:3]
    if table is not None:
        tiles, width = table.shape
        k_stride, v_stride = (0, *k_stride[1:]), (0, *v_stride[1:])  # all tiles read one cache
    known, settings = constants(q.dtype, heads // kv_heads, size, width)
    launch(
        parts, (tiles, kv_heads, count), q, k, v, table, start, limit, out, lse,
        *q.stride()[:2], *k_stride, *v_stride, k.shape[1], len(q), first, out.shape[2],
        **known, **settings,
    )  # fmt: skip
