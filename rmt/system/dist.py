"""The process group, FSDP2, gathered weights and reductions.

The same calls work in one process without a process group, under torchrun on one node (FSDP over
all ranks) and on several nodes (HSDP: sharded within a node, replicated across nodes).
"""

import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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

from models.lora import add_adapters, init_adapters, rank_of
from models.transformer import Transformer
from models.weights import check, load, on_meta
from rmt.system.env import proc_field
from rmt.system.torchrun import check_store, copies

CPU = torch.device("cpu")
TIMEOUT = 1800.0  # seconds, gloo's default: rank 0 may write 28 GB meanwhile; NCCL's is 600


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    replicate: int = 1  # copies of the model, each sharded over consecutive ranks
    timeout: float = TIMEOUT  # seconds that a rank waits for another


def start(replicate: int = 0, timeout: float = TIMEOUT) -> World:
    """Join torchrun's process group if there is one, and choose this rank's device. All ranks.

    replicate: copies of the model; 0: one per node. timeout: seconds that a rank waits for another
    before it fails. ValueError, with the remedy, when torchrun's settings cannot work.
    """
    device = CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        check_store()
        dist.init_process_group(_backend(device), timeout=timedelta(seconds=timeout))
    world = current(device)
    local = gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), world)
    return replace(world, replicate=copies(replicate, local), timeout=timeout)


def _backend(device: torch.device) -> str:
    """Return NCCL for tensors of a GPU, gloo for those of the host (objects, numbers, norms)."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def current(device: torch.device = CPU) -> World:
    """Return this process's place in the process group, if there is one."""
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads free tensors; while Python exits that aborts the process


@contextmanager
def leaving() -> Iterator[None]:
    """Leave the process group at the end of the block.

    If an error ends it on one of several ranks, print that and end the process: NCCL's leaving
    waits for ranks that wait for this one, so that it would be seen only after --timeout.
    """
    try:
        yield
    except BaseException as error:
        if current().size > 1 and getattr(error, "code", 1):  # no exit with 0
            if isinstance(error, SystemExit):
                print(error.code, file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        raise
    finally:
        stop()


def compute_dtype(name: str, world: World) -> torch.dtype:
    """Return the dtype that --dtype names, for this rank's device."""
    if name == "auto":
        return torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(
    directory: Path, world: World, compute: torch.dtype, trainable: bool = True,
    offload: bool = False, lora_rank: int = 0, seed: int = 0,
) -> Transformer:  # fmt: skip
    """Load a Hugging Face directory onto this rank's device; each rank reads its rows. All ranks.

    trainable: fp32 master weights, sharded, and `compute` in the forward and backward pass. If not,
    weights are frozen in `compute`. offload: as in `shard`. lora_rank: freeze the weights in
    `compute` and train adapters of this rank, whose first values have this seed. ValueError on
    damaged weights.
    """
    model = on_meta(directory)
    check(model, Path(directory))  # shapes, before memory is allocated
    model.to(torch.float32 if trainable and not lora_rank else compute)
    add_adapters(model, lora_rank)
    masters = compute != torch.float32 and not lora_rank  # adapters cast their own
    if sharded := world.size > 1 or (trainable and (offload or masters)):
        shard(model, world, compute, offload)
    model.to_empty(device="cpu" if offload and sharded else world.device)
    load(model, directory)
    init_adapters(model, seed)
    mine = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if broken := sorted({name for part in gather_objects(mine, world) for name in part}):
        raise ValueError(
            f"{directory}: tensor {broken[0]} holds nan or infinity ({len(broken)} such); the "
            "weights are damaged, or --dtype overflows: fetch them again"
        )
    return model if lora_rank else model.requires_grad_(trainable)


@torch.no_grad()
def _finite(parameter: torch.Tensor) -> bool:
    """Return whether this rank's rows are finite, in constant memory."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return not own.numel() or all(bool(end.isfinite()) for end in own.aminmax())


def shard(model: Transformer, world: World, compute: torch.dtype, offload: bool = False) -> None:
    """Apply FSDP2 to blocks and root; gradients are summed, not averaged, over ranks. All ranks.

    offload: keep parameters, gradients and so the optimizer's state on the host.
    """
    if not dist.is_initialized():  # one process, started with plain python
        store = dist.HashStore()
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1)
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
    """Arrange the ranks in a row, or in `replicate` rows, each with a whole model. All ranks."""
    kind = world.device.type
    if world.replicate == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    rows = torch.arange(world.size).view(world.replicate, -1)
    timeout = timedelta(seconds=world.timeout)  # init_device_mesh would use gloo's default
    across, inside = (
        dist.new_subgroups_by_enumeration(groups.tolist(), timeout=timeout)[0]
        for groups in (rows.T, rows)
    )
    names = ("replicate", "shard")
    return DeviceMesh.from_group([across, inside], kind, rows, mesh_dim_names=names)


@contextmanager
def gathered_weights(model: Transformer) -> Iterator[Transformer]:
    """Yield a model with gathered weights to sample from; do not run `model` meanwhile. All ranks.

    It shares the weights in the compute dtype, without FSDP's hooks: ranks may run different
    numbers of forward passes, and a CUDA graph may record them.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    device = model.model.norm.weight.device  # of gathered weights; shards may be on the host
    try:
        yield _without_hooks(model) if sharded else model
    finally:
        for module in sharded:
            module.reshard()
        release_memory(device)


def _without_hooks(model: Transformer) -> Transformer:
    with torch.device("meta"):
        bare = Transformer(model.config)
        add_adapters(bare, rank_of(model))
    bare.load_state_dict(dict(model.named_parameters()), assign=True)
    return bare.requires_grad_(False)


def release_memory(device: torch.device) -> None:
    """Return freed memory to the device, so that the next phase does not suffer fragmentation."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def reduce_sums(values: dict[str, float], world: World) -> dict[str, float]:
    """Sum each value over all ranks, in fp64. All ranks, with the same keys."""
    return dict(zip(values, _reduce(list(values.values()), dist.ReduceOp.SUM, world)))


def reduce_max(values: Sequence[float], world: World) -> list[float]:
    """Return the largest of each value over all ranks. All ranks."""
    return _reduce(values, dist.ReduceOp.MAX, world)


def _reduce(values: Sequence[float], operation, world: World) -> list[float]:
    if world.size == 1:
        return list(values)
    # On the host, so by gloo, which tells of a lost rank where NCCL would hang until --timeout.
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def gather_objects(value: Any, world: World, group=None) -> list[Any]:
    """Return the picklable values of all ranks, in rank order. All ranks of the group."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_0(work: Callable[[], Any], world: World) -> Any:
    """Return what `work` gives on rank 0, or raise its ValueError or OSError. All ranks.

    Only it reads: on a shared file system other ranks may see what is older.
    """
    found = [None]
    if world.rank == 0:
        try:
            found = [work()]
        except (ValueError, OSError) as error:
            found = [error]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def background_group(world: World):
    """Make a process group for a background thread; None for a single process. All ranks."""
    if world.size == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout))


def free_memory(world: World) -> float:
    """Return the bytes this rank can still use: of its GPU, or its share of half the machine's."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        cached = torch.cuda.memory_reserved(world.device)
        return free + cached - torch.cuda.memory_allocated(world.device)
    available = proc_field("meminfo", "MemAvailable")  # Linux
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return (1024 * int(available.split()[0]) if available else 8e9) / 2 / local


def grad_norm(model: Transformer, limit: float) -> float:
    """Clip the global gradient to `limit` and return its norm before clipping. All ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
