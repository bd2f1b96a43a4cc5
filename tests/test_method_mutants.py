"""The tests of the method can fail: each broken copy of it is found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from method_mutants import CONTROLS, MUTANTS, ROOT

SCRIPT = Path(__file__).with_name("method_mutants.py")


@pytest.mark.mutants
def test_broken_copies_are_found_out_and_others_are_not():
    """Each copy says which check failed, or SURVIVES."""
    environment, names = os.environ | {"PYTHONWARNINGS": "ignore"}, list(MUTANTS | CONTROLS)
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    verdicts = dict(re.findall(r"^(.*?): (.*) \[", run.stdout, re.MULTILINE))
    assert list(verdicts) == names, run.stderr[-2000:]
    wanted = {name: MUTANTS[name][-1] if name in MUTANTS else "SURVIVES" for name in names}
    assert {n: v for n, v in verdicts.items() if not v.startswith(wanted[n])} == {}


def test_there_are_sixty_broken_copies_or_more():
    assert len(MUTANTS) >= 60 and len(CONTROLS) == 3


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_broken_copy_replaces_stands_once_in_its_file(name):
    file, old, *_ = MUTANTS[name]
    assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1
