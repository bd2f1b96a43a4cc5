"""The same few positions asked again and again, so that one can watch thinking shrink.

Training meets a position once in a while. Here one position of each tier of a few documents is
chosen once and asked at a few steps, as training asks: same prompt, budget and rewards. Nothing is
learnt from it, and random numbers have a purpose of their own: a run has the same bits without.
"""

from typing import Any

import numpy as np
from torch import Tensor

from rmt.ask import Said, question_at, respond
from rmt.batch import Question
from rmt.curriculum import NO_TIER, TIERS, Draw
from rmt.engine.run import Run
from rmt.grpo import advantage_scale, advantages
from rmt.prompt import escape
from rmt.system.dist import rollout_mode


def probe_steps(run: Run) -> set[int]:
    """Steps before which probes are asked: the first, evenly in between, and T, after the last."""
    gaps = run.config.probe_times - 1
    return {round(k * run.total_steps / gaps) for k in range(gaps + 1)}


def probed_documents(run: Run) -> list[int]:
    """The first documents that the run meets; none where no next token is reasoned about."""
    c = run.config
    met = dict.fromkeys(run.order.flatten().tolist())
    return list(met)[: c.probe_documents if c.task == "next-token" else 0]


def probe_questions(run: Run, step: int) -> list[Question]:
    """One position of each tier that a probed document has, the same at every step."""
    questions = []
    for index in probed_documents(run):
        for tier in range(len(TIERS)):
            places = np.flatnonzero(run.tiers[index] == tier)
            if len(places):
                chosen = np.random.default_rng((run.config.seed, index, tier)).choice(places)
                questions.append(question_at(run, step, index, Draw(int(chosen), tier)))
    return questions


def ask_probes(run: Run) -> list[dict[str, Any]]:
    """G responses to each probe at this step, a record per position. All ranks.

    Every rank samples all of them: there are few, and none has to wait for another.
    """
    c, step, questions = run.config, run.step, probe_questions(run, run.step)
    if not questions:
        return []
    run.optimizer.zero_grad(set_to_none=True)  # as before training's rollouts: room for the cache
    with rollout_mode(run.model) as sampler:
        said = respond(run, sampler, questions, step, "sample")
    total = said.rewards["total"]
    scale = advantage_scale(total, c.advantage_norm, c.advantage_delta, [total])
    advantage = advantages(total, scale)
    return [
        {
            "step": step,
            "budget": question.budget,
            "document": question.document,
            "position": question.position,
            "tier": TIERS[question.tier],
            "truth": escape(question.truth),
            "rollouts": [_rollout(said, advantage, number, k) for k in range(c.group_size)],
        }
        for number, question in enumerate(questions)
    ]


def _rollout(said: Said, advantage: Tensor, number: int, k: int) -> dict[str, Any]:
    answer = said.answers[number][k]
    worth = {name: float(values[number, k]) for name, values in said.rewards.items()}
    return {
        "thought": answer.thought,
        "answer": answer.text,
        "match": worth["match"],
        "length_reward": worth["length"],
        "total": worth["total"],
        "advantage": float(advantage[number, k]),
        "thinking_length": answer.thinking_length,
        "tokens": len(said.groups[number][k].tokens),
    }


def describe_documents(run: Run) -> list[dict[str, Any]]:
    """The probed documents for people: text, entropy in nats and tier (or null) of each token."""
    return [
        {
            "index": index,
            "source": run.documents[index].source,
            "tokens": [_readable(run.tokenizer.bytes_of([t])) for t in run.documents[index].tokens],
            "entropies": [round(float(entropy), 4) for entropy in run.entropies[index]],
            "tiers": [None if tier == NO_TIER else TIERS[tier] for tier in run.tiers[index]],
        }
        for index in probed_documents(run)
    ]


def _readable(token: bytes) -> str:
    """Its text, so that tokens in a row read as the document; escaped where there is none."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character
        return escape(token)
    return text if all(c.isprintable() or c in "\n\t" for c in text) else escape(token)
