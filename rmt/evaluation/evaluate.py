"""Evaluate a model at fixed positions: next tokens, plainly or with thinking, and problems.

Departures: the paper does not publish its evaluation decoding; ours samples as in training unless
asked. A response without a readable answer counts as wrong and is never left out.
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
from rmt.objective import target_logprobs
from rmt.prompt import Answer, PromptIds, escape, next_token_prompt, parse_response, prompt_for
from rmt.questions import Question, coming_tokens, question_trees, text_trees
from rmt.rewards import match_reward
from rmt.rollout import generate
from rmt.sampling import Sampling
from rmt.system.dist import World, gather_objects, gathered_weights
from rmt.trees import Tree, micro_batches


def predict_plainly(
    model, tokenizer: Tokenizer, documents: Sequence[Document], positions: Sequence[Position],
    token_limit: int, world: World,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predict the next token greedily from the raw text at each position (mode ntp). All ranks."""
    own = _share(positions, world)
    begin = tokenizer.begin_ids
    trees = [Tree(d, begin + documents[d].tokens.tolist()) for d in own]
    device, items = world.device, []  # of the gathered weights: --offload has its own on the CPU
    with torch.no_grad(), gathered_weights(model) as gathered:
        for batch in micro_batches(trees, token_limit):
            forest, start, places = pack(batch, device), 0, []
            for tree in batch:
                places += [(start + len(begin) + p.position, p) for p in own[tree.document]]
                start += len(tree)
            before = forest.predecessor[torch.tensor([place for place, _ in places], device=device)]
            top = gathered(
                forest.tokens, forest.position, forest.attend,
                lambda hidden, head: linear_topk(
                    hidden[before], head, 1, tokenizer.vocab_size,  # noqa: B023 - called at once
                )[1][:, 0],
            )  # fmt: skip
            items += [
                asdict(p) | dict(  # the same fields as with thinking
                    predicted=token, match=token == p.target, prefix_match=None, well_formed=True,
                    budget=None, thinking_length=None, tokens=0,
                    kind=answer_kind(tokenizer.bytes_of([p.target])),
                )
                for token, (_, p) in zip(top.tolist(), places)
            ]  # fmt: skip
    return _gather(items, world)


def nats_per_token(
    model, tokenizer: Tokenizer, documents: Sequence[Document], token_limit: int, world: World
) -> float:
    """Return the mean next-token loss of the raw text, over every token with a predecessor.

    In nats. Next-token training lowers it; a run that only reasons may raise it. All ranks.
    """
    mine = range(len(documents))[world.rank :: world.size]
    trees = text_trees(mine, documents, tokenizer.begin_ids, (), "all")
    nats, count = 0.0, 0
    with gathered_weights(model) as gathered:
        for batch in micro_batches(trees, token_limit):
            forest = pack(batch, world.device)
            logprob = target_logprobs(gathered, forest, 1.0, tokenizer.vocab_size)
            nats, count = nats - float(logprob.double().sum()), count + len(logprob)
    nats, count = map(sum, zip(*gather_objects((nats, count), world)))
    return nats / count


def predict_thinking(
    model, tokenizer: Tokenizer, documents: Sequence[Document], positions: Sequence[Position],
    budget: int | None, budget_entropy: float, sampling: Sampling, world: World, samples: int = 1,
    text_in: str = "question",
) -> list[dict[str, Any]]:  # fmt: skip
    """Think, then predict (modes ntr and rmt): `samples` responses per position. All ranks.

    budget_entropy: exponent of the budget of a position (Eq. 13); 0 gives each the same budget.
    text_in: see rmt/prompt.py.
    """
    own = [p for group in _share(positions, world).values() for p in group]
    questions = []
    for p in own:
        asked = budget and budget_of_position(budget, p.entropy, budget_entropy)
        coming = coming_tokens(tokenizer, documents[p.document], p.position)
        questions.append(Question(p.document, p.position, TIERS.index(p.tier), coming, asked))
    prompts = [next_token_prompt(tokenizer, question.budget, text_in) for question in questions]
    known, items = (model, tokenizer, documents, questions, prompts, sampling, samples), []
    for number, answer, item in _answer(*known):
        position, question = own[number], questions[number]
        match = bool(match_reward(answer, question.coming))
        ids = [position.target] if match else tokenizer.encode(answer.text or "")
        item |= dict(predicted=ids[0] if len(ids) == 1 else None, match=match)
        item["prefix_match"] = bool(match_reward(answer, question.coming, "prefix"))
        items.append(asdict(position) | item | dict(kind=answer_kind(question.truth)))
    return _gather(items, world)


