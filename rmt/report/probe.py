"""Ask the same few positions again and again, to watch thinking change during a run.

Training meets a position only once in a while. Probes are one position of each tier in a few
documents, chosen once, with the prompt, budget and rewards of training at that step (Eq. 6 and 7:
neither RLP's gain nor what RFT keeps). Nothing is learnt from them, and their random numbers have a
purpose of their own: they change no bit of a run.
"""

from typing import Any

import numpy as np
from torch import Tensor

from rmt.config.config import Config
from rmt.curriculum import NO_TIER, TIERS
from rmt.engine.run import Run, Setup
from rmt.grpo import advantage_scale, advantages
from rmt.prompt import escape
from rmt.questions import (
    Question,
    RolloutBatch,
    TrainingSet,
    ask,
    asks_at_end,
    budget_of_step,
    roll_out,
)
from rmt.rollout import generate
from rmt.system.dist import gathered_weights


def probe_steps(run: Run) -> set[int]:
    """Return the steps before which probes are asked: 0, evenly in between, and T (the end)."""
    gaps = run.config.probe_times - 1
    return {round(k * run.total_steps / gaps) for k in range(gaps + 1)}


def probed_documents(c: Config, data: TrainingSet) -> list[int]:
    """Return the first documents of the run; none unless it reasons about next tokens."""
    met = dict.fromkeys(data.order.flatten().tolist())
    return list(met)[: c.probe_documents if c.task == "next-token" and not asks_at_end(c) else 0]


def probe_questions(c: Config, data: TrainingSet, step: int) -> list[Question]:
    """Ask one position of each tier of each probed document, the same at every step."""
    questions, budget = [], budget_of_step(c, step, data.total_steps)
    for index in probed_documents(c, data):
        for tier in range(len(TIERS)):
            places = np.flatnonzero(data.tiers[index] == tier)
            if len(places):
                chosen = np.random.default_rng((c.seed, index, tier)).choice(places)
                questions.append(ask(c, data, index, int(chosen), budget))
    return questions


def ask_probes(run: Run, setup: Setup) -> list[dict[str, Any]]:
    """Sample G responses to each probe at this step; return a record per position. All ranks.

    Every rank samples all of them: there are few.
    """
    c, step, data = run.config, run.step, setup.data
    questions = probe_questions(c, data, step)
    if not questions:
        return []
    run.optimizer.zero_grad(set_to_none=True)  # room for the cache
    with gathered_weights(run.model) as sampler:
        batch = roll_out(c, data, sampler, generate, questions, step, "sample")
    total = batch.rewards["total"]
    scale = advantage_scale(total, c.advantage_norm, c.advantage_delta, [total])
    advantage = advantages(total, scale)
    return [
        dict(
            step=step, budget=q.budget, document=q.document, position=q.position,
            tier=TIERS[q.tier], truth=escape(q.truth),
            rollouts=[_rollout(batch, advantage, number, k) for k in range(c.group_size)],
        )
        for number, q in enumerate(questions)
    ]  # fmt: skip


def _rollout(batch: RolloutBatch, advantage: Tensor, number: int, k: int) -> dict[str, Any]:
    answer = batch.answers[number][k]
    rewards = {name: float(values[number, k]) for name, values in batch.rewards.items()}
    return dict(
        thought=answer.thought, answer=answer.text, match=rewards["match"],
        length_reward=rewards["length"], total=rewards["total"],
        advantage=float(advantage[number, k]), thinking_length=answer.thinking_length,
        tokens=len(batch.responses[number][k].tokens),
    )  # fmt: skip


def describe_documents(run: Run, setup: Setup) -> list[dict[str, Any]]:
    """Describe the probed documents: text, entropy in nats and tier (or None) of each token."""
    data = setup.data
    return [
        {
            "index": index,
            "source": data.documents[index].source,
            "tokens": [
                _readable(data.tokenizer.bytes_of([t])) for t in data.documents[index].tokens
            ],
            "entropies": [round(float(entropy), 4) for entropy in data.entropies[index]],
            "tiers": [None if tier == NO_TIER else TIERS[tier] for tier in data.tiers[index]],
        }
        for index in probed_documents(run.config, data)
    ]


def _readable(token: bytes) -> str:
    """Return the text of a token, escaped where it has none that can be seen."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character
        return escape(token)
    return text if all(c.isprintable() or c in "\n\t" for c in text) else escape(token)
