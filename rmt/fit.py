"""Knobs that fit the memory there is: rows, what is computed again, branches decoded at one time.

A dry run and a real one ask the same: the one about a machine that is described, the other about
the memory that is free when its model is loaded. Knobs that are set are kept as they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch.distributed.tensor import DTensor

from models.transformer import Transformer
from rmt.config import Config
from rmt.dist import World, free_memory, reduce_max
from rmt.flags import flag, read_bytes
from rmt.memory import (
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

MEMORIES = (24, 32, 40, 48, 80, 96, 141, 192)  # GB of GPUs that can be bought
MOST_GPUS = 1024


class DoesNotFit(ValueError):
    """The message has what is too large, why, and what would fit."""


def fit(case: Case) -> Case:
    """The case with its open knobs set. DoesNotFit, with the smallest change that would do."""
    try:
        return _fit(case)
    except DoesNotFit as problem:
        ways = "; ".join(remedies(case)) or "nothing up to 1,024 GPUs of 192 GB"
        raise DoesNotFit(f"{problem}. What fits: {ways}") from None


def _fit(case: Case) -> Case:
    branches = case.config.max_branches or most_branches(case)
    case = replace(case, config=replace(case.config, max_branches=branches))
    room, needs = case.machine.room, rollout(case, branches)
    if total(needs) > room:
        raise DoesNotFit(
            f"--max-branches {branches} needs {_gb(total(needs))} while sampling, and there are "
            f"{_gb(room)}"
        )
    if not case.trainable:
        return case
    if case.machine.kind == "cpu":  # which has no fixed limit, and where "full" costs no time
        recompute = {"auto": "full"}.get(case.config.recompute, case.config.recompute)
        return replace(
            case, config=replace(
                case.config, recompute=recompute, tokens_per_micro_batch=_rows(case)[0]
            )
        )  # fmt: skip
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
    """Responses that can be decoded at one time: a power of two. DoesNotFit: not even one."""
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
    return 1 << (branches.bit_length() - 1)


def remedies(case: Case) -> Iterator[str]:
    """Flags that would make the case fit, the smallest changes first."""
    c = case.config
    for changes in (dict(max_branches=0), dict(recompute="auto", tokens_per_micro_batch=0)):
        given = [flag(name) for name, value in changes.items() if getattr(c, name) != value]
        if given and _fits(replace(case, config=replace(c, **changes))):
            yield "the same without " + " and ".join(given)
    if case.machine.kind == "cpu":  # of a real run, on the machine that there is
        return
    more = [c.gpus << n for n in range(1, 11) if c.gpus << n <= MOST_GPUS]
    larger = [f"{m}GB" for m in MEMORIES if 1e9 * m > read_bytes(c.gpu_memory)]
    offloaded = _first(case, [True], [c.gpus], [c.gpu_memory])
    yield from offloaded
    yield from (others := _first(case, [c.offload], more, [c.gpu_memory]))
    yield from _first(case, [c.offload], [c.gpus], larger)
    if not (offloaded or others):
        yield from _first(case, [True], [c.gpus], larger)
        yield from _first(case, [c.offload], more, larger)


def _first(case: Case, offloads, numbers, memories) -> list[str]:
    """The first of these machines that the case fits, as the flags to change."""
    c = case.config
    for memory, gpus, offload in product(memories, numbers, offloads):
        config = replace(c, gpus=gpus, gpu_memory=memory, offload=offload)
        if config != c and _fits(replace(case, config=config, machine=described(config))):
            changed = ((gpus != c.gpus, f"--gpus {gpus}"), (offload != c.offload, "--offload"),
                       (memory != c.gpu_memory, f"--gpu-memory {memory}"))  # fmt: skip
            return [" ".join(text for differs, text in changed if differs)]
    return []


def _fits(case: Case) -> bool:
    try:
        _fit(case)
    except DoesNotFit:
        return False
    return True


def described(config: Config) -> Machine:
    """The machine of --gpus, --nodes and --gpu-memory; a node holds one copy of the model."""
    ranks = config.gpus * config.nodes
    return Machine.described(ranks, config.gpus, read_bytes(config.gpu_memory))


def fitted(
    config: Config, prompt: PromptIds, model: Transformer, compute: torch.dtype, world: World
) -> Config:
    """The config with knobs that fit every rank. All ranks.

    To be asked when the model is loaded and nothing was trained yet.
    """
    if config.max_branches and config.tokens_per_micro_batch and config.recompute != "auto":
        return config
    parameters = list(model.parameters())
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    held = sum(p.nbytes for p in own if p.device.type == world.device.type)
    free = -reduce_max([-free_memory(world) - held], world)[0]
    shards = parameters[0].device_mesh.shape[-1] if isinstance(parameters[0], DTensor) else 1
    # The machine as one would describe it, so that other machines can be compared with it.
    here = dict(gpus=shards, nodes=world.size // shards, gpu_memory=f"{free / 1e9:.1f}GB")
    machine = Machine(world.device.type, world.size, shards, (1 - FRAGMENTED) * free)
    trainable = any(p.requires_grad for p in parameters)
    case = Case(replace(config, **here), model.config, compute, prompt, machine, trainable)
    chosen = fit(case).config
    return replace(
        config, max_branches=chosen.max_branches, recompute=chosen.recompute,
        tokens_per_micro_batch=chosen.tokens_per_micro_batch,
    )  # fmt: skip


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
