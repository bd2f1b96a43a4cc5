"""Four ranks load, learn, save and are killed; two resume and export; transformers opens it."""

import sys

import life
import pytest
import torch

from models.weights import on_meta

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc"),
]
GIGABYTES = 0.05
NOISE = 24 * 2**20  # bytes: what libraries and malloc keep; up to 16 MiB were seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def found(place):
    pytest.importorskip("transformers")
    return life.whole_life(place, GIGABYTES, "float32")


def grown(found, name):
    """Anonymous bytes that each rank took in a phase beyond what it held, at the most."""
    return [row["anonymous"] - row["before"] for row in found["rows"] if row["phase"] == name]


def test_ranks_killed_during_a_save_resume_from_the_one_before(found):
    assert found["lives"][0]["killed"] and not found["lives"][1]["killed"]
    assert found["kept"] == [1]


def test_the_step_after_the_kill_has_the_losses_it_had_before_it(found):
    before, after = found["losses"]
    assert before["step"] == after["step"] == 1
    for name in ("loss/ntp", "loss/rl", "reward/mean", "update/grad_norm"):
        assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-7), name


def test_transformers_opens_what_two_ranks_exported_and_has_our_logits(found, place):
    files = list((place / "out" / "model").glob("*.safetensors"))
    assert len(files) >= life.FILES
    assert found["difference"] < 1e-4


def test_no_rank_ever_holds_the_whole_model_when_it_loads_or_exports(found, place):
    shapes = on_meta(place / "model").named_parameters()
    tensors = [parameter.numel() * torch.float32.itemsize for _, parameter in shapes]
    file = max(max(tensors), sum(tensors) // life.FILES)
    assert sum(tensors) > file + 2 * max(tensors) + NOISE, "too small a model to tell"
    for held in grown(found, "load"):
        assert held < sum(tensors) / 4 + NOISE
    writer, other = grown(found, "export")
    assert writer < file + 2 * max(tensors) + NOISE
    assert other < 2 * max(tensors) + NOISE


def test_the_table_has_every_phase(found):
    table = life.table(found)
    for name in ("load", "prepare", "step 1", "save 1", "step 2", "resume", "export"):
        assert f" | {name} | " in table
