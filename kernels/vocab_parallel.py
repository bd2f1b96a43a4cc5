"""Log-probability and entropy of a head whose rows are divided among ranks ("vocab-parallel").

Each rank reduces its rows to one tile per token, (m, r, s) of kernels/tile_math.py. Tiles merge in
any order, so the ranks exchange four numbers a token and no logits. In the backward pass each
computes the gradient of its rows, and its part of the gradient of the hidden states.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from .head import _statistics_backward
from .reference import IGNORE, TokenStatistics
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
) -> TokenStatistics:
    """Compute `linear_entropy_logprob` of a weight whose rows the ranks of `group` hold in parts.

    weight (V / ranks, C): of rank r the rows from r · V / ranks on. hidden, targets (ids of the
    whole vocabulary), the loss and all other arguments must be the same on all ranks; so are the
    results. vocab_size: of the whole vocabulary; only the last rank may hold padding. The gradient
    of hidden is summed over the ranks, that of weight is of this rank's rows.
    """
    own = require_head(hidden, weight, None)
    require_targets(targets, hidden, "hidden")
    require_softcap(softcap)
    ranks, first = dist.get_world_size(group), dist.get_rank(group) * own
    vocab_size = ranks * own if vocab_size is None else vocab_size
    if not (ranks - 1) * own < vocab_size <= ranks * own:
        raise ValueError(
            f"vocab_size {vocab_size} of {ranks} ranks with {own} rows each must be from "
            f"{(ranks - 1) * own + 1} to {ranks * own}: only the last rank may hold padding"
        )
    inverse_t = per_token_inverse(temperature, hidden)
    y = targets.flatten()
    require_values(y, vocab_size, inverse_t)
    x, own = hidden.flatten(0, -2), min(own, vocab_size - first)
    options = inverse_t, first, own, chunk_of(hidden, chunk), softcap
    found = _VocabParallel.apply(x, weight, y, group, *options)
    return TokenStatistics(*(part.view(targets.shape) for part in found))


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, group, inverse_t, first, own, chunk, softcap):
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
        statistics, _ = merge(Tiles(*columns, at_target.sum(dim=1), [], 0), inverse_t)
        statistics = Statistics(*(part.masked_fill(ignored, 0) for part in statistics))
        ctx.save_for_backward(hidden, weight, local, inverse_t, *statistics)
        ctx.options, ctx.group = (own, chunk, softcap), group
        ctx.mark_non_differentiable(statistics.top1)
        return tuple(statistics[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h, _, of_lse):
        hidden, weight, local, inverse_t, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        known = hidden, weight, local, inverse_t, saved, g, h, of_lse
        of_hidden, of_weight = _statistics_backward(*known, *ctx.options, *wanted)
        if wanted[0]:
            dist.all_reduce(of_hidden, group=ctx.group)
        gradients = (x if want else None for x, want in zip((of_hidden, of_weight), wanted))
        return *gradients, *(None,) * 7
