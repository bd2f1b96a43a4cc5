"""The benchmark of the kernels: it runs, leaves nobody out, and its columns mean something."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import OPERATIONS, Contender, contenders, eager, one_pass
from benchmarks.kernels import SHAPES, make_inputs, measure, ratios
from benchmarks.machine import peak_memory

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
EVERYONE = {"ours reference", "ours triton", "eager", "torch.compile", "Liger"}
ABSOLUTE, RELATIVE = 1e-5, 2e-6  # of ours in fp32: an order above rounding, no more


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "new" / "tiny.json"
    flags = ["--shapes", "tiny", "--tokens", "64", "--repeats", "1", "--dtype", "float32"]
    # Inductor takes a minute.
    quick = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.kernels", *flags, "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_every_contender_of_every_operation_has_numbers_or_a_reason(result):
    _, found = result
    rows = found["shapes"]["tiny"]["rows"]
    for operation in OPERATIONS:
        names = {row["contender"] for row in rows if row["operation"] == operation}
        for someone in EVERYONE:
            assert any(name.startswith(someone) for name in names), (operation, someone)
        measured = [row for row in rows if row["operation"] == operation and "median" in row]
        assert {"eager"} < {row["contender"] for row in measured}
    for row in rows:
        assert ("median" in row) != bool(row.get("reason"))
    assert not [row for row in rows if row.get("reason", "").startswith("failed")]


def test_numbers_are_finite_and_ours_are_exact(result):
    _, found = result
    for row in found["shapes"]["tiny"]["rows"]:
        if "median" not in row:
            continue
        assert 0 < row["low"] <= row["median"] <= row["high"] < math.inf
        assert 0 < row["roofline"] < 1.5
        assert not row["disagrees"], row
        for name, error in row["errors"].items():
            assert error < (ABSOLUTE if name in ("logprob", "entropy") else RELATIVE), row
        gradients = {f"grad_{leaf}" for leaf in OPERATIONS[row["operation"]].leaves}
        assert (gradients <= set(row["errors"])) == OPERATIONS[row["operation"]].backward


def test_the_report_says_what_ran_and_not_where(result):
    printed, found = result
    assert found["command"].startswith("python -m benchmarks.kernels --shapes tiny --tokens 64")
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["commit"] == "unknown" or len(found["commit"]) == 40
    ratios = found["shapes"]["tiny"]["ratios"]
    assert [ratio["operation"] for ratio in ratios] == list(OPERATIONS)
    assert all(ratio["ratio_time"] > 0 for ratio in ratios)
    for text in (printed, json.dumps(found)):
        assert str(ROOT) not in text and socket.gethostname() not in text
    assert "DISAGREES" not in printed and "ours reference one pass" in printed


def without_entropy_gradient(hidden, weight, targets, advantage):
    results = eager(hidden, weight, targets, advantage)
    return results | {"loss": results["loss"] + 0.1 * results["entropy"].sum()}


def one_token_short(hidden, weight, targets, advantage):
    return eager(hidden, weight, targets.index_fill(0, torch.tensor([40]), -100), advantage)


def phantom_columns(hidden, weight, targets, advantage):
    return eager(hidden, torch.cat((weight, 0 * weight[:12])), targets, advantage)


def rounded_logits(hidden, weight, targets, advantage):
    return eager(hidden.bfloat16().float(), weight, targets, advantage)


def broken(*_):
    raise NotImplementedError("sm_75 is too old\nfor this")


WRONG = [without_entropy_gradient, one_token_short, phantom_columns, rounded_logits]


@pytest.fixture(scope="module")
def tiny():
    return make_inputs(SHAPES["tiny"], 64, torch.float32, CPU)


@pytest.mark.parametrize("forward", WRONG, ids=lambda forward: forward.__name__)
def test_who_computes_something_else_is_told_apart_and_is_no_best_peer(tiny, forward):
    who = [Contender("ours reference", one_pass), Contender("peer", forward)]
    ours, peer = rows = measure("objective", who, tiny, repeats=1)
    assert peer["disagrees"] and not ours["disagrees"]
    for row in rows:
        row["median"] = row["times"][0]
    assert ratios(rows)["best_time"] is None


def test_who_fails_has_a_row_that_says_so_and_the_others_go_on(tiny):
    who = [Contender("peer", broken), Contender("ours reference", one_pass)]
    peer, ours = measure("objective", who, tiny, repeats=2)
    assert peer["reason"] == "failed: NotImplementedError: sm_75 is too old"
    assert len(ours["times"]) == 2


def test_without_a_compiler_there_is_a_reason_instead_of_torch_compile(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("TORCHDYNAMO_DISABLE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = {c.name: c.forward for c in contenders("objective", CPU)}
    assert found["torch.compile"] == "torch.compile needs a C++ compiler, and there is none"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_what_lives_for_a_moment():
    def work():
        torch.ones(2**24)  # 64 MiB, gone at once
        return torch.ones(2**22)

    assert 60 << 20 < peak_memory(work, CPU) < 80 << 20
    assert peak_memory(lambda: None, CPU) < 8 << 20
