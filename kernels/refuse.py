"""Input checks of the public functions of `kernels`: each raises ValueError."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import IGNORE, wide

MOST_HEAD_DIM = 256  # 512 spills registers, 576 needs 327,680 bytes of shared memory (`make aot`)


def require_logits(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (…, V) with rows and V > 0, not {tuple(logits.shape)}")
    require_no_tangent(logits)
    require_targets(targets, logits, "logits")


def require_head(hidden: Tensor, weight: Tensor, vocab_size: int | None) -> int:
    """Check the head's inputs and return the vocabulary size: the rows of weight that count."""
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be rows (…, C) and weight (V, C), not {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not weight.dtype.is_floating_point or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on "
            f"{weight.device}; give them floating dtypes and one device"
        )
    require_no_tangent(hidden, weight)
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size {vocab_size} must be from 1 to the head's {len(weight)} rows")
    return vocab_size


def require_one_pass(hidden: Tensor, weight: Tensor) -> None:
    """Refuse what `linear_objective` cannot compute and `linear_entropy_logprob` can."""
    for name, x in {"hidden": hidden, "weight": weight}.items():
        if x.dtype == torch.float16:
            raise ValueError(
                f"{name} is torch.float16: gradients are computed before the loss scale applies, "
                "and would be 0; convert to bfloat16, or use linear_entropy_logprob"
            )
    if hidden.is_meta:
        raise ValueError("hidden is on meta, but a loss needs values; use linear_entropy_logprob")


def require_no_tangent(*inputs: Tensor) -> None:
    """Refuse forward-mode tangents: a custom operator would silently drop them."""
    if forward_ad._current_level < 0:  # not in forward mode; torch.compile can trace this
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise ValueError("there is no forward-mode derivative; use loss.backward()")


def require_softcap(softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap {softcap} must be a positive number, or None for none")


def require_chunk(chunk: int | None, default: int) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be a number of tokens, 1 or more")
    return default if chunk is None else chunk


def require_targets(targets: Tensor, rows: Tensor, name: str) -> None:
    if not rows.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating dtype, not {rows.dtype}")
    if targets.shape != rows.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be {tuple(rows.shape[:-1])} int64, one for each row of {name}, not "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    if targets.device != rows.device:
        raise ValueError(f"targets are on {targets.device}, {name} on {rows.device}; move them")


def require_values(targets: Tensor, vocab_size: int, inverse_t: Tensor) -> None:
    """Check targets and 1/T; on a GPU by assertions there: reading values would wait for it."""
    ignored = targets == IGNORE
    fits = ((targets >= 0) & (targets < vocab_size)) | ignored
    warm = ((inverse_t > 0) & (inverse_t < float("inf"))) | ignored
    if targets.is_cuda:
        torch._assert_async(fits.all(), f"a target is neither {IGNORE} nor in [0, {vocab_size})")
        torch._assert_async(warm.all(), "a temperature is not a positive number")
    elif not fits.all():
        wrong = targets[~fits][0].item()
        raise ValueError(
            f"target {wrong} is not in [0, {vocab_size}); use {IGNORE} for rows without a target"
        )
    elif not warm.all():
        wrong = inverse_t[~warm][0].reciprocal().item()
        raise ValueError(f"temperature {wrong} must be a positive number")


def per_token_inverse(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """Return 1/T of each row (N,), fp32 or wider; rows (…, C), temperature a number or (…)."""
    shape = rows.shape[:-1]
    if isinstance(temperature, Tensor):
        if temperature.shape not in (torch.Size(()), shape):
            raise ValueError(
                f"temperature must be a number or {tuple(shape)}, not {tuple(temperature.shape)}"
            )
        t = temperature.detach().to(rows.device, wide(rows))
    else:
        if not temperature > 0:
            raise ValueError(f"temperature {temperature} must be above 0")
        # Not torch.full: torch.compile would compile it again for every temperature.
        t = torch.ones((), dtype=wide(rows), device=rows.device) * temperature
    return t.reciprocal().expand(shape).flatten().contiguous()


def require_head_dim(size: int) -> None:
    if size > MOST_HEAD_DIM:
        raise ValueError(
            f"head dim {size} is above {MOST_HEAD_DIM}, the most that the Triton kernels of "
            "branches have room for; set RMT_KERNELS=reference to use PyTorch"
        )


def require_attention(
    q: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    seen,
) -> None:
    """Check shapes, dtypes and devices of `branch_attention`; no value is read."""
    n, heads, size = q.shape if q.dim() == 3 else (0, 0, 0)
    branches = len(seen.start)
    if n != branches:
        raise ValueError(f"q is {tuple(q.shape)}, but seen has {branches} branches; match them")
    kv_heads = trunk_k.shape[1] if trunk_k.dim() == 3 else 0
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"q must be (n, H, D) and trunk_k (T, K, D), H a multiple of K, not {tuple(q.shape)} "
            f"and {tuple(trunk_k.shape)}"
        )
    caches = {"trunk_k": trunk_k, "trunk_v": trunk_v, "own_k": own_k, "own_v": own_v}
    for name, x in caches.items():
        shape = (len(trunk_k),) if name.startswith("trunk") else own_k.shape[:2]
        if x.shape != (*shape, kv_heads, size) or own_k.dim() != 4 or len(own_k) < n:
            raise ValueError(
                f"{name} is {tuple(x.shape)}; trunk_k and trunk_v must be (T, {kv_heads}, {size}), "
                f"own_k and own_v (slots, capacity, {kv_heads}, {size}) of at least {n} slots"
            )
    _require_numbers({"q": q, **caches})
    for name, x in {"start": seen.start, "tiles.table": seen.tiles.table}.items():
        if x.device != q.device:
            raise ValueError(f"seen.{name} is on {x.device}, q on {q.device}; move one of them")


def require_counts(start: Tensor, **others: Tensor) -> None:
    """Check the counts of a `Seen`."""
    for name, x in {"start": start, **others}.items():
        if x.shape != (len(start),) or x.dtype != torch.int64 or x.device != start.device:
            raise ValueError(
                f"{name} must be ({len(start)},) int64 on {start.device}, one for each branch, not "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )
        if not x.is_contiguous():
            raise ValueError(f"{name} has stride {x.stride()}; call {name}.contiguous()")


def _require_numbers(of: dict[str, Tensor]) -> None:
    q = of["q"]
    for name, x in of.items():
        if x.dtype != q.dtype or x.device != q.device or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; convert them to "
                "one floating dtype on one device"
            )
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}, but the last must be 1; call {name}.contiguous()"
            )


