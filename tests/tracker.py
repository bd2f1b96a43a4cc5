"""Who holds how much memory when: a tracker of every tensor that comes and goes, real or fake.

Storages are counted, not tensors, so that views are free. Each has a label; what a region of the
code or FSDP has not labelled is an activation where gradients are recorded, else temporary. Labels
may be given later, when it is known what became of a tensor: the peak is looked for at the end.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmt.memory.estimate import Parts

FSDP = "torch/distributed/fsdp/_fully_shard/"
GATHERED, REDUCED = "gathered weights", "gradients in reduction"
FRAMES = 24  # between a tensor's birth and FSDP's function, at most


class Tracker(TorchDispatchMode):
    """Entered as a context: counts the tensors that operations return, until they are freed."""

    def __init__(self):
        super().__init__()
        self.region: str | None = None
        self.labels: list[str] = []  # of each storage that was ever seen, by number
        self.events: list[tuple[int, int]] = []  # number of a storage, bytes more or less
        self._live: dict[int, tuple[int, int, weakref.ref]] = {}  # address: number, bytes, storage
        self._resized: set[int] = set()  # addresses of storages that FSDP empties and fills

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as what it does to its local tensors
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # a fake one would return a copy, which no device makes
        out = func(*args, **kwargs or {})
        self._look_again()
        label = self.region or _label()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, label)
        return out

    @contextmanager
    def of(self, region: str) -> Iterator[None]:
        """Everything that is made inside has this label."""
        self.region, before = region, self.region
        try:
            yield
        finally:
            self.region = before

    def note(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Count tensors that were there before, and label all of them."""
        for tensor in tensors:
            if tensor is not None:
                number = self._see(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
                self.labels[number] = label

    def peak(self, since: int = 0) -> Parts:
        """What was held when the most was held, after event number `since`."""
        held = most = 0
        at = len(self.events)
        for index, (_, change) in enumerate(self.events):
            held += change
            if index >= since and held > most:
                most, at = held, index + 1
        return self.held(at)

    def held(self, at: int | None = None) -> Parts:
        """What was held after the first `at` events."""
        parts: Parts = {}
        for number, change in self.events[:at]:
            label = self.labels[number]
            parts[label] = parts.get(label, 0) + change
        return {label: size for label, size in parts.items() if size}

    def _see(self, tensor: Tensor, label: str = "temporary") -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            number, size = len(self.labels), storage.nbytes()
            self.labels.append(label)
            self.events.append((number, size))
            gone = lambda _, address=address: self._forget(address)
            self._live[address] = (number, size, weakref.ref(storage, gone))
            if label == GATHERED:
                self._resized.add(address)
        return self._live[address][0]

    def _forget(self, address: int) -> None:
        number, size, _ = self._live.pop(address)
        self._resized.discard(address)
        self.events.append((number, -size))

    def _look_again(self) -> None:
        """FSDP frees and fills the storages of gathered weights without any operation."""
        for address in self._resized:
            number, size, reference = self._live[address]
            now = reference().nbytes()
            if now != size:
                self._live[address] = (number, now, reference)
                self.events.append((number, now - size))


def _label() -> str:
    """By who is asking: FSDP's gather or reduction, or what records gradients, or the rest."""
    frame, found = sys._getframe(2), False
    for _ in range(FRAMES):
        if frame is None or (found and FSDP not in frame.f_code.co_filename):
            break
        found = FSDP in frame.f_code.co_filename
        if found and frame.f_code.co_name == "foreach_reduce":
            return REDUCED
        frame = frame.f_back
    if found:
        return GATHERED
    return "activations" if torch.is_grad_enabled() else "temporary"
