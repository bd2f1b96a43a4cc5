"""Log-probability and entropy of a head whose rows are divided among ranks ("vocab-parallel").

Each rank reduces its rows to one tile per token, (m, r, s) of kernels/tile_math.py. Tiles merge in
any order, so the ranks exchange four numbers a token and no logits. In the backward pass each
computes the gradient of its rows, and its part of the gradient of the hidden states (N, C), which
are then summed in fp32.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from .head import recompute_gradients
from .reference import IGNORE, TokenStatistics, wide
from .refuse import (
    per_token_inverse,
    require_head,
    require_softcap,
    require_targets,
    require_values,
)
from .slices import chunk_of, chunk_tiles, chunks
from .tile_math import Statistics, Tiles, combine, merge

ELSEWHERE = 1 << 40  # the target of a token whose target another rank has: beyond every tile


@_disable_dynamo  # collectives of a group that is an argument
def vocab_parallel_entropy_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: "dist.ProcessGroup",
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sum_hidden: bool = True,
) -> TokenStatistics:
    """Compute `linear_entropy_logprob` of a weight whose rows the ranks of `group` hold in parts.

    weight (rows, C): one rank's rows after another's, as many as each has. hidden, targets (ids of
    the whole vocabulary), the loss and all other arguments must be the same on all ranks; so are
    the results. vocab_size: of the whole vocabulary; only the last rank may hold padding. The
    gradient of weight is of this rank's rows. sum_hidden: sum that of hidden over the ranks;
    False leaves this rank's part, for a caller that sums it, as Megatron's regions do.
    """
    require_targets(targets, hidden, "hidden")
    require_softcap(softcap)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group; call it on the group's ranks only")
    try:
        own, refused = require_head(hidden, weight, None), None
    except ValueError as error:  # to be raised when the other ranks know
        own, refused = 0, error
    ranks = [targets.new_empty(1) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, ranks[0].new_full((1,), own), group=group)
    rows = torch.cat(ranks).tolist()
    if refused:
        raise refused
    if 0 in rows:
        raise ValueError(
            f"rank {rows.index(0)} of the group has no rows of the head, or they do not fit "
            "hidden; give each rank one or more, of hidden's width"
        )
    vocab_size = sum(rows) if vocab_size is None else vocab_size
    if not sum(rows[:-1]) < vocab_size <= sum(rows):
        raise ValueError(
            f"vocab_size {vocab_size} of ranks with {rows} rows must be from "
            f"{sum(rows[:-1]) + 1} to {sum(rows)}: only the last rank may hold padding"
        )
    inverse_t = per_token_inverse(temperature, hidden)
    y, first = targets.flatten(), sum(rows[:rank])
    require_values(y, vocab_size, inverse_t)
    x, own = hidden.flatten(0, -2), min(own, vocab_size - first)
    options = inverse_t, first, own, chunk_of(hidden, chunk), softcap, sum_hidden
    found = _VocabParallel.apply(x, weight, y, group, *options)
    return TokenStatistics(*(part.view(targets.shape) for part in found))


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, targets, group, inverse_t, first, own, chunk, softcap, sum_hidden
    ):
        ignored = targets == IGNORE
        here = (targets >= first) & (targets < first + own)
        local = (targets - first).where(here, ELSEWHERE).masked_fill(ignored, IGNORE)
        sums = inverse_t.new_zeros(4, len(targets))
        for rows in chunks(targets, chunk):
            t = inverse_t[rows]
            known = hidden[rows], weight[:own], local[rows], t
            tile, _ = combine(chunk_tiles(*known, keep=False, softcap=softcap), t)
            columns = (column[:, 0] for column in tile[:3])
            sums[:, rows] = torch.stack((*columns, tile.at_target))
        parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sums, group=group)
        *columns, at_target = torch.stack(parts, dim=2)  # (N, ranks) each
        statistics, _ = merge(Tiles(*columns, at_target.sum(dim=1), []), inverse_t)
        statistics = Statistics(*(part.masked_fill(ignored, 0) for part in statistics))
        ctx.save_for_backward(hidden, weight, local, inverse_t, *statistics)
        ctx.options, ctx.group = (own, chunk, softcap), group if sum_hidden else None
        ctx.mark_non_differentiable(statistics.top1)
        return tuple(statistics[:4])

    @staticmethod
    def backward(ctx, g, h, _, of_lse):
        if torch.is_grad_enabled():  # create_graph; once_differentiable would drop it silently
            raise RuntimeError("there is no second derivative; drop create_graph=True")
        hidden, weight, local, inverse_t, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        known = hidden, weight, local, inverse_t, saved, g, h, of_lse
        # In fp32: parts of 8 ranks, each rounded to bf16, are twice as far off as their sum.
        options = *ctx.options, *wanted, wide(hidden)
        of_hidden, of_weight = recompute_gradients(*known, *options)
        if wanted[0] and ctx.group is not None:
            of_hidden = of_hidden.contiguous()
            dist.all_reduce(of_hidden, group=ctx.group)
        gradients = of_hidden.to(hidden.dtype), of_weight
        return *(x if want else None for x, want in zip(gradients, wanted)), *(None,) * 8
