"""Time, tokens and operations of a step are what an independent count says."""

import json
import subprocess
import sys
import time

import pytest
import torch
from small_run import ROOT, arguments, metrics, refusal, run_here, write_corpus, write_small_model
from torch.utils.flop_counter import FlopCounterMode
from toy_forests import grouped_trees, toy_model, toy_trees
from toy_runs import prepared, stepped

import train
from models.config import ModelConfig
from models.transformer import Transformer
from rmt.engine.step_metrics import forward_flops, peak_flops, visible_pairs
from rmt.forest import pack
from rmt.naive import separate_tokens
from rmt.system.metrics import Clock
from rmt.trees import Branch, Tree

CPU = torch.device("cpu")


def test_clock_adds_up_phases_and_starts_anew_after_each_reading():
    clock = Clock(CPU)
    for pause in (0.02, 0.03):
        with clock("outer"), clock("inner"):
            time.sleep(pause)
    with clock("other"):
        pass
    seconds = clock.read()
    assert seconds["outer"] >= seconds["inner"] >= 0.05 > seconds["other"] >= 0
    assert clock.read() == {}


def test_phases_of_a_step_fit_into_it(tmp_path):
    row, _ = stepped(prepared(tmp_path), 0)
    parts = sum(row[f"time/{name}"] for name in ("forward", "backward", "optimizer"))
    assert 0 < parts <= row["time/update"]
    assert row["time/rollout"] + row["time/update"] <= row["time/step"]
    assert row["time/communication"] >= 0
    assert row["speed/mfu"] is None, "a CPU has no peak in the table"
    generated = row["length/response"] * 6 * 4  # documents, G
    assert row["speed/rollout_tokens_per_second"] * row["time/rollout"] == pytest.approx(generated)
    trained = row["speed/train_tokens_per_second"] * row["time/update"]
    assert trained == pytest.approx(row["speed/tokens_per_second"] * row["time/step"])


def test_pairs_are_those_that_the_forest_sees():
    for tree in toy_trees() + grouped_trees():
        forest = pack([tree])
        index = torch.arange(len(forest))
        seen = forest.sees(index[:, None], index[None, :])
        assert visible_pairs(tree) == int(seen.sum())


def spelt_out(layer, query, key, value):
    """Attention without a mask in two products, which PyTorch's counter sees on a CPU."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    weights = torch.einsum("ihd,jhd->hij", query, key).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


def test_operations_of_one_sequence_are_those_that_pytorch_counts():
    model, tokens = toy_model(), torch.arange(40)
    readout = lambda hidden, head: hidden[:-1] @ head.T  # 39 targets
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(40), spelt_out, readout)
    tree = Tree(0, tokens.tolist(), targets=[True] * 40)
    unseen = 40 * 40 - visible_pairs(tree)
    attention = 2 * 4 * 4 * 16 * unseen  # layers; q·k and p·v; H; D
    assert forward_flops(model.config, [tree]) == counter.get_total_flops() - attention


def test_operations_of_the_tiny_model_are_those_of_a_count_by_hand():
    c = ModelConfig.from_dict(
        dict(architectures=["LlamaForCausalLM"], vocab_size=10, hidden_size=4, head_dim=2,
             intermediate_size=6, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1)
    )  # fmt: skip
    # q 4x4, k 4x2, v 4x2, o 4x4, gate, up and down 4x6: 120 weights a layer.
    tree = Tree(0, [1, 2, 3], [Branch(0, 2, [4], [5])])
    # 5 tokens; trunk 1 + 2 + 3 pairs, branch 3 + 4; one target.
    assert forward_flops(c, [tree]) == 3 * (2 * 120 * 5 + 4 * 2 * 2 * 13) + 2 * 10 * 4
    layer = Transformer(c).model.layers[0]
    assert sum(p.numel() for p in layer.parameters() if p.dim() == 2) == 120


def test_forest_saves_the_trunks_that_sequences_of_their_own_would_repeat(tmp_path):
    tree = Tree(0, range(10), [Branch(0, 10, [1], [2]), Branch(1, 4, [1], [2, 3])])
    text = Tree(1, range(7), targets=[True] * 7)
    assert separate_tokens([tree, text]) == (10 + 2) + (4 + 3) + 7
    row, _ = stepped(prepared(tmp_path), 0)
    assert 0.3 < row["share/forest_saved"] < 1


def test_peak_is_that_of_the_gpu_and_unknown_for_slices_and_other_types():
    bf16 = torch.bfloat16
    assert peak_flops("NVIDIA H100 80GB HBM3", bf16) == peak_flops("NVIDIA H200", bf16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", bf16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16) == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", bf16) is None
    assert peak_flops("NVIDIA GeForce RTX 2080", bf16) is None
    assert peak_flops("NVIDIA H200", torch.float32) is None


def test_profile_writes_a_trace_of_its_step_and_names_the_costliest_operators(tmp_path, capsys):
    write_small_model(tmp_path / "model")
    write_corpus(tmp_path / "train.jsonl", 4)
    run_here(*arguments(tmp_path, steps=2, save_every=9, max_response=4, budget=False, profile=1))
    printed = capsys.readouterr().out
    out = tmp_path / "run"
    assert [path.name for path in out.glob("profile-*")] == ["profile-1.json"]
    events = json.loads((out / "profile-1.json").read_text())["traceEvents"]
    assert {"aten::mm", "aten::embedding"} <= {event.get("name") for event in events}
    assert printed.count(" aten::") > 3 and "ui.perfetto.dev" in printed
    assert len(metrics(out)) == 2


def test_profile_of_a_step_that_does_not_come_is_refused(tmp_path, capsys):
    write_small_model(tmp_path / "model")
    write_corpus(tmp_path / "train.jsonl", 4)
    refusal(train, arguments(tmp_path, profile=8), ("--profile 8", "0 to 7"), capsys)


def test_peak_memory_is_not_that_of_the_parent():
    held = b"\1" * 2**31  # touched by whoever starts the child; Linux's ru_maxrss survives exec
    code = "import torch; from rmt.system.metrics import peak_memory as peak; "
    code += "print(peak(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 5e7 < int(child.stdout) < 1e9 < len(held), child.stderr
