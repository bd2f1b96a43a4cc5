"""Some of the broken files and command lines of tests/fuzz.py, a few of each kind."""

import fuzz
import pytest

SEEDS = range(3)
FOUND = {"run": (95650920065,), "tokenizer": (95667090060,)}  # faults once


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    fuzz.preload()
    place = tmp_path_factory.mktemp("fuzz") / "base"
    status, printed = fuzz.child(lambda: fuzz.make_base(place))
    assert status == 0, printed
    return place


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_is_broken_ends_in_a_message(kind, base):
    for seed in (*SEEDS, *FOUND.get(kind, ())):
        problem, printed = fuzz.case(kind, seed, base)
        assert problem is None, f"python tests/fuzz.py --kind {kind} --seeds {seed}\n{printed}"
