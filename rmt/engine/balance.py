"""Load balancing: documents are assigned to ranks so that none waits long for the slowest.

Before the rollouts by expected work: document length, position and budget, which every rank knows.
Before the update again, by the true lengths of the responses. Ranks get equally many documents,
since the sampler's memory is planned for that many.
"""

from collections.abc import Sequence

import torch

from rmt.config.config import Config
from rmt.questions import Question, RolloutBatch, TrainingSet
from rmt.sampling import Rollout
from rmt.system.dist import World, gather_objects


def own_documents(
    c: Config, data: TrainingSet, asked: dict[int, list[Question]], world: World
) -> dict[int, list[Question]]:
    """This rank's share of a step's documents, with the questions about them."""
    work = [
        expected_work(len(data.documents[i].tokens), questions, c.group_size, c.max_response, c.ntp)
        for i, questions in asked.items()
    ]
    indices = list(asked)
    return {indices[k]: asked[indices[k]] for k in assign(work, world.size)[world.rank]}


def rebalance(
    c: Config, data: TrainingSet, documents: list[int], batch: RolloutBatch, world: World
) -> tuple[list[int], RolloutBatch]:
    """Rebalance documents across ranks by true response lengths. All ranks."""
    if world.size == 1:
        return documents, batch
    parts = gather_objects((documents, batch), world)
    documents = [index for indices, _ in parts for index in indices]
    join = lambda name: [item for _, part in parts for item in getattr(part, name)]
    questions, responses, answers = join("questions"), join("responses"), join("answers")
    rewards = {name: torch.cat([part.rewards[name] for _, part in parts]) for name in batch.rewards}
    places = [[i for i, q in enumerate(questions) if q.document == index] for index in documents]
    work = [
        update_work(
            len(data.documents[index].tokens), [questions[i] for i in group],
            [responses[i] for i in group], c.ntp,
        )
        for index, group in zip(documents, places)
    ]  # fmt: skip
    mine = assign(work, world.size)[world.rank]
    kept = [i for number in mine for i in places[number]]
    pick = lambda items: [items[i] for i in kept]
    own = {name: whole[kept] for name, whole in rewards.items()}
    return [documents[number] for number in mine], RolloutBatch(
        pick(questions), pick(responses), pick(answers), own
    )


def expected_work(
    length: int, questions: Sequence[Question], group_size: int, max_response: int, text: bool
) -> int:
    """Tokens that a document of `length` tokens is likely to cost: sampled, and trained on.

    A thought is expected to have the length that is asked for. text: trained on by next-token
    prediction as well.
    """
    asked = sum(min(q.budget or max_response, max_response) for q in questions)
    return 2 * (_trunk(questions) + group_size * asked) + text * length


def update_work(
    length: int, questions: Sequence[Question], responses: Sequence[Sequence[Rollout]], text: bool
) -> int:
    """Tokens of a document's questions and responses in an update."""
    said = sum(len(rollout.tokens) for group in responses for rollout in group)
    return _trunk(questions) + said + text * length


def _trunk(questions: Sequence[Question]) -> int:
    """Tokens of the document that its questions see; they are computed once for all of them."""
    return max((question.position for question in questions), default=0)


def assign(work: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of its items, in rising order; counts differ by one at most.

    The largest item goes first, each to the rank that has least so far (longest processing time
    first, Graham 1969). Same result on every rank: nothing is random, ties go to the lower index.
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
    """Share of all ranks' time in a step that is spent waiting for the slowest.

    sampling: seconds of each rank, none of them waiting; flops: what each computes in an update of
    `update` seconds. Ranks pass through an update in step with each other, layer by layer, so that
    its seconds say nothing: the rank with most to compute is taken to be busy all the time.
    """
    most = max(flops)
    busy = [update * part / most for part in flops] if most else [update] * len(flops)
    slowest = max(sampling) + max(busy)
    return 1 - sum((*sampling, *busy)) / (len(busy) * slowest) if slowest else 0.0
