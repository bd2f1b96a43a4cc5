"""Load balancing: assign documents to ranks so that none waits long for the slowest.

Before the rollouts by expected work, from document length, position and budget, which every rank
knows; before the update again by the true lengths of the responses. Ranks get equally many
documents, because the sampler's memory is planned for that many.
"""

from collections.abc import Sequence

from rmt.config.config import Config
from rmt.questions import Question, RolloutBatch, TrainingSet, joined
from rmt.sampling import Rollout
from rmt.system.dist import World, gather_objects


def own_documents(
    c: Config, data: TrainingSet, asked: dict[int, list[Question]], world: World
) -> dict[int, list[Question]]:
    """Return this rank's share of a step's documents, with the questions about them."""
    work = [
        expected_work(len(data.documents[i].tokens), questions, c.group_size, c.max_response, c.ntp)
        for i, questions in asked.items()
    ]
    items = list(asked.items())
    return dict(items[k] for k in assign(work, world.size)[world.rank])


def rebalance(
    c: Config, data: TrainingSet, documents: list[int], batch: RolloutBatch, world: World
) -> tuple[list[int], RolloutBatch]:
    """Rebalance documents across ranks by true response lengths. All ranks."""
    if world.size == 1:
        return documents, batch
    parts = gather_objects((documents, batch), world)
    documents = [index for indices, _ in parts for index in indices]
    batch = joined([part for _, part in parts])
    asked = [question.document for question in batch.questions]
    rows = [[i for i, document in enumerate(asked) if document == index] for index in documents]
    work = [
        update_work(len(data.documents[index].tokens), own.questions, own.responses, c.ntp)
        for index, own in zip(documents, map(batch.rows, rows))
    ]
    mine = assign(work, world.size)[world.rank]
    kept = [i for number in mine for i in rows[number]]
    return [documents[number] for number in mine], batch.rows(kept)


def expected_work(
    length: int, questions: Sequence[Question], group_size: int, max_response: int, text: bool
) -> int:
    """Estimate the tokens that a document of `length` tokens costs in rollouts and update.

    A thought is expected to have the length that is asked for. text: also trained on by next-token
    prediction.
    """
    asked = sum(min(q.budget or max_response, max_response) for q in questions)
    return 2 * (_trunk(questions) + group_size * asked) + text * length


def update_work(
    length: int, questions: Sequence[Question], responses: Sequence[Sequence[Rollout]], text: bool
) -> int:
    """Count the tokens of a document's questions and responses in an update."""
    generated = sum(len(rollout.tokens) for group in responses for rollout in group)
    return _trunk(questions) + generated + text * length


def _trunk(questions: Sequence[Question]) -> int:
    """Count the tokens of the document that its questions see, computed once for all of them."""
    return max((question.position for question in questions), default=0)


def assign(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Return for each rank the indices of its items, in rising order; counts differ by at most 1.

    Longest processing time first (Graham 1969): the largest item goes to the rank with the least
    work so far. Deterministic, so every rank gets the same result; ties go to the lower index.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    smallest, larger = divmod(len(work), ranks)  # so many shares have one item more
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        longer = sum(len(share) > smallest for share in shares)
        room = smallest + (longer < larger)
        rank = min((r for r in range(ranks) if len(shares[r]) < room), key=loads.__getitem__)
        shares[rank].append(index)
        loads[rank] += work[index]
    return [sorted(share) for share in shares]


def idle_share(sampling: Sequence[float], flops: Sequence[float], update: float) -> float:
    """Return the share of all ranks' time in a step that is spent waiting for the slowest.

    sampling: seconds of each rank, without waiting; flops: of each rank in an update of `update`
    seconds. Ranks pass through an update layer by layer together, so their seconds say nothing:
    the rank with most flops is taken to be busy all the time.
    """
    most = max(flops)
    busy = [update * part / most for part in flops] if most else [update] * len(flops)
    slowest = max(sampling) + max(busy)
    return 1 - sum((*sampling, *busy)) / (len(busy) * slowest) if slowest else 0.0
