"""What a run will hold: sums, a simulation without memory, and what PyTorch and Linux measure."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import attend_flex, fuse_norms
from simulate import Simulation, fake_world, row_of
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from toy_runs import WORLD
from tracker import Tracker

from models.config import ModelConfig
from models.lora import adapt
from models.shapes import REPOSITORIES, SHAPES
from models.transformer import Block, Transformer, rotary_angles
from rmt.config.config import Config
from rmt.forest import pack
from rmt.memory.dry_run import PROMPT
from rmt.memory.estimate import MASK_BYTES, Case, Machine, layer, rollout, total, update
from rmt.trees import Branch, Tree

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {  # as the Hugging Face hub counts them
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "r1-distill-qwen-1.5b": 1_777_088_000, "r1-distill-qwen-7b": 7_615_616_512,
    "r1-distill-qwen-14b": 14_770_033_664, "r1-distill-qwen-32b": 32_763_876_352,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "olmo-2-1b": 1_484_916_736,
}  # fmt: skip
SMALL = ModelConfig(
    "Qwen3ForCausalLM", 8192, 256, 768, 4, 4, 2, 64, 1e6, 1e-6, 40960,
    tie_word_embeddings=False, qk_norm="head", qkv_bias=False, post_norm=False,
)  # fmt: skip
SHORT = dict(
    budget=False,
    document_tokens=256,
    max_response=256,
    tokens_per_micro_batch=4096,
    max_branches=16,
)

CHANGES = {
    "untied": {}, "tied": {"tie_word_embeddings": True},
    "olmo2": {"qk_norm": "all", "post_norm": True},
}  # fmt: skip
# An orthogonal array: each value of each of the four meets each value of every other.
PAIRS = [
    (recompute, shape, (1, 4, 4)[(i + j) % 3], (0, 8, 8)[(i + 2 * j) % 3])
    for i, recompute in enumerate(("none", "selective", "full"))
    for j, shape in enumerate(CHANGES)
]


def case(kind="cuda", ranks=4, shape=SMALL, compute=torch.bfloat16, **knobs) -> Case:
    config = Config(**SHORT | dict(recompute="full", compile="off") | knobs)
    return Case(config, shape, compute, PROMPT, Machine(kind, ranks, ranks, 80e9))


def simulated(given: Case, phase: str):
    with fake_world(given.machine.ranks, given.machine.shards) as world:
        return getattr(Simulation(given, world), phase)()


# ---- the table of shapes


def test_published_shapes_have_the_published_number_of_parameters():
    assert SHAPES.keys() == REPOSITORIES.keys() == PARAMETERS.keys()
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Transformer(replace(shape, num_hidden_layers=1))
        layer = sum(p.numel() for p in model.model.layers.parameters())
        whole = sum(p.numel() for p in model.parameters()) + layer * (shape.num_hidden_layers - 1)
        assert whole == PARAMETERS[name], name


# ---- three counts of the same


@pytest.mark.parametrize("recompute, shape, ranks, rank", PAIRS)
def test_sums_agree_with_the_simulation_of_an_update(recompute, shape, ranks, rank):
    shape = replace(SMALL, num_hidden_layers=2, **CHANGES[shape])
    given = case("cuda", ranks, shape, recompute=recompute, lora_rank=rank)
    assert total(update(given)) == pytest.approx(total(simulated(given, "update")), rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_simulation_of_an_update_agrees_with_fsdp_mem_tracker(recompute):
    given = case(recompute=recompute, tokens_per_micro_batch=1024)
    ours = total(simulated(given, "update"))
    # Of real tensors: it does not look where fake ones are mixed with indices that are known.
    with fake_world(4, 4) as world:
        simulation = Simulation(given, world, real=True)
        simulation.optimizer.zero_grad(set_to_none=True)
        tracker = FSDPMemTracker(simulation.model, simulation.optimizer)
        with tracker:
            for tokens in (64, given.row):  # it takes one pass through the model at a time
                simulation.learn([row_of(tokens)], Tracker())
                tracker.reset_mod_stats()
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ours == pytest.approx(theirs, rel=0.01)


GROWTH = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_plan import real_case
from toy_runs import WORLD
from tracker import Tracker
from simulate import Simulation, row_of

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

given = real_case(int(sys.argv[1]))
simulation = Simulation(given, WORLD, real=True)
simulation.optimizer.zero_grad(set_to_none=True)
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
simulation.learn([row_of(64), row_of(given.row)], Tracker())
print(json.dumps(1024 * (kib("VmHWM") - before)))
"""


