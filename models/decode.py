"""The decode loop: one static step for all active branches, on a GPU replayed as a CUDA graph.

A branch has a slot: an entry in each buffer that a step reads or writes; buffers never move. The
step itself marks branches that are done, so the host need not wait for each token. Every POLL steps
the host gives the slots of ended branches to waiting ones, or, when none waits, moves the last
active ones down. A branch that ends in between keeps decoding; tokens past its end are ignored.

Shapes: n active slots, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TrunkGroups, matmul
from kernels.dispatch import choice
from models.kv_cache import KVCache
from models.transformer import Transformer

POLL = {"cpu": 1, "cuda": 16}  # steps; reading `done` synchronizes a GPU, a CPU not


@dataclass(frozen=True)
class BranchStart:
    """The place of a branch's prompt in the cache."""

    start: int  # of its trunk in the trunk cache
    fork: int  # how many of the trunk's tokens it sees
    first: int  # of its own tokens in the prompt cache
    length: int  # own tokens there: all but the last
    last: int  # the last token, which the first decode step is fed


class DecodeLoop:
    """The branches of one call of the sampler; request = prompt · samples + sample."""

    def __init__(
        self, model: Transformer, cache: KVCache, prompts: Sequence[BranchStart],
        uniform: Tensor, stop_ids: Sequence[int],
        draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ):  # fmt: skip
        """uniform (requests, limit): the random number of every draw; `cache` holds all prompts.

        draw: from logits (n, V) and numbers (n,) to tokens (n,) and their log-probabilities (n,).
        """
        self.model, self.cache, self.prompts, self.draw = model, cache, prompts, draw
        (self.requests, self.limit), device = uniform.shape, uniform.device
        self.samples = self.requests // len(prompts)
        # A CPU has no product of 16-bit numbers with an fp32 result: the head is widened once.
        wide = torch.promote_types(model.head.dtype, torch.float32)
        self.head = model.head.to(wide) if device.type == "cpu" else model.head
        self.stop_ids = torch.tensor(stop_ids, device=device, dtype=torch.int64)
        # One more row, for idle slots, and one more column, for branches that are done.
        self.uniform = F.pad(uniform, (0, 1, 0, 1))
        self.tokens = torch.zeros_like(self.uniform, dtype=torch.int64)
        self.logprobs = torch.zeros_like(self.uniform, dtype=wide)
        self.count = torch.zeros(self.requests + 1, dtype=torch.int64, device=device)
        # start, fork, own length in the cache, request, offset, token, done: (slots,) each
        self.idle = torch.tensor([[0, 0, 0, self.requests, 0, 0, 1]], device=device).t()
        self.state = self.idle.repeat(1, cache.slots)
        self.waiting = deque(range(self.requests))
        self.held: list[int] = []  # the request of each active slot
        self.longest = 0  # upper bound on the own tokens of an active slot
        graphs = device.type == "cuda" and choice(self.head) != "reference"
        self.recorded = graphs and self.limit > 1  # one step would be recorded and not replayed
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.recorded else None
        self.tables: dict[int, Tensor] = {}

    def run(self) -> Iterator[None]:
        """Decode all requests; yield after each poll, before slots are reused."""
        self._fill([])
        while self.held:
            for _ in range(min(POLL[self.state.device.type], self.limit)):
                self._advance(self._width())
            yield
            done = self.state[-1, : len(self.held)]
            if done.any():
                self._fill(done.nonzero()[:, 0].tolist())

    def responses(self, requests: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Return tokens and log-probabilities of these requests, as far as they are decoded."""
        index = torch.tensor(requests, device=self.count.device)
        columns = (self.count[index], self.tokens[index], self.logprobs[index])
        return [(t[:count], p[:count]) for count, t, p in zip(*(x.tolist() for x in columns))]

    def _fill(self, ended: list[int]) -> None:
        """Give the slots of ended branches to waiting ones, then close the gaps that are left."""
        free = ended + list(range(len(self.held), self.cache.slots))
        slots = free[: len(self.waiting)]
        if slots:
            self._admit(slots, [self.waiting.popleft() for _ in slots])
        if gaps := ended[len(slots) :]:
            self._compact(gaps)
        if self.held:
            start, fork, length = self.state[:3, : self._width()].tolist()
            self.longest = max(length)
            self._tile(start, fork)

    def _width(self) -> int:
        """Count the slots that a step computes: those in use, of a recorded step a few more."""
        return _bucket(len(self.held), self.cache.slots) if self.recorded else len(self.held)

    def _admit(self, slots: list[int], requests: list[int]) -> None:
        prompts = [self.prompts[request // self.samples] for request in requests]
        self.cache.admit(slots, [p.first for p in prompts], [p.length for p in prompts])
        # The first step is fed the prompt's last token, and gives the response's first.
        columns = [
            (p.start, p.fork, p.length, request, 0, p.last, 0)
            for p, request in zip(prompts, requests)
        ]
        self.state[:, slots] = torch.tensor(columns, device=self.state.device).t()
        held = dict(enumerate(self.held)) | dict(zip(slots, requests))
        self.held = [held[slot] for slot in range(len(held))]

    def _compact(self, gaps: list[int]) -> None:
        """Move the last active slots into the gaps, so that the active ones are the first n."""
        alive = sorted(set(range(len(self.held))) - set(gaps))
        targets = [slot for slot in gaps if slot < len(alive)]
        sources = alive[len(alive) - len(targets) :]
        if targets:
            self.cache.move(sources, targets, self.longest)
            self.state[:, targets] = self.state[:, sources]
            for source, target in zip(sources, targets):
                self.held[target] = self.held[source]
        self.state[:, len(alive) :] = self.idle
        self.held = self.held[: len(alive)]

    def _tile(self, start: list[int], fork: list[int]) -> None:
        """Group branches by trunk; for recorded steps, in the table that they read."""
        config, device = self.model.config, self.state.device
        heads = (config.num_attention_heads, config.num_key_value_heads)
        trunks = len({prompt.start for prompt in self.prompts})
        most = TrunkGroups.most(len(start), trunks, *heads) if self.recorded else None
        self.tiles = TrunkGroups.of(start, fork, device, *heads, most)
        if self.recorded:
            table = self.tables.setdefault(len(start), self.tiles.table)
            table.copy_(self.tiles.table)
            self.tiles = replace(self.tiles, table=table)

    def _advance(self, n: int) -> None:
        """One step of the first n slots."""
        self.longest += 1
        if n in self.graphs:
            self.graphs[n].replay()
            return
        self._step(n)  # also the warm-up that recording needs: kernels are compiled, caches filled
        if self.recorded:
            self.graphs[n] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[n], self.pool, capture_error_mode="thread_local"):
                self._step(n)  # recorded, not run

    def _step(self, n: int) -> None:
        """One token for each of the first n slots; no shape depends on what is computed."""
        # Views of self.state: what is written to them stays.
        start, fork, length, request, offset, token, done = self.state[:, :n]
        self.cache.begin_step(start, fork, length, self.tiles)
        logits_of = lambda hidden: matmul(hidden.to(self.head.dtype), self.head.t())
        choose = lambda hidden, _head: self.draw(logits_of(hidden), self.uniform[request, offset])
        drawn, logprob = self.model(token, fork + length, self.cache.attend, choose)
        self.tokens[request, offset] = drawn
        self.logprobs[request, offset] = logprob
        token.copy_(drawn)
        for counter in (offset, length):
            counter += 1 - done
        self.count[request] = offset
        ended = (drawn[:, None] == self.stop_ids).any(dim=1) | (offset >= self.limit)
        done |= ended


def _bucket(branches: int, slots: int) -> int:
    """Round up to a size of which a step is recorded."""
    size = 1 << (branches - 1).bit_length() if branches <= 8 else -(-branches // 16) * 16
    return min(size, slots)
