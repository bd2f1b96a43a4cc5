"""How much memory the phases of a run need, in bytes per rank.

Sums over what is held at the fullest moments. autofit.py chooses knobs by them and dry_run.py shows
them; tests/simulate.py runs a whole step on fake tensors and finds the same to 5 %. Shapes: n
tokens of a row, C hidden, I intermediate, H heads, K key/value heads, D head dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from kernels.slices import CHUNK, SLICE
from models.config import ModelConfig
from models.kv_cache import KVCache
from models.transformer import Block
from rmt.config.config import Config
from rmt.forest import padded_length
from rmt.prompt import PromptIds
from rmt.rollout import PREFILL_TOKENS

Parts = dict[str, int]  # label -> bytes

MASK_BYTES = 6  # of each pair of tokens, while create_block_mask evaluates Eq. 11 for a forest
CACHED_TOKENS = 1 << 15  # of documents that an evaluation holds at one time
MOST_BRANCHES = 256  # beyond, a GPU's decode step is bound by arithmetic, no longer by memory
ROW_TOKENS = 1 << 14  # of a micro-batch: beyond, nothing becomes faster
# What the tensors of a run cannot have. Usual values; no GPU has measured them here.
CONTEXT = 0.6e9  # the CUDA context, the kernels that are loaded, cuBLAS's workspace
NCCL = 1.0e9  # its buffers, where there are several ranks
FRAGMENTED = 0.05  # share of the rest that lies in pieces too small for what is asked
HOST = ("master weights", "optimizer state", "gradients")  # what --offload keeps there


@dataclass(frozen=True)
class Machine:
    """What a rank has."""

    kind: str  # of its device: cuda or cpu
    ranks: int
    shards: int  # ranks that hold one copy of the model between them
    room: float  # bytes for tensors, after the reserves

    @classmethod
    def described(cls, ranks: int, shards: int, memory: float) -> "Machine":
        """GPUs of `memory` bytes each."""
        room = (memory - CONTEXT - NCCL * (ranks > 1)) * (1 - FRAGMENTED)
        return cls("cuda", ranks, shards, room)


@dataclass(frozen=True)
class Case:
    """Everything that the memory of a run depends on; knobs of `config` that are 0 or auto: open"""

    config: Config
    shape: ModelConfig
    compute: torch.dtype
    prompt: PromptIds
    machine: Machine
    trainable: bool = True

    @property
    def sharded(self) -> bool:
        special = self.config.offload or self.compute != torch.float32
        return self.machine.ranks > 1 or (self.trainable and special)

    @property
    def documents(self) -> int:
        return math.ceil(self.config.batch_size / self.machine.ranks)

    @property
    def longest(self) -> int:
        """Tokens of a document with one response: what cannot be split."""
        return self.config.document_tokens + len(self.prompt) + self.config.max_response

    @property
    def row(self) -> int:
        """Tokens of the largest micro-batch: a full one, a tree, or all that a step has."""
        c = self.config
        group = len(self.prompt.footer) + c.group_size * c.max_response
        questions = len(self.prompt.header) + c.document_tokens + c.positions_per_document * group
        most = self.documents * (questions + c.document_tokens + 1)
        row = min(most, max(c.tokens_per_micro_batch, self.longest))
        return padded_length(row) if self.machine.kind == "cuda" else row


@cache
def parameters(shape: ModelConfig) -> tuple[int, int]:
    """How many the root of the model has (embedding, head, last norm), and each layer."""
    tables = 1 if shape.tie_word_embeddings else 2
    with torch.device("meta"):
        layer = sum(p.numel() for p in Block(shape).parameters())
    return (tables * shape.vocab_size + 1) * shape.hidden_size, layer


@dataclass(frozen=True)
class Layer:
    """Bytes per token of a row."""

    kept: float  # from forward to backward pass
    backward: float  # besides, while it is differentiated
    forward: float  # at most, in a pass without gradient


def layer(shape: ModelConfig, compute: torch.dtype, recompute: str) -> Layer:
    """What autograd keeps of a layer on a GPU, with FlexAttention and fused norms."""
    c, i, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    rows = heads + shape.num_key_value_heads
    hd, size, norms = rows * shape.head_dim, compute.itemsize, int(shape.qk_norm)
    mlp = size * (c + 2 * i)  # gradients of its output, gate and up
    # Inputs of norms and products, q, k, v, attention's output; fp32: norms and log-sum-exp.
    whole = size * (4 * c + (2 + norms) * hd + 4 * i) + 4 * (2 + heads + norms * rows)
    products = size * (3 * c + 3 * hd + 2 * i) + 4 * heads
    forward = size * (2 * c + 2 * hd + 3 * i)
    return {
        "none": Layer(whole, mlp, forward),
        "selective": Layer(products, 2 * mlp, forward),
        "full": Layer(size * c, whole + mlp, forward),
    }[recompute]


def states(case: Case) -> Parts:
    """What stays from step to step, wherever it is kept; gradients until the next rollouts."""
    root, each = parameters(case.shape)
    own = (root + each * case.shape.num_hidden_layers) // case.machine.shards
    if not case.trainable:
        return {"master weights": case.compute.itemsize * own}
    parts = {"master weights": 4 * own, "optimizer state": 8 * own, "gradients": 4 * own}
    if case.config.kl_beta:
        parts["reference weights"] = case.compute.itemsize * own
    return parts


def on_device(case: Case, parts: Parts) -> Parts:
    return {k: v for k, v in parts.items() if not (case.config.offload and k in HOST)}


def host_copies(case: Case) -> Parts:
    """With --offload: the root on its way from the host, each tensor in fp32, then in `compute`."""
    root, _ = parameters(case.shape)
    head = case.shape.vocab_size * case.shape.hidden_size
    size = (4 * head + case.compute.itemsize * root) // case.machine.shards
    return {"copies from the host": size} if case.config.offload else {}


def update(case: Case) -> Parts:
    """The worst moment on a GPU of forward and backward passes over the largest row."""
    held = on_device(case, states(case)) | host_copies(case)
    return max((held | moment for moment in _moments(case)), key=total)


def _moments(case: Case) -> Iterator[Parts]:
    shape, size, n = case.shape, case.compute.itemsize, case.row
    (root, each), layers = parameters(shape), shape.num_hidden_layers
    own = layer(shape, case.compute, kept_by(case.config))
    kept, gathered = n * own.kept * layers, size * case.sharded
    # The head: its gradient in fp32, exponentials of a chunk, slices of logits on their way.
    head, width = shape.vocab_size * shape.hidden_size, 2 if size == 2 else size
    chunk = math.ceil(n / math.ceil(n / CHUNK["cuda"]))  # they are dealt out evenly
    exponentials = chunk * (width * shape.vocab_size + 16 * (SLICE + shape.hidden_size))
    hidden = 3 * n * shape.hidden_size * size
    yield {
        "gathered weights": gathered * (root + each),
        "activations": kept + hidden,
        "head slices": 4 * head + exponentials,
    }
    # Its backward pass begins: the root is gathered again, and the layer before it on its way.
    yield {
        "gathered weights": gathered * 2 * root,
        "activations": kept + hidden,
        "head slices": (4 + size) * head,
    }
    # The first layer of the backward pass, while the next is gathered and the last one reduced.
    yield {
        "gathered weights": gathered * (root + 2 * each),
        "activations": kept + n * own.backward + hidden,
        "gradients in reduction": 4 * each * case.sharded,
        "temporary": size * (head * case.sharded + each),
    }
    # The root at the end: gradients of embedding and head, and both in fp32 for the reduction.
    yield {
        "gathered weights": gathered * root,
        "gradients in reduction": 4 * root * case.sharded,
        "temporary": size * max(root, head + head),
    }
    yield {"gathered weights": gathered * (root + each), "block mask": MASK_BYTES * n * n}


def kept_by(config: Config) -> str:
    """--recompute, as a layer on a GPU would have it without torch.compile."""
    compiled = config.compile != "off" and config.recompute == "none"
    return "selective" if compiled else config.recompute


def rollout(case: Case, branches: int = 0) -> Parts:
    """What sampling holds: weights, documents, their prefill, and so many branches."""
    root, each = parameters(case.shape)
    kind, size, n = case.machine.kind, case.compute.itemsize, PREFILL_TOKENS
    parts = on_device(case, states(case))
    parts.pop("gradients", None)  # they made room
    tokens = case.documents * (len(case.prompt) + case.config.document_tokens)
    cache = max(tokens, CACHED_TOKENS) * KVCache.bytes_per_token(case.shape, case.compute)
    pairs = n * n * MASK_BYTES * (kind == "cuda")
    prefill = n * layer(case.shape, case.compute, "none").forward
    whole = root + each * (case.shape.num_hidden_layers + 1)  # one is on its way
    gathered = {"gathered weights": size * whole} if case.sharded else {}
    own, logits = branch(case)
    cache += branches * own
    held = {"KV cache": cache, "temporary": max(pairs, prefill), "sampler": branches * logits}
    return parts | gathered | held


def branch(case: Case) -> tuple[int, int]:
    """Bytes of a branch's own keys and values, and of its logits while a token is drawn."""
    capacity = len(case.prompt.footer) + case.config.max_response + 1
    # fp32, exponentials and a copy; and the same again in the memory of a recorded step.
    logits = 2 * 3 * 4 * case.shape.vocab_size
    return capacity * KVCache.bytes_per_token(case.shape, case.compute), logits


def total(parts: Parts) -> int:
    return sum(parts.values())
