"""Ranks save together: what four have written others read, and one that cannot write stops all."""

import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from many_ranks import on_ranks
from safetensors.torch import load_file
from toy_runs import WORLD, prepared, stepped
from two_ranks import whole

from models.weights import SINGLE
from rmt.engine.checkpoint import CheckpointError, newest, steps
from rmt.engine.export import write_model
from rmt.engine.run import save
from rmt.system import dist

pytestmark = pytest.mark.slow
STEPS = 8
LOSSES = ("loss/rl", "loss/ntp", "reward/mean", "update/grad_norm", "length/response")
# What four ranks of two nodes begin, two go on with, then one, then four of one node.
LEGS = ((4, 2, 0), (2, 2, 0), (1, 1, 0), (4, 4, 2))  # (ranks, ranks of a node, --replicate)


def run_on(place, world, count, **changes):
    """Rows of the next `count` steps; the state after them is saved while the last is logged."""
    run, rows = prepared(place, world, steps=STEPS, **changes), []
    for _ in range(count):
        rows.append(stepped(run, run.step)[0])
        run.step += 1
        save(*run, wait=False)
    run.saver.wait()
    return run, rows


def leg(rank, port, place, copies, replicate, **changes):
    """Two steps of the run in `place`, on as many ranks as the environment says."""
    os.environ |= {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.start(replicate)
    begun = steps(place / "out")
    run, rows = run_on(place, world, 2, **({"resume": str(place / "out")} if begun else changes))
    if world.size > 1:
        mesh = next(run.model.parameters()).device_mesh
        shape = {"replicate": copies} if copies > 1 else {}
        shape |= {"shard": world.size // copies}
        assert dict(zip(mesh.mesh_dim_names, mesh.shape)) == shape
    held = [whole(p) for p in run.model.parameters()]
    for other in dist.gather_objects(held, world):  # on all ranks, whichever copy they have
        assert all(torch.equal(a, b) for a, b in zip(held, other, strict=True))
    torch.save(rows, place / f"rank{rank}.pt")


@pytest.mark.parametrize("changes", [{}, dict(lora_rank=3, learning_rate=1e-2)], ids=str)
def test_ranks_that_take_over_from_each_other_have_the_losses_of_one_process(
    tmp_path, monkeypatch, changes
):
    legs = LEGS[2:] if "lora_rank" in changes else LEGS
    count = 2 * len(legs)
    _, wanted = run_on(tmp_path, WORLD, count, out=str(tmp_path / "alone"), **changes)
    found = []
    for ranks, local, replicate in legs:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        known = dict(copies=replicate or ranks // local, replicate=replicate)
        found += on_ranks(ranks, tmp_path, partial(leg, **known, **changes))[0]
    assert [row["step"] for row in found] == list(range(count))
    assert len({row["length/response"] for row in wanted}) > 2, "responses are not ragged"
    for row, one in zip(found, wanted):
        for name in LOSSES:
            assert row[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (row["step"], name)

    write_model(newest(tmp_path / "out"), tmp_path / "hf")  # which four ranks have written
    state = prepared(tmp_path, resume=str(tmp_path / "out")).model.state_dict()
    for low in [name.removesuffix("lora_A") for name in state if name.endswith("lora_A")]:
        a, b = state.pop(low + "lora_A"), state.pop(low + "lora_B")
        state[low + "weight"] = torch.addmm(state[low + "weight"], b, a, alpha=2)
    exported = load_file(tmp_path / "hf" / SINGLE)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


def fail(rank, port, place):
    """Saves that one of two ranks cannot write: what each rank was told."""
    os.environ |= {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world, told = dist.start(), []
    run = prepared(place, world)
    files = run.out / "checkpoints"
    if rank == 0:
        run.out.mkdir()
        files.write_text("in the way")  # of the first save, which rank 0 begins
    for step in (0, 1, 2):
        run.step = step
        limit = 1000 if (rank, step) == (1, 2) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(*run)
            told.append("saved")
        except CheckpointError as error:
            told.append(str(error))
        dist.gather_objects(None, world)
        if step == 0 and rank == 0:
            files.unlink()
        dist.gather_objects(None, world)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    torch.save((told, os.listdir(files)), Path(place) / f"rank{rank}.pt")


def test_all_ranks_hear_of_the_one_that_could_not_write(tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (told, left), (told_other, _) = on_ranks(2, tmp_path, fail)
    assert told == told_other
    first, second, third = told
    assert "of step 0 could not be written" in first and "start anew" in first
    assert second == "saved"
    assert "of step 2 could not be written" in third and "File too large" in third
    assert "continues from step-000001" in third and left == ["step-000001"]
