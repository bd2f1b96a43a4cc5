"""The trees of a step: questions to be answered, answers to be learnt, and raw text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rmt.data.corpus import Document
from rmt.forest import Branch, Tree
from rmt.prompt import PromptIds


@dataclass(frozen=True)
class Question:
    """A position to reason about: which token comes next? Of a problem: its end."""

    document: int
    position: int
    tier: int
    coming: tuple[bytes, ...]  # of the tokens from there on, exact; or the answer to a problem
    budget: int | None = None  # thinking tokens that its prompt asks for

    @property
    def truth(self) -> bytes:
        return self.coming[0]


def question_trees(
    questions: Sequence[Question],
    documents: Sequence[Document],
    prompts: Sequence[PromptIds],
    responses: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[Tree]:
    """One tree per document (questions of a document are adjacent): header and text on the trunk.

    prompts: of each question; those of a document have one header.
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
            answers = [()] if responses is None else responses[index]
            for number, answer in enumerate(answers):
                branches.append(Branch(index * len(answers) + number, fork, footer, answer))
        trunk = (*header, *documents[document].tokens[:seen].tolist())
        trees.append(Tree(document, trunk, tuple(branches)))
    return trees


def text_trees(
    indices: Sequence[int],
    documents: Sequence[Document],
    begin_ids: Sequence[int],
    excluded: Sequence[Question],
    low_entropy: Sequence[np.ndarray],
    scope: str,
) -> list[Tree]:
    """Bare trunks of raw text with their next-token targets.

    scope "not_in_C": every position but those of `excluded` (the paper's mask m); "low_entropy":
    only where low_entropy[document] is True, and not excluded; "all": every position.
    """
    trees = []
    for index in indices:
        tokens = documents[index].tokens
        targets = (
            low_entropy[index].copy() if scope == "low_entropy" else np.ones(len(tokens), bool)
        )
        if scope != "all":
            targets[[q.position for q in excluded if q.document == index]] = False  # m, Eq. 10
        targets = np.concatenate((np.zeros(len(begin_ids), dtype=bool), targets))
        targets[0] = False  # nothing precedes the first token of the row
        trees.append(Tree(index, (*begin_ids, *tokens.tolist()), targets=targets))
    return trees
