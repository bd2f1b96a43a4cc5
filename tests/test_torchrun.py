"""A command that torchrun starts again goes on with its run; one that cannot work says so."""

import os
import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist
from small_run import (
    ROOT,
    arguments,
    metrics,
    refusal,
    run_here,
    write_corpus,
    write_small_model,
)

import train
from rmt.config.config import parse
from rmt.engine.checkpoint import steps
from rmt.system.torchrun import check_store, copies, lost_contact


@pytest.fixture
def place(tmp_path):
    write_small_model(tmp_path / "model")
    write_corpus(tmp_path / "train.jsonl")
    return tmp_path


@pytest.fixture
def restarting(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")


def four_steps(place, **changes):
    return arguments(
        place, **dict(steps=4, save_every=1, keep=4, max_response=8, budget=False) | changes
    )


def test_the_same_command_begins_a_run_and_goes_on_with_it(place, restarting, capsys):
    run_here(*four_steps(place))
    whole = metrics(place / "run")
    assert "continuing from" not in capsys.readouterr().out
    for step in (3, 4):  # as if it had died in the third step
        shutil.rmtree(place / f"run/checkpoints/step-{step:06d}")
    run_here(*four_steps(place))
    assert f"continuing from {place / 'run/checkpoints/step-000002'}" in capsys.readouterr().out
    assert metrics(place / "run") == whole
    assert steps(place / "run") == [1, 2, 3, 4]


def test_how_ranks_are_laid_out_may_change_between_starts(place, restarting):
    run_here(*four_steps(place, steps=1))
    run_here(*four_steps(place, steps=1, replicate=1, timeout=77))


def test_another_run_in_its_place_is_not_continued(place, restarting, capsys):
    run_here(*four_steps(place, steps=1))
    fragments = (
        f"--out {place / 'run'} holds a run with other settings (--learning-rate, --seed)",
        "--resume", "choose another directory",
    )  # fmt: skip
    other = four_steps(place, steps=1, seed=1, learning_rate=0.5)
    refusal(train, other, fragments, capsys)


def test_a_store_that_keeps_addresses_of_the_dead_is_refused(monkeypatch, restarting):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    check_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match=r"on 2 nodes: .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_store()


GLOO = (
    "[/__w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:34028. "
    "This is typically caused by a crash"
)


def test_a_lost_rank_is_told_from_other_errors(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    told = lost_contact(RuntimeError(GLOO), "--resume runs/x")
    assert told.startswith("rank 5 has lost another rank (Connection closed by peer [10.0.0.1]:34")
    assert "typically" not in told and "/__w" not in told
    assert "--timeout" in told and "--resume runs/x" in told and "torchrun" not in told
    after = "Application timeout caused pair closure"  # of a collective that follows one
    assert f"({after})" in lost_contact(RuntimeError(after), "runs/x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    told = lost_contact(dist.DistNetworkError("Broken pipe\n at socket.cpp"), "runs/x")
    assert "(Broken pipe)" in told and "torchrun starts all ranks again" in told
    assert lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "") is None


ONE_OF_TWO = """
import time, torch
from rmt.system import dist
dist.current = lambda: dist.World(1, 2, torch.device("cpu"))
dist.stop = lambda: time.sleep(600)  # NCCL, while the other rank waits for this one
with dist.leaving():
    ERROR
"""


@pytest.mark.parametrize(
    "error, said", [("raise RuntimeError('boom')", "RuntimeError: boom\n"),
                    ("raise SystemExit('error: boom')", "error: boom\n")],
)  # fmt: skip
def test_the_error_of_one_rank_is_printed_although_the_others_wait_for_it(error, said):
    program = ONE_OF_TWO.replace("ERROR", error)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.endswith(said)


def test_the_example_for_slurm_is_a_script_with_flags_that_exist(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node1; echo node2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "docs/slurm.sh")], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.split()
    launcher, script = words[: words.index("train.py")], words[words.index("train.py") + 1 :]
    assert "node1:29500" in launcher and "7" in launcher
    config = parse(script, "", "")
    assert (config.model, config.out) == ("qwen3-14b", "runs/7")


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
