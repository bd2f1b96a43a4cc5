"""The terms of a step as formulas: seconds of one rank from operations, a shape and a machine.

benchmarks/cost_model.py says what each is, benchmarks/cost_machines.py what is assumed. Operations
are those of rmt/engine/flops.py, split in three by leaving out the rest.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

from benchmarks.cost_machines import Machine, World, together
from models.config import ModelConfig
from rmt.engine.flops import forward_flops
from rmt.forest import Tree

# Of each logit in sampling, in fp32: written, shifted and scaled (3 × read, 2 × written),
# exponential (read, written), summed and read by the draw (rmt/decoder.py).
LOGIT_BYTES = 4 * 10
TILE = 8  # branches of a trunk that share one read of it, kernels/README.md: 8 with 5 heads per key
COPIES = 14  # bytes per weight and micro-batch, see benchmarks/cost_model.py
OPTIMIZER = 40  # bytes per weight: norm and scaling 12, AdamW reads 16 and writes 12
STATES = 12  # bytes per weight: master, two moments in fp32
GRADIENT = 4


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: products of the layers, attention, and the head at its targets."""

    products: int
    attention: int
    head: int

    @classmethod
    def of(cls, shape: ModelConfig, trees: Sequence[Tree]) -> "Flops":
        head = forward_flops(replace(shape, num_hidden_layers=0), trees)
        attention = forward_flops(replace(shape, hidden_size=0), trees)  # no width, no weights
        return cls(forward_flops(shape, trees) - attention - head, attention, head)

    def times(self, documents: int) -> "Flops":
        """Of so many equal documents."""
        return Flops(*(documents * count for count in astuple(self)))

    def layers(self, m: Machine) -> float:
        """Seconds of the arithmetic below the head."""
        return self.products / (m.flops * m.products) + self.attention / (m.flops * m.attention)


def weights(shape: ModelConfig) -> tuple[int, int, int]:
    """Of all layers, of the head, and of the model with its embeddings; norms are left out."""
    layers = Flops.of(shape, [Tree(0, range(1))]).products // 2
    head = shape.vocab_size * shape.hidden_size
    return layers, head, layers + head * (1 if shape.tie_word_embeddings else 2)


def prefill(m: Machine, shape: ModelConfig, flops: Flops) -> float:
    """Seconds of a forward pass over trunks and prompts; the head is not read."""
    launches = shape.num_hidden_layers * m.layer_seconds
    return together([flops.layers(m), launches], m.overlap)


def gather(world: World, shape: ModelConfig) -> float:
    """Seconds of collecting all weights in every rank, and of copying them out."""
    m, total = world.machine, weights(shape)[2]
    if not m.sharded:
        return 0.0
    sent = world.gather_or_scatter(m.itemsize * total, shape.num_hidden_layers + 1)
    return sent + 2 * m.itemsize * total / (m.bandwidth * m.streaming)


def widths(lengths: Sequence[int], slots: int) -> Iterator[tuple[int, int, float]]:
    """(steps, active branches, their own tokens in all) while responses are decoded in order.

    A slot that falls free takes the next response, as rmt/decoder.py does.
    """
    waiting = iter(lengths)
    ends = [(length, 0) for _, length in zip(range(slots), waiting)]  # (last step, first step)
    heapq.heapify(ends)
    now = born = 0  # born: sum of first steps
    while ends:
        end, start = ends[0]
        if end > now:
            yield end - now, len(ends), len(ends) * (now + end) / 2 - born
            now = end
        heapq.heappop(ends)
        born -= start
        if length := next(waiting, 0):
            heapq.heappush(ends, (now + length, now))
            born += now


def decode_parts(
    m: Machine, shape: ModelConfig, lengths: Sequence[int], slots: int,
    fork: float, prompt: int, shared: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds of decoding by what takes them, and together as `decode`.

    fork: trunk tokens that a branch sees; shared: branches that see the same ones; prompt: own
    tokens of a branch before its response.
    """
    layers, head, _ = weights(shape)
    kv_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * m.itemsize
    attend = 4 * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers  # per pair
    read = m.itemsize * layers + m.head_itemsize * head
    rate, product = m.bandwidth * m.streaming, m.flops * m.thin
    parts = dict.fromkeys(("weights", "cache", "logits", "arithmetic", "latency", "decode"), 0.0)
    for steps, n, said in widths(lengths, slots):
        own = said + n * prompt
        trunks = n * fork / min(shared, TILE)
        seconds = {
            "weights": read / rate,
            "cache": kv_token * (trunks + own) / rate,
            "logits": LOGIT_BYTES * n * shape.vocab_size / rate,
            "arithmetic": 2 * n * (layers + head) / product
            + attend * (n * fork + own) / (m.flops * m.attention),
        }
        moved = seconds["weights"] + seconds["cache"] + seconds["logits"]
        latency = shape.num_hidden_layers * m.layer_seconds
        for name, value in (seconds | {"latency": latency}).items():
            parts[name] += steps * value
        parts["decode"] += steps * (together([moved, seconds["arithmetic"]], m.overlap) + latency)
    return parts


def update(
    world: World, shape: ModelConfig, flops: Flops, micro_batches: int, recompute: bool
) -> dict[str, float]:
    """Seconds of forward, backward and optimizer of one rank, by term."""
    m, total = world.machine, weights(shape)[2]
    launches = micro_batches * shape.num_hidden_layers * m.layer_seconds
    once = together([flops.layers(m), launches], m.overlap)
    arithmetic = {
        "forward": 3 * once,
        "recompute": once * recompute,
        "head": 3 * flops.head / (m.flops * m.head),
    }
    rate = m.bandwidth * m.streaming
    busy = sum(arithmetic.values())
    sent = micro_batches * communication(world, shape)
    return arithmetic | {
        "copies": micro_batches * COPIES * total / rate if m.sharded else 0.0,
        "communication": together([busy, sent], m.hidden) - busy,
        "optimizer": OPTIMIZER * total / world.shards / rate,
    }


def communication(world: World, shape: ModelConfig) -> float:
    """Seconds of what FSDP sends for one micro-batch, if nothing hid it."""
    m, total, modules = world.machine, weights(shape)[2], shape.num_hidden_layers + 1
    return (
        2 * world.gather_or_scatter(m.itemsize * total, modules)
        + world.gather_or_scatter(GRADIENT * total, modules)
        + world.reduce_across(GRADIENT * total / world.shards, modules)
    )


def checkpoint(world: World, shape: ModelConfig, between: float) -> float:
    """Seconds that a save holds up a run which has `between` seconds until the next: a copy of
    masters and moments to the host, and what all nodes together could not write behind it in time.
    """
    m, size = world.machine, STATES * weights(shape)[2]
    write = size / (m.storage * world.replicas)
    return size / world.shards / m.to_host + max(0.0, write - between)
