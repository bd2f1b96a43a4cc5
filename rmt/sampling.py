"""Draw tokens: the parameters, the random numbers, the draw itself, and what comes back.

The distribution that is sampled is the one that is scored: softmax(logits / temperature) over the
tokenizer's ids, nothing cut off in training. Random numbers are counter-based: the draw for token t
of a rollout depends on (seed, purpose, step, document, fork, rollout, t) and on nothing else, so
neither batch nor number of ranks changes a sample. Shapes: n rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rmt.trees import Tree

PURPOSES = {"train": 0, "evaluate": 1, "sample": 2}
BLOCK = 128  # tokens whose probabilities are summed before any of them is looked at


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampling, and the place in the stream of random numbers."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    vocab_size: int  # rows of the head beyond it are padding and never sampled
    temperature: float = 1.0  # 0: greedy; log-probabilities are then those of temperature 1
    max_branches: int = 256  # decoded at one time; the rest wait
    seed: int = 0
    purpose: str = "train"
    step: int = 0
    first: int = 0  # number of a prompt's first rollout: a new attempt has new random numbers
    top_p: float = 1.0  # in evaluation, see `cut_tail_`
    top_k: int = 0


@dataclass
class Rollout:
    """One response: its tokens with the end token, and log-probabilities under the sampler."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # ended by a stop token, not by the limit


def uniforms(trees: Sequence[Tree], samples: int, sampling: Sampling) -> Tensor:
    """Uniform numbers in [0, 1): (branches · samples, max_new_tokens), a row for each rollout."""
    starts = [(tree.document, branch.fork) for tree in trees for branch in tree.branches]
    rows = []
    for document, fork in starts:
        for rollout in range(sampling.first, sampling.first + samples):
            place = (sampling.step, document, fork, rollout)
            key = (sampling.seed, PURPOSES[sampling.purpose], *place)
            rows.append(np.random.Generator(np.random.Philox(key)).random(sampling.max_new_tokens))
    return torch.from_numpy(np.stack(rows))


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution, in two levels.

    logits (n, V) fp32 or wider, overwritten; uniform (n,) fp64 in [0, 1). Columns from vocab_size
    on are never drawn. Returns tokens (n,) and their log-probabilities (n,) under the sampled
    distribution, after top-k and top-p; temperature 0 takes the likeliest, scored at temperature 1.
    """
    rows, temperature = torch.arange(len(logits), device=logits.device), sampling.temperature
    logits[:, sampling.vocab_size :] = -torch.inf
    cut_tail_(logits, temperature, sampling.top_p, sampling.top_k)
    if logits.shape[1] % BLOCK:
        logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf)
    if not temperature:
        tokens = logits.argmax(dim=-1)
    logits -= logits.amax(dim=-1, keepdim=True)
    logits *= 1 / (temperature or 1.0)
    weights = logits.exp().unflatten(1, (-1, BLOCK))  # (n, blocks, BLOCK)
    # fp64: over 150,000 tokens an fp32 sum would shift the tail's probabilities.
    blocks = weights.sum(dim=-1, dtype=torch.float64)  # (n, blocks)
    ends = blocks.cumsum(dim=-1)
    if temperature:
        block, rest = _first_beyond(ends, uniform * ends[:, -1])
        inside = weights[rows, block].double().cumsum(dim=-1)  # (n, BLOCK)
        tokens = block * BLOCK + _first_beyond(inside, rest)[0]
        tokens.clamp_(max=sampling.vocab_size - 1)  # of a row of nan, whose update will be skipped
    return tokens, (logits[rows, tokens] - ends[:, -1].log()).to(logits.dtype)


def cut_tail_(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Set to -inf, in place, all logits (n, V) but those of the likeliest tokens.

    For evaluation and sample.py only, as a run trains the distribution that it samples, whole.
    top_k keeps the k likeliest (0: all). Of these, renormalised at the temperature, top_p (Holtzman
    et al. 2020) keeps the fewest likeliest that together have this probability, at least one; of
    equal logits the first.
    Temperature 0 takes the likeliest anyway: nothing is cut.
    """
    if temperature == 0 or (top_k == 0 and top_p == 1):
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)  # (n, V)
    ordered[:, top_k or len(ordered[0]) :] = -torch.inf
    p = (ordered / temperature).softmax(dim=-1)
    before = p.cumsum(dim=-1, dtype=torch.float64) - p
    ordered.masked_fill_(before >= top_p, -torch.inf)  # the tokens before have top_p
    return logits.scatter_(1, token, ordered)


def _first_beyond(ends: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find the interval that holds the target, and how far into it the target lies. (n,) each

    ends (n, m) are rising sums, target (n,). Rounding may put a target at the very end or beyond
    it, and an interval of length 0 must never be chosen: such a target is moved below the end.
    """
    last = ends[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(ends, target[:, None], right=True)
    index.clamp_(max=ends.shape[1] - 1)  # of a row of nan
    before = F.pad(ends, (1, 0)).gather(1, index)[:, 0]
    return index[:, 0], target - before
