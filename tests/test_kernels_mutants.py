"""The tests of the kernels can fail: each broken copy of them is found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_faults import CONTROLS, MUTANTS

SCRIPT = Path(__file__).with_name("kernel_mutants.py")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("half", [0, 1])
def test_broken_copies_are_found_out_and_others_are_not(half):
    """A process for each half, for two cores: it says which check failed first, or SURVIVES."""
    mutants, controls = list(MUTANTS)[half::2], list(CONTROLS)[half::2]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), *mutants, *controls]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert not run.stderr, run.stderr
    verdicts = dict(re.findall(r"^(.*?): (.*)$", run.stdout, re.MULTILINE))
    survivors = [name for name in mutants if not verdicts[name].startswith("check_")]
    assert not survivors
    survives = "SURVIVES [passes the usual test"
    assert all(verdicts[name].startswith(survives) for name in controls), verdicts
    # Random logits and tolerances of 5e-2: why the inputs here are what they are.
    passing = sum("passes the usual test" in verdicts[name] for name in mutants)
    assert passing > len(mutants) / 2
