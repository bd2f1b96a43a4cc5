"""Who does what in a step: documents dealt to ranks so that none waits long for the slowest.

What a response will cost is not known before it is sampled. What is known, on every rank alike, is
how long the documents are, where they are asked about and how long a thought is asked for: by that
they are dealt for the rollouts, and once more by the true lengths for the update. Ranks get equally
many documents as well, since the sampler's memory is planned for that many.
"""

from collections.abc import Sequence

from rmt.batch import Question
from rmt.rollout import Rollout


def expected_work(
    length: int, questions: Sequence[Question], group_size: int, max_response: int, text: bool
) -> int:
    """Tokens that a document of `length` tokens is likely to cost: sampled, and trained on.

    A thought is taken to be as long as it is asked to be. text: whether it is learnt plainly, too.
    """
    asked = sum(min(q.budget or max_response, max_response) for q in questions)
    return 2 * (_trunk(questions) + group_size * asked) + text * length


def update_work(
    length: int, questions: Sequence[Question], groups: Sequence[Sequence[Rollout]], text: bool
) -> int:
    """Tokens that an update has of a document, its questions and what was said to them."""
    said = sum(len(rollout.tokens) for group in groups for rollout in group)
    return _trunk(questions) + said + text * length


def _trunk(questions: Sequence[Question]) -> int:
    """Tokens of the document that its questions see; they are computed once for all of them."""
    return max((question.position for question in questions), default=0)


def deal(work: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of its share, in rising order; shares differ by one item at most.

    The largest item goes first, each to the rank that has least so far (longest processing time
    first, Graham 1969). Same shares everywhere: nothing is random and ties go to the lower index.
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


def waiting(sampling: Sequence[float], flops: Sequence[float], update: float) -> float:
    """Share of all ranks' time in a step that is spent waiting for the slowest.

    sampling: seconds of each rank, none of them waiting; flops: what each computes in an update of
    `update` seconds. Ranks pass through an update in step with each other, layer by layer, so that
    its seconds say nothing: the rank with most to compute is taken to be busy all the time.
    """
    most = max(flops)
    busy = [update * part / most for part in flops] if most else [update] * len(flops)
    slowest = max(sampling) + max(busy)
    return 1 - sum((*sampling, *busy)) / (len(busy) * slowest) if slowest else 0.0
