"""The tests of the kernels can fail: each broken copy of them is found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_faults import CONTROLS, MUTANTS
from kernel_mutants import ROOT

SCRIPT = Path(__file__).with_name("kernel_mutants.py")


@pytest.mark.mutants
def test_broken_copies_are_found_out_and_others_are_not():
    """A process of its own says of each which check failed first, or SURVIVES."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert not run.stderr, run.stderr
    verdicts = dict(re.findall(r"^(.*?): (.*)$", run.stdout, re.MULTILINE))
    survivors = [name for name in MUTANTS if not verdicts[name].startswith("check_")]
    assert not survivors
    survives = "SURVIVES [passes the usual test"
    assert all(verdicts[name].startswith(survives) for name in CONTROLS), verdicts
    # Random logits and tolerances of 5e-2: why the inputs here are what they are.
    passing = sum("passes the usual test" in verdicts[name] for name in MUTANTS)
    assert passing > len(MUTANTS) / 2


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_broken_copy_replaces_stands_once_in_its_file(name):
    file, old, _ = MUTANTS[name]
    assert (ROOT / "kernels" / file).read_text(encoding="utf-8").count(old) == 1
