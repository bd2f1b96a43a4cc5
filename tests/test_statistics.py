"""How sure an accuracy is: against enumeration, and against numbers that are known."""

import itertools
import math
import time

import numpy as np
import pytest

from rmt.curriculum import TIERS
from rmt.evaluation import compare, statistics
from rmt.evaluation.statistics import wilson
from rmt.evaluation.summary import summarise, table


def test_mcnemar_is_the_share_of_outcomes_at_least_as_uneven():
    for gained, lost in ((0, 0), (1, 0), (3, 1), (2, 2), (0, 7), (6, 3)):
        changed = gained + lost
        outcomes = [sum(signs) for signs in itertools.product((-1, 1), repeat=changed)]
        uneven = [total for total in outcomes if abs(total) >= abs(gained - lost)]
        expected = len(uneven) / len(outcomes)
        assert statistics.mcnemar(gained, lost) == statistics.mcnemar(lost, gained) == expected


def test_mcnemar_of_many_thousand_changes_is_exact_and_quick():
    started = time.perf_counter()
    for gained in (10_000, 10_200):  # a normal distribution, corrected for continuity
        distance = (abs(gained - 9_800) - 1) / math.sqrt(gained + 9_800)
        expected = math.erfc(distance / math.sqrt(2))
        assert statistics.mcnemar(gained, 9_800) == pytest.approx(expected, rel=1e-2)
    assert time.perf_counter() - started < 5  # summing binomials anew takes a minute


def test_bootstrap_has_the_spread_of_all_ways_to_draw_documents():
    clusters, values = [5, 5, 7, 9, 9, 9], np.array([1.0, 0, 1, 0, 0, 1])
    sums = {c: values[np.equal(clusters, c)].sum() for c in (5, 7, 9)}
    exact = [sum(sums[c] for c in drawn) for drawn in itertools.product(sums, repeat=3)]
    drawn = statistics.resample(clusters, values, draws=20_000)
    assert drawn.mean() == pytest.approx(np.mean(exact), rel=0.02)
    assert drawn.var() == pytest.approx(np.var(exact), rel=0.05)
    assert set(np.round(drawn)) == set(np.round(exact))
    assert np.array_equal(drawn, statistics.resample(clusters, values, draws=20_000))


@pytest.mark.parametrize("right, n", [(0, 10), (5, 10), (10, 10), (1, 200), (118, 200)])
def test_wilson_interval_ends_where_the_score_test_rejects(right, n):
    for end in wilson(right, n):
        distance = 1.959964 * math.sqrt(end * (1 - end) / n)
        assert abs(right / n - end) == pytest.approx(distance, abs=1e-6)


def test_wilson_interval_has_its_textbook_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_items_of_a_document_that_are_all_alike_count_as_one():
    right = [k % 2 == 0 for k in range(60)]
    of_documents = statistics.interval(range(60), right, [1] * 60, [0] * 60)
    alike = [x for x in right for _ in range(10)]
    documents = [k for k in range(60) for _ in range(10)]
    repeated = statistics.interval(documents, alike, [1] * 600, [0] * 600)
    assert repeated == pytest.approx(of_documents, abs=0.02)
    narrow = statistics.wilson(300, 600)
    assert repeated[1] - repeated[0] > 2.5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize("right", [0, 1])
def test_an_interval_is_not_empty_where_all_are_right_or_of_one_document(right):
    low, high = statistics.interval([0] * 9, [right] * 9, [1] * 9, [0] * 9)
    assert (low, high) == pytest.approx(statistics.wilson(9 * right, 9))
    assert math.isnan(statistics.bootstrap([0] * 9, [right] * 9, [1] * 9, [0] * 9)[0])


def item(document, position, tier, match, entropy=1.0, **more):
    return dict(document=document, position=position, tier=tier, match=match, entropy=entropy,
                well_formed=True, thinking_length=8, tokens=9, budget=10) | more  # fmt: skip


def one(match, tier="easy", entropy=0.7, length=8, **more):
    return item(0, 0, tier, match, entropy, thinking_length=length, **{"budget": None} | more)


