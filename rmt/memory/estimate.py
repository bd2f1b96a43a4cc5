"""Estimate the peak memory of sampling and updating, in bytes per rank.

autofit.py chooses knobs by these sums and dry_run.py prints them; tests/simulate.py runs a whole
step on fake tensors and finds the same to 5 %.
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

MASK_BYTES = 6  # per pair of tokens, while create_block_mask evaluates Eq. 11 for a forest
CACHED_TOKENS = 1 << 15  # of documents whose keys and values an evaluation holds at a time
MOST_BRANCHES = 256  # with more, a decode step on a GPU is bound by arithmetic, not by memory
ROW_TOKENS = 1 << 14  # of a micro-batch; longer ones are no faster
# Memory that tensors cannot use: usual values, not measured here.
CONTEXT = 0.6e9  # CUDA context, loaded kernels, cuBLAS workspace
NCCL = 1.0e9  # buffers of NCCL, with several ranks
FRAGMENTED = 0.05  # share of the rest that is lost to fragmentation
HOST = ("master weights", "optimizer state", "gradients")  # in host memory with --offload


@dataclass(frozen=True)
class Machine:
    """The ranks of a run and the memory of each."""

    kind: str  # of the device: cuda or cpu
    ranks: int
    shards: int  # ranks that share one copy of the model
    room: float  # bytes that tensors may use


@dataclass(frozen=True)
class Case:
    """All that the memory of a run depends on; knobs of `config` that are 0 or auto are open."""

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
        """Tokens of a document with one response, which cannot be split."""
        return self.config.document_tokens + len(self.prompt) + self.config.max_response

    @property
    def row(self) -> int:
        """Tokens of the largest micro-batch: a full one, a single tree, or a whole step."""
        c = self.config
        group = len(self.prompt.footer) + c.group_size * c.max_response
        questions = len(self.prompt.header) + c.document_tokens + c.positions_per_document * group
        most = self.documents * (questions + c.document_tokens + 1)
        row = min(most, max(c.tokens_per_micro_batch, self.longest))
        return padded_length(row) if self.machine.kind == "cuda" else row


@cache
def parameters(shape: ModelConfig) -> tuple[int, int]:
    """Count the parameters of the root (embedding, head, last norm), and of each layer."""
    tables = 1 if shape.tie_word_embeddings else 2
    with torch.device("meta"):
        layer = sum(p.numel() for p in Block(shape).parameters())
    return (tables * shape.vocab_size + 1) * shape.hidden_size, layer


@dataclass(frozen=True)
class Layer:
    """Activation bytes of a layer, per token."""

    kept: float  # from forward to backward pass
    backward: float  # in addition, during its backward pass
    forward: float  # at most, in a pass without gradient


def layer(shape: ModelConfig, compute: torch.dtype, recompute: str) -> Layer:
    """Estimate the activations of a layer on a GPU, with FlexAttention and fused norms."""
    c, i, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    rows = heads + shape.num_key_value_heads
    hd, size, norms = rows * shape.head_dim, compute.itemsize, int(shape.qk_norm != "")
    normed = {"": 0, "head": rows, "all": 2}[shape.qk_norm]  # queries and keys, each with its norm
    mlp = size * (c + 2 * i)  # gradients of its output, gate and up
    # Inputs of norms and products, q, k, v, attention's output; fp32: norms and log-sum-exp.
    whole = size * (4 * c + (2 + norms) * hd + 4 * i) + 4 * (2 + heads + normed)
    products = size * (3 * c + 3 * hd + 2 * i) + 4 * heads
    spared = size * c * shape.post_norm  # beside the MLP's input there is no norm of it
    forward = size * (2 * c + 2 * hd + 3 * i) - spared
    return {
        "none": Layer(whole, mlp - spared, forward),
        "selective": Layer(products, 2 * mlp - spared, forward),
        "full": Layer(size * c, whole + mlp - spared, forward),
    }[recompute]


def states(case: Case) -> Parts:
    """Return what stays from step to step, on device or host; gradients until the next rollouts."""
    root, each = parameters(case.shape)
    own = (root + each * case.shape.num_hidden_layers) // case.machine.shards
    if not case.trainable:
        return {"master weights": case.compute.itemsize * own}
    parts = {"master weights": 4 * own, "optimizer state": 8 * own, "gradients": 4 * own}
    if case.config.kl_beta:
        parts["reference weights"] = case.compute.itemsize * own
    return parts


def device_states(case: Case) -> Parts:
    """Return those of `states` that are on the device."""
    return {k: v for k, v in states(case).items() if not (case.config.offload and k in HOST)}


def update(case: Case) -> Parts:
    """Return what is held at the peak of a forward and backward pass over the largest row."""
    held = device_states(case)
    if case.config.offload:  # the root is copied to the device, each tensor in fp32, then `compute`
        (root, _), head = parameters(case.shape), case.shape.vocab_size * case.shape.hidden_size
        size = 4 * head + case.compute.itemsize * root
        held["copies from the host"] = size // case.machine.shards
    return max((held | moment for moment in _moments(case)), key=total)


def _moments(case: Case) -> Iterator[Parts]:
    """Yield what is held besides, at each moment that may be the peak."""
    shape, size, n = case.shape, case.compute.itemsize, case.row
    (root, each), layers = parameters(shape), shape.num_hidden_layers
    own = layer(shape, case.compute, kept_by(case.config))
    kept, gathered = n * own.kept * layers, size * case.sharded
    # The head: its gradient in fp32, the exponentials of a chunk, slices of logits.
    head, width = shape.vocab_size * shape.hidden_size, 2 if size == 2 else size
    chunk = math.ceil(n / math.ceil(n / CHUNK["cuda"]))  # chunks have equal lengths
    exponentials = chunk * (width * shape.vocab_size + 16 * (SLICE + shape.hidden_size))
    hidden = 3 * n * shape.hidden_size * size
    yield {
        "gathered weights": gathered * (root + each),
        "activations": kept + hidden,
        "head slices": 4 * head + exponentials,
    }
    # Its backward pass begins: the root is gathered again, the last layer is prefetched.
    yield {
        "gathered weights": gathered * 2 * root,
        "activations": kept + hidden,
        "head slices": (4 + size) * head,
    }
    # The first layer of the backward pass: the next is gathered, the last one's gradients reduced.
    yield {
        "gathered weights": gathered * (root + 2 * each),
        "activations": kept + n * own.backward + hidden,
        "gradients in reduction": 4 * each * case.sharded,
        "temporary": size * (head * case.sharded + each),
    }
    # The end: the root's gradients, and the same in fp32 for the reduction.
    yield {
        "gathered weights": gathered * root,
        "gradients in reduction": 4 * root * case.sharded,
        "temporary": size * max(root, head + head),
    }
    yield {"gathered weights": gathered * (root + each), "block mask": MASK_BYTES * n * n}


def kept_by(config: Config) -> str:
    """Return --recompute; a compiled layer without it keeps what "selective" keeps."""
    compiled = config.compile != "off" and config.recompute == "none"
    return "selective" if compiled else config.recompute


def rollout(case: Case, branches: int = 0) -> Parts:
    """Return what sampling holds: weights, documents and their prefill, and `branches` branches."""
    root, each = parameters(case.shape)
    size, n = case.compute.itemsize, PREFILL_TOKENS
    parts = device_states(case)
    parts.pop("gradients", None)  # freed before sampling
    if case.sharded:  # all layers, and one that is being gathered
        parts["gathered weights"] = size * (root + each * (case.shape.num_hidden_layers + 1))
    tokens = case.documents * (len(case.prompt) + case.config.document_tokens)
    cache = max(tokens, CACHED_TOKENS) * KVCache.bytes_per_token(case.shape, case.compute)
    mask = n * n * MASK_BYTES * (case.machine.kind == "cuda")
    prefill = n * layer(case.shape, case.compute, "none").forward
    own, logits = branch(case)
    return parts | {
        "KV cache": cache + branches * own,
        "temporary": max(mask, prefill),
        "sampler": branches * logits,
    }


def branch(case: Case) -> tuple[int, int]:
    """Return bytes of a branch's own keys and values, and of its logits while a token is drawn."""
    capacity = len(case.prompt.footer) + case.config.max_response + 1
    # fp32, exponentials and a copy; twice, for the CUDA graph of a step has them too.
    logits = 2 * 3 * 4 * case.shape.vocab_size
    return capacity * KVCache.bytes_per_token(case.shape, case.compute), logits


def total(parts: Parts) -> int:
    return sum(parts.values())
