"""The sampler: prefill each trunk once, decode all branches against it (models/decode.py).

rmt/naive.py does the same without a cache. Nothing is kept between calls: a cache never survives a
weight update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from models.decode import BranchStart, DecodeLoop
from models.kv_cache import KVCache
from models.transformer import Transformer
from rmt.forest import pack
from rmt.sampling import Rollout, Sampling, sample, uniforms
from rmt.trees import Tree

PREFILL_TOKENS = 1 << 14  # of one forward pass


@torch.inference_mode()
def generate(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> list[list[Rollout]]:
    """Sample `samples` responses to each branch of each tree, in the order of the branches.

    The branches hold prompts (trunk[:fork] + branch.stem, which has at least one token) and no
    response; those of one document fork at different places. model: of dist.gathered_weights.
    """
    if not any(tree.branches for tree in trees):
        return []
    decoder = _prepare(model, trees, samples, sampling)
    for _ in decoder.run():
        pass
    rollouts = [Rollout(*said) for said in decoder.responses(range(decoder.requests))]
    for rollout in rollouts:
        rollout.finished = rollout.tokens[-1] in sampling.stop_ids
    return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]


@torch.inference_mode()
def stream(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> Iterator[tuple[int, int, float]]:
    """Yield (request, token, logprob) as it is decoded; request = prompt · samples + sample."""
    decoder = _prepare(model, trees, samples, sampling)
    told = [0] * decoder.requests
    for _ in decoder.run():
        for request, (tokens, logprobs) in zip(decoder.held, decoder.responses(decoder.held)):
            for place in range(told[request], len(tokens)):
                yield request, tokens[place], logprobs[place]
            told[request] = len(tokens)


def _prepare(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> DecodeLoop:
    """Make a decode loop with all trunks and prompts (at least one) in its cache."""
    trees = [tree for tree in trees if tree.branches]
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    # Skip trunk tokens beyond the last fork, and each prompt's last token (decoding feeds it).
    trunks = [tree.trunk[: max(1, max(b.fork for b in tree.branches))] for tree in trees]
    branches = [branch for tree in trees for branch in tree.branches]
    trunk_first = np.cumsum([0, *map(len, trunks)]).tolist()
    prompt_first = np.cumsum([0, *(len(b.stem) - 1 for b in branches)]).tolist()
    owners = [number for number, tree in enumerate(trees) for _ in tree.branches]
    prompts = [
        BranchStart(trunk_first[owner], b.fork, first, len(b.stem) - 1, b.stem[-1])
        for owner, b, first in zip(owners, branches, prompt_first)
    ]
    cache = KVCache(
        model.config, trunk_first[-1], prompt_first[-1],
        slots=min(sampling.max_branches, len(prompts) * samples),
        capacity=max(p.length for p in prompts) + sampling.max_new_tokens + 1,  # one is scratch
        device=device, dtype=dtype,
    )  # fmt: skip
    _prefill(model, cache, trees, trunks)
    uniform = uniforms(trees, samples, sampling).to(device)
    draw = partial(sample, sampling=sampling)
    return DecodeLoop(model, cache, prompts, uniform, sampling.stop_ids, draw)


def _prefill(
    model: Transformer, cache: KVCache, trees: Sequence[Tree], trunks: Sequence[Sequence[int]]
) -> None:
    """Fill the cache by forward passes over trunks and branch prompts; no logits are made."""
    prefilled = [
        Tree(t.document, trunk, tuple(
            replace(b, stem=b.stem[:-1]) for b in t.branches if len(b.stem) > 1
        )) for t, trunk in zip(trees, trunks)
    ]  # fmt: skip
    device = cache.own.device
    ends = [0, 0]  # of the trunks and of the prompts in the cache
    for batch in _chunks(prefilled):
        on_trunk = np.concatenate([
            np.arange(len(tree)) < len(tree.trunk) for tree in batch
        ])  # fmt: skip
        rows = [torch.from_numpy(np.flatnonzero(x)).to(device) for x in (on_trunk, ~on_trunk)]
        places = [slice(end, end + len(own)) for end, own in zip(ends, rows)]
        ends = [place.stop for place in places]
        forest = pack(batch, device)
        attend = cache.capture(forest.attend, places, rows)
        model(forest.tokens, forest.position, attend, readout=lambda hidden, head: None)


def _chunks(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Group whole trees in their order, about PREFILL_TOKENS at a time."""
    chunk: list[Tree] = []
    for tree in trees:
        if chunk and sum(map(len, chunk)) + len(tree) > PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(tree)
    yield chunk
