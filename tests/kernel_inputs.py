"""Inputs that real kernels got wrong, and what they should give in fp64.

Random logits around 0 forgive nearly everything: with those and the usual tolerances, most of the
broken kernels of kernel_faults.py pass (kernel_mutants.py counts them). Each case here says which
bug it is there for.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 4096  # of kernels/tiles.py
INF = math.inf


class Logits(NamedTuple):
    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    temperature: Tensor  # (N,)


class Head(NamedTuple):
    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    targets: Tensor
    temperature: Tensor
    vocab_size: int


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def choose(n, high, seed=1):
    return torch.randint(0, high, (n,), generator=torch.Generator().manual_seed(seed))


def _logits(z, targets=None, temperature=None):
    n, v = z.shape
    targets = choose(n, v) if targets is None else torch.as_tensor(targets)
    ones = torch.ones(n, dtype=torch.float64)
    return Logits(z, targets, ones if temperature is None else temperature)


def _peaked():
    """From unsure to surer than fp32 can say 1 − p; everything else far below 0."""
    z = torch.full((12, 300), -60.0, dtype=torch.float64) + draw(12, 300) / 8
    z[:, 7] = z.amax(dim=1) + torch.linspace(3, 25, 12)
    return _logits(z, [7] * 9 + [8, 9, 299])


def _minus_infinity():
    """Some columns, a whole leading tile, all but one, all but the last, and the target's own."""
    z = 3 * draw(5, TILE + 900)
    z[0, 1::2] = -INF
    z[1, :TILE] = -INF
    z[2, torch.arange(z.shape[1]) != TILE + 5] = -INF
    z[3, :-1] = -INF
    z[4, 3] = -INF
    return _logits(z, [0, TILE + 1, TILE + 5, TILE + 899, 3])


def broken_rows():
    """nan and +inf stay in their rows, which are 1, 3 and 5."""
    z = 3 * draw(7, TILE + 900)
    z[1, 5], z[3, TILE + 7], z[5, 0] = math.nan, INF, -math.nan
    return _logits(z)


def _ignored():
    """Targets at the edges of a tile, and every other row without one and not to be read."""
    z = 3 * draw(20, TILE + 900)
    z[1::2] = math.nan
    edges = torch.tensor([0, TILE - 1, TILE, TILE + 899, 17]).repeat_interleave(4)
    return _logits(z, edges.where(torch.arange(20) % 2 == 0, -100), torch.full((20,), 0.6).double())


def _huge():
    """Around 2^24, where fp32 holds only even numbers: z_y − log Σ exp(z) is lost, z_y − m not."""
    z = 2.0**24 + 2 * torch.randint(0, 12, (6, 500), generator=torch.Generator().manual_seed(3))
    return _logits(z.double())


LOGITS = {
    "one-column": lambda: _logits(draw(3, 1)),
    "fewer-columns-than-a-block": lambda: _logits(3 * draw(5, 50)),
    "127-columns": lambda: _logits(3 * draw(4, 127)),
    "1003-columns": lambda: _logits(4 * draw(6, 1003)),
    "1024-columns": lambda: _logits(4 * draw(3, 1024)),
    "151936-columns": lambda: _logits(3 * draw(2, 151936), [0, 151935]),
    "one-row": lambda: _logits(draw(1, 77)),
    "no-row": lambda: _logits(draw(0, 77)),
    "peaked-and-low": _peaked,
    "far-above-0": lambda: _logits(draw(6, 600) + 3000),
    "far-below-0": lambda: _logits(draw(6, 600) - 300),
    "huge": _huge,
    "uniform": lambda: _logits(torch.full((3, 600), -7.0, dtype=torch.float64)),
    "ties": lambda: _logits((2 * draw(6, 600)).round()),
    "steep": lambda: _logits(1e4 * draw(6, 600)),
    "minus-infinity": _minus_infinity,
    "cold": lambda: _logits(3 * draw(6, 600), None, torch.full((6,), 0.01).double()),
    "temperature-per-token": lambda: _logits(
        3 * draw(9, 600), None, torch.linspace(0.2, 3, 9).double()
    ),
    "ignored-and-edges": _ignored,
    "all-ignored": lambda: _logits(torch.full((4, 90), math.nan).double(), [-100] * 4),
}  # fmt: skip


def _head(n, c, v, vocab_size=None, scale=1.0, low=0.0, temperature=1.0):
    """Sure and unsure tokens: the length of the hidden states grows with their number."""
    hidden = draw(n, c, seed=2) * torch.linspace(0.1, 1.5, n)[:, None] * scale
    weight = draw(v, c, seed=3)
    if low:  # one direction that all hidden states have, and the whole vocabulary dislikes
        hidden[:, 0], weight[:, 0] = 1.0, low
    vocab_size = vocab_size or v
    likely = (hidden @ weight[:vocab_size].T).argmax(dim=1)
    targets = torch.where(torch.arange(n) % 2 == 0, likely, choose(n, vocab_size))
    return Head(
        hidden, weight, targets, torch.as_tensor(temperature).double().expand(n), vocab_size
    )


