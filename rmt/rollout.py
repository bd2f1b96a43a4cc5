"""The sampler: prefill trunks once, decode all branches against them, return what was sampled.

The distribution that is sampled is the one that is scored: softmax(logits / temperature) over the
tokenizer's ids, nothing cut off. Random numbers are counters: the draw for offset t of a rollout
depends on (seed, purpose, step, document, fork, rollout, t) and on nothing else, so neither the
batch nor the number of ranks changes a sample. Nothing is kept between calls: a cache never
survives a weight update.

Shapes: n active branches, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels import entropy_logprob, matmul
from models.kv_cache import KVCache
from models.transformer import Transformer
from rmt.forest import Forest, Tree, pack

PURPOSES = {"train": 0, "evaluate": 1, "sample": 2}


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


@dataclass
class Rollout:
    """One response: its tokens with the end token, and log-probabilities under the sampler."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # ended by a stop token, not by the limit


@torch.no_grad()
def generate(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> list[list[Rollout]]:
    """`samples` responses to each branch of each tree, in the order of the branches.

    The branches hold prompts (trunk[:fork] + branch.prompt) and no response; those of one document
    fork at different places.
    """
    prompts = sum(len(tree.branches) for tree in trees)
    rollouts = [[Rollout() for _ in range(samples)] for _ in range(prompts)]
    for request, token, logprob in stream(model, trees, samples, sampling):
        rollout = rollouts[request // samples][request % samples]
        rollout.tokens.append(token)
        rollout.logprobs.append(logprob)
        rollout.finished = token in sampling.stop_ids
    return rollouts


@torch.no_grad()
def stream(
    model: Transformer, trees: Sequence[Tree], samples: int, sampling: Sampling
) -> Iterator[tuple[int, int, float]]:
    """Yield (request, token, logprob) as it is decoded; request = prompt · samples + sample."""
    forest = pack(trees, next(model.parameters()).device)
    prompts = [(tree, branch) for tree in trees for branch in tree.branches]
    if not prompts:
        return
    requests = len(prompts) * samples
    longest = max(len(branch.prompt) for _, branch in prompts) + sampling.max_new_tokens
    slots = min(sampling.max_branches, requests)
    cache = KVCache(model.config.num_hidden_layers, slots, limit=longest)
    _prefill(model, forest, cache)
    decoder = _Decoder(model, cache, forest, samples, sampling)
    waiting = deque(range(requests))
    while waiting or decoder.active:
        decoder.admit([waiting.popleft() for _ in range(min(slots - decoder.active, len(waiting)))])
        yield from decoder.step()


def _prefill(model: Transformer, forest: Forest, cache: KVCache) -> None:
    """One forward pass over trunks and branch prompts fills the cache; no logits are made."""
    attend = cache.capture(forest.attend)
    model(forest.tokens, forest.position, attend, readout=lambda hidden, head: None)
    trunks, prompts, start = [], [], 0
    for tree in forest.trees:
        trunks.append(np.arange(start, start + len(tree.trunk)))
        start += len(tree.trunk)
        for branch in tree.branches:
            prompts.append(np.arange(start, start + len(branch)))
            start += len(branch)
    device = forest.tokens.device
    cache.arrange(_rectangle(trunks).to(device), _rectangle(prompts).to(device))


def _rectangle(rows: list[np.ndarray]) -> Tensor:
    """(len(rows), longest) int64, padded with 0."""
    out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, values in zip(out, rows):
        row[: len(values)] = values
    return torch.from_numpy(out)


class _Decoder:
    """The state of the active branches: (n,) vectors, one entry per slot."""

    def __init__(self, model, cache: KVCache, forest: Forest, samples: int, sampling: Sampling):
        self.model, self.cache, self.samples, self.sampling = model, cache, samples, sampling
        self.device = forest.tokens.device
        branches = [
            (row, branch) for row, tree in enumerate(forest.trees) for branch in tree.branches
        ]
        prompts = [(row, b.fork, len(b.prompt), b.prompt[-1]) for row, b in branches]
        columns = torch.tensor(prompts, device=self.device).t().contiguous()
        self.prompt_trunk, self.prompt_fork, self.prompt_length, self.prompt_last = columns
        self.uniform = torch.from_numpy(_uniforms(forest.trees, samples, sampling)).to(self.device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.request, self.offset, self.token = empty, empty, empty

    @property
    def active(self) -> int:
        return len(self.request)

    def admit(self, requests: list[int]) -> None:
        """Start requests in the free slots.

        The last token of the prompt is fed to the first decode step, which rewrites its key and
        value and gives the logits of the response's first token.
        """
        if not requests:
            return
        self.cache.admit(self.active, [request // self.samples for request in requests])
        new = torch.tensor(requests, device=self.device)
        self.request = torch.cat((self.request, new))
        self.offset = torch.cat((self.offset, torch.zeros_like(new)))
        self.token = torch.cat((self.token, self.prompt_last[new // self.samples]))

    def step(self) -> list[tuple[int, int, float]]:
        """One token for every active branch; branches that ended leave their slot."""
        prompt = self.request // self.samples
        length = self.prompt_length[prompt] + self.offset - 1  # own tokens already in the cache
        fork = self.prompt_fork[prompt]
        self.cache.begin_step(self.prompt_trunk[prompt], fork, length)
        choose = lambda hidden, head: sample(
            matmul(hidden, head[: self.sampling.vocab_size].t()),
            self.uniform[self.request, self.offset],
            self.sampling.temperature,
        )
        self.token, logprob = self.model(self.token, fork + length, self.cache.attend, choose)
        self.offset = self.offset + 1
        done = torch.isin(self.token, self.stop_ids)
        done |= self.offset >= self.sampling.max_new_tokens
        events = list(zip(self.request.tolist(), self.token.tolist(), logprob.tolist()))
        self._release(done.tolist())
        return events

    def _release(self, done: list[bool]) -> None:
        """Fill the slots of ended branches with the last active ones."""
        alive = [slot for slot, ended in enumerate(done) if not ended]
        count = len(alive)
        if count == len(done):
            return
        targets = [slot for slot, ended in enumerate(done[:count]) if ended]
        sources = alive[count - len(targets) :]
        order = torch.arange(count, device=self.device)
        if targets:
            self.cache.move(sources, targets)
            order[targets] = torch.tensor(sources, device=self.device)
        self.request, self.offset = self.request[order], self.offset[order]
        self.token = self.token[order]


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    logits (n, V) fp32 or wider, uniform (n,) in [0, 1). Returns tokens (n,) and their
    log-probabilities (n,) under the sampled distribution; temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        x = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        # fp64: over 150,000 tokens an fp32 sum would shift the tail's probabilities.
        cumulative = x.double().exp_().cumsum(dim=-1)  # (n, V)
        threshold = uniform[:, None].double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, entropy_logprob(logits, tokens, temperature or 1.0)[0]


def _uniforms(trees: Sequence[Tree], samples: int, sampling: Sampling) -> np.ndarray:
    """(requests, max_new_tokens) in [0, 1): row = one rollout's stream, column = offset."""
    rows = []
    for tree in trees:
        for branch in tree.branches:
            place = (sampling.step, tree.document, branch.fork)
            for rollout in range(samples):
                key = (sampling.seed, PURPOSES[sampling.purpose], *place, rollout)
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
                rows.append(generator.random(sampling.max_new_tokens))
    return np.stack(rows)
