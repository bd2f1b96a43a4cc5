"""Answers to fixed questions: next tokens, plain and with thinking, and problems.

Departures: the paper does not publish its evaluation decoding; ours is greedy unless asked. A
response without a readable answer is wrong, never left out.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kernels import linear_topk
from models.tokenizer import Tokenizer
from rmt.budget import budget_of_position
from rmt.curriculum import NO_TIER, TIERS
from rmt.data.corpus import Document
from rmt.evaluation.positions import Position
from rmt.evaluation.summary import PROBLEMS
from rmt.forest import pack
from rmt.memory.estimate import CACHED_TOKENS
from rmt.objective import score
from rmt.prompt import (
    Answer,
    PromptIds,
    answer_kind,
    next_token_prompt,
    parse_response,
    problem_prompt,
)
from rmt.questions import Question, coming_tokens, question_trees, text_trees
from rmt.rewards import match_reward
from rmt.rollout import generate
from rmt.sampling import Rollout, Sampling
from rmt.system.dist import World, gather_objects, rollout_mode
from rmt.trees import Tree, micro_batches


def predict_plainly(
    model,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    positions: Sequence[Position],
    token_limit: int,
    world: World,
) -> list[dict[str, Any]]:
    """Greedy next token of the raw text at each position (mode ntp). All ranks."""
    by_document = _share(positions, world)
    begin = tokenizer.begin_ids
    trees = [Tree(d, begin + documents[d].tokens.tolist()) for d in by_document]
    device, items = next(model.parameters()).device, []
    with torch.no_grad(), rollout_mode(model) as gathered:
        for batch in micro_batches(trees, token_limit):
            forest, start, places = pack(batch, device), 0, []
            for tree in batch:
                places += [(start + len(begin) + p.position, p) for p in by_document[tree.document]]
                start += len(tree)
            before = forest.predecessor[torch.tensor([place for place, _ in places], device=device)]
            top = gathered(
                forest.tokens, forest.position, forest.attend,
                lambda hidden, head: linear_topk(
                    hidden[before], head, 1, tokenizer.vocab_size,  # noqa: B023 - called at once
                )[1][:, 0],
            )  # fmt: skip
            items += [
                asdict(p)
                | dict(predicted=token, match=token == p.target, prefix_match=None)
                | dict(well_formed=True, budget=None, thinking_length=None, tokens=0)
                | dict(kind=answer_kind(tokenizer.bytes_of([p.target])))
                for token, (_, p) in zip(top.tolist(), places)  # the same fields as with thinking
            ]
    return _collect(items, world)


def nats_per_token(
    model, tokenizer: Tokenizer, documents: Sequence[Document], token_limit: int, world: World
) -> float:
    """Next-token loss of the raw text, over all its tokens but one that has none before. All ranks.

    What next-token training lowers, and what a run that only reasons may forget.
    """
    mine = range(len(documents))[world.rank :: world.size]
    trees = text_trees(mine, documents, tokenizer.begin_ids, (), {}, "all")
    device, found = next(model.parameters()).device, [0.0, 0]
    with rollout_mode(model) as gathered:
        for batch in micro_batches(trees, token_limit):
            logprob = score(gathered, pack(batch, device), 1.0, tokenizer.vocab_size)
            found = [found[0] - float(logprob.double().sum()), found[1] + len(logprob)]
    total, count = map(sum, zip(*gather_objects(found, world)))
    return total / count


def predict_thinking(
    model,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    positions: Sequence[Position],
    budget: int | None,
    budget_entropy: float,
    sampling: Sampling,
    world: World,
) -> list[dict[str, Any]]:
    """Think, then predict (modes ntr and rmt): one response per position. All ranks.

    budget_entropy: the exponent of budgets by position (Eq. 14); 0: the budget as it is.
    """
    own = [p for group in _share(positions, world).values() for p in group]
    questions = []
    for p in own:
        asked = budget and budget_of_position(budget, p.entropy, budget_entropy)
        coming = coming_tokens(tokenizer, documents[p.document], p.position)
        questions.append(Question(p.document, p.position, TIERS.index(p.tier), coming, asked))
    prompts = [next_token_prompt(tokenizer, question.budget) for question in questions]
    rollouts, items = _answer(model, questions, documents, prompts, sampling), []
    for position, question, rollout in zip(own, questions, rollouts):
        answer = parse_response(tokenizer, rollout.tokens)
        match = bool(match_reward(answer, question.coming))
        ids = [position.target] if match else tokenizer.encode(answer.text or "")
        predicted = ids[0] if len(ids) == 1 else None
        found = _item(tokenizer, question, rollout, answer, match, predicted)
        found["prefix_match"] = bool(match_reward(answer, question.coming, "prefix"))
        items.append(asdict(position) | found | dict(kind=answer_kind(question.truth)))
    return _collect(items, world)


def solve(
    model,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    budget: int | None,
    request: str,
    sampling: Sampling,
    world: World,
) -> list[dict[str, Any]]:
    """One response to each problem; with its answer, whether or not it has thought. All ranks."""
    prompt = problem_prompt(tokenizer, budget, request)
    own = range(len(documents))[world.rank :: world.size]
    questions = [
        Question(d, len(documents[d].tokens), NO_TIER, (documents[d].answer.encode(),), budget)
        for d in own
    ]
    prompts = [prompt] * len(questions)
    rollouts, items = _answer(model, questions, documents, prompts, sampling), []
    for question, rollout in zip(questions, rollouts):
        answer = parse_response(tokenizer, rollout.tokens, thinks=False)
        match = bool(match_reward(answer, question.coming, "answer"))
        where = dict(document=question.document, position=question.position, tier=PROBLEMS)
        items.append(where | _item(tokenizer, question, rollout, answer, match, answer.text))
    return _collect(items, world)


def _answer(
    model, questions: Sequence[Question], documents: Sequence[Document],
    prompts: Sequence[PromptIds], sampling: Sampling,
) -> list[Rollout]:  # fmt: skip
    """One response to each of this rank's questions. All ranks."""
    with rollout_mode(model) as gathered:
        groups = {}  # by question: batches hold the trees in any order
        for batch in micro_batches(question_trees(questions, documents, prompts), CACHED_TOKENS):
            ids = [branch.id for tree in batch for branch in tree.branches]
            groups |= zip(ids, generate(gathered, batch, 1, sampling))
    return [groups[number][0] for number in range(len(questions))]


def _item(
    tokenizer: Tokenizer, question: Question, rollout: Rollout, answer: Answer, match: bool,
    predicted: Any,
) -> dict[str, Any]:  # fmt: skip
    return dict(
        budget=question.budget, predicted=predicted, match=match,
        well_formed=answer.text is not None, thinking_length=answer.thinking_length,
        tokens=len(rollout.tokens), response=tokenizer.decode(rollout.tokens),
    )  # fmt: skip


def _share(positions: Sequence[Position], world: World) -> dict[int, list[Position]]:
    """This rank's positions by document."""
    grouped: dict[int, list[Position]] = {}
    for position in positions:
        grouped.setdefault(position.document, []).append(position)
    return {d: grouped[d] for d in sorted(grouped)[world.rank :: world.size]}


def _collect(items: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    merged = [item for part in gather_objects(items, world) for item in part]
    return sorted(merged, key=lambda item: (item["document"], item["position"]))