def real_case(rank):
    shape = replace(SMALL, hidden_size=512, intermediate_size=1536, num_attention_heads=8)
    knobs = dict(tokens_per_micro_batch=2048, recompute="none", lora_rank=rank)
    return case("cpu", 1, shape, torch.float32, **knobs)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_simulation_of_an_update_agrees_with_resident_memory(rank):
    given = real_case(rank)
    simulation = Simulation(given, WORLD)
    simulation.optimizer.zero_grad(set_to_none=True)
    states = total(simulation.tracker().held())
    planned = total(simulation.update()) - states
    # malloc gives blocks back at once: what it would keep for later is not the model's.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(rank)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert planned == pytest.approx(json.loads(done.stdout), rel=0.05)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("rank", [0, 8])
def test_sums_agree_with_the_simulation_of_a_rollout(ranks, rank):
    given = case(ranks=ranks, lora_rank=rank)
    needs = rollout(given, given.config.max_branches)
    assert total(needs) == pytest.approx(total(simulated(given, "rollout")), rel=0.05)


def kept_by_a_layer(n, shape, compute, recompute, rank):
    """Bytes that a layer keeps, needs besides for backward, and holds without a gradient."""
    attend = lambda _layer, q, k, v: attend_flex(q, k, v)
    training, sampling = Tracker(), Tracker()
    with torch.device("meta"):
        block = fuse_norms(Block(shape).to(compute).requires_grad_(not rank))
        adapt(block, rank, compute)
        x = torch.empty(n, shape.hidden_size, dtype=compute, requires_grad=True)
        rotary = rotary_angles(torch.empty(n), shape, compute)
    block.recompute = recompute
    with sampling, torch.no_grad():
        block(x, rotary, attend, 0)
    with training:
        out = block(x, rotary, attend, 0)
        kept = total(training.held())
        out.backward(torch.empty_like(out))
    return kept, total(training.peak()) - kept, total(sampling.peak())


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "name", ["qwen3-14b", "qwen3-0.6b", "r1-distill-qwen-7b", "smollm2-135m", "olmo-2-1b"]
)
@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_of_a_layer_are_those_that_its_tensors_have(name, recompute, compute, rank):
    given = layer(SHAPES[name], compute, recompute, rank)
    # Two rows, so that what does not grow with them drops out.
    known = (SHAPES[name], compute, recompute, rank)
    small, large = (kept_by_a_layer(n, *known) for n in (8192, 16384))
    measured = [(b - a) / 8192 for a, b in zip(small, large)]
    assert [given.kept, given.backward, given.forward] == pytest.approx(measured, abs=4.01)


def test_other_phases_hold_less():
    given = case()
    with fake_world(given.machine.ranks, given.machine.shards) as world:
        simulation = Simulation(given, world)
        most = max(total(simulation.rollout()), total(simulation.update()))
        for phase in (simulation.load, simulation.checkpoint, simulation.export):
            assert total(phase()) < most


def test_a_block_mask_holds_no_more_than_planned_while_it_is_made():
    n, tracker = 1024, Tracker()
    forest = pack([Tree(0, [0] * 512, (Branch(0, 512, [0], [0] * 511),))])
    with tracker:
        mask = forest.block_mask
    assert MASK_BYTES * n**2 <= total(tracker.peak()) < 1.05 * MASK_BYTES * n**2
    assert mask is not None
