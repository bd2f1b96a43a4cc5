"""What a machine can do: the one place where every assumption of benchmarks/cost_model.py is named.

GPUs have the numbers of NVIDIA's data sheets (H100 SXM 2023, H200 2023: dense bf16, one direction
of NVLink 4, one 400 Gb/s adapter per GPU as in a DGX), and shares of them that are guesses until a
GPU has run this code. A CPU has what benchmarks/cost_check.py reads from its measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """One device, how many share a node, and what is between them. Bytes, seconds, FLOP/s."""

    name: str
    flops: float  # dense operations per second at most, in the compute dtype
    bandwidth: float  # of memory at most, read + written
    memory: float
    # Shares of the two that are reached. The first four are of `flops`.
    products: float  # the layers' products, with the small operators between them
    thin: float  # products with as few rows as decoding has, beside the reading of their weights
    attention: float
    head: float  # the loss inside the head
    streaming: float  # of `bandwidth`, by whatever reads weights and caches or writes states
    overlap: float  # of the shorter of arithmetic and memory traffic, hidden behind the longer
    layer_seconds: float  # a forward pass of a layer takes at least: launches, and Python on a CPU
    # Links; both bandwidths are per device, into it and out of it at once.
    per_node: int = 8
    link: float = float("inf")  # between devices of a node
    link_latency: float = 0.0  # of one hop of a collective
    network: float = float("inf")  # between nodes
    network_latency: float = 0.0
    hidden: float = 0.0  # of FSDP's communication, behind arithmetic, where there is enough of it
    to_host: float = 20e9  # guess: PCIe 5 has 64, pageable memory on the host takes less
    storage: float = 2e9  # guess: checkpoints, per node
    itemsize: int = 2  # of the compute dtype
    head_itemsize: int = 2  # of the head in sampling: a CPU widens it to fp32
    sharded: bool = True  # FSDP's copies: not in fp32 on one CPU


H100 = Machine(
    "H100", flops=989e12, bandwidth=3.35e12, memory=80e9,
    products=0.6,  # guess: cuBLAS reaches 0.7 to 0.8 on large products; the rest is in between
    thin=0.6,  # guess: a tile of few rows is padded to 64, which matters little beside the reading
    attention=0.3,  # guess: FlexAttention with blocks that are half masked
    head=0.5,  # guess: kernels/README.md has the operations, no GPU has timed them
    streaming=0.75,  # guess: a copy reaches 0.9, small products with weights less
    overlap=1.0,  # a kernel loads the next tile while it multiplies this one
    layer_seconds=40e-6,  # guess: 13 kernels of a recorded step, 3 µs each at least
    link=360e9,  # 0.8 of 450 GB/s
    link_latency=3e-6, network=40e9,  # 0.8 of 400 Gb/s
    network_latency=10e-6, hidden=0.9,
)  # fmt: skip
H200 = replace(H100, name="H200", bandwidth=4.8e12, memory=141e9)
GPUS = {gpu.name.lower(): gpu for gpu in (H100, H200)}


def together(seconds: Sequence[float], overlap: float) -> float:
    """Time of things that run side by side: the longest, and of the others what cannot hide."""
    return max(seconds) + (1 - overlap) * (sum(seconds) - max(seconds))


@dataclass(frozen=True)
class World:
    """So many devices: FSDP inside a node, replicas across nodes, as rmt/system/dist.py shards."""

    machine: Machine
    size: int

    def __post_init__(self):
        if self.size > self.machine.per_node and self.size % self.machine.per_node:
            raise ValueError(
                f"{self.size} devices are not whole nodes of {self.machine.per_node}; take "
                f"{self.size // self.machine.per_node * self.machine.per_node}"
            )

    @property
    def shards(self) -> int:
        return min(self.size, self.machine.per_node)

    @property
    def replicas(self) -> int:
        return self.size // self.shards

    def gather_or_scatter(self, size: float, calls: int) -> float:
        """Seconds of all-gathers, or reduce-scatters, of `size` bytes inside a node, in a ring."""
        m, others = self.machine, self.shards - 1
        return size * others / self.shards / m.link + calls * others * m.link_latency

    def reduce_across(self, size: float, calls: int) -> float:
        """Seconds of all-reduces of `size` bytes of each device over all replicas, in a ring with
        the latency of a tree.
        """
        m, r = self.machine, self.replicas
        hops = 2 * (r - 1).bit_length()
        return 2 * size * (r - 1) / r / m.network + calls * hops * m.network_latency
