"""Choose the knobs that are left open so that a run fits its memory.

max_branches (responses decoded at a time), tokens_per_micro_batch and recompute. A dry run fits a
described machine, a real run the memory that is free once its model is loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from models.transformer import Transformer
from rmt.config.config import Config
from rmt.config.flags import flag, read_bytes
from rmt.memory import estimate
from rmt.memory.estimate import Case, Machine, total
from rmt.prompt import PromptIds
from rmt.system.dist import World, free_memory, reduce_max
from rmt.system.torchrun import copies

OPEN = dict(max_branches=0, tokens_per_micro_batch=0, recompute="auto")  # chosen here
MEMORIES = (24, 32, 40, 48, 80, 96, 141, 192)  # GB of common GPUs
NODE, MOST_GPUS = 8, 1024
TILE = 16  # rows of a matrix product on a GPU: as fast as one row


class DoesNotFit(ValueError):
    """The memory is too small; the message has what is too large, why, and what would fit."""


def fixed_knobs(config: Config) -> dict[str, Any]:
    """Return the knobs that are set."""
    return {name: getattr(config, name) for name in OPEN if getattr(config, name) != OPEN[name]}


def fit(case: Case) -> Case:
    """Set the open knobs; DoesNotFit names the smallest changes that would fit."""
    try:
        return _fit(case)
    except DoesNotFit as problem:
        if case.machine.kind == "cpu":
            ways = "or set --max-branches, which is then used as given"
            raise DoesNotFit(f"{problem}; {ways}") from None
        if not case.trainable:
            ways = "leave --max-branches out, or " * ("max_branches" in fixed_knobs(case.config))
            raise DoesNotFit(f"{problem}; {ways}use a GPU with more memory") from None
        ways = "; ".join(remedies(case)) or "nothing up to 1,024 GPUs of 192 GB"
        raise DoesNotFit(f"{problem}. What fits: {ways}") from None


def _fit(case: Case) -> Case:
    case = _with(case, max_branches=case.config.max_branches or most_branches(case))
    c, room = case.config, case.machine.room
    recompute, rows = [c.recompute], [c.tokens_per_micro_batch]  # fast first, then frugal
    if c.recompute == OPEN["recompute"]:
        recompute = ["none", "selective", "full"]
    if not c.tokens_per_micro_batch:  # half a row is nearly as fast, and cheaper than recomputing
        rows = [
            max(case.longest, tokens)
            for tokens in (estimate.ROW_TOKENS, estimate.ROW_TOKENS // 2, 1)
        ]
    if case.machine.kind == "cpu":  # no fixed limit, and "full" costs no time
        return _with(case, recompute=recompute[-1], tokens_per_micro_batch=rows[0])
    needs = total(estimate.rollout(case, c.max_branches))
    if needs > room:
        raise DoesNotFit(
            f"--max-branches {c.max_branches} needs {_gb(needs)} while sampling, and there are "
            f"{_gb(room)}"
        )
    if not case.trainable:
        return case
    choices = [
        _with(case, recompute=r, tokens_per_micro_batch=n) for r, n in product(recompute, rows)
    ]
    for chosen in choices:
        if total(estimate.update(chosen)) <= room:
            return chosen
    least = min(choices, key=lambda choice: total(estimate.update(choice)))
    raise DoesNotFit(
        f"an update of rows of {least.row} tokens with --recompute {least.config.recompute} needs "
        f"{_gb(total(estimate.update(least)))}, of which "
        f"{_gb(total(estimate.device_states(case)))} are weights, gradients and optimizer state; "
        f"there are {_gb(room)}"
    )


def _with(case: Case, **knobs) -> Case:
    return replace(case, config=replace(case.config, **knobs))


def most_branches(case: Case) -> int:
    """Return how many responses can be decoded at a time, in whole tiles; DoesNotFit if none."""
    room, held, own = case.machine.room, estimate.rollout(case), sum(estimate.branch(case))
    weights = {k: v for k, v in held.items() if k not in ("KV cache", "temporary", "sampler")}
    if total(weights) > room:
        listed = ", ".join(f"{_gb(size)} of {name}" for name, size in weights.items())
        raise DoesNotFit(
            f"sampling needs all weights on every GPU: {listed}, together {_gb(total(weights))}; "
            f"there are {_gb(room)}"
        )
    branches = min(estimate.MOST_BRANCHES, int((room - total(held)) / own))
    if branches < 1:
        smaller = []
        # Of an evaluation it is so many tokens, whatever the flags.
        if estimate.cached_tokens(case) != estimate.CACHED_TOKENS:
            smaller = ["--batch-size"] * case.trainable + ["--document-tokens"]
        if room > total(held):
            smaller.append("--max-response")
        raise DoesNotFit(
            f"{_gb(room - total(weights))} are free for rollouts, but documents and their prefill "
            f"need {_gb(held['KV cache'])} + {_gb(held['temporary'])} and each response "
            f"{_gb(own)}" + "; lower " * bool(smaller) + " or ".join(smaller)
        )
    return branches // TILE * TILE or 1 << (branches.bit_length() - 1)


def remedies(case: Case) -> Iterator[str]:
    """Yield flags that would make the case fit, the smallest changes first."""
    c = case.config
    for names in (["max_branches"], ["recompute", "tokens_per_micro_batch"]):
        given = [name for name in names if name in fixed_knobs(c)]
        if given and _fits(_with(case, **{name: OPEN[name] for name in given})):
            yield "the same without " + " and ".join(map(flag, given))
    if c.eval_data and _fits(_with(case, eval_data=())):
        yield "the same without --eval-data"
    least = read_bytes(c.gpu_memory)
    memories = [dict(gpu_memory=f"{m}GB") for m in MEMORIES if 1e9 * m > least]
    offload, gpus = dict(offload=True), list(_more_gpus(c))
    single = [*_first(case, [offload]), *_first(case, gpus)]
    yield from single
    yield from _first(case, memories)
    if not single:
        yield from _first(case, [memory | offload for memory in memories])
        yield from _first(case, [more | memory for memory, more in product(memories, gpus)])


def _more_gpus(config: Config) -> Iterator[dict[str, int]]:
    """Double the GPUs up to a whole node, then the nodes, which share one copy of the model."""
    gpus, nodes = config.gpus, config.nodes
    while 2 * gpus <= NODE:
        gpus *= 2
        yield dict(gpus=gpus)
    while 2 * gpus * nodes <= MOST_GPUS:
        nodes *= 2
        yield dict(gpus=gpus, nodes=nodes, replicate=1)


def _first(case: Case, changes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the flags of the first of these changes with which the case fits."""
    for change in changes:
        config = replace(case.config, **change)
        if _fits(replace(case, config=config, machine=described(config))):
            return [" ".join(flag(n) + f" {v}" * (v is not True) for n, v in change.items())]
    return []


