"""A whole step of the real model, sharded, on any machine and without its memory.

Model, forest, objective, FSDP2 and optimiser are those of a run; tensors are fake, they have shapes
but no numbers, and so are the other ranks. A tracker sees what is held when. The GPU is a CPU here:
attention and norms are those of fakes.py, layers are not compiled (a GPU holds less), and
PyTorch's tiles of the head hold some 0.3 GB more than Triton's would.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed
from fakes import attend_flex, fuse_norms, make_block_mask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from tracker import Parts, Tracker

from kernels.slices import CHUNK
from models.kv_cache import KVCache
from models.lora import add_adapters
from models.transformer import Transformer
from models.weights import BLOCK_BYTES
from rmt.forest import Forest, pack
from rmt.memory.estimate import Case, cached_tokens, kept_by, total
from rmt.objective import Objective, forest_loss
from rmt.rollout import PREFILL_TOKENS
from rmt.sampling import Sampling, sample
from rmt.system.dist import World, gathered_weights, shard
from rmt.trees import Branch, Tree

aten = torch.ops.aten
WARM_UP = 64  # tokens of a row before it is counted: lazy state of FSDP and of the optimiser


@contextmanager
def fake_world(ranks: int, shards: int) -> Iterator[World]:
    """Rank 0 of a process group whose other ranks are not there."""
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield World(0, ranks, torch.device("cpu"), replicate=ranks // shards)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in it: fake ones cannot be cast later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LargestShapes(TorchDispatchMode):
    """Entered as a context: no number is known, so every row that is looked for is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], FakeTensor):
            if func is aten.nonzero.default and args[0].dim() == 1:
                with unset_fake_temporarily():
                    return torch.arange(len(args[0]))[:, None]
            if func is aten._local_scalar_dense.default:
                return False  # the head asks whether an entropy has a gradient: none in our loss
            if func is aten.index.Tensor:
                args = (args[0], [_rows(index) for index in args[1]])
        return func(*args, **kwargs or {})