def _half_ignored():
    head = _head(30, 16, 600, temperature=torch.linspace(0.5, 2, 30))
    targets = head.targets.where(torch.arange(30) % 3 != 0, -100)
    hidden = head.hidden.clone()
    hidden[targets == -100] = math.nan  # never read
    return head._replace(hidden=hidden, targets=targets)


def _edge_targets():
    """At both ends of slices, with C and V that no block divides, and padding that would win."""
    head = _head(10, 70, TILE + 901, vocab_size=TILE + 897, temperature=0.6)
    head.weight[TILE + 897 :] *= 9
    edges = torch.tensor([0, TILE - 1, TILE, TILE + 896, 1]).repeat(2)
    return head._replace(targets=edges)


# Σ dz W with one large direction in W: dz adds up to 0 over the vocabulary, and what is left of it
# is rounding. Here a gradient is judged by that of PyTorch in the same dtype alone.
CANCELLING = {"low-logits", "far-below-0"}
HEADS = {
    "one-token": lambda: _head(1, 8, 100),
    "no-token": lambda: _head(0, 8, 100),
    "one-word": lambda: _head(5, 8, 1),
    "50-words": lambda: _head(9, 24, 50),
    "1003-words": lambda: _head(40, 33, 1003),
    "1024-words": lambda: _head(16, 64, 1024),
    "151936-words": lambda: _head(2, 8, 151936),
    "low-logits": lambda: _head(20, 24, 700, vocab_size=650, low=-60.0),
    "far-below-0": lambda: _head(20, 24, 700, vocab_size=650, low=-300.0),
    "cold": lambda: _head(8, 16, 300, scale=0.5, temperature=0.01),
    "edges-and-padding": _edge_targets,
    "half-ignored": _half_ignored,
    "all-ignored": lambda: _head(7, 8, 90)._replace(targets=torch.full((7,), -100)),
}


def cast(case, dtype):
    """The case on the device, its real numbers rounded to dtype; temperatures stay fp32 numbers."""
    parts = case._asdict()
    for name in {"logits", "hidden", "weight"} & parts.keys():
        parts[name] = parts[name].to(DEVICE, dtype).requires_grad_()
    parts["targets"] = parts["targets"].to(DEVICE)
    parts["temperature"] = (
        parts["temperature"].float().to(DEVICE, torch.promote_types(dtype, torch.float32))
    )
    return type(case)(**parts)


def exact(case):
    """The same rounded inputs in fp64, as new leaves."""
    parts = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.dtype.is_floating_point
        else v
        for k, v in case._asdict().items()
    }
    return type(case)(**parts)


def oracle(logits, targets, temperature):
    """log p and entropy in fp64, 0 for ignored rows: softmax as a textbook has it."""
    real = (targets != -100).nonzero()[:, 0]
    log_p = (logits[real] / temperature[real, None]).log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1)
    logprob = log_p.gather(1, targets[real, None])[:, 0]
    zeros = logits.new_zeros(len(logits))
    return zeros.index_put((real,), logprob), zeros.index_put((real,), entropy)


def same_dtype(head: Head, token_loss):
    """Gradients as PyTorch computes them from fp32 logits, with dz in the dtype of hidden."""
    dtype, real = head.hidden.dtype, (head.targets != -100).nonzero()[:, 0]
    hidden, weight, size = head.hidden.detach(), head.weight.detach(), head.vocab_size
    wide = torch.promote_types(dtype, torch.float32)
    x, head_rows = hidden[real].to(wide), weight[:size].to(wide)
    z = (x @ head_rows.T).requires_grad_()
    loss = token_loss(*oracle(z, head.targets[real], head.temperature[real]), real)
    dz = torch.autograd.grad(loss, z)[0].to(dtype).to(wide)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    grad_hidden[real] = (dz @ head_rows).to(dtype)
    grad_weight[:size] = (dz.T @ x).to(dtype)
    return grad_hidden, grad_weight


def oracle_of_head(head: Head):
    """log p, entropy and top-1 of the head's tokens in fp64."""
    real = head.targets != -100
    hidden = torch.where(real[:, None], head.hidden, 0.0)
    logits = hidden @ head.weight[: head.vocab_size].T
    at_target = logits.gather(1, head.targets.where(real, 0)[:, None])[:, 0]
    top1 = real & (at_target >= logits.amax(dim=1))
    return *oracle(logits, head.targets, head.temperature), top1
