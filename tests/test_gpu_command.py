"""What of `make gpu` can be seen without a GPU: its parts exist, and their results are read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        gpu.main()


def test_all_kernel_tests_are_part_of_it():
    assert {str(p) for p in Path("tests").glob("test_kernels*.py")} < set(gpu.TESTS)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    return tmp_path


def test_a_part_that_takes_too_long_ends_with_all_it_started(out, monkeypatch):
    code = f"import subprocess; subprocess.Popen(['sleep', '97.{os.getpid()}']).wait()"
    monkeypatch.setattr(gpu, "command", lambda name: ["-c", code])
    monkeypatch.setattr(gpu, "LIMIT", 2)
    monkeypatch.setattr(gpu.machine, "state", lambda device: {})
    found = gpu.run("memory", torch.device("cpu"))
    assert found["exit_status"] == -signal.SIGTERM and found["results"] is None
    left = subprocess.run(["pgrep", "-f", f"sleep 97.{os.getpid()}"], capture_output=True)
    assert left.returncode == 1, "its sleep goes on"


def test_a_part_that_wrote_nothing_has_no_results(out):
    assert [gpu.results(name) for name in gpu.PARTS] == [None] * len(gpu.PARTS)


def test_results_are_those_of_each_part(out):
    (out / "two.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "two.py"]
    subprocess.run([*command, "--junitxml=tests.xml"], cwd=out, capture_output=True)
    assert gpu.results("tests") == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    (out / "kernels.json").write_text(json.dumps({"shapes": {}}))
    assert gpu.results("kernels") == {"shapes": {}}
    (out / "training").mkdir()
    (out / "training" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert gpu.results("training") == [{"step": 0}, {"step": 1}]
