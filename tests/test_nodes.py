"""However many ranks and copies of the model there are, a run has the same losses."""

from functools import partial

import pytest
import torch
from many_ranks import join, on_ranks
from toy_runs import WORLD, prepared, stepped
from two_ranks import whole

from rmt.engine.run import save
from rmt.system import dist
from rmt.system.torchrun import copies

RAGGED = dict(batch_size=6, steps=10, max_response=24, learning_rate=3e-4, samples_per_step=9)
LAYOUTS = {"FSDP-2": (2, 1), "FSDP-4": (4, 1), "HSDP-2x2": (4, 2)}  # ranks, copies of the model


def weights(run):
    return {name: whole(p) for name, p in run.model.named_parameters()}


def ten_steps(world, place):
    """Metrics and responses of ten steps, and the weights after them, which are saved too."""
    out = place / f"out{world.size}-{world.replicate}"
    run, rows, responses = prepared(place, world, out=str(out), **RAGGED), [], []
    for step in range(run.total_steps):
        row, samples = stepped(run, step)
        run.step += 1
        rows.append(row)
        gathered = dist.gather_objects(samples, world)
        responses += sorted(s["response"] for part in gathered for s in part)
    save(*run)
    mesh = getattr(next(run.model.parameters()), "device_mesh", None)
    shape = mesh and dict(zip(mesh.mesh_dim_names, mesh.shape))
    return dict(rows=rows, responses=responses, weights=weights(run), mesh=shape, out=out)


def on_a_rank(count, replicate, rank, port, place):
    world = join(rank, count, port, replicate)
    torch.save(ten_steps(world, place), place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("nodes")
    prepared(place)
    return place


@pytest.fixture(scope="module")
def alone(place):
    return ten_steps(WORLD, place)


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def ranks(request, place):
    count, replicate = request.param
    answers = on_ranks(count, place, partial(on_a_rank, count, replicate))
    shard = {"shard": count // replicate}
    expected = {"replicate": replicate} | shard if replicate > 1 else shard
    assert [answer["mesh"] for answer in answers] == [expected] * count
    return answers


@pytest.mark.slow
def test_losses_of_ten_steps_depend_neither_on_ranks_nor_on_copies(alone, ranks):
    lengths = {len(response) for response in alone["responses"]}
    assert len(lengths) > 9, "all responses are of one length"
    for rank in ranks:
        assert rank["responses"] == alone["responses"]
        for given, expected in zip(rank["rows"], alone["rows"], strict=True):
            for name in ("loss/rl", "loss/ntp", "update/grad_norm"):
                assert given[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_all_copies_hold_the_weights_that_are_saved(place, ranks):
    saved = weights(prepared(place, resume=str(ranks[0]["out"])))
    for rank in ranks:
        for name, weight in rank["weights"].items():
            assert torch.equal(weight, saved[name]), name


def test_there_is_a_copy_per_node_unless_another_number_is_asked_for():
    assert copies(0, [1]) == copies(0, [4] * 4) == 1
    assert copies(0, [8] * 16) == 2
    assert copies(0, [1] * 3) == 3
    assert copies(1, [8] * 16) == 1
    assert copies(4, [8] * 16) == 4


def test_copies_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match=r"--replicate 3: 8 ranks .* choose one of 1, 2, 4, 8"):
        copies(3, [8] * 8)
    with pytest.raises(ValueError, match=r"nodes have 4 to 8 ranks; .* --replicate 1"):
        copies(0, [8] * 8 + [4] * 4)
    assert copies(1, [8] * 8 + [4] * 4) == 1
