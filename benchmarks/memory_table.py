"""Table of settings that fit: every known model on 1, 8 and 16 GPUs of 24, 80 and 141 GB, and with
`--lora-rank 16` on one GPU.

    python -m benchmarks.memory_table      rewrites the table in docs/memory.md

The planner of a real run (rmt/memory/autofit.py) estimates each cell with the paper's
hyper-parameters, for a batch of 128 documents or, where that does not fit, a smaller one. Nothing
is measured. `python train.py --dry-run` shows the sums of any cell.
"""

import math
from itertools import product
from pathlib import Path

import torch

from models.shapes import SHAPES
from rmt.config.config import Config
from rmt.memory.autofit import NODE, DoesNotFit, described, fit
from rmt.memory.dry_run import PROMPT
from rmt.memory.estimate import Case

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- memory -->", "<!-- /memory -->"
RANK = 16  # of adapters, in the last columns
CELLS = [*product((1, 8, 16), (24, 80, 141), (0,)), (1, 24, RANK), (1, 80, RANK)]
BATCHES = (128, 64, 32, 16, 8)  # documents per step; the paper's first
SHORT = {"none": "", "selective": " s", "full": " f"}


def cell(model: str, gpus: int, memory: int, rank: int) -> str:
    """Format branches, recompute (s, f), * for --offload, and / with a smaller batch size."""
    nodes = math.ceil(gpus / NODE)
    for batch, offload in product(BATCHES, (False, True)):
        config = Config(
            model=model, gpus=gpus // nodes, nodes=nodes, replicate=1, gpu_memory=f"{memory}GB",
            offload=offload, batch_size=batch, lora_rank=rank,
        )  # fmt: skip
        case = Case(config, SHAPES[model], torch.bfloat16, PROMPT, described(config))
        try:
            chosen = fit(case).config
        except DoesNotFit:
            continue
        smaller = f" /{batch}" * (batch < BATCHES[0])
        return f"{chosen.max_branches}{SHORT[chosen.recompute]}{' *' * offload}{smaller}"
    return "–"


def table() -> str:
    """Return the table in Markdown."""
    names = [f"{gpus} × {memory} GB" + ", LoRA" * (rank > 0) for gpus, memory, rank in CELLS]
    rows = [[model, *(cell(model, *where) for where in CELLS)] for model in SHAPES]
    lines = [["", *names], ["---", *["---:"] * len(CELLS)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
