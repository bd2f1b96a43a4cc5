"""A step and a whole run in seconds: the paper's trees on one rank, over the schedule of B_t.

`Text` names what is assumed of the text and of how the model obeys its budget; everything else of a
run is rmt/config/config.py's Config. benchmarks/cost_model.py says what the terms are.
"""

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch

from benchmarks.cost_machines import World
from benchmarks.cost_terms import (
    Flops,
    checkpoint,
    decode_parts,
    gather,
    prefill,
    update,
)
from models.config import ModelConfig
from rmt.budget import budget_at
from rmt.config.config import Config
from rmt.forest import Branch, Tree
from rmt.memory.autofit import described, fit
from rmt.memory.estimate import Case
from rmt.prompt import PromptIds

SAMPLES = 8  # points at which a run's schedule is integrated


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


def fitted(world: World, shape: ModelConfig, c: Config, text: Text) -> Config:
    """The knobs that a run on this machine would choose; ValueError if none fit."""
    memory = f"{world.machine.memory / 1e9:g}GB"
    c = replace(c, gpus=world.shards, nodes=world.replicas, gpu_memory=memory)
    prompt = PromptIds(header=(0,) * text.header, footer=(0,) * text.footer)
    return fit(Case(c, shape, torch.bfloat16, prompt, described(c))).config


def step(
    world: World, shape: ModelConfig, c: Config, text: Text, thinking: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step by term, and what decoding spends them on."""
    c, documents = fitted(world, shape, c, text), math.ceil(c.batch_size / world.size)
    fuller = text.imbalance if world.size > 1 else 1.0
    asked, raw = text.trees(thinking, c)
    prompts = replace(asked, branches=tuple(
        Branch(b.id, b.fork, b.prompt) for b in asked.branches[:: c.group_size]
    ))  # fmt: skip
    count = documents * len(asked.branches)
    lengths = text.lengths(thinking, count, c.max_response, c.batch_size * len(asked.branches))
    fork = sum(b.fork for b in asked.branches) / len(asked.branches)
    decoding = decode_parts(
        world.machine, shape, lengths, c.max_branches, fork, text.footer, c.group_size
    )  # fmt: skip
    trees, once = [tree for tree in (asked, raw) if tree], Flops.of(shape, [prompts])
    rows = math.ceil(fuller * documents * sum(map(len, trees)) / c.tokens_per_micro_batch)
    flops = Flops.of(shape, trees).times(documents)
    learning = update(world, shape, flops, rows, c.recompute == "full")
    for term in ("forward", "recompute", "head"):
        learning[term] *= fuller
    terms = {
        "gather": gather(world, shape),
        "prefill": fuller * prefill(world.machine, shape, once.times(documents)),
        "decode": decoding.pop("decode"),
        **learning,
    }
    between = c.save_every * sum(terms.values())
    terms["checkpoint"] = checkpoint(world, shape, between) / c.save_every
    return terms, decoding


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
