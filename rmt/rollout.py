"""The sampler: prefill trunks once, decode all branches against them, return what was sampled.

The distribution that is sampled is the one that is scored: softmax(logits / temperature) over the
tokenizer's ids, nothing cut off. Random numbers are counters: the draw for offset t of a rollout
depends on (seed, purpose, step, document, fork, rollout, t) and on nothing else, so neither the
batch nor the number of ranks changes a sample. Nothing is kept between calls: a cache never
survives a weight update.

This file says what is asked for and what comes back; rmt/decoder.py decodes. Shapes: n branches,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from models.kv_cache import KVCache
from models.transformer import Transformer
from rmt.decoder import BranchStart, DecodeLoop
from rmt.forest import Tree, pack

PURPOSES = {"train": 0, "evaluate": 1, "sample": 2}
PREFILL_TOKENS = 1 << 14  # of one forward pass


@dataclass(frozen=True)
class Sampling:
    """How to sample, and where in the stream of random numbers."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    vocab_size: int  # rows of the head beyond it are padding and never sampled
    temperature: float = 1.0  # 0: greedy; log-probabilities are then those of temperature 1
    max_branches: int = 256  # decoded at one time; the rest wait
    seed: int = 0
    purpose: str = "train"
    step: int = 0
    first: int = 0  # number of the first rollout to each prompt


@dataclass
class Rollout:
    """One response: its tokens with the end token, and log-probabilities under the sampler."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # ended by a stop token, not by the limit


@torch.inference_mode()
def generate(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> list[list[Rollout]]:
    """`samples` responses to each branch of each tree, in the order of the branches.

    The branches hold prompts (trunk[:fork] + branch.prompt, which has at least one token) and no
    response; those of one document fork at different places. `model` is what rollout_mode yields.
    """
    decoder = _prepare(model, trees, samples, sampling)
    if decoder is None:
        return []
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
    if decoder is None:
        return
    told = [0] * decoder.requests
    for _ in decoder.run():
        for request, (tokens, logprobs) in zip(decoder.held, decoder.responses(decoder.held)):
            for place in range(told[request], len(tokens)):
                yield request, tokens[place], logprobs[place]
            told[request] = len(tokens)


def _prepare(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> DecodeLoop | None:
    """A decoder with all trunks and prompts in its cache; None when there is nothing to do."""
    trees = [tree for tree in trees if tree.branches]
    if not trees:
        return None
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    # What no branch sees is not computed, nor is a prompt's last token: decoding starts with it.
    trunks = [tree.trunk[: max(1, max(b.fork for b in tree.branches))] for tree in trees]
    branches = [branch for tree in trees for branch in tree.branches]
    trunk_first = np.cumsum([0, *map(len, trunks)]).tolist()
    prompt_first = np.cumsum([0, *(len(b.prompt) - 1 for b in branches)]).tolist()
    owners = [number for number, tree in enumerate(trees) for _ in tree.branches]
    prompts = [
        BranchStart(trunk_first[owner], b.fork, first, len(b.prompt) - 1, b.prompt[-1])
        for owner, b, first in zip(owners, branches, prompt_first)
    ]
    cache = KVCache(
        model.config, trunk_first[-1], prompt_first[-1],
        slots=min(sampling.max_branches, len(prompts) * samples),
        capacity=max(p.length for p in prompts) + sampling.max_new_tokens + 1,  # one is scratch
        device=device, dtype=dtype,
    )  # fmt: skip
    _prefill(model, cache, trees, trunks)
    uniform = torch.from_numpy(uniforms(trees, samples, sampling)).to(device)
    return DecodeLoop(
        model, cache, prompts, uniform, sampling.stop_ids, sampling.vocab_size, sampling.temperature
    )


def _prefill(
    model: Transformer, cache: KVCache, trees: Sequence[Tree], trunks: Sequence[Sequence[int]]
) -> None:
    """Forward passes over trunks and branch prompts fill the cache; no logits are made."""
    known = [
        Tree(t.document, trunk, tuple(
            replace(b, prompt=b.prompt[:-1]) for b in t.branches if len(b.prompt) > 1
        )) for t, trunk in zip(trees, trunks)
    ]  # fmt: skip
    device = cache.own.device
    trunk_end = prompt_end = 0
    for batch in _chunks(known):
        on_trunk = np.concatenate([
            np.arange(len(tree)) < len(tree.trunk) for tree in batch
        ])  # fmt: skip
        rows = [torch.from_numpy(np.flatnonzero(x)).to(device) for x in (on_trunk, ~on_trunk)]
        places = (slice(trunk_end, trunk_end + len(rows[0])),
                  slice(prompt_end, prompt_end + len(rows[1])))  # fmt: skip
        trunk_end, prompt_end = places[0].stop, places[1].stop
        forest = pack(batch, device)
        attend = cache.capture(forest.attend, places[0], rows[0], places[1], rows[1])
        model(forest.tokens, forest.position, attend, readout=lambda hidden, head: None)


def _chunks(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Whole trees in their order, about PREFILL_TOKENS at a time."""
    chunk: list[Tree] = []
    for tree in trees:
        if chunk and sum(map(len, chunk)) + len(tree) > PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(tree)
    yield chunk


def uniforms(trees: Sequence[Tree], samples: int, sampling: Sampling) -> np.ndarray:
    """(requests, max_new_tokens) in [0, 1): row = one rollout's stream, column = offset."""
    rows = []
    for tree in trees:
        for branch in tree.branches:
            place = (sampling.step, tree.document, branch.fork)
            for rollout in range(sampling.first, sampling.first + samples):
                key = (sampling.seed, PURPOSES[sampling.purpose], *place, rollout)
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
                rows.append(generator.random(sampling.max_new_tokens))
    return np.stack(rows)
