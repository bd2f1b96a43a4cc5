"""What is asked in a step, and what is answered: questions, groups of responses, their rewards.

Training asks through `draw_questions` and `ask`; rmt/report/probe.py by `respond`.

Departures: RPT's dynamic sampling fills its batch with groups of other prompts; ours replaces a
group whose matching rewards are all equal by one at a new position of the same document, so that
a step has the documents that its epoch gave it. Groups are judged by r_match (as the composite
reward differs almost always), at most `resample_tries` times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmt.batch import Question, question_trees
from rmt.budget import budget_at, budget_of_position
from rmt.curriculum import NO_TIER, Draw, adaptive_probabilities, tier_probabilities
from rmt.engine.balance import deal, expected_work, update_work
from rmt.engine.metrics import Metrics, mixed
from rmt.engine.run import Run
from rmt.prompt import Answer, PromptIds, parse_response, prompt_for
from rmt.rewards import reward_groups
from rmt.rollout import Rollout, Sampling, generate
from rmt.system import dist

LOOKAHEAD = 32  # tokens that a prefix may have


@dataclass
class Said:
    """G responses to each of P questions, what they say, and (P, G) rewards."""

    groups: list[list[Rollout]]
    answers: list[list[Answer]]
    rewards: dict[str, Tensor]


def budget_of(run: Run, step: int) -> int | None:
    """B_t, None when no budget is asked for; `step` may be T, which is the end of the schedule."""
    c = run.config
    if not c.budget:
        return None
    return budget_at(step, run.total_steps, c.budget_start, c.budget_decay, c.budget_min)


def draw_questions(run: Run, step: int, metrics: Metrics) -> tuple[list[int], list[Question]]:
    """This rank's documents of a step, and questions about them.

    Every rank draws for all: to know what was drawn, and to deal documents out by their work.
    """
    c, indices = run.config, run.order[step].tolist()
    drawn = [_draw(run, step, index, c.positions_per_document) for index in indices]
    asked = [
        [question_at(run, step, index, draw) for draw in draws]
        for index, (draws, _) in zip(indices, drawn)
    ]
    work = [
        expected_work(
            len(run.documents[index].tokens), questions, c.group_size, c.max_response, c.ntp
        )
        for index, questions in zip(indices, asked)
    ]
    mine = deal(work, run.world.size)[run.world.rank]
    missing = sum(drawn[i][1] for i in mine)
    metrics.add("share/empty_tier_draws", missing, len(mine) * c.positions_per_document)
    return [indices[i] for i in mine], [question for i in mine for question in asked[i]]


def _draw(
    run: Run, step: int, index: int, count: int, taken: Sequence[int] = (), attempt: int = 0
) -> tuple[list[Draw], int]:
    """Positions of a document to ask about, none of `taken`, and how often a tier was empty."""
    c = run.config
    if c.task == "nothing":
        return [], 0
    if c.task == "problems":
        return [Draw(len(run.documents[index].tokens), NO_TIER)], 0
    return run.curriculum.draw(step, index, planned_tiers(run, step), count, taken, attempt)


def planned_tiers(run: Run, step: int) -> np.ndarray | None:
    """The probabilities that tiers are drawn with; None: without a curriculum."""
    c = run.config
    if not c.curriculum:
        return None
    if c.curriculum_rule == "adaptive":
        return adaptive_probabilities(*run.curriculum.rates.T, c.adaptive_floor)
    return tier_probabilities(
        step / run.total_steps, c.curriculum_early, c.curriculum_late, c.curriculum_start,
        c.curriculum_end,
    )  # fmt: skip


def question_at(run: Run, step: int, index: int, draw: Draw) -> Question:
    """The question about a position of a document, with what comes there, and its budget."""
    document, budget = run.documents[index], budget_of(run, step)
    if run.config.task == "problems":
        coming = (document.answer.encode("utf-8"),)
    else:
        ids = document.tokens[draw.position : draw.position + LOOKAHEAD].tolist()
        coming = tuple(run.tokenizer.bytes_of([token]) for token in ids)
        if budget is not None:
            entropy = float(run.entropies[index][draw.position])
            budget = budget_of_position(budget, entropy, run.config.budget_entropy)
    return Question(index, draw.position, draw.tier, coming, budget)


def prompts_of(run: Run, questions: Sequence[Question]) -> list[PromptIds]:
    """What each question asks: the next token, or to solve a problem, within its budget."""
    c = run.config
    return [prompt_for(c.task, run.tokenizer, q.budget, c.problem_request) for q in questions]


def ask(
    run: Run, sampler, questions: list[Question], step: int, metrics: Metrics
) -> tuple[list[Question], Said]:
    """Responses to questions; with dynamic sampling the questions may change. All ranks."""
    c, generated = run.config, 0
    with run.clock("sampling"):  # without waiting for others
        said = respond(run, sampler, questions, step)
    run.curriculum.fade()
    _observe(run, questions, said)
    taken = _taken(questions)
    for attempt in range(1, 1 + (c.resample_tries if 0 <= c.resample_from <= step else 0)):
        dull = (~mixed(said.rewards["match"])).nonzero()[:, 0].tolist()
        others = _others(run, step, questions, dull, taken, attempt)
        if others is None:
            break
        with run.clock("sampling"):
            fresh = respond(run, sampler, list(others.values()), step, attempt=attempt)
        _observe(run, list(others.values()), fresh)
        generated += sum(len(r.tokens) for i in others for r in said.groups[i])
        questions, said = _replaced(questions, said, others, fresh)
    metrics.add("tokens/dropped", generated, 1 / run.world.size)  # a sum over ranks
    metrics.add("share/noise", run.curriculum.noise, max(1, len(run.curriculum.misses)))
    return questions, said


def _taken(questions: Sequence[Question]) -> dict[int, set[int]]:
    """The positions of each document that are asked about."""
    taken: dict[int, set[int]] = {}
    for question in questions:
        taken.setdefault(question.document, set()).add(question.position)
    return taken


def _others(
    run: Run, step: int, questions: list[Question], dull: Sequence[int],
    taken: dict[int, set[int]], attempt: int,
) -> dict[int, Question] | None:  # fmt: skip
    """New questions in the places `dull`, about positions of the same documents that this step has
    not asked about, as far as there are any; None when no rank has one. Adds to taken. All ranks.
    """
    places: dict[int, list[int]] = {}
    for i in dull:
        places.setdefault(questions[i].document, []).append(i)
    wanted = [(index, len(group), sorted(taken[index])) for index, group in places.items()]
    # Every rank draws for all, to know what was drawn.
    drawn = [
        [_draw(run, step, *request, attempt)[0] for request in part]
        for part in dist.gather_objects(wanted, run.world)
    ]
    if not any(draws for part in drawn for draws in part):
        return None
    others = {
        i: question_at(run, step, index, draw)
        for (index, group), draws in zip(places.items(), drawn[run.world.rank])
        for i, draw in zip(group, draws)
    }
    for question in others.values():
        taken[question.document].add(question.position)
    return others


def respond(
    run: Run, sampler, questions: Sequence[Question], step: int, purpose: str = "train",
    attempt: int = 0,
) -> Said:  # fmt: skip
    """G responses to each question, parsed and rewarded; `purpose` names their random numbers, of
    which each attempt of a step has its own.
    """
    c, tokenizer = run.config, run.tokenizer
    sampling = Sampling(
        c.max_response, tokenizer.stop_ids, tokenizer.vocab_size, c.temperature, c.max_branches,
        c.seed, purpose, step, attempt * c.group_size,
    )  # fmt: skip
    trees = question_trees(questions, run.documents, prompts_of(run, questions))
    groups = generate(sampler, trees, c.group_size, sampling)
    thinks = c.task == "next-token"
    answers = [[parse_response(tokenizer, r.tokens, thinks) for r in group] for group in groups]
    rewards = reward_groups(
        answers, [q.coming for q in questions], c.group_size, [q.budget for q in questions],
        c.length_weight, c.length_reward_max, c.length_reward_gate, c.match,
    )  # fmt: skip
    return Said(groups, answers, rewards)


def deal_again(
    run: Run, indices: list[int], questions: list[Question], said: Said
) -> tuple[list[int], list[Question], Said]:
    """Documents, questions and what was said, dealt anew now that lengths are known. All ranks."""
    if run.world.size == 1:
        return indices, questions, said
    parts = dist.gather_objects((indices, questions, said), run.world)
    indices, questions, groups, answers = (
        [item for part in column for item in part]
        for column in zip(*((i, q, s.groups, s.answers) for i, q, s in parts))
    )
    rewards = {name: torch.cat([s.rewards[name] for *_, s in parts]) for name in said.rewards}
    places = [[i for i, q in enumerate(questions) if q.document == index] for index in indices]
    work = [
        update_work(
            len(run.documents[index].tokens), [questions[i] for i in asked],
            [groups[i] for i in asked], run.config.ntp,
        )
        for index, asked in zip(indices, places)
    ]  # fmt: skip
    mine = deal(work, run.world.size)[run.world.rank]
    kept = [i for number in mine for i in places[number]]
    pick = lambda items: [items[i] for i in kept]
    own = Said(pick(groups), pick(answers), {name: whole[kept] for name, whole in rewards.items()})
    return [indices[number] for number in mine], pick(questions), own


def _observe(run: Run, questions: Sequence[Question], said: Said) -> None:
    """Tell the curriculum of every rank what became of its positions. All ranks."""
    if run.config.task != "next-token":
        return
    right = said.rewards["match"].sum(dim=1).tolist()
    own = [(q.document, q.position, q.tier, int(n)) for q, n in zip(questions, right)]
    for part in dist.gather_objects(own, run.world):
        for document, position, tier, matched in part:
            run.curriculum.observe(document, position, tier, matched, run.config.group_size)


def _replaced(
    questions: Sequence[Question], said: Said, others: dict[int, Question], fresh: Said
) -> tuple[list[Question], Said]:
    """Questions and what was said to them, with others (and what was said to those) in places."""
    order = {place: number for number, place in enumerate(others)}
    pick = lambda old, new: [new[order[i]] if i in order else x for i, x in enumerate(old)]
    rewards = {name: old.clone() for name, old in said.rewards.items()}
    for name, values in rewards.items():
        values[list(others)] = fresh.rewards[name]
    answered = Said(pick(said.groups, fresh.groups), pick(said.answers, fresh.answers), rewards)
    return pick(questions, list(others.values())), answered