def _fits(case: Case) -> bool:
    try:
        _fit(case)
    except DoesNotFit:
        return False
    return True


def described(config: Config) -> Machine:
    """Describe the machine of --gpus, --nodes and --gpu-memory, with --replicate copies of the
    model (0: one per node).
    """
    ranks = config.gpus * config.nodes
    shards = ranks // copies(config.replicate, [config.gpus] * ranks)
    room = read_bytes(config.gpu_memory) - estimate.CONTEXT - nccl_buffers(ranks, shards)
    return Machine("cuda", ranks, shards, room * (1 - estimate.FRAGMENTED))


def nccl_buffers(ranks: int, shards: int) -> float:
    """Return the bytes of NCCL: a group of all ranks, or one in a copy of the model, one across."""
    return 0.0 if ranks == 1 else estimate.NCCL * (1 if shards == ranks else 2)


def autofit(
    config: Config, prompt: PromptIds, model: Transformer, compute: torch.dtype, world: World
) -> Config:
    """Set the open knobs to values that fit every rank. All ranks.

    Call it with the model loaded, before any training.
    """
    if fixed_knobs(config).keys() == OPEN.keys():
        return config
    parameters = list(model.parameters())
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    held = sum(p.nbytes for p in own if p.device.type == world.device.type)
    free = -reduce_max([-free_memory(world) - held], world)[0]
    shards = parameters[0].device_mesh.shape[-1] if isinstance(parameters[0], DTensor) else 1
    # The flags that describe this machine, from which `remedies` departs.
    here = dict(
        gpus=shards, nodes=world.size // shards, gpu_memory=f"{free / 1e9:.1f}GB", replicate=0
    )
    if world.device.type == "cuda":  # made at their first use; `described` subtracts them, too
        free -= nccl_buffers(world.size, shards)
    machine = Machine(world.device.type, world.size, shards, (1 - estimate.FRAGMENTED) * free)
    trainable = any(p.requires_grad for p in parameters)
    case = Case(replace(config, **here), model.config, compute, prompt, machine, trainable)
    return replace(config, **fixed_knobs(fit(case).config))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
