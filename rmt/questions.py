"""Questions and answers of a step: draw positions, ask, score responses, make trees.

A question is a position of a document: which token comes next? With --task problems it is the end
of a problem; --task nothing asks no questions. Shapes: P questions, G responses to each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from models.tokenizer import Tokenizer
from rmt.budget import budget_at, budget_of_position
from rmt.config.config import Config
from rmt.curriculum import NO_TIER, Curriculum, low_entropy, tier_probabilities
from rmt.data.corpus import Document
from rmt.prompt import Answer, PromptIds, parse_response, prompt_for
from rmt.rewards import reward_groups
from rmt.sampling import Rollout, Sampling
from rmt.trees import Branch, Tree

LOOKAHEAD = 32  # tokens that an answer by prefix may have (RPT)


@dataclass(frozen=True)
class TrainingSet:
    """Documents and the difficulty of their tokens; nothing in it changes during a run."""

    tokenizer: Tokenizer
    documents: list[Document]
    tiers: list[np.ndarray]  # (T,) of each document, see curriculum.assign_tiers
    entropies: dict[int, np.ndarray]  # (T,) in nats, of the documents that the run meets
    order: np.ndarray  # (steps, batch) documents of each step

    @property
    def total_steps(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class Question:
    """A position to reason about, and the right answer. For problems: the end of the text."""

    document: int
    position: int
    tier: int
    coming: tuple[bytes, ...]  # exact bytes of the tokens from there on; or a problem's answer
    budget: int | None = None  # thinking tokens that the prompt asks for

    @property
    def truth(self) -> bytes:
        return self.coming[0]


@dataclass
class RolloutBatch:
    """P questions with G responses each, the answers in them, and (P, G) rewards by name."""

    questions: list[Question]
    responses: list[list[Rollout]]
    answers: list[list[Answer]]
    rewards: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(rollout.tokens) for group in self.responses for rollout in group)

    def rows(self, wanted: list[int]) -> "RolloutBatch":
        """Return these questions with what belongs to them, in this order."""
        lists = (self.questions, self.responses, self.answers)
        rewards = {name: values[wanted] for name, values in self.rewards.items()}
        return RolloutBatch(*([x[i] for i in wanted] for x in lists), rewards)


def joined(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Put batches one behind another."""
    names = ("questions", "responses", "answers")
    lists = ([x for batch in batches for x in getattr(batch, name)] for name in names)
    rewards = {name: torch.cat([b.rewards[name] for b in batches]) for name in batches[0].rewards}
    return RolloutBatch(*lists, rewards)


# ---- draw and ask


def budget_of_step(c: Config, step: int, total_steps: int) -> int | None:
    """Return B_t (at step = total_steps: B_T), or None when no budget is asked for."""
    if not c.budget:
        return None
    return budget_at(step, total_steps, c.budget_start, c.budget_decay, c.budget_min)


def spread_budget(c: Config, index: int, total_steps: int) -> int:
    """Return a document's budget in a cold start: uniformly from B_T to B_0, by the seed."""
    lowest = budget_of_step(c, total_steps, total_steps)
    return int(np.random.default_rng((c.seed, index)).integers(lowest, c.budget_start + 1))


def asks_at_end(c: Config) -> bool:
    """Return whether a document has one question, at its end: it is a problem, or has a trace."""
    return c.task == "problems" or c.traces not in ("", "own")


def tier_schedule(c: Config, progress: float) -> np.ndarray | None:
    """Return the probabilities of the tiers at progress = t/T; None without a curriculum."""
    if not c.curriculum:
        return None
    return tier_probabilities(
        progress, c.curriculum_early, c.curriculum_late, c.curriculum_start, c.curriculum_end
    )


def draw_positions(
    c: Config, data: TrainingSet, curriculum: Curriculum, step: int, index: int, count: int,
    taken: Sequence[int] = (), attempt: int = 0,
) -> tuple[list[int], int]:  # fmt: skip
    """Draw `count` positions of a document, none of `taken`, and count draws from empty tiers.

    The curriculum remembers each draw, so every rank draws for all documents of a step.
    """
    if c.task == "nothing":
        return [], 0
    if asks_at_end(c):
        return [len(data.documents[index].tokens)], 0
    probabilities = tier_schedule(c, step / data.total_steps)
    return curriculum.draw(step, index, probabilities, count, taken, attempt)


def own_budget(c: Config, data: TrainingSet, index: int, position: int, budget: int) -> int:
    """Return the tokens to ask for at a position: B_t, or what takes its place."""
    if c.traces and asks_at_end(c):
        return len(data.documents[index].thought)  # as long as the thought that is given
    if c.traces:
        return spread_budget(c, index, data.total_steps)
    if c.budget_entropy:
        entropy = float(data.entropies[index][position])
        return budget_of_position(budget, entropy, c.budget_entropy)  # Eq. 13
    return budget


