"""Who does what in a step: documents dealt to ranks so that none waits long for the slowest.

What a response will cost is not known before it is sampled. What is known, on every rank alike, is
how long the documents are, where they are asked about and how long a thought is asked for. Ranks
get equally many documents as well, since the sampler's memory is planned for that many.
"""

from collections.abc import Sequence

from rmt.batch import Question


def expected_work(
    length: int, questions: Sequence[Question], group_size: int, max_response: int, text: bool
) -> int:
    """Tokens that a document of `length` tokens is likely to cost: sampled, and trained on.

    A thought is taken to be as long as it is asked to be. text: whether it is learnt plainly, too.
    """
    asked = [min(q.budget or max_response, max_response) for q in questions]
    seen = max((q.position for q in questions), default=0)  # the trunk, computed once
    return 2 * (seen + group_size * sum(asked)) + text * length


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


def waiting(busy: Sequence[Sequence[float]]) -> float:
    """Share of all ranks' time spent waiting for the slowest; busy[rank][phase].

    Phases end together: in each, all wait for the one that is busy longest.
    """
    slowest = sum(max(phase) for phase in zip(*busy))
    return 1 - sum(map(sum, busy)) / (len(busy) * slowest) if slowest else 0.0
