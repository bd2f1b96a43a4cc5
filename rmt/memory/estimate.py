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
from models.lora import adapt
from models.transformer import Block
from rmt.config.config import Config
from rmt.curriculum import TIERS
from rmt.forest import padded_length
from rmt.prompt import PromptIds
from rmt.questions import asks_at_end
from rmt.rollout import PREFILL_TOKENS

Parts = dict[str, int]  # label -> bytes

MASK_BYTES = 6  # per pair of tokens, while create_block_mask evaluates Eq. 11 for a forest
CACHED_TOKENS = 1 << 14  # of documents whose keys and values an evaluation holds at a time
MOST_BRANCHES = 256  # with more, a decode step on a GPU is bound by arithmetic, not by memory
ROW_TOKENS = 1 << 14  # of a micro-batch; longer ones are no faster
# Memory that tensors cannot use: usual values, not measured here.
CONTEXT = 0.6e9  # CUDA context, loaded kernels, cuBLAS workspace
NCCL = 1.0e9  # buffers of NCCL, with several ranks
FRAGMENTED = 0.05  # share of the rest that is lost to fragmentation
# In host memory with --offload:
HOST = ("master weights", "frozen weights", "optimizer state", "gradients")


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
        masters = self.compute != torch.float32 and not self.config.lora_rank
        special = self.config.offload or masters
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
def parameters(shape: ModelConfig, rank: int = 0) -> tuple[int, int]:
    """Count the parameters of the root (embedding, head, last norm), and of each layer.

    rank: of the adapters that are counted, too. ValueError when it is too large for a layer.
    """
    tables = 1 if shape.tie_word_embeddings else 2
    with torch.device("meta"):
        block = adapt(Block(shape), rank)
    layer = sum(p.numel() for p in block.parameters())
    return (tables * shape.vocab_size + 1) * shape.hidden_size, layer


def learnt(case: Case) -> tuple[int, int]:
    """Count those that are trained: with LoRA the adapters, of layers alone."""
    (root, each), rank = parameters(case.shape), case.config.lora_rank
    return (0, parameters(case.shape, rank)[1] - each) if rank else (root, each)


@dataclass(frozen=True)
class Layer:
    """Activation bytes of a layer, per token."""

    kept: float  # from forward to backward pass
    backward: float  # in addition, during its backward pass
    forward: float  # at most, in a pass without gradient


def layer(shape: ModelConfig, compute: torch.dtype, recompute: str, rank: int = 0) -> Layer:
    """Estimate the activations of a layer on a GPU, with FlexAttention and fused norms.

    rank: of adapters. Frozen weights keep the same inputs, and each B has one of its own.
    """
    c, i, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    rows = heads + shape.num_key_value_heads
    hd, size, norms = rows * shape.head_dim, compute.itemsize, int(shape.qk_norm != "")
    normed = {"": 0, "head": rows, "all": 2}[shape.qk_norm]  # queries and keys, each with its norm
    adapted, low = int(rank > 0), size * 7 * rank  # the inputs of a layer's seven B
    mlp = size * (c + 2 * i - rank)  # gradients of its output, gate and up
    # Inputs of norms and products, q, k, v, attention's output; fp32: norms and log-sum-exp.
    whole = size * (4 * c + (2 + norms) * hd + 4 * i) + 4 * (2 + heads + normed) + low
    products = size * (3 * c + 3 * hd + 2 * i) + 4 * heads + low
    products += adapted * size * shape.num_key_value_heads * shape.head_dim  # v, and before its B
    spared = size * c * shape.post_norm  # beside the MLP's input there is no norm of it
    forward = size * (2 * c + 2 * hd + 3 * i + rank) - spared
    selective = 2 * mlp - (size * (c - rank) if adapted else spared)
    return {
        "none": Layer(whole, mlp - spared, forward),
        "selective": Layer(products, selective, forward),
        "compiled": Layer(whole - size * i, selective, forward),  # silu is computed again
        "full": Layer(size * c, whole + mlp - spared, forward),
    }[recompute]


def states(case: Case) -> Parts:
    """Return what stays from step to step, on device or host; gradients until the next rollouts."""
    of_rank = lambda root, each: (root + each * case.shape.num_hidden_layers) // case.machine.shards
    all_weights = case.compute.itemsize * of_rank(*parameters(case.shape))
    if not case.trainable:
        return {"master weights": all_weights}
    own = of_rank(*learnt(case))
    parts = {"master weights": 4 * own, "optimizer state": 8 * own, "gradients": 4 * own}
    if case.config.lora_rank:
        parts["frozen weights"] = all_weights  # the reference of KL, too
    elif case.config.kl_beta:
        parts["reference weights"] = all_weights
    return parts


def device_states(case: Case) -> Parts:
    """Return those of `states` that are on the device."""
    return {k: v for k, v in states(case).items() if not (case.config.offload and k in HOST)}


