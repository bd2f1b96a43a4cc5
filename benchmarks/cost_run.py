"""A step and a whole run in seconds: the paper's trees on one rank, over the schedule of B_t.

`Text` names what is assumed of the text and of how the model obeys its budget; everything else of a
run is rmt/config.py's Config. benchmarks/cost_model.py says what the terms are.
"""

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch

from benchmarks.cost_machines import World
from benchmarks.cost_terms import (
    GRADIENT,
    STATES,
    Flops,
    checkpoint,
    decode_parts,
    gather,
    prefill,
    update,
    weights,
)
from models.config import ModelConfig
from rmt.budget import budget_at
from rmt.config import Config
from rmt.forest import Branch, Tree
from rmt.memory import CACHED_TOKENS, branches_in

SAMPLES = 8  # points at which a run's schedule is integrated
USABLE = 0.95  # of a GPU's memory: the rest is CUDA's own and NCCL's buffers
STATES_AT_MOST = 0.9  # of a GPU's memory, beside gathered layers and activations


@dataclass(frozen=True)
class Text:
    """What a run meets. Tokens are Qwen3's; where from is said of each."""

    documents: int = 4051  # of Omni-MATH, as the paper
    tokens: int = 412  # mean of 2,470 documents: the 2,462 problems that can be checked by rule
    header: int = 103  # rmt/prompt.py: before the document
    footer: int = 20  # and after it
    answer: int = 26  # the paper's RMT-Q3 answers in 186 tokens when B_T asks for 160 of thought
    spread: float = 0.4  # guess: thinking is lognormal, this is the deviation of its logarithm
    imbalance: float = 1.1  # guess: work of the fullest rank over the mean, of several ranks

    def lengths(self, thinking: float, count: int, limit: int, of_all: int) -> list[int]:
        """Of `count` responses on the rank that has the longest of `of_all`, in random order."""
        quantiles = [(i + 0.5) / count for i in range(count)]
        quantiles[-1] = 1 - 0.5 / of_all
        deviations = map(NormalDist().inv_cdf, quantiles)
        factors = [math.exp(self.spread * z - self.spread**2 / 2) for z in deviations]
        found = [max(1, min(limit, round(thinking * f) + self.answer)) for f in factors]
        random.Random(0).shuffle(found)
        return found

    def trees(self, thinking: float, c: Config) -> tuple[Tree, Tree | None]:
        """A document with all of its questions and responses, and as raw text."""
        k, g = c.positions_per_document, c.group_size
        lengths = self.lengths(thinking, k * g, c.max_response, k * g)
        branches = tuple(
            Branch(i, self.fork(i // g, k), range(self.footer), range(length))
            for i, length in enumerate(lengths)
        )
        asked = Tree(0, range(self.fork(k - 1, k)), branches)
        raw = Tree(0, range(self.tokens), targets=np.ones(self.tokens, bool)) if c.ntp else None
        return asked, raw

    def fork(self, position: int, positions: int) -> int:
        """Where the question forks off: evenly over the document."""
        return self.header + self.tokens * (position + 1) // (positions + 1)


def slots(world: World, shape: ModelConfig, c: Config, text: Text, documents: int) -> int:
    """Branches that a rank decodes at one time, as rmt/memory.py plans them; ValueError if none."""
    m, total = world.machine, weights(shape)[2]
    states = (STATES + GRADIENT) * total / world.shards
    if states > STATES_AT_MOST * m.memory:
        raise ValueError(
            f"{states / 1e9:.0f} GB of states do not fit in {m.memory / 1e9:.0f} GB; take more "
            "devices per node or a smaller model"
        )
    free = USABLE * m.memory - STATES * total / world.shards - m.itemsize * total
    trunks = documents * (text.header + c.document_tokens)
    own = text.footer + c.max_response
    return c.max_branches or branches_in(
        free, shape, torch.bfloat16, max(trunks, CACHED_TOKENS), own
    )


def step(
    world: World, shape: ModelConfig, c: Config, text: Text, thinking: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step by term, and what decoding spends them on."""
    documents = math.ceil(c.batch_size / world.size)
    fuller = text.imbalance if world.size > 1 else 1.0
    asked, raw = text.trees(thinking, c)
    prompts = replace(asked, branches=tuple(
        Branch(b.id, b.fork, b.prompt) for b in asked.branches[:: c.group_size]
    ))  # fmt: skip
    count = documents * len(asked.branches)
    lengths = text.lengths(thinking, count, c.max_response, c.batch_size * len(asked.branches))
    fork = sum(b.fork for b in asked.branches) / len(asked.branches)
    decoding = decode_parts(
        world.machine, shape, lengths, slots(world, shape, c, text, documents), fork, text.footer,
        c.group_size,
    )  # fmt: skip
    trees, once = [tree for tree in (asked, raw) if tree], Flops.of(shape, [prompts])
    rows = math.ceil(fuller * documents * sum(map(len, trees)) / c.tokens_per_micro_batch)
    flops = Flops.of(shape, trees).times(documents)
    learning = update(world, shape, flops, rows, c.recompute == "full")
    for term in ("forward", "recompute", "head"):
        learning[term] *= fuller
    return {
        "gather": gather(world, shape),
        "prefill": fuller * prefill(world.machine, shape, once.times(documents)),
        "decode": decoding.pop("decode"),
        **learning,
        "checkpoint": checkpoint(world, shape) / c.save_every,
    }, decoding


def whole_run(world: World, shape: ModelConfig, c: Config, text: Text) -> dict:
    """Steps, hours and the mean seconds of every term, over the schedule of the budget."""
    steps = c.steps or int(c.epochs * text.documents / c.batch_size)
    budgets = [
        budget_at(t, steps, c.budget_start, c.budget_decay, c.budget_min)
        for t in (0, steps - 1, *(round((i + 0.5) * steps / SAMPLES) for i in range(SAMPLES)))
    ]
    first, last, *seen = (step(world, shape, c, text, budget)[0] for budget in budgets)
    terms = {name: sum(s[name] for s in seen) / SAMPLES for name in first}
    documents = math.ceil(text.documents / world.size)
    flops = Flops.of(shape, [Tree(0, range(text.tokens))]).times(documents)
    once = flops.layers(world.machine)  # difficulty, without its head
    seconds = sum(terms.values())
    return {
        "steps": steps, "thinking": sum(budgets[2:]) / SAMPLES, "seconds": seconds,
        "first": sum(first.values()), "last": sum(last.values()), "difficulty": once,
        "hours": (steps * seconds + once) / 3600, "terms": terms,
    }  # fmt: skip


def binding(terms: dict[str, float], decoding: dict[str, float]) -> str:
    """The largest term; of decoding also what it waits for."""
    most = max(terms, key=terms.get)
    return f"decode: {max(decoding, key=decoding.get)}" if most == "decode" else most
