"""The tests of the kernels can fail: each broken copy of them is found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_mutants import CONTROLS, MUTANTS

SCRIPT = Path(__file__).with_name("kernel_mutants.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts():
    """What became of each mutant: the check that failed first, or SURVIVES."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert not run.stderr, run.stderr
    return dict(re.findall(r"^(.*?): (.*)$", run.stdout, re.MULTILINE))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(verdicts, name):
    assert verdicts[name].startswith("check_")


@pytest.mark.parametrize("name", CONTROLS)
def test_a_copy_without_a_bug_survives(verdicts, name):
    assert verdicts[name].startswith("SURVIVES [passes the usual test")


def test_most_mutants_would_pass_the_usual_test(verdicts):
    """Random logits and tolerances of 5e-2: why the inputs here are what they are."""
    passing = sum("passes the usual test" in verdicts[name] for name in MUTANTS)
    assert passing > len(MUTANTS) / 2
