"""Everything distributed: the process group, FSDP2, rollout mode and reductions.

The same calls work for one process without a process group, for torchrun on one node (FSDP over
all ranks) and on several nodes (HSDP: sharded inside a node, replicated across).
"""

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from models.config import ModelConfig
from models.transformer import Transformer
from models.weights import check, load
from rmt.system.torchrun import check_store, copies

TIMEOUT = 600.0  # seconds; as long as NCCL's own, where gloo waits for half an hour


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    replicate: int = 1  # copies of a sharded model: of consecutive ranks each
    timeout: float = TIMEOUT  # seconds that a rank waits for another


def start(replicate: int = 0, timeout: float = TIMEOUT) -> World:
    """Join torchrun's process group if there is one, and pick this rank's device. All ranks.

    replicate: copies of the model, 0 for one per node. A rank that has waited `timeout` seconds
    for another fails, see rmt/system/torchrun.py. ValueError when it cannot work.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        check_store()
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    world = current(torch.device(device))
    local = gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), world)
    return replace(world, replicate=copies(replicate, local), timeout=timeout)


def current(device: torch.device) -> World:
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


def first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # Threads of gloo outlive it. One that gives back its last tensor while Python ends aborts
        # the process; it needs a moment of the GIL before.
        time.sleep(0.2)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """What --dtype means on this rank's device."""
    if name == "auto":
        return torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(
    directory: Path,
    world: World,
    compute: torch.dtype,
    trainable: bool = True,
    offload: bool = False,
) -> Transformer:
    """A model of a Hugging Face directory on this rank's device. All ranks.

    Trainable: fp32 master weights, sharded, `compute` in the forward and backward pass. Otherwise
    weights are stored in `compute` and frozen. Each rank reads only the rows it keeps. offload:
    what a rank keeps, and what an optimizer makes of it, is in the host's memory.
    """
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_directory(directory))
    check(model, Path(directory))  # sizes, before memory is taken for them
    model.to(torch.float32 if trainable else compute)
    if sharded := world.size > 1 or (trainable and (offload or compute != torch.float32)):
        shard(model, world, compute, offload)
    model.to_empty(device="cpu" if offload and sharded else world.device)
    load(model, directory)
    mine = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if broken := sorted({name for part in gather_objects(mine, world) for name in part}):
        raise ValueError(
            f"{directory}: tensor {broken[0]} holds nan or infinity ({len(broken)} such); the "
            "weights are damaged, or --dtype overflows: fetch them again"
        )
    return model.requires_grad_(trainable)


@torch.no_grad()
def _finite(parameter: torch.Tensor) -> bool:
    """Of this rank's rows."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return not own.numel() or all(bool(end.isfinite()) for end in own.aminmax())


def shard(model: Transformer, world: World, compute: torch.dtype, offload: bool = False) -> None:
    """FSDP2 over blocks and root, gradients summed (not averaged) over ranks. All ranks.

    offload: parameters, their gradients and so the optimizer's state stay on the host.
    """
    if not dist.is_initialized():  # one GPU, started with plain python
        # gloo: the norm of gradients that are on the host is reduced there
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = _mesh(world)
    reduce = torch.promote_types(compute, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    pinned = world.device.type == "cuda"
    place = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for module in (*model.model.layers, model):
        fully_shard(
            module, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True
        )
        # Losses are divided by global counts already. gloo has no pre-multiplied sum, hence both.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _mesh(world: World) -> DeviceMesh:
    """The ranks: in a row, or in `replicate` rows, each of which holds a whole model. All ranks."""
    kind = world.device.type
    if world.replicate == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    rows = torch.arange(world.size).view(world.replicate, -1)
    patience = timedelta(seconds=world.timeout)  # init_device_mesh would take gloo's own
    across, inside = (
        dist.new_subgroups_by_enumeration(groups.tolist(), timeout=patience)[0]
        for groups in (rows.T, rows)
    )
    names = ("replicate", "shard")
    return DeviceMesh.from_group([across, inside], kind, rows, mesh_dim_names=names)


@contextmanager
def rollout_mode(model: Transformer) -> Iterator[Transformer]:
    """Yield a model of gathered weights to sample from; do not run `model` meanwhile. All ranks.

    It shares the weights, in the dtype that the forward pass uses, but has none of FSDP's hooks:
    ranks may run different numbers of forward passes, and a CUDA graph may record them.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    device = model.model.norm.weight.device  # of what is gathered; the rest may be on the host
    try:
        gathered = _without_hooks(model) if sharded else model
        yield gathered
    finally:
        del gathered
        for module in sharded:
            module.reshard()
        release_memory(device)


def _without_hooks(model: Transformer) -> Transformer:
    with torch.device("meta"):
        bare = Transformer(model.config)
    bare.load_state_dict(dict(model.named_parameters()), assign=True)
    return bare.requires_grad_(False)


def release_memory(device: torch.device) -> None:
    """Return what was freed to the device, so that the next phase's tensors fit where they like."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps much of it
        trim(0)


def reduce_sums(values: dict[str, float], world: World) -> dict[str, float]:
    """Sum each value over all ranks, in fp64. All ranks, with the same keys."""
    return dict(zip(values, _reduce(list(values.values()), dist.ReduceOp.SUM, world)))


def reduce_max(values: Sequence[float], world: World) -> list[float]:
    """Largest value over all ranks, elementwise. All ranks."""
    return _reduce(values, dist.ReduceOp.MAX, world)


def _reduce(values: Sequence[float], operation, world: World) -> list[float]:
    if world.size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def gather_objects(value: Any, world: World, group=None) -> list[Any]:
    """Picklable values of all ranks, in rank order; through `group` if given. All ranks."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def background_group(world: World):
    """A group for a thread beside the steps; None where there is one process. All ranks."""
    return dist.new_group(backend="gloo") if world.size > 1 else None


def free_memory(world: World) -> float:
    """Bytes that this rank can still use: of its GPU, else its share of half the machine's."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        kept = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return free + kept
    described = Path("/proc/meminfo")  # Linux
    lines = described.read_text().splitlines() if described.is_file() else []
    kib = [float(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return (kib[0] * 1024 if kib else 8e9) / 2 / local


def grad_norm(model: Transformer, limit: float) -> float:
    """Clip the global gradient to `limit` and return its norm before clipping. All ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