def test_an_unparseable_response_counts_as_wrong():
    items = [one(True, budget=10), one(False, well_formed=False, length=None, budget=10)]
    row = summarise(items)[0]
    assert (row["n"], row["accuracy"], row["well_formed"]) == (2, 0.5, 0.5)
    assert row["thinking_length"] == 8, "the length of thoughts that ended"
    assert row["budget_error"] == pytest.approx(0.2)


def test_a_length_is_compared_with_the_budget_of_its_own_position():
    row = summarise([one(True, budget=16), one(True, budget=10)])[0]
    assert row["budget_error"] == pytest.approx((0.5 + 0.2) / 2)


def test_the_average_is_the_mean_of_the_tiers_not_of_the_items():
    items = [one(True)] * 8 + [one(False, "medium", 1.2)] * 2 + [one(True, "hard", 2.0)] * 2
    rows = {row["tier"]: row for row in summarise(items)}
    assert [rows[tier]["accuracy"] for tier in TIERS] == [1, 0, 1]
    assert rows["average"]["accuracy"] == pytest.approx(2 / 3)
    assert 0 < rows["average"]["low"] < 2 / 3 < rows["average"]["high"] <= 1


def test_a_tier_without_items_is_not_part_of_the_average():
    rows = {row["tier"]: row for row in summarise([one(True)])}
    assert math.isnan(rows["hard"]["accuracy"]) and rows["average"]["accuracy"] == 1


def test_nested_sets_weight_tiers_by_how_many_positions_have_them():
    sample = [item(k, 0, "easy", k < 8, 0.7) for k in range(10)]
    sample += [item(k, 1, "medium", k < 5, 1.2) for k in range(10)]
    sample += [item(k, 2, "hard", k < 2, 2.0) for k in range(10)]
    population = {"easy": 700, "medium": 200, "hard": 100}
    rows = {row["tier"]: row for row in summarise(sample, population, lowest=0.5)}
    assert rows["H > 0.5"]["accuracy"] == pytest.approx(0.7 * 0.8 + 0.2 * 0.5 + 0.1 * 0.2)
    assert rows["H > 1.0"]["accuracy"] == pytest.approx((2 * 0.5 + 1 * 0.2) / 3)
    assert rows["H > 1.5"]["accuracy"] == pytest.approx(0.2)
    assert rows["H > 0.5"]["low"] < 0.68 < rows["H > 0.5"]["high"]
    assert rows["H > 0.5"]["n"] == 30, "n is of the sample"


def test_nested_sets_below_the_lowest_tier_or_without_a_population_are_not_told():
    sample = [item(0, 0, "easy", True, 0.9), item(1, 0, "hard", True, 2.0)]
    names = lambda *known: {row["tier"] for row in summarise(sample, *known)}
    population = {"easy": 10, "medium": 0, "hard": 10}
    assert "H > 0.5" not in names(population, 0.7) and "H > 1.0" in names(population, 0.7)
    assert not any(name.startswith("H > ") for name in names())


def test_the_average_is_of_the_tiers_in_every_column():
    items = [item(0, k, "easy", True, thinking_length=10, tokens=20) for k in range(9)]
    items.append(item(1, 0, "hard", False, thinking_length=40, tokens=80, well_formed=False))
    row = next(row for row in summarise(items) if row["tier"] == "average")
    assert (row["accuracy"], row["thinking_length"], row["response_length"]) == (0.5, 25, 50)
    assert row["well_formed"] == 0.5


def test_accuracy_is_told_by_kind_of_answer_and_by_both_matches():
    kinds = ["plain", "plain", "brace", "escaped"]
    items = [item(k, 0, "easy", k == 0, kind=kind, prefix_match=k < 2)
             for k, kind in enumerate(kinds)]  # fmt: skip
    rows = {row["tier"]: row for row in summarise(items)}
    assert (rows["plain answers"]["n"], rows["plain answers"]["accuracy"]) == (2, 0.5)
    assert rows["answers with a brace"]["n"] == rows["escaped answers"]["n"] == 1
    assert (rows["easy"]["accuracy"], rows["easy"]["prefix_accuracy"]) == (0.25, 0.5)


def answers(document, said, truth="1", **more):
    """Several responses to a question; None: one that cannot be read."""
    return [
        item(document, 0, "easy", text == truth, sample=k, answer=text, tokens=k, **more)
        for k, text in enumerate(said)
    ]


