"""Print the memory that a run would need on a machine that is not here.

    python train.py --model qwen3-14b --dry-run --gpus 8 --gpu-memory 80GB

Chooses knobs as a real run does (autofit.py). Needs no weights and no tokenizer.
"""

import torch

from models.shapes import published
from rmt.config.config import Config
from rmt.memory import estimate
from rmt.memory.autofit import described, fit
from rmt.memory.estimate import Case, Parts, total
from rmt.prompt import PromptIds
from rmt.system.dist import World, compute_dtype

# Longer than the real ones: 103 and 20 tokens with Qwen3's tokenizer, 102 and 18 with R1's.
PROMPT = PromptIds(header=(0,) * 112, footer=(0,) * 40)


def plan(config: Config) -> tuple[Case, dict[str, Parts]]:
    """Choose the knobs; return the case, and the peak of each phase on a rank."""
    compute = compute_dtype(config.dtype, World(0, config.gpus, torch.device("cuda")))
    case = fit(Case(config, published(config.model), compute, PROMPT, described(config)))
    return case, {
        "rollout": estimate.rollout(case, case.config.max_branches),
        "update": estimate.update(case),
    }


def dry_run(config: Config) -> str:
    """Format the memory that a run needs, in GB per rank, and the knobs that it would choose.

    DoesNotFit if it is too much.
    """
    case, phases = plan(config)
    c, machine = case.config, case.machine
    labels = dict.fromkeys(n for parts in phases.values() for n, size in parts.items() if size)
    sizes = {label: [parts.get(label, 0) for parts in phases.values()] for label in labels}
    line = lambda name, sizes: f"{name:<24}" + "".join(f"{s / 1e9:>12.2f}" for s in sizes)
    largest, nccl = max(map(total, phases.values())), estimate.NCCL * (machine.ranks > 1)
    lines = [
        f"{c.model}: {machine.ranks} GPUs of {c.gpu_memory}, {machine.shards} to a copy of the "
        f"weights; the peak of each phase, GB per rank",
        " " * 24 + "".join(f"{phase:>12}" for phase in phases),
        *(line(label, sizes[label]) for label in sorted(labels, key=lambda x: -max(sizes[x]))),
        line("together", map(total, phases.values())),
        f"fits: {largest / 1e9:.1f} of {machine.room / 1e9:.1f} GB, which is {c.gpu_memory} less "
        f"{estimate.CONTEXT / 1e9:.1f} GB for CUDA, {nccl / 1e9:.1f} GB for NCCL and "
        f"{estimate.FRAGMENTED:.0%} for fragments",
        f"chosen: --max-branches {c.max_branches} --tokens-per-micro-batch "
        f"{c.tokens_per_micro_batch} (rows of {case.row} at most) --recompute {c.recompute}",
    ]
    if c.offload:
        host = sum(size for name, size in estimate.states(case).items() if name in estimate.HOST)
        lines.append(f"host memory per rank: {host / 1e9:.1f} GB of {', '.join(estimate.HOST)}")
    return "\n".join(lines)
