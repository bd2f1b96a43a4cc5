"""Key/value cache for decoding: each trunk is stored once, each branch has a slot of its own.

All trunks lie one after another in one flat cache; a slot holds the own tokens of one branch. The
active slots are the first n. Buffers never move or grow, so that a decode step can be captured once
as a CUDA graph and replayed. kernels.branch_attention attends to both parts.

Shapes: T trunk tokens of all trees, P prompt tokens of all branches, n active slots, H heads,
K key/value heads, D head dim. The first two dimensions of each buffer are layers and (key, value).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import Seen, TrunkGroups, branch_attention
from models.config import ModelConfig


class KVCache:
    """Decode-time attention over shared trunks and branches; valid for one set of weights."""

    def __init__(
        self, config: ModelConfig, trunk_tokens: int, prompt_tokens: int, slots: int,
        capacity: int, device: torch.device, dtype: torch.dtype,
    ):  # fmt: skip
        """Allocate all trunks and prompts, and `slots` branches of `capacity` tokens each."""
        shape = (config.num_hidden_layers, 2)
        token = (config.num_key_value_heads, config.head_dim)
        zeros = lambda *size: _zeros((*shape, *size, *token), device, dtype)
        self.trunk = zeros(trunk_tokens)  # (layers, 2, T, K, D)
        self.prompt = zeros(max(1, prompt_tokens))  # (layers, 2, P, K, D)
        self.own = zeros(slots, capacity)  # (layers, 2, slots, capacity, K, D)
        self.slots, self.capacity = slots, capacity

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        heads = config.num_hidden_layers * config.num_key_value_heads
        return 2 * heads * config.head_dim * dtype.itemsize

    def capture(self, attend, places: Sequence[slice], rows: Sequence[Tensor]):
        """Wrap a forest's attention so that it also stores keys and values.

        Of x (N, K, D) rows[0] are stored in the trunks, at places[0]; rows[1] in the prompts.
        """

        def attend_and_keep(layer, q, k, v):
            for part, x in enumerate((k, v)):
                for buffer, place, own in zip((self.trunk, self.prompt), places, rows):
                    buffer[layer, part, place] = x[own]
            return attend(layer, q, k, v)

        return attend_and_keep

    def admit(self, slots: Sequence[int], first: Sequence[int], count: Sequence[int]) -> None:
        """Copy prompt tokens first .. first + count to the start of each slot."""
        longest = max(count)
        if longest == 0:
            return
        first = torch.tensor(first, device=self.own.device)
        # A shorter prompt is followed by its neighbour's keys, which its length masks.
        rows = first[:, None] + torch.arange(longest, device=first.device)
        rows.clamp_(max=self.prompt.shape[2] - 1)
        slots = torch.tensor(slots, device=first.device)
        self.own[:, :, slots, :longest] = self.prompt[:, :, rows]

    def move(self, sources: Sequence[int], targets: Sequence[int], longest: int) -> None:
        """Copy slots of at most `longest` tokens, to keep the active ones the first n."""
        sources, targets = (torch.tensor(x, device=self.own.device) for x in (sources, targets))
        for own in self.own:  # a layer's copy at a time
            own[:, targets, :longest] = own[:, sources, :longest]

    def begin_step(self, start: Tensor, fork: Tensor, length: Tensor, tiles: TrunkGroups) -> None:
        """Set the trunk, its visible part and the own length of the n active slots for a step.

        start, fork, length (n,) int64: `length` tokens are in the slot, and this step appends one.
        Nothing here depends on values: a recorded step is replayed with others.
        """
        slot = torch.arange(len(length), device=length.device)
        self._place = slot * self.capacity + length  # of the new token in the flattened slots
        self._seen = Seen(start, fork, length + 1, tiles)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v (n, K, D) to the branches and attend with q (n, H, D) -> (n, H, D)."""
        own_k, own_v = self.own[layer]
        own_k.flatten(0, 1).index_copy_(0, self._place, k)
        own_v.flatten(0, 1).index_copy_(0, self._place, v)
        return branch_attention(q, *self.trunk[layer], own_k, own_v, self._seen)


def _zeros(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on a CPU pages take memory only when they are first written."""
    if device.type != "cpu":
        return torch.zeros(size, device=device, dtype=dtype)
    raw = np.zeros(int(np.prod(size)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(size)
