"""Next-token accuracy by difficulty on fixed positions, plain and with thinking.

Departures: the paper does not publish its evaluation decoding; ours is greedy unless asked. A
response without a readable answer is wrong, never left out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kernels import linear_topk
from rmt.batch import Question, question_trees
from rmt.budget import budget_of_position
from rmt.corpus import Document
from rmt.curriculum import NO_TIER, TIERS
from rmt.dist import World, gather_objects, rollout_mode
from rmt.forest import Tree, micro_batches, pack
from rmt.memory import CACHED_TOKENS
from rmt.positions import Position
from rmt.prompt import Answer, PromptIds, next_token_prompt, parse_response, problem_prompt
from rmt.rewards import match_reward
from rmt.rollout import Rollout, Sampling, generate
from rmt.tokenizer import Tokenizer

PROBLEMS = "problems"  # in place of a tier
Z = 1.959964  # 95 % of a normal distribution


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
                | dict(predicted=token, match=token == p.target, well_formed=True)
                | dict(
                    budget=None, thinking_length=None, tokens=0
                )  # the same fields as with thinking
                for token, (_, p) in zip(top.tolist(), places)
            ]
    return _collect(items, world)


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
        coming = (tokenizer.bytes_of([p.target]),)
        questions.append(Question(p.document, p.position, TIERS.index(p.tier), coming, asked))
    prompts = [next_token_prompt(tokenizer, question.budget) for question in questions]
    rollouts, items = _answer(model, questions, documents, prompts, sampling), []
    for position, question, rollout in zip(own, questions, rollouts):
        answer = parse_response(tokenizer, rollout.tokens)
        match = bool(match_reward(answer, question.coming))
        ids = [position.target] if match else tokenizer.encode(answer.text or "")
        predicted = ids[0] if len(ids) == 1 else None
        found = _item(tokenizer, question, rollout, answer, match, predicted)
        items.append(asdict(position) | found)
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


def summarise(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per disjoint tier, their average, and RPT's nested sets (entropy above a threshold);
    of problems one row.
    """
    if items and all(item["tier"] == PROBLEMS for item in items):
        return [_row(PROBLEMS, items)]
    rows = [_row(name, [i for i in items if i["tier"] == name]) for name in TIERS]
    present = [row for row in rows if row["n"]]
    average = _row("average", items)
    average["accuracy"] = sum(row["accuracy"] for row in present) / len(present)
    # Interval of a mean of independent proportions (MOVER, Zou & Donner 2008).
    for end, sign in (("low", -1), ("high", 1)):
        spread = math.sqrt(sum((row[end] - row["accuracy"]) ** 2 for row in present))
        average[end] = average["accuracy"] + sign * spread / len(present)
    nested = [_row(f"H > {h}", [i for i in items if i["entropy"] > h]) for h in (0.5, 1.0, 1.5)]
    return rows + [average] + [row for row in nested if row["n"]]


def _row(name: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(items)
    right = sum(item["match"] for item in items)
    low, high = wilson(right, n)
    thinking = [i for i in items if i["thinking_length"] is not None]
    lengths = [i["thinking_length"] for i in thinking]
    off = [abs(i["thinking_length"] - i["budget"]) / i["budget"] for i in thinking if i["budget"]]
    return dict(
        tier=name, n=n, accuracy=right / n if n else math.nan, low=low, high=high,
        thinking_length=_mean(lengths), budget_error=_mean(off),
        well_formed=_mean([item["well_formed"] for item in items]),
        tokens=sum(item["tokens"] for item in items),
        response_length=_mean([item["tokens"] for item in items]),
    )  # fmt: skip


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return math.nan, math.nan
    p, scale = right / n, 1 + Z * Z / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a markdown table."""
    lines = [
        "| tier | n | accuracy % | 95 % interval | thinking tokens | \\|ℓ−B\\|/B | well-formed % |",
        "|---|---:|---:|:---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["tier"], str(row["n"]), _percent(row["accuracy"]),
            f"{_percent(row['low'])} – {_percent(row['high'])}", _number(row["thinking_length"], 1),
            _number(row["budget_error"], 2), _percent(row["well_formed"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(positions: Sequence[Position], world: World) -> dict[int, list[Position]]:
    """This rank's positions by document."""
    grouped: dict[int, list[Position]] = {}
    for position in positions:
        grouped.setdefault(position.document, []).append(position)
    return {d: grouped[d] for d in sorted(grouped)[world.rank :: world.size]}


def _collect(items: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    merged = [item for part in gather_objects(items, world) for item in part]
    return sorted(merged, key=lambda item: (item["document"], item["position"]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
