"""Compiled layers compute what eager ones do, as one program for all layers and lengths."""

import shutil

import pytest
import torch
import torch._dynamo as dynamo
from test_recompute import backward
from toy_forests import adapted, assert_same_gradients, toy_model, toy_trees

from models import transformer
from models.lora import without_adapters
from rmt.forest import pack
from rmt.system import dist
from rmt.trees import Tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"),
]
ROWS = [toy_trees()[:2], toy_trees()[2:4], toy_trees()]  # of three lengths


@pytest.fixture(autouse=True)
def programs():
    """Graphs compiled so far, from none."""
    dynamo.reset()
    transformer._compiled.cache_clear()
    dynamo.utils.counters.clear()
    return dynamo.utils.counters["stats"]


def test_compiled_gradients_are_those_of_eager(programs):
    model, eager = toy_model(torch.float32), toy_model(torch.float32)
    model.configure_training("none", compiled=True)
    for forest in map(pack, ROWS):
        assert_same_gradients(backward(model, forest), backward(eager, forest), 1e-5)
    assert programs["unique_graphs"] == 2  # one before attention and one after it


def test_passes_without_gradient_have_one_program_too(programs):
    model, eager = toy_model(torch.float32), toy_model(torch.float32)
    model.configure_training("none", compiled=True)
    for forest in map(pack, ROWS):
        with torch.inference_mode():
            hidden, expected = (
                m(forest.tokens, forest.position, forest.attend, lambda hidden, head: hidden)
                for m in (model, eager)
            )
        torch.testing.assert_close(hidden, expected)
    assert programs["unique_graphs"] == 2


def test_a_run_with_adapters_and_kl_stays_within_the_compilers_programs(programs):
    """Scoring, sampling of many and of one, the policy, its reference, and the update, twice."""
    model, eager = (adapted(toy_model(torch.float32), 3) for _ in range(2))
    model.configure_training("selective", compiled=True)
    forests = [*map(pack, ROWS), pack([Tree(0, [5])])]
    for forest in forests[:-1]:
        assert_same_gradients(backward(model, forest), backward(eager, forest), 1e-5)
    # Two more than without adapters: the input of the first layer has no gradient.
    assert programs["unique_graphs"] == 4

    def run(forest, model=model):
        return model(forest.tokens, forest.position, forest.attend, lambda hidden, _: hidden)

    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for forest in forests * 2:
            with torch.inference_mode():
                run(forest)
            with torch.no_grad():
                run(forest)
                run(forest, without_adapters(model))
            if len(forest) > 1:
                backward(model, forest)


def distance(given, expected):
    """Of all gradients together, relative."""
    flat = lambda gradients: torch.cat([g.float().flatten() for g in gradients.values()])
    return float((flat(given) - flat(expected)).norm() / flat(expected).norm())


def test_sharded_layers_in_bfloat16_share_one_program(programs):
    exact, (model, eager) = toy_model(torch.float32), (toy_model(torch.float32) for _ in range(2))
    model.configure_training("full", compiled=True)
    whole = lambda gradients: {name: g.full_tensor() for name, g in gradients.items()}
    try:
        for m in (model, eager):
            dist.shard(m, dist.current(torch.device("cpu")), torch.bfloat16)
        for forest in map(pack, ROWS):
            expected = backward(exact, forest)
            ours, theirs = (whole(backward(m, forest)) for m in (model, eager))
            # A compiled program rounds to bf16 less often than an eager one.
            assert distance(ours, expected) < 1.5 * distance(theirs, expected) < 0.1
    finally:
        dist.stop()
    assert programs["unique_graphs"] == 2