def ask(c: Config, data: TrainingSet, index: int, position: int, budget: int | None) -> Question:
    """Make the question about a position. budget: B_t, or None to ask for none."""
    document = data.documents[index]
    budget = None if budget is None else own_budget(c, data, index, position, budget)
    if asks_at_end(c):
        return Question(index, position, NO_TIER, (document.answer.encode("utf-8"),), budget)
    coming = coming_tokens(data.tokenizer, document, position)
    return Question(index, position, int(data.tiers[index][position]), coming, budget)


def coming_tokens(tokenizer: Tokenizer, document: Document, position: int) -> tuple[bytes, ...]:
    ids = document.tokens[position : position + LOOKAHEAD].tolist()
    return tuple(tokenizer.bytes_of([token]) for token in ids)


def prompts_of(c: Config, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[PromptIds]:
    """Put each question into words: name the next token, or solve the problem, within B tokens."""
    known = (c.problem_request, c.text_in)
    return [prompt_for(c.task, tokenizer, q.budget, *known) for q in questions]


# ---- answers


def sampling_at(
    c: Config, tokenizer: Tokenizer, step: int, purpose: str = "train", attempt: int = 0
) -> Sampling:
    """Return the parameters of sampling; each purpose and attempt has its own random numbers."""
    return Sampling(
        c.max_response, tokenizer.stop_ids, tokenizer.vocab_size, c.temperature, c.max_branches,
        c.seed, purpose, step, attempt * c.group_size,
    )  # fmt: skip


def reward_responses(
    c: Config, tokenizer: Tokenizer, questions: list[Question], responses: list[list[Rollout]]
) -> RolloutBatch:
    """Read the answer in each response and reward it (Eq. 3, 5, 6)."""
    thinks = c.task == "next-token"
    answers = [[parse_response(tokenizer, r.tokens, thinks) for r in group] for group in responses]
    rewards = reward_groups(
        answers, [q.coming for q in questions], c.group_size, [q.budget for q in questions],
        c.length_weight, c.length_reward_max, c.length_reward_gate, c.match,
    )  # fmt: skip
    return RolloutBatch(questions, responses, answers, rewards)


def roll_out(
    c: Config, data: TrainingSet, sampler, generate: Callable, questions: list[Question],
    step: int, purpose: str = "train", attempt: int = 0,
) -> RolloutBatch:  # fmt: skip
    """Sample G responses to each question, and reward them. generate: rollout's or naive's."""
    trees = question_trees(questions, data.documents, prompts_of(c, data.tokenizer, questions))
    sampling = sampling_at(c, data.tokenizer, step, purpose, attempt)
    responses = generate(sampler, trees, c.group_size, sampling)
    return reward_responses(c, data.tokenizer, questions, responses)


# ---- trees


def question_trees(
    questions: Sequence[Question], documents: Sequence[Document], prompts: Sequence[PromptIds],
    responses: Sequence[Sequence[Rollout]] | None = None,
) -> list[Tree]:  # fmt: skip
    """Make one tree per document (its questions are adjacent): header and text on the trunk.

    prompts: of each question; those of a document have one header. Where nothing stands between
    text and response, the branch begins with the text's last token: the sampler must feed one.
    Without responses each question is one branch, a prompt to continue, with the question's index
    as id. With responses (G per question) each is a branch with id = index · G + number.
    """
    trees = []
    numbered = groupby(enumerate(questions), key=lambda pair: pair[1].document)
    for document, group in numbered:
        group = list(group)
        seen = max(question.position for _, question in group)
        header = prompts[group[0][0]].header
        branches = []
        for index, question in group:
            fork, footer = len(header) + question.position, prompts[index].footer
            if not footer:
                last = documents[document].tokens[question.position - 1]
                fork, footer = fork - 1, (int(last),)
            said = [()] if responses is None else [r.tokens for r in responses[index]]
            for number, tokens in enumerate(said):
                branches.append(Branch(index * len(said) + number, fork, footer, tokens))
        trunk = (*header, *documents[document].tokens[:seen].tolist())
        trees.append(Tree(document, trunk, tuple(branches)))
    return trees


def text_trees(
    indices: Sequence[int], documents: Sequence[Document], begin_ids: Sequence[int],
    excluded: Sequence[Question], scope: str, tiers: Sequence[np.ndarray] = (),
    min_context: int = 0,
) -> list[Tree]:  # fmt: skip
    """Make bare trunks of raw text with their next-token targets.

    scope "not_in_C": every position but those of `excluded` (the paper's mask m); "low_entropy":
    those of them that curriculum.low_entropy marks by `tiers` (T,) of each document and
    min_context; "all": every position.
    """
    trees = []
    for index in indices:
        tokens = documents[index].tokens
        targets = np.ones(len(tokens), dtype=bool)
        if scope == "low_entropy":
            targets = low_entropy(tiers[index], min_context)
        if scope != "all":
            asked = [q.position for q in excluded if q.document == index]
            targets[[p for p in asked if p < len(tokens)]] = False  # m, Eq. 10; not of a trace
        targets = np.concatenate((np.zeros(len(begin_ids), dtype=bool), targets))
        targets[0] = False  # nothing precedes the first token of the row
        trees.append(Tree(index, (*begin_ids, *tokens.tolist()), targets=targets))
    return trees
