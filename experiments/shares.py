"""How much of an update is reinforcement, how much next-token prediction: tokens and gradients.

    python -m experiments.shares FLAGS OF train.py --out RUN

Trains as train.py does, without checkpoints, and at each step also computes the gradients of −J_RL
and of λ·L_NTP (Eq. 10) alone. RUN/shares.json has for each step the target tokens of either part,
the norms of both gradients, and their cosine.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

import train
from rmt.config.config import parse
from rmt.engine.log import describe
from rmt.engine.run import prepare
from rmt.forest import pack
from rmt.objective import Objective, forest_loss
from rmt.system import dist
from rmt.system.records import write_json
from rmt.trees import Tree, micro_batches
from rmt.update import update


def gradient(model, trees: Sequence[Tree], objective: Objective, token_limit: int) -> torch.Tensor:
    """Return the gradient of a step's loss with respect to all weights, as one vector."""
    model.zero_grad(set_to_none=True)
    for batch in micro_batches(trees, token_limit):
        forest_loss(model, pack(batch, next(model.parameters()).device), objective)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def shares(
    model, trees: Sequence[Tree], objective: Objective, token_limit: int
) -> dict[str, int | float]:
    """Return tokens and norms of both parts of the loss, and the cosine of their gradients."""
    alone = {
        "rl": replace(objective, ntp_weight=0.0),
        "ntp": replace(objective, advantage=torch.zeros_like(objective.advantage)),
    }
    rl, ntp = (gradient(model, trees, part, token_limit) for part in alone.values())
    taught = (objective.advantage != 0) & (objective.weight != 0)
    responses = [b for tree in trees for b in tree.branches if taught[b.id]]
    return {
        "tokens/rl": sum(len(branch.response) for branch in responses),
        "tokens/ntp": sum(tree.trunk_targets for tree in trees),
        "norm/rl": float(rl.norm()), "norm/ntp": float(ntp.norm()),
        "cosine": float(torch.cosine_similarity(rl, ntp, dim=0)),
    }  # fmt: skip


def main() -> None:
    config, world = parse(sys.argv[1:], __doc__, ""), dist.start()
    run, setup = prepare(config, world)
    found = []

    def measured(c, model, optimizer, reference, trees, objective, *rest):
        found.append(shares(model, trees, objective, c.tokens_per_micro_batch))
        return update(c, model, optimizer, reference, trees, objective, *rest)

    train.update = measured
    for _ in tqdm(range(run.total_steps), unit="step"):
        train.train_step(run, setup)
        run.step += 1
    about = describe(run.config, run.total_steps, world, run.step)
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(run.out / "shares.json", about | {"steps": found})


if __name__ == "__main__":
    main()
