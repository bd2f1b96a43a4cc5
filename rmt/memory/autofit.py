"""Knobs that fit the memory there is: rows, what is computed again, branches decoded at one time.

A dry run and a real one ask the same: the one about a machine that is described, the other about
the memory that is free when its model is loaded. Knobs that are set are kept as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from models.transformer import Transformer
from rmt.config.config import Config
from rmt.config.flags import flag, read_bytes
from rmt.memory.estimate import (
    FRAGMENTED,
    MOST_BRANCHES,
    ROW_TOKENS,
    Case,
    Machine,
    branch,
    on_device,
    rollout,
    states,
    total,
    update,
)
from rmt.prompt import PromptIds
from rmt.system.dist import World, free_memory, reduce_max
from rmt.system.torchrun import copies

OPEN = dict(max_branches=0, tokens_per_micro_batch=0, recompute="auto")  # to be chosen here
MEMORIES = (24, 32, 40, 48, 80, 96, 141, 192)  # GB of GPUs that can be bought
NODE, MOST_GPUS = 8, 1024
TILE = 16  # rows of a matrix product on a GPU that cost as much as one


class DoesNotFit(ValueError):
    """The message has what is too large, why, and what would fit."""


def fixed_knobs(config: Config) -> dict[str, Any]:
    """The knobs that are not open (any more)."""
    return {name: getattr(config, name) for name in OPEN if getattr(config, name) != OPEN[name]}


def fit(case: Case) -> Case:
    """The case with its open knobs set. DoesNotFit, with the smallest change that would do."""
    try:
        return _fit(case)
    except DoesNotFit as problem:
        if case.machine.kind == "cpu":
            raise DoesNotFit(
                f"{problem}; or set --max-branches, which is then not doubted"
            ) from None
        ways = "; ".join(remedies(case)) or "nothing up to 1,024 GPUs of 192 GB"
        raise DoesNotFit(f"{problem}. What fits: {ways}") from None


def _fit(case: Case) -> Case:
    branches = case.config.max_branches or most_branches(case)
    case = replace(case, config=replace(case.config, max_branches=branches))
    if case.machine.kind == "cpu":  # which has no fixed limit, and where "full" costs no time
        recompute = {"auto": "full"}.get(case.config.recompute, case.config.recompute)
        tokens = _rows(case)[0]
        return replace(
            case, config=replace(case.config, recompute=recompute, tokens_per_micro_batch=tokens)
        )
    room, needs = case.machine.room, rollout(case, branches)
    if total(needs) > room:
        raise DoesNotFit(
            f"--max-branches {branches} needs {_gb(total(needs))} while sampling, and there are "
            f"{_gb(room)}"
        )
    if not case.trainable:
        return case
    least = None
    for recompute, tokens in product(_recomputed(case), _rows(case)):
        config = replace(case.config, recompute=recompute, tokens_per_micro_batch=tokens)
        chosen = replace(case, config=config)
        least = chosen if least is None or total(update(chosen)) < total(update(least)) else least
        if total(update(chosen)) <= room:
            return chosen
    needs = total(update(least))
    raise DoesNotFit(
        f"an update of rows of {least.row} tokens with --recompute {least.config.recompute} needs "
        f"{_gb(needs)}, of which {_gb(total(on_device(case, states(case))))} are weights, "
        f"gradients and optimizer state; there are {_gb(room)}"
    )


def _recomputed(case: Case) -> tuple[str, ...]:
    """From fast to frugal."""
    given = case.config.recompute
    return ("none", "selective", "full") if given == "auto" else (given,)


def _rows(case: Case) -> tuple[int, ...]:
    """Half a row is nearly as fast as a whole one, and costs less than to compute twice."""
    if case.config.tokens_per_micro_batch:
        return (case.config.tokens_per_micro_batch,)
    return tuple(max(case.longest, tokens) for tokens in (ROW_TOKENS, ROW_TOKENS // 2, 1))


def most_branches(case: Case) -> int:
    """Responses that can be decoded at one time, in whole tiles. DoesNotFit: not even one."""
    room, held, own = case.machine.room, rollout(case), sum(branch(case))
    weights = {k: v for k, v in held.items() if k not in ("KV cache", "temporary", "sampler")}
    if total(weights) > room:
        listed = ", ".join(f"{_gb(size)} of {name}" for name, size in weights.items())
        raise DoesNotFit(
            f"sampling needs all weights on every GPU: {listed}, together {_gb(total(weights))}; "
            f"there are {_gb(room)}"
        )
    branches = min(MOST_BRANCHES, int((room - total(held)) / own))
    if branches < 1:
        raise DoesNotFit(
            f"{_gb(room - total(weights))} are free for rollouts, but documents and their prefill "
            f"need {_gb(held['KV cache'])} + {_gb(held['temporary'])} and each response "
            f"{_gb(own)}; lower --batch-size, --document-tokens or --max-response"
        )
    return branches // TILE * TILE or 1 << (branches.bit_length() - 1)


def remedies(case: Case) -> Iterator[str]:
    """Flags that would make the case fit, the smallest changes first."""
    c = case.config
    for names in (["max_branches"], ["recompute", "tokens_per_micro_batch"]):
        given = [name for name in names if name in fixed_knobs(c)]
        opened = replace(c, **{name: OPEN[name] for name in given})
        if given and _fits(replace(case, config=opened)):
            yield "the same without " + " and ".join(map(flag, given))
    more = list(_more(c))
    larger = [
        replace(c, gpu_memory=f"{m}GB") for m in MEMORIES if 1e9 * m > read_bytes(c.gpu_memory)
    ]
    yield from (offloaded := _first(case, [replace(c, offload=True)]))
    yield from (others := _first(case, more))
    yield from _first(case, larger)
    if not (offloaded or others):
        yield from _first(case, [replace(one, offload=True) for one in larger])
        pairs = product(larger, more)
        yield from _first(case, [replace(b, gpu_memory=a.gpu_memory) for a, b in pairs])


def _more(config: Config) -> Iterator[Config]:
    """More GPUs: a whole node, then more nodes that hold one copy of the model between them."""
    while 2 * config.gpus <= NODE:
        config = replace(config, gpus=2 * config.gpus)
        yield config
    while 2 * config.gpus * config.nodes <= MOST_GPUS:
        config = replace(config, nodes=2 * config.nodes, replicate=1)
        yield config


def _first(case: Case, configs: Sequence[Config]) -> list[str]:
    """The first of these that the case fits, as the flags to change."""
    for config in configs:
        changed = [
            f.name
            for f in fields(Config)
            if getattr(case.config, f.name) != getattr(config, f.name)
        ]
        if changed and _fits(replace(case, config=config, machine=described(config))):
            values = {name: getattr(config, name) for name in changed}
            return [" ".join(flag(n) + f" {v}" * (v is not True) for n, v in values.items())]
    return []


def _fits(case: Case) -> bool:
    try:
        _fit(case)
    except DoesNotFit:
        return False
    return True


def described(config: Config) -> Machine:
    """The machine of --gpus, --nodes and --gpu-memory, and a copy of the model per node or as many
    as --replicate says.
    """
    ranks = config.gpus * config.nodes
    replicate = copies(config.replicate, [config.gpus] * ranks)
    return Machine.described(ranks, ranks // replicate, read_bytes(config.gpu_memory))


def autofit(
    config: Config, prompt: PromptIds, model: Transformer, compute: torch.dtype, world: World
) -> Config:
    """The config with knobs that fit every rank. All ranks.

    To be asked when the model is loaded and nothing was trained yet.
    """
    if fixed_knobs(config).keys() == OPEN.keys():
        return config
    parameters = list(model.parameters())
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    held = sum(p.nbytes for p in own if p.device.type == world.device.type)
    free = -reduce_max([-free_memory(world) - held], world)[0]
    shards = parameters[0].device_mesh.shape[-1] if isinstance(parameters[0], DTensor) else 1
    # The machine as one would describe it, so that other machines can be compared with it.
    here = dict(
        gpus=shards, nodes=world.size // shards, gpu_memory=f"{free / 1e9:.1f}GB", replicate=0
    )
    machine = Machine(world.device.type, world.size, shards, (1 - FRAGMENTED) * free)
    trainable = any(p.requires_grad for p in parameters)
    case = Case(replace(config, **here), model.config, compute, prompt, machine, trainable)
    return replace(config, **fixed_knobs(fit(case).config))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