def _rows(index: Tensor | None) -> Tensor | None:
    """The rows that a mask of real numbers chooses: a fake tensor can be indexed by those."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return index
    with unset_fake_temporarily():
        return index.nonzero()[:, 0]


class Simulation:
    """Model and optimiser of a case, to be gone through phase by phase inside a `fake_world`."""

    def __init__(self, case: Case, world: World, real: bool = False):
        """real: with numbers after all, to compare with what is measured."""
        c, self.case = case.config, case
        self.fake = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, default_dtype(case.compute if c.lora_rank else torch.float32):
            self.model = Transformer(case.shape)
            add_adapters(self.model, c.lora_rank)
        if case.machine.kind == "cuda":
            fuse_norms(self.model)
        if case.sharded:
            shard(self.model, world, case.compute)
        self.model.configure_training(kept_by(c))
        with self.fake:
            self.optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad], lr=c.learning_rate,
                fused=True,
            )  # fmt: skip
        self.learn([row_of(WARM_UP)], Tracker())
        self.optimizer.zero_grad(set_to_none=True)

    def tracker(self) -> Tracker:
        """With what is held between the phases."""
        tracker = Tracker()
        tracker.note(self.model.parameters(), "master weights")
        state = self.optimizer.state.values()
        tracker.note((x for one in state for x in one.values()), "optimizer state")
        tracker.note((p.grad for p in self.model.parameters()), "gradients")
        return tracker

    def update(self) -> Parts:
        """Two micro-batches, so that gradients are there while the second is computed."""
        self.optimizer.zero_grad(set_to_none=True)
        tracker = self.tracker()
        with tracker:
            self.learn([row_of(WARM_UP), row_of(self.case.row)], tracker)
        return tracker.peak()

    def learn(self, rows: list[Forest], tracker: Tracker) -> None:
        """What rmt.update does, without what asks for numbers."""
        one = torch.ones(1, dtype=torch.float64)
        vocab = self.case.shape.vocab_size
        objective = Objective(one, one, 0.1, 0.8, vocab, 0.2, 0.2, 0.0)
        chunk = CHUNK[self.case.machine.kind]
        with LargestShapes():
            for forest in rows:
                loss, *_ = forest_loss(self._runner(tracker), forest, objective, chunk=chunk)
                with self.fake:
                    loss.backward()
                tracker.note((p.grad for p in self.model.parameters()), "gradients")
            with self.fake:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()

    def _runner(self, tracker: Tracker, model: Transformer | None = None):
        """The model as a function that labels what happens inside, and whose attention is fake."""
        gpu = self.case.machine.kind == "cuda"

        def run(tokens, positions, attend, readout):
            def labelled(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if gpu and layer == 0:
                    with tracker.of("block mask"):
                        make_block_mask(len(q), q.device)
                with tracker.of("activations"):
                    return attend_flex(q, k, v) if gpu else attend(layer, q, k, v)

            def read(hidden, head):
                # Which tokens are targets is known: their indices are no fake tensors.
                with unset_fake_temporarily(), tracker.of("head slices"):
                    return readout(hidden, head)

            with self.fake:
                return (model or self.model)(tokens, positions, labelled, read)

        return run

    def rollout(self) -> Parts:
        """Prefill and a decoding step with gathered weights and a full cache."""
        case, c = self.case, self.case.config
        self.optimizer.zero_grad(set_to_none=True)
        drawing = Tracker()
        with drawing:
            self._draw()
        tracker, trunks = self.tracker(), cached_tokens(case)
        with self.fake, torch.no_grad(), gathered_weights(self.model) as sampler:
            if case.sharded:
                tracker.note(sampler.parameters(), "gathered weights")
            with tracker:
                with tracker.of("KV cache"):
                    cache = KVCache(
                        case.shape, trunks, 0, c.max_branches,
                        len(case.prompt.footer) + c.max_response + 1, torch.device("meta"),
                        case.compute,
                    )  # fmt: skip
                forest, nothing = row_of(min(PREFILL_TOKENS, trunks)), lambda hidden, head: None
                run = self._runner(tracker, sampler)
                run(forest.tokens, forest.position, forest.attend, nothing)
                with tracker.of("sampler"):  # a recorded step has memory of its own
                    recorded = torch.empty(total(drawing.peak()), dtype=torch.uint8, device="meta")
                    self._draw()
                del cache, recorded
        return tracker.peak()

    def _draw(self) -> None:
        """A token for each branch."""
        branches, vocab = self.case.config.max_branches, self.case.shape.vocab_size
        with self.fake:
            logits = torch.empty(branches, vocab)
            sample(logits, torch.empty(branches, dtype=torch.float64), Sampling(1, (), vocab, 0.8))

    def load(self) -> Parts:
        """Weights where they stay, and a block of a file on its way there."""
        tracker = Tracker()
        tracker.note(self.model.parameters(), "master weights")
        with tracker, tracker.of("temporary"):
            torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="meta")
        return tracker.peak()

    def checkpoint(self) -> Parts:
        """What there is, a tensor at a time on its way to the host."""
        tracker = self.tracker()
        largest = max(x.to_local().nbytes for x in self.model.parameters())
        return tracker.peak() | {"temporary": largest}

    def export(self) -> Parts:
        """One whole tensor at a time."""
        tracker = self.tracker()
        with tracker, self.fake, torch.no_grad():
            for parameter in self.model.parameters():
                with tracker.of("temporary"):
                    parameter.full_tensor() if self.case.sharded else parameter
        return tracker.peak()


def row_of(tokens: int) -> Forest:
    """A packed row of made-up tokens of which nearly all are targets."""
    prompt = (0,) * 4
    response = (0,) * (tokens - 2 * len(prompt))
    return pack([Tree(0, prompt, (Branch(0, len(prompt), prompt, response),))])