def update(case: Case) -> Parts:
    """Return what is held at the peak of a forward and backward pass over the largest row."""
    held = device_states(case)
    if case.config.offload:  # the root is copied to the device, each tensor in fp32, then `compute`
        (root, _), head = parameters(case.shape), case.shape.vocab_size * case.shape.hidden_size
        size = 4 * head * (not case.config.lora_rank) + case.compute.itemsize * root
        held["copies from the host"] = size // case.machine.shards
    return max((held | moment for moment in _moments(case)), key=total)


def _moments(case: Case) -> Iterator[Parts]:
    """Yield what is held besides, at each moment that may be the peak."""
    shape, size, n = case.shape, case.compute.itemsize, case.row
    rank, layers = case.config.lora_rank, shape.num_hidden_layers
    (root, each), (learnt_root, learnt_each) = parameters(shape, rank), learnt(case)
    own = layer(shape, case.compute, kept_by(case.config), rank)
    kept, gathered = n * own.kept * layers, size * case.sharded
    if rank and size < 4 and not case.sharded:  # adapters, cast where they are used
        kept += size * learnt_each * (1 if case.config.recompute == "full" else layers)
    # The head: its gradient (in fp32 if it is a sum), exponentials of a chunk, slices of logits.
    head, width = shape.vocab_size * shape.hidden_size, 2 if size == 2 else size
    learnt_head = head * (learnt_root > 0)
    chunk = min(n, CHUNK["cuda"])  # tokens with a target may be fewer than those of a row
    summed = size if n <= CHUNK["cuda"] else 4
    exponentials = chunk * (width * shape.vocab_size + 16 * (SLICE + shape.hidden_size))
    hidden = 3 * n * shape.hidden_size * size
    yield {
        "gathered weights": gathered * (root + each),
        "activations": kept + hidden,
        "head slices": summed * learnt_head + exponentials,
    }
    # Its backward pass begins: the root is gathered again, the last layer is prefetched.
    yield {
        "gathered weights": gathered * 2 * root,
        "activations": kept + hidden,
        "head slices": (summed + size * (n > CHUNK["cuda"])) * learnt_head,
    }
    # The first layer of the backward pass: the next is gathered, the last one's gradients reduced.
    yield {
        "gathered weights": gathered * (root + 2 * each),
        "activations": kept + n * own.backward + hidden,
        "gradients in reduction": 4 * learnt_each * case.sharded,
        "temporary": size * (learnt_head * case.sharded + learnt_each),
    }
    # The end: the root's gradients, and the same in fp32 for the reduction.
    yield {
        "gathered weights": gathered * root,
        "gradients in reduction": 4 * learnt_root * case.sharded,
        "temporary": size * max(learnt_root, 2 * learnt_head),
    }
    yield {"gathered weights": gathered * (root + each), "block mask": MASK_BYTES * n * n}


def kept_by(config: Config) -> str:
    """Return --recompute, or "compiled": the compiler chooses by itself what a layer keeps."""
    compiled = config.compile != "off" and config.recompute != "full"
    return "compiled" if compiled else config.recompute


def rollout(case: Case, branches: int = 0) -> Parts:
    """Return what sampling holds: weights, documents and their prefill, and `branches` branches."""
    root, each = parameters(case.shape, case.config.lora_rank)
    cached = cached_tokens(case)
    size, n = case.compute.itemsize, min(PREFILL_TOKENS, cached)
    parts = device_states(case)
    parts.pop("gradients", None)  # freed before sampling
    if case.sharded:  # all layers, and one that is being gathered
        parts["gathered weights"] = size * (root + each * (case.shape.num_hidden_layers + 1))
    cache = cached * KVCache.bytes_per_token(case.shape, case.compute)
    mask = n * n * MASK_BYTES * (case.machine.kind == "cuda")
    prefill = n * layer(case.shape, case.compute, "none", case.config.lora_rank).forward
    own, logits = branch(case)
    return parts | {
        "KV cache": cache + branches * own,
        "temporary": max(mask, prefill),
        "sampler": branches * logits,
    }


def cached_tokens(case: Case) -> int:
    """Count the tokens of documents that are cached at one time, in a step or an evaluation."""
    c, header, footer = case.config, len(case.prompt.header), len(case.prompt.footer)
    document = lambda questions: header + c.document_tokens + questions * footer
    evaluated = max(CACHED_TOKENS, document(1))
    if not case.trainable:
        return evaluated
    step = case.documents * document(1 if asks_at_end(c) else c.positions_per_document)
    probes = c.probe_documents * document(len(TIERS))  # all of them by each rank
    return max(step, probes, evaluated * bool(c.eval_data))


def branch(case: Case) -> tuple[int, int]:
    """Return bytes of a branch's own keys and values, and of its logits while a token is drawn."""
    capacity = len(case.prompt.footer) + case.config.max_response + 1
    # fp32, exponentials and a copy; twice, for the CUDA graph of a step has them too.
    logits = 2 * 3 * 4 * case.shape.vocab_size
    return capacity * KVCache.bytes_per_token(case.shape, case.compute), logits


def total(parts: Parts) -> int:
    return sum(parts.values())
