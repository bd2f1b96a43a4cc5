"""The method without the forest: every response is a sequence of its own. Slow, easy to check.

`pack` and `generate` do what rmt/forest.py and rmt/rollout.py do, and compute nothing for two
responses at once: a response is scored, and each of its tokens sampled, in the whole sequence
trunk[:fork] + stem + response, with ordinary causal attention and no cache. `train.py --naive` runs
on them. Tests hold the forest against this file: same tokens, same loss, same gradients.

Shapes: N tokens of all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import matmul
from rmt.sampling import Rollout, Sampling, sample, uniforms
from rmt.trees import Tree


@dataclass(frozen=True)
class Sequences:
    """Sequences one after another in a row, with the (N,) vectors of a Forest that a loss reads."""

    trees: tuple[Tree, ...]
    lengths: list[int]  # of the sequences
    tokens: Tensor
    tree: Tensor  # which of `trees`
    branch: Tensor  # 1 + Branch.id in the sequence of a response, 0 in a text
    position: Tensor
    predecessor: Tensor  # index of the token before; -1 for the first of a sequence
    is_target: Tensor  # True where the token is a training target

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention in each sequence: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        out = []
        for one in zip(*(x.split(self.lengths) for x in (q, k, v))):
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in one)  # (1, heads, length, D)
            seen = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
            out.append(seen[0].transpose(0, 1))
        return torch.cat(out)


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Sequences:
    """Lay out each response behind all that it sees, and each text that is trained on."""
    columns: dict[str, list] = {name: [] for name in ("tokens", "tree", "branch", "is_target")}
    lengths = []
    for number, tree in enumerate(trees):
        rows = []  # (tokens, which of them are targets, branch)
        if tree.targets is not None or not tree.branches:
            targets = [False] * len(tree.trunk) if tree.targets is None else list(tree.targets)
            rows.append((list(tree.trunk), targets, 0))
        for b in tree.branches:
            before = [*tree.trunk[: b.fork], *b.stem]
            targets = [False] * len(before) + [True] * len(b.response)
            rows.append(([*before, *b.response], targets, 1 + b.id))
        for tokens, targets, branch in rows:
            lengths.append(len(tokens))
            columns["tokens"] += tokens
            columns["tree"] += [number] * len(tokens)
            columns["branch"] += [branch] * len(tokens)
            columns["is_target"] += [False, *targets[1:]]  # nothing precedes a first token
    vectors = {name: torch.tensor(values, device=device) for name, values in columns.items()}
    position = torch.cat([torch.arange(n, device=device) for n in lengths])
    predecessor = torch.where(position > 0, torch.arange(len(position), device=device) - 1, -1)
    return Sequences(tuple(trees), lengths, position=position, predecessor=predecessor, **vectors)


@torch.inference_mode()
def generate(model, trees: Sequence[Tree], samples: int, sampling: Sampling) -> list[list[Rollout]]:
    """`samples` responses to the prompt on each branch of each tree, as rollout.generate."""
    device = next(model.parameters()).device
    prompts = [[*t.trunk[: b.fork], *b.stem] for t in trees for b in t.branches]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    if not prompts:
        return []
    rollouts = [Rollout() for _ in prompts]
    uniform = uniforms(trees, samples, sampling).to(device)
    for offset in range(sampling.max_new_tokens):
        open_ = [i for i, rollout in enumerate(rollouts) if not rollout.finished]
        if not open_:
            break
        row = pack([Tree(i, [*prompts[i], *rollouts[i].tokens]) for i in open_], device)
        last = torch.tensor(np.cumsum(row.lengths) - 1, device=device)
        logits = model(
            row.tokens, row.position, row.attend,
            lambda hidden, head: matmul(hidden[last], head.t()),  # noqa: B023 - called at once
        )  # fmt: skip
        drawn = sample(logits, uniform[open_, offset], sampling)
        for i, token, logprob in zip(open_, *(x.tolist() for x in drawn)):
            rollouts[i].tokens.append(token)
            rollouts[i].logprobs.append(logprob)
            rollouts[i].finished = token in sampling.stop_ids
    return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]


def separate_tokens(trees: Sequence[Tree]) -> int:
    """Tokens if every response, and every trunk that is trained on, were a sequence of its own."""
    texts = sum(len(tree.trunk) for tree in trees if tree.targets is not None)
    return texts + sum(b.fork + len(b) for tree in trees for b in tree.branches)
