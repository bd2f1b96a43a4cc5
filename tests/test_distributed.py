"""Two processes do what one does: the same losses, gradients, samples and metrics."""

import pytest
import torch
from toy_forests import assert_same_gradients
from toy_runs import WORLD, prepared
from two_ranks import everything, on_two_ranks

UPDATES = [
    "uneven", "no-response-on-one-rank", "nothing-on-one-rank", "micro-batches", "clipped",
    "untied", "two-per-batch",
]  # fmt: skip
CLOCK = ("time/", "speed/", "memory/", "share/waiting")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of one process, of rank 0 and of rank 1."""
    place = tmp_path_factory.mktemp("ranks")
    prepared(place)
    prepared(place / "untied", shape={"tie_word_embeddings": False})
    return [everything(WORLD, place), *on_two_ranks(place)]


def assert_same_metrics(given, expected, tolerance, absolute=1e-9):
    """All but what a clock or the size of the process says."""
    assert given.keys() == expected.keys()
    for name in (name for name in expected if not name.startswith(CLOCK)):
        wanted = expected[name]
        wanted = wanted if wanted is None else pytest.approx(wanted, rel=tolerance, abs=absolute)
        assert given[name] == wanted, name


@pytest.mark.parametrize("name", UPDATES)
def test_loss_does_not_depend_on_world_size(answers, name):
    one, *ranks = (a[f"updates/{name}"]["metrics"] for a in answers)
    for rank in ranks:
        assert_same_metrics(rank, one, 1e-9)


@pytest.mark.parametrize("name", UPDATES)
def test_gradients_do_not_depend_on_world_size(answers, name):
    one, *ranks = (a[f"updates/{name}"]["gradients"] for a in answers)
    for rank in ranks:
        assert_same_gradients(rank, one, 1e-9)


@pytest.mark.parametrize("name", UPDATES)
def test_updated_weights_do_not_depend_on_world_size(answers, name):
    one, *ranks = (a[f"updates/{name}"]["weights"] for a in answers)
    for rank in ranks:
        assert_same_gradients(rank, one, 1e-9)


def test_micro_batches_of_unequal_number_per_rank_change_no_gradient(answers):
    whole, split = (answers[1][f"updates/{n}"]["gradients"] for n in ("uneven", "micro-batches"))
    assert_same_gradients(split, whole, 1e-9)


def test_float32_gradients_agree_to_rounding(answers):
    one, *ranks = (a["float32"]["gradients"] for a in answers)
    assert next(iter(one.values())).dtype == torch.float32
    for rank in ranks:
        assert_same_gradients(rank, one, 1e-5)


def test_the_gradient_is_clipped_after_it_was_synchronised(answers):
    for answer in answers:
        whole, clipped = (answer[f"updates/{name}"] for name in ("uneven", "clipped"))
        norm = torch.stack([g.norm() for g in whole["gradients"].values()]).norm()
        assert clipped["metrics"]["update/grad_norm"] == pytest.approx(float(norm), rel=1e-9)
        expected = {k: g * (1e-3 / (norm + 1e-6)) for k, g in whole["gradients"].items()}
        assert_same_gradients(clipped["gradients"], expected, 1e-9)


def test_ranks_on_nodes_of_their_own_replicate_instead_of_sharding(answers):
    one, hybrid = answers[0]["updates/uneven"], answers[1]["hybrid"]
    assert (hybrid["mesh"], hybrid["names"]) == ((2, 1), ("replicate", "shard"))
    assert_same_gradients(hybrid["gradients"], one["gradients"], 1e-9)
    assert_same_metrics(hybrid["metrics"], one["metrics"], 1e-9)


def test_bf16_ranks_sample_from_the_weights_of_the_last_update(answers):
    ranks = [a["bfloat16"] for a in answers[1:]]
    for rank in ranks:
        for name, master in rank["after"].items():
            assert master.dtype == torch.float32 and not torch.equal(master, rank["before"][name])
            assert torch.equal(rank["given"][name], master.bfloat16()), name
    assert_same_metrics(*(rank["rows"][-1] for rank in ranks), 1e-9)


def test_ragged_decoding_gives_the_samples_of_one_process(answers):
    one, *ranks = (a["steps"]["responses"] for a in answers)
    assert len({len(response) for *_, response in one}) > 3, "all responses are of one length"
    assert ranks == [one, one]


@pytest.mark.parametrize("name", ["steps", "knowing", "given"])
def test_metrics_of_whole_steps_are_those_of_one_process(answers, name):
    one, *ranks = (a[name]["rows"] for a in answers)
    for rank in ranks:
        for given, expected in zip(rank, one):
            assert_same_metrics(given, expected, 1e-4, absolute=1e-5)


@pytest.mark.parametrize("name", ["steps", "knowing"])
def test_every_rank_knows_all_that_was_drawn(answers, name):
    one, *ranks = (a[name]["drawn"] for a in answers)
    assert ranks == [one, one] and max(map(max, one)) > 0
    assert any(row["tokens/dropped"] > 0 for row in answers[0]["knowing"]["rows"])


def test_difficulty_does_not_depend_on_world_size(answers):
    one, *ranks = (a["entropies"] for a in answers)
    for rank in ranks:
        for given, expected in zip(rank, one):
            assert given == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["plain", "thinking", "problems"])
def test_evaluation_runs_on_all_ranks_and_all_get_every_item(answers, mode):
    one, *ranks = (a["evaluation"][mode] for a in answers)
    places = [(0, 9), (0, 11), (3, 10), (5, 8)]
    if mode == "problems":
        places = [(d, item["position"]) for d, item in zip(range(5), one)]
    assert [(item["document"], item["position"]) for item in one] == places
    assert ranks == [one, one]


def test_a_whole_run_with_evaluations_ends_on_all_ranks(answers):
    assert [a["run"]["evaluations"] for a in answers] == [3, 3, 3]
    assert all(a["run"]["said"].startswith("wrote") for a in answers)


def test_probes_of_two_ranks_are_those_of_one_process(answers):
    one, *ranks = (a["run"]["probes"] for a in answers)
    assert len(one) > 9 and ranks == [one, one]
