"""The arithmetic of the head, one tile of the vocabulary at a time, in plain PyTorch.

kernels/tiles.py has the same functions in Triton; without a GPU these run.

Shapes: N tokens, n of them in a chunk, V vocabulary, S columns of a slice of the logits, t tiles.
z are logits divided by the temperature T. With m = max_v z_v and x_v = z_v − m ≤ 0,

    D = Σ_v exp(x_v) = 1 + r          exactly 1 from the likeliest token, r from all others
    log p(y) = x_y − log(1 + r)
    H = log(1 + r) − s / (1 + r)      with s = Σ_v exp(x_v) x_v, in nats (Eq. 1)

Nothing cancels: x, s ≤ 0 ≤ r. The shift by m prevents overflow and keeps entropy exact: with
logits around 300, log Σ exp(z) − Σ p z is a small difference of large numbers. Keeping r instead of
D keeps near-certain tokens exact: at H = 1e-6, 1 + r has lost most digits of r, log1p(r) none.

With g = ∂loss/∂log p(y), h = ∂loss/∂H and l = ∂loss/∂lse of a token, the gradient of its logits is

    ∂loss/∂logit_v = ( g (1[v = y] − p_v) − h p_v (log p_v + H) + l p_v ) / T
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import IGNORE

SLICE = 4096  # rows of the head whose logits exist at one time (a slice)
NEGLIGIBLE = -1e4  # replaces log 0 = −inf: exp(−1e4) is 0 in every dtype, and 0 · −1e4 is not nan
SCALE = 2.0**15  # factor of the stored exp(x) ≤ 1: fp16 then has its 11 bits down to 2e-9


class Tiles(NamedTuple):
    """Statistics of each tile of logits: (m, r, s) and the target's logit, see `merge`."""

    maximum: Tensor  # (n, t) the largest logit, not yet divided by the temperature
    rest: Tensor  # (n, t) r = Σ exp(x) over all tokens of the tile except its likeliest
    weighted: Tensor  # (n, t) s = Σ exp(x) x
    at_target: Tensor  # (n,) the target's logit, 0 if these tiles do not have it
    exponentials: list[Tensor]  # SCALE · exp(x), (n, S) each; only if a gradient will be computed

    @classmethod
    def join(cls, parts: "list[Tiles]") -> "Tiles":
        """Join the tiles of consecutive slices."""
        tops, rests, weighted, at_target, exponentials = zip(*parts)
        columns = (torch.cat(column, dim=1) for column in (tops, rests, weighted))
        return cls(
            *columns,
            torch.stack(at_target).sum(dim=0),
            [e for es in exponentials for e in es],
        )


class Statistics(NamedTuple):
    """Statistics of each token over the whole vocabulary, all (n,)."""

    logprob: Tensor
    entropy: Tensor
    top1: Tensor  # the target is the likeliest token, or one of them
    lse: Tensor  # log Σ exp(logit / T) = m + log(1 + r)
    maximum: Tensor  # m · T
    log_sum: Tensor  # log(1 + r)


def tile_statistics(
    logits: Tensor,
    targets: Tensor,
    first: int,
    inverse_t: Tensor,
    keep: torch.dtype | None,
) -> Tiles:
    """Reduce one tile: logits (n, S) of the vocabulary from `first` on, targets (n,), 1/T (n,).

    keep: dtype of the SCALE · exp(x) to return as well; None returns none.
    """
    logits = logits.to(inverse_t.dtype)
    top = logits.amax(dim=1)  # (n,)
    x = logits - top.clamp(min=torch.finfo(logits.dtype).min)[:, None]  # −inf − −inf is nan
    x = x.mul_(inverse_t[:, None]).clamp_(min=NEGLIGIBLE)
    exponentials = x.exp()
    # 0 for the likeliest tokens, −1 for others: on a CPU `where` is as slow as all the rest.
    sign = x.sign()
    ties = logits.shape[1] + sign.sum(dim=1)
    rest = (ties - 1) - torch.mul(exponentials, sign, out=sign).sum(dim=1)
    weighted = torch.mul(exponentials, x, out=x).sum(dim=1)
    row, column = _own_targets(targets, first, logits)
    at_target = torch.zeros_like(top).index_put_((row,), logits[row, column])
    parts = (part[:, None] for part in (top, rest, weighted))
    kept = [exponentials.mul_(SCALE).to(keep)] if keep else []
    return Tiles(*parts, at_target, kept)


def merge(tiles: Tiles, inverse_t: Tensor) -> tuple[Statistics, Tensor]:
    """Return the statistics of the whole vocabulary, and (m_tile − m)/T (n, t) of each tile."""
    whole, offset = combine(tiles, inverse_t)
    top, rest, weighted = (column[:, 0] for column in whole[:3])
    log_sum = rest.log1p()
    logprob = (whole.at_target - top) * inverse_t - log_sum
    entropy = log_sum - weighted / (1 + rest)
    top1, lse = whole.at_target >= top, top * inverse_t + log_sum
    return Statistics(logprob, entropy, top1, lse, top, log_sum), offset