@pytest.mark.parametrize(
    "said, right, voted",
    [
        ("121", 2 / 3, True), ("122", 1 / 3, False), ("12", 1 / 2, True), ("21", 1 / 2, False),
        ("2131", 1 / 2, True), ((None, None, "1"), 1 / 3, True), ((None, None), 0, False),
        (("1 ", "1 ", "1"), 1 / 3, False),
    ],
)  # fmt: skip
def test_several_responses_have_a_mean_a_vote_and_the_best(said, right, voted):
    row = summarise(answers(0, said))[0]
    assert (row["n"], row["samples"]) == (1, len(said))
    assert (row["accuracy"], row["majority"], row["any_right"]) == (right, voted, right > 0)
    assert row["tokens"] == sum(range(len(said))), "of all responses"


def test_more_responses_to_a_question_are_no_more_questions():
    said = ["1111" if k % 2 else "2222" for k in range(20)]
    row = summarise([i for k, text in enumerate(said) for i in answers(k, text)])[0]
    once = summarise([item(k, 0, "easy", text[0] == "1") for k, text in enumerate(said)])[0]
    assert [row[name] for name in ("n", "accuracy", "low", "high")] == [
        once[name] for name in ("n", "accuracy", "low", "high")
    ]
    assert "samples" not in once and "maj@" not in table([once])
    assert "| tier | n | avg@4 % | 95 % interval | maj@4 % | pass@4 % | by" in table([row])
    assert "| easy | 20 | 50.0 |" in table([row])


def test_pairs_with_other_numbers_of_responses_compare_the_first_ones():
    before = [i for k, said in enumerate(("12", "22", "11")) for i in answers(k, said)]
    after = [i for k, said in enumerate(("1122", "2111", "1122")) for i in answers(k, said)]
    row = compare.differences(before, after)[0]
    assert (row["n"], row["before"], row["after"]) == (3, 0.5, pytest.approx(5 / 6))
    assert (row["gained"], row["lost"]) == (2, 0), "1/2 to 1, 0 to 1/2, 1 to 1"
    single = compare.differences([i for i in before if not i["sample"]], after)[0]
    assert (single["before"], single["after"], single["gained"]) == (2 / 3, 2 / 3, 0)


def two_answers(gained, lost, both, of, documents):
    """The same questions, answered twice."""
    outcomes = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * both
    outcomes += [(0, 0)] * (of - len(outcomes))
    return [
        [item(k % documents, k, "easy", bool(pair[side])) for k, pair in enumerate(outcomes)]
        for side in (0, 1)
    ]


def test_a_difference_within_overlapping_intervals_is_found_in_pairs():
    before, after = two_answers(gained=20, lost=1, both=99, of=200, documents=200)
    old, new = (summarise(items)[0] for items in (before, after))
    assert (old["accuracy"], new["accuracy"]) == (0.5, 0.595) and new["low"] < old["high"]
    row = compare.differences(before, after)[0]
    assert row["p"] == pytest.approx(2.1e-5, rel=0.01) and (row["gained"], row["lost"]) == (20, 1)
    assert row["low"] < row["difference"] < row["high"] and compare.direction(row) == "up"
    assert compare.direction(compare.differences(after, before)[0]) == "down"


def test_what_changed_in_few_documents_is_no_clear_difference():
    before, after = two_answers(gained=20, lost=1, both=99, of=200, documents=200)
    for number, items in enumerate(zip(before, after)):
        for one in items:
            one["document"] = 0 if number < 20 else number  # all that was gained is of one
    row = compare.differences(before, after)[0]
    assert row["p"] < 1e-4 and row["low"] <= 0 <= row["high"]
    assert compare.direction(row) == "no clear difference"


def test_a_difference_that_chance_explains_is_none():
    row = compare.differences(*two_answers(5, 3, 50, 100, 100))[0]
    assert row["p"] > 0.5 and compare.direction(row) == "no clear difference"


def test_other_questions_are_not_compared():
    before, after = two_answers(5, 3, 50, 100, 100)
    with pytest.raises(ValueError, match=r"other questions.*the same --positions"):
        compare.differences(before, after[1:])
