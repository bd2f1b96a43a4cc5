"""Keys and values for decoding: each trunk once, and a row of their own for the branches on it.

A slot holds one branch. Active slots are always the first n, so that a decode step works on views:
when a branch ends, the last slot moves into its place. Attention to the trunk and to the branch
are computed apart and merged by their log-sum-exp, so trunk keys are read once for all branches
that share them and are never copied.

Shapes: R trunks, T trunk tokens, n active slots, L own tokens, H heads, K key/value heads,
D head dim; H = K · rep.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import matmul


class KVCache:
    """Decode-time attention over shared trunks plus branches. Lives for one set of weights."""

    def __init__(self, layers: int, slots: int, limit: int):
        """At most `slots` branches at a time, each of at most `limit` tokens of its own."""
        self.layers, self.slots, self.limit = layers, slots, limit
        self.trunk: list[tuple[Tensor, Tensor]] = []  # per layer: (R, K, T, D) twice
        self.prompt: list[tuple[Tensor, Tensor]] = []  # per layer: (branches, K, P, D) twice
        self.own: list[tuple[Tensor, Tensor]] = []  # per layer: (slots, K, capacity, D) twice
        self.capacity = 0
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    def capture(self, attend):
        """Wrap a forest's attention so that its keys and values are kept."""

        def attend_and_keep(layer, q, k, v):
            self._packed[layer] = (k, v)
            return attend(layer, q, k, v)

        return attend_and_keep

    def arrange(self, trunk_rows: Tensor, prompt_rows: Tensor) -> None:
        """Sort what was captured: trunk_rows (R, T) and prompt_rows (branches, P) index the row.

        Padding may point anywhere: it is masked by lengths when it is read.
        """
        for layer in range(self.layers):
            kept = self._packed.pop(layer)
            self.trunk.append(tuple(x[trunk_rows].transpose(1, 2).contiguous() for x in kept))
            self.prompt.append(tuple(x[prompt_rows].transpose(1, 2).contiguous() for x in kept))
        self._grow(prompt_rows.shape[1] + 64)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` tokens per slot; doubling keeps the number of copies small."""
        if needed <= self.capacity:
            return
        old, self.capacity = self.capacity, min(self.limit, max(needed, 2 * self.capacity))
        for layer in range(self.layers):
            grown = []
            for which in range(2):
                like = self.trunk[layer][which]
                _, heads, _, size = like.shape
                row = like.new_zeros(self.slots, heads, self.capacity, size)
                if old:
                    row[:, :, :old] = self.own[layer][which]
                grown.append(row)
            self.own[layer : layer + 1] = [tuple(grown)]

    def admit(self, first_slot: int, branches: Sequence[int]) -> None:
        """Put copies of branch prompts into the slots from first_slot on."""
        length = self.prompt[0][0].shape[2]
        target = slice(first_slot, first_slot + len(branches))
        for own, prompt in zip(self.own, self.prompt):
            for row, source in zip(own, prompt):
                row[target, :, :length] = source[list(branches)]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move slots, so that the active ones stay the first n."""
        for own in self.own:
            for row in own:
                row[list(targets)] = row[list(sources)]

    def begin_step(self, trunk: Tensor, fork: Tensor, length: Tensor) -> None:
        """Say where the n active slots stand: their trunk, its visible part, their own length.

        All three (n,) int64. `length` tokens are in the cache; this step appends one more.
        """
        self._grow(int(length.max()) + 1)
        n, device = len(trunk), trunk.device
        self._length, self._longest = length, int(length.max()) + 1
        # Slots are filled in the order of the trunks: those in use lie in a window, a view.
        self._window = slice(int(trunk.min()), int(trunk.max()) + 1)
        trunk = trunk - self._window.start
        # Slots of a trunk side by side: a rectangle (trunks, slots on it) with holes at index 0.
        order = torch.argsort(trunk, stable=True)
        counts = torch.bincount(trunk)
        start = counts.cumsum(0) - counts
        column = torch.empty_like(trunk)
        column[order] = torch.arange(n, device=device) - start[trunk[order]]
        place = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64, device=device)
        place[trunk, column] = torch.arange(n, device=device)
        self._place, self._where = place, (trunk, column)
        tokens = torch.arange(self.trunk[0][0].shape[2], device=device)
        self._hidden_trunk = tokens >= fork[place][:, None, :, None, None]  # (R, 1, m, 1, T)
        own = torch.arange(self._longest, device=device)
        self._hidden_own = own > length[:, None, None, None]  # (n, 1, 1, L)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v (n, K, D) to the branches and attend with q (n, H, D) -> (n, H, D)."""
        n, heads, size = q.shape
        own_k, own_v = self.own[layer]
        rows = torch.arange(n, device=q.device)
        own_k[rows, :, self._length], own_v[rows, :, self._length] = k, v
        q = (q * size**-0.5).view(n, k.shape[1], -1, size)  # (n, K, rep, D)
        parts = [
            self._attend_trunk(q, *(x[self._window] for x in self.trunk[layer])),
            _softmax_values(
                q,
                own_k[:n, :, : self._longest],
                own_v[:n, :, : self._longest],
                self._hidden_own,
            ),
        ]
        return _merge(*parts).to(q.dtype).reshape(n, heads, size)

    def _attend_trunk(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        trunks, m = self._place.shape
        kv_heads, rep, size = q.shape[1:]
        grouped = q[self._place].transpose(1, 2)  # (R, K, m, rep, D)
        hidden = self._hidden_trunk.expand(-1, -1, -1, rep, -1).flatten(2, 3)  # (R, 1, m·rep, T)
        out, lse = _softmax_values(grouped.flatten(2, 3), k, v, hidden)
        out = out.view(trunks, kv_heads, m, rep, size)
        lse = lse.view(trunks, kv_heads, m, rep)
        row, column = self._where
        return out[row, :, column], lse[row, :, column]  # (n, K, rep, D), (n, K, rep)


def _softmax_values(q, k, v, hidden) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, fp32. q (B, K, M, D), k, v (B, K, S, D), hidden (B, 1, M, S)."""
    batch, heads = k.shape[:2]
    scores = matmul(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))  # (B·K, M, S)
    scores = scores.view(batch, heads, *scores.shape[1:]).masked_fill(hidden, -math.inf)
    # A branch that sees no trunk token (fork 0) has only hidden keys: weight 0, not nan.
    largest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = matmul(weights.to(v.dtype).flatten(0, 1), v.flatten(0, 1))
    out = out.view(batch, heads, *out.shape[1:]) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return out, (largest + total.log())[..., 0]


def _merge(trunk: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax over two sets of keys from the softmax over each (online softmax)."""
    (trunk_out, trunk_lse), (own_out, own_lse) = trunk, own
    share = torch.sigmoid(trunk_lse - own_lse)[..., None]  # weight of the trunk
    return share * trunk_out + (1 - share) * own_out