def combine(tiles: Tiles, inverse_t: Tensor) -> tuple[Tiles, Tensor]:
    """Merge tiles into one without exponentials; also return (m_tile − m)/T (n, t).

    This is the online softmax: a factor exp(m_tile − m) turns sums relative to a tile's maximum
    into sums relative to the row's maximum. It is associative: the order, the width and the backend
    of the tiles do not matter.
    """
    top = tiles.maximum.amax(dim=1)  # (n,)
    offset = (tiles.maximum - top[:, None]).mul_(inverse_t[:, None]).clamp_(min=NEGLIGIBLE)
    factor = offset.exp()  # (n, t)
    likeliest = offset == 0
    rest = (factor * tiles.rest).sum(dim=1)
    rest += torch.where(likeliest, 0.0, factor).sum(dim=1) + (likeliest.sum(dim=1) - 1)
    weighted = (factor * (tiles.weighted + offset * (1 + tiles.rest))).sum(dim=1)
    columns = (column[:, None] for column in (top, rest, weighted))
    return Tiles(*columns, tiles.at_target, []), offset


class LossGrads(NamedTuple):
    """Gradients of the loss of each token, and its statistics that dz needs, all (n,)."""

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    inverse_t: Tensor
    g: Tensor  # ∂loss/∂log p − ∂loss/∂lse
    h: Tensor  # ∂loss/∂H
    at_target: Tensor  # the gradient of the target's logit

    @classmethod
    def of(
        cls, s: Statistics, inverse_t: Tensor, g: Tensor, h: Tensor, of_lse: Tensor | float = 0.0
    ) -> "LossGrads":
        logprob = s.logprob.clamp(min=NEGLIGIBLE)
        # 1 − p of a near-certain token would lose all its digits; expm1 keeps them.
        at_target = -g * logprob.expm1() - h * logprob.exp() * (logprob + s.entropy)
        at_target += of_lse * logprob.exp()
        known = s.maximum, s.log_sum, s.entropy, inverse_t
        return cls(*known, g - of_lse, h, at_target * inverse_t)

    def choose(self, rows: Tensor) -> "LossGrads":
        return LossGrads(*(field[rows] for field in self))


def gradient_of_logits(
    logits: Tensor, targets: Tensor, first: int, slopes: LossGrads, out: Tensor
) -> Tensor:
    """Write ∂loss/∂logits to out (n, S) and return it; 0 where the target is IGNORE."""
    s = slopes
    x = (logits.to(s.g.dtype) - s.maximum[:, None]).mul_(s.inverse_t[:, None])
    log_p = x.sub_(s.log_sum[:, None]).clamp_(min=NEGLIGIBLE)
    gradient = log_p.exp().mul_(_slope(log_p, s))
    _set_targets(gradient, targets, first, s)
    return out.copy_(gradient.masked_fill_((targets == IGNORE)[:, None], 0.0))


def gradient_of_exponentials(
    exponentials: Tensor,
    offset: Tensor,
    rows: Tensor,
    targets: Tensor,
    first: int,
    slopes: LossGrads,
    out: Tensor,
) -> Tensor:
    """Write ∂loss/∂logits of some rows to out (n', S), from SCALE · exp(x) (n, S) of one tile.

    offset (n,): the tile's, see `combine`. exponentials and offset have all rows; targets and
    slopes those of `rows` (n',).
    """
    s = slopes
    shift = (offset[rows] - s.log_sum)[:, None]  # (n', 1)
    chosen = exponentials if len(rows) == len(exponentials) else exponentials[rows]
    e = chosen.to(shift.dtype)
    factor = shift.exp() / SCALE
    if s.h.any():
        # Not log(p): p of a near-certain token is rounded to 1.
        log_p = (e / SCALE).log_().clamp_(min=NEGLIGIBLE).add_(shift)
        gradient = (e * factor).mul_(_slope(log_p, s))
    else:
        gradient = e * (factor * _slope(factor, s))
    _set_targets(gradient, targets, first, s)
    return out.copy_(gradient)


def tile_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of logits (n, S) and their columns, or all S; largest first."""
    return tuple(logits.topk(min(k, logits.shape[1]), dim=1))


def _slope(log_p: Tensor, s: LossGrads) -> Tensor:
    """Return dz / p = −(g + h (log p + H)) / T, for log p (n, S)."""
    slope = (-s.g * s.inverse_t)[:, None]
    if s.h.any():
        slope = slope - (s.h * s.inverse_t)[:, None] * (log_p + s.entropy[:, None])
    return slope


def _set_targets(gradient: Tensor, targets: Tensor, first: int, s: LossGrads) -> None:
    row, column = _own_targets(targets, first, gradient)
    gradient[row, column] = s.at_target[row]


def _own_targets(targets: Tensor, first: int, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows whose target is in this slice (n, S), and its column there."""
    column = targets - first
    row = ((column >= 0) & (column < columns.shape[1])).nonzero()[:, 0]
    return row, column[row]