def solve(
    model, tokenizer: Tokenizer, documents: Sequence[Document], budget: int | None, request: str,
    sampling: Sampling, world: World, samples: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Give `samples` responses to each problem; answers count even without </think>. All ranks."""
    questions = [
        Question(d, len(documents[d].tokens), NO_TIER, (documents[d].answer.encode(),), budget)
        for d in range(len(documents))[world.rank :: world.size]
    ]
    prompts = [prompt_for("problems", tokenizer, budget, request)] * len(questions)
    known, items = (model, tokenizer, documents, questions, prompts, sampling, samples), []
    for number, answer, item in _answer(*known, thinks=False):
        question = questions[number]
        item |= dict(document=question.document, position=question.position, tier=PROBLEMS)
        item |= dict(
            predicted=answer.text, match=bool(match_reward(answer, question.coming, "answer"))
        )
        items.append(item)
    return _gather(items, world)


def _answer(
    model, tokenizer: Tokenizer, documents: Sequence[Document], questions: Sequence[Question],
    prompts: Sequence[PromptIds], sampling: Sampling, samples: int, thinks: bool = True,
) -> list[tuple[int, Answer, dict[str, Any]]]:  # fmt: skip
    """Answer each question of this rank, `samples` times in a row. All ranks.

    Returns the number of the question, the answer, and the fields of its item.
    """
    with gathered_weights(model) as gathered:
        groups = {}  # by question: batches hold the trees in any order
        for batch in micro_batches(question_trees(questions, documents, prompts), CACHED_TOKENS):
            ids = [branch.id for tree in batch for branch in tree.branches]
            groups |= zip(ids, generate(gathered, batch, samples, sampling))
    answers = []
    for number, question in enumerate(questions):
        for sample, rollout in enumerate(groups[number]):
            tokens = rollout.tokens
            answer = parse_response(tokenizer, tokens, thinks)
            item = dict(
                budget=question.budget, well_formed=answer.text is not None, tokens=len(tokens),
                thinking_length=answer.thinking_length, response=tokenizer.decode(tokens),
                cut_off=not rollout.finished,
            )  # fmt: skip
            item |= dict(sample=sample, answer=answer.text) if samples > 1 else {}
            answers.append((number, answer, item))
    return answers


def _share(positions: Sequence[Position], world: World) -> dict[int, list[Position]]:
    """Return this rank's positions by document."""
    grouped: dict[int, list[Position]] = {}
    for position in positions:
        grouped.setdefault(position.document, []).append(position)
    return {d: grouped[d] for d in sorted(grouped)[world.rank :: world.size]}


def _gather(items: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """Gather the items of all ranks, in the order of positions."""
    merged = [item for part in gather_objects(items, world) for item in part]
    return sorted(merged, key=lambda item: (item["document"], item["position"]))


def answer_kind(token: bytes) -> str:
    """Classify a token by how it is named: "plain", "brace" (an unpaired one) or "escaped"."""
    written = escape(token)
    if written.encode("utf-8", errors="surrogateescape") != token:
        return "escaped"
    depth = 0
    for character in written:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return "brace"
    return "brace" if depth else "plain"
