"""Cold start: given responses, for a model that would earn no reward with its own.

Reinforcement needs responses that sometimes succeed; a small model never closes a thought. So it
is first taught the form of a response by its own knowledge: a thought is a few guesses drawn from
its plain next-token distribution, and the answer is the commonest of them. With
--text-in thought the first is right behind the text; all others stand behind the end of the
context, repeated, and an invisible mark (here |):

    ... the sum of the two is| 12⏎ of the two is| 12⏎ of the two is| 15⏎</think>⏎⏎\\boxed{ 12}

With more tokens there are more guesses, so a longer budget is worth more. All else is a step of
the method, with advantage 1 (Eq. 15).

Departures: the paper has no cold start, so all of this is ours.

Shapes: P questions, G responses to each.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from models.tokenizer import THINK_CLOSE, Tokenizer
from rmt.config.config import Config
from rmt.data.corpus import Document
from rmt.prompt import BOXED, MARK, PromptIds, escape, parse_response, think_ids
from rmt.questions import Question, TrainingSet, asks_at_end, question_trees, sampling_at
from rmt.sampling import Rollout

TAIL = 4  # tokens of the context that a guess repeats


def given_responses(
    c: Config, data: TrainingSet, sampler, generate: Callable, questions: Sequence[Question],
    step: int,
) -> tuple[list[list[Rollout]], int]:  # fmt: skip
    """Return G responses to each question: its trace, or thoughts of the model's own guesses.

    Also returns how many tokens were sampled for them.
    """
    tokenizer, opening = data.tokenizer, think_ids(data.tokenizer, c.text_in)
    if asks_at_end(c):
        traces = [trace_ids(tokenizer, data.documents[q.document]) for q in questions]
        return [[Rollout(trace, finished=True)] * c.group_size for trace in traces], 0
    mark = tokenizer.encode(MARK)
    tails = [guess_tails(c, q.budget, len(opening), len(mark)) for q in questions]
    most = len(guess_tails(c, c.budget_start, len(opening), len(mark)))
    drawn = plain_guesses(c, data, sampler, generate, questions, step, c.group_size * most)
    groups = []
    for question, tail, guesses in zip(questions, tails, drawn):
        context = data.documents[question.document].tokens[: question.position].tolist()
        groups.append([
            own_response(tokenizer, context, tail, guesses[i :: c.group_size][: len(tail)], opening)
            for i in range(c.group_size)
        ])  # fmt: skip
    return groups, sum(map(len, drawn))


def trace_ids(tokenizer: Tokenizer, document: Document) -> list[int]:
    """Return the response to a document that has a trace."""
    said = tokenizer.encode(escape(document.answer.encode("utf-8")))
    return [*document.thought, *answer_ids(tokenizer, said)]


def guess_tails(c: Config, budget: int | None, opening: int, mark: int) -> list[int]:
    """Return how many tokens of the context each guess repeats, so that a thought has B tokens.

    budget: B, None for B_0; opening, mark: how many tokens these have.
    """
    plain = [0] * (c.text_in == "thought")  # a guess right behind the text, and a newline
    room = (budget or c.budget_start) - opening - 2 * len(plain)
    beside = mark + 2  # a tail is followed by the mark, a guess and a newline
    count = max(0, room // (TAIL + beside))
    if not count and (room > beside or not plain):
        count = 1  # with a shorter tail
    tails = [TAIL] * count
    if tails:  # the first takes the tokens that are left, or lacking
        tails[0] = max(1, TAIL + room - count * (TAIL + beside))
    return plain + tails


def plain_guesses(
    c: Config, data: TrainingSet, sampler, generate: Callable, questions: Sequence[Question],
    step: int, count: int,
) -> list[list[int]]:  # fmt: skip
    """Draw `count` next tokens at each position from what the model predicts of the raw text."""
    raw = [PromptIds(tuple(data.tokenizer.begin_ids), ())] * len(questions)
    sampling = replace(sampling_at(c, data.tokenizer, step), max_new_tokens=1)
    trees = question_trees(questions, data.documents, raw)
    return [[r.tokens[0] for r in group] for group in generate(sampler, trees, count, sampling)]


def own_response(
    tokenizer: Tokenizer, context: Sequence[int], tails: Sequence[int], guesses: Sequence[int],
    opening: Sequence[int],
) -> Rollout:  # fmt: skip
    """Write down guesses, each behind a tail of the context, and the commonest as the answer."""
    newline, mark, thought = tokenizer.encode("\n"), tokenizer.encode(MARK), list(opening)
    for tail, guess in zip(tails, guesses):
        thought += [*context[max(0, len(context) - tail) :], *mark] if tail else []
        thought += [*(spelled(tokenizer, guess) or [guess]), *newline]
    if parse_response(tokenizer, thought).thinking_length is not None:
        thought = list(opening)  # the text itself has a </think>: repeat none of it
    answer = Counter(guesses).most_common(1)[0][0]  # of several, the first
    return Rollout(thought + answer_ids(tokenizer, boxed_ids(tokenizer, answer)), finished=True)


def spelled(tokenizer: Tokenizer, guess: int) -> list[int]:
    """Return a control token, such as the end of a text, in letters; [] for all others."""
    return tokenizer.encode(tokenizer.decode([guess])) if guess in tokenizer.control_ids else []


def boxed_ids(tokenizer: Tokenizer, token: int) -> list[int]:
    """Return the ids of a token in a box: itself, or its escape if it cannot be seen."""
    text = tokenizer.bytes_of([token])
    as_it_is = escape(text).encode("utf-8") == text and not spelled(tokenizer, token)
    return [token] if as_it_is else tokenizer.encode(escape(text))


def answer_ids(tokenizer: Tokenizer, inside: Sequence[int]) -> list[int]:
    """Return the ids that close a thought, give an answer and end the response."""
    return [*opened_box(tokenizer), *inside, *tokenizer.encode("}"), tokenizer.stop_ids[0]]


def opened_box(tokenizer: Tokenizer) -> list[int]:
    """Return the ids between a thought and its answer."""
    return [*tokenizer.encode_with_control(THINK_CLOSE), *tokenizer.encode("\n\n" + BOXED)]
