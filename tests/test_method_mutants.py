"""The tests of the method can fail: each broken copy of it is found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from method_mutants import CONTROLS, MUTANTS

SCRIPT = Path(__file__).with_name("method_mutants.py")
pytestmark = pytest.mark.slow


def test_broken_copies_are_found_out_and_others_are_not():
    """One test, so that one process runs them: each says which check failed, or SURVIVES."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    verdicts = dict(re.findall(r"^(.*?): (.*) \[", run.stdout, re.MULTILINE))
    assert verdicts.keys() == MUTANTS.keys() | CONTROLS.keys(), run.stderr[-2000:]
    assert [name for name in MUTANTS if not verdicts[name].startswith(MUTANTS[name][-1])] == []
    assert {name: verdicts[name] for name in CONTROLS} == dict.fromkeys(CONTROLS, "SURVIVES")
    assert len(MUTANTS) >= 60
