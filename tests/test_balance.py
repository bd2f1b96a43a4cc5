"""Documents are dealt to ranks so that none has much more to do than the others."""

import numpy as np
import pytest

from rmt.engine.balance import assign, expected_work, idle_share, update_work
from rmt.questions import Question
from rmt.sampling import Rollout

RANKS, BATCH, G, CAP, STEPS = 4, 128, 8, 2048, 50  # the paper's batch


def long_tailed(rng, budget):
    """A step: (length, questions, groups) of each document, with log-normal lengths."""
    lengths = np.clip(300 * rng.lognormal(sigma=1, size=BATCH), 32, CAP).astype(int)
    # Some documents make think longer than others, and so do some of their responses.
    spread = 0.3 * rng.standard_normal((BATCH, 1)) + 0.5 * rng.standard_normal((BATCH, G))
    thoughts = np.clip(budget * np.exp(spread), 8, CAP).astype(int)
    for length, row in zip(lengths.tolist(), thoughts.tolist()):
        question = Question(0, int(rng.integers(16, length)), 0, (b"",), budget)
        yield length, [question], [[Rollout(range(n)) for n in row]]


def rollout_work(questions, groups):
    return update_work(0, questions, groups, text=False)


def share_waiting(sampled, trained, rollouts, updates):
    """With shares of documents while sampling and while training; a token takes a millisecond."""
    loads = lambda shares, work: [sum(work[i] for i in share) for share in shares]
    seconds, busy = (
        [load / 1000 for load in loads(*pair)] for pair in ((sampled, rollouts), (trained, updates))
    )
    return idle_share(seconds, busy, max(busy))


@pytest.mark.parametrize("budget", [800, 160, 20])
def test_four_ranks_wait_less_than_15_percent_with_long_tailed_lengths(budget):
    rng, dealt, in_turn = np.random.default_rng(budget), [], []
    for _ in range(STEPS):
        step = list(long_tailed(rng, budget))
        rollouts = [rollout_work(questions, groups) for _, questions, groups in step]
        updates = [update_work(*document, text=True) for document in step]
        expected = [expected_work(n, asked, G, CAP, True) for n, asked, _ in step]
        shares = assign(expected, RANKS), assign(updates, RANKS)
        dealt.append(share_waiting(*shares, rollouts, updates))
        turns = [range(rank, BATCH, RANKS) for rank in range(RANKS)]
        in_turn.append(share_waiting(turns, turns, rollouts, updates))
    assert max(dealt) < 0.15
    assert np.mean(dealt) < 0.6 * np.mean(in_turn)


def test_a_deal_gives_the_longest_to_those_who_have_least():
    assert assign([9, 1, 1, 1, 8, 2], 2) == [[0, 1, 2], [3, 4, 5]]
    assert assign([5, 5, 5], 1) == [[0, 1, 2]]
    assert assign([1], 3) == [[0], [], []]


def test_shares_are_equally_large_and_hold_every_item_once():
    rng = np.random.default_rng(0)
    for count, ranks in ((128, 4), (13, 4), (3, 4), (7, 2), (16, 16)):
        shares = assign(rng.pareto(1.0, size=count).tolist(), ranks)
        assert sorted(i for share in shares for i in share) == list(range(count))
        assert {len(share) for share in shares} <= {count // ranks, -(-count // ranks)}


def test_waiting_is_what_the_slowest_of_each_phase_costs_the_others():
    assert idle_share([3.0], [7.0], 2.0) == 0
    assert idle_share([4.0, 4.0], [5.0, 5.0], 2.0) == 0
    # One samples 4 seconds and the other 2; then one trains 2 seconds and the other 1.
    assert idle_share([4.0, 2.0], [5.0, 10.0], 2.0) == pytest.approx(1 - (5 + 4) / 12)
    assert idle_share([0.0, 0.0], [0.0, 0.0], 0.0) == 0


def test_work_of_a_document_counts_what_is_sampled_and_trained_on():
    asked = [Question(0, 30, 0, (b"",), 10), Question(0, 50, 0, (b"",), 99)]
    said = [[Rollout([0] * 3), Rollout([0] * 4)], [Rollout([0] * 5), Rollout([0] * 6)]]
    assert expected_work(70, asked, 2, 40, True) == 2 * (50 + 2 * (10 + 40)) + 70
    assert expected_work(70, [], 2, 40, False) == 0
    assert update_work(70, asked, said, True) == 50 + 18 + 70
