"""The kernels at their edges: nothing there, too much asked for, and what cannot be computed."""

import ast
from pathlib import Path

import kernel_edges
import pytest

import kernels

ROOT = Path(__file__).resolve().parent.parent
CHECKS = dict.fromkeys(kernel_edges.OF_BRANCHES + kernel_edges.OF_HEADS)


@pytest.mark.parametrize("kind", ["reference", "triton"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_edges(monkeypatch, kind, check):
    monkeypatch.setenv("RMT_KERNELS", kind)
    check(kernels)


def test_kernels_are_launched_in_one_place():
    places = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = [x for x in ast.walk(function) if isinstance(x, ast.Call)]
                launches = [x for x in calls if ast.unparse(x.func).endswith("[grid]")
                            or isinstance(x.func, ast.Subscript)]  # fmt: skip
                places += [f"{path.name} {function.name}"] * len(launches)
    assert places == ["tiles.py launch"]