def require_reach(seen, tokens: int, capacity: int, look: bool) -> None:
    """Check that each branch sees only tokens that exist, and that tiles fit.

    tokens: T, of all trunks; capacity: own tokens of a slot. look: read the values and raise
    ValueError. Otherwise assert on the device, once for each `Seen`; a CUDA graph replays the
    assertions that it captured.
    """
    n = len(seen.start)
    if seen.tiles.branches != n:
        raise ValueError(
            f"tiles are of {seen.tiles.branches} branches, lengths of {n}; make tiles again when "
            "branches come or go"
        )
    known = (tokens, capacity)
    if look:  # changed in place, they are checked again
        known += (*seen.values(), tuple(seen.tiles.table.flatten().tolist()))
    if known in seen.checked:
        return
    for fits, whose, said in _reach(seen, tokens, capacity):
        if not look:
            torch._assert_async(fits.all(), said)
        elif not fits.all():
            slot = int(whose[~fits][0])
            counts = (int(x[slot]) for x in (seen.start, seen.fork, seen.length))
            raise ValueError(
                "branch {} has start {}, fork {} and length {}; ".format(slot, *counts) + said
            )
    seen.checked.add(known)


def _reach(seen, tokens: int, capacity: int) -> list[tuple[Tensor, Tensor, str]]:
    """Return each condition, the branches that it is about, and its error message."""
    start, fork, length, n = seen.start, seen.fork, seen.length, len(seen.start)
    table = seen.tiles.table.long()
    slot = table.clamp(0, n - 1)
    there = table >= 0
    count = torch.zeros(n + 1, dtype=torch.int64, device=start.device)
    count.index_add_(0, table.clamp(max=n).where(there, 0).flatten(), there.flatten().long())
    reads = there & (fork[slot] > 0)
    common = start[slot].masked_fill(~reads, 0).amax(dim=1, keepdim=True)
    each = torch.arange(n, device=start.device)
    trunk = (fork == 0) | ((start >= 0) & (fork > 0) & (start + fork <= tokens))
    own, once = (length >= 0) & (length <= capacity), (count[:n] == 1) & (count[n] == 0)
    return [
        (trunk, each, f"the trunk from start to start + fork is not within its {tokens} tokens"),
        (own, each, f"a length must be from 0 to {capacity}"),
        (once, each, "each branch must be in exactly one tile; make tiles again"),
        (~reads | (start[slot] == common), slot, "a tile has one start; make tiles again"),
    ]
