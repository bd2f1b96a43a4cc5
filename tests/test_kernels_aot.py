"""What make aot says of the installed Triton: a process of its own, without the interpreter."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
aot = pytest.importorskip("benchmarks.aot")
ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    # Of two head dims the larger, which has more registers and shared memory; make aot does both.
    program = "import sys; from benchmarks import aot; aot.BRANCHES = aot.BRANCHES[1:]; "
    program += f"sys.argv = ['aot', '--json', {str(path)!r}]; aot.main()"
    result = run("-c", program)
    assert path.exists(), result.stderr
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def kernels() -> set[str]:
    """Every function under @triton.jit in kernels/ that is launched; helpers start with _."""
    return {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_passes_every_gate(rows):
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {(row["kernel"], row["variant"], row["target"]): row["ok"] for row in rows} == {
        (row["kernel"], row["variant"], row["target"]): "ok" for row in rows
    }


@pytest.mark.slow
def test_no_kernel_is_forgotten(rows):
    assert kernels() >= {"statistics", "gradient", "topk", "parts"}
    for target in {row["target"] for row in rows}:
        assert kernels() == {row["kernel"] for row in rows if row["target"] == target}


def test_each_gate_can_fail():
    good = dict(
        kernel="parts", variant="bf16, trunk, D = 64", target="gfx942", registers=100,
        spills=0, shared=65_536, matrix="mfma", load=16,
    )  # fmt: skip
    changes = {}, {"spills": 1}, {"shared": 65_537}, {"matrix": ""}, {"load": 2}
    passed, *failed = [aot.failures(good | change) for change in changes]
    assert passed == []
    assert [reasons[0].split()[0] for reasons in failed] == ["spills", "shared", "no", "loads"]
    assert all(len(reasons) == 1 for reasons in failed)


def test_a_gate_that_fails_is_seen_in_the_exit_status():
    program = """
import sys
from benchmarks import aot
aot.DEVICES = {"gfx942": aot.DEVICES["gfx942"]._replace(shared=31)}
sys.argv = ["aot", "--kernels", "statistics"]
aot.main()
"""
    result = run("-c", program)
    assert result.returncode == 1, result.stderr
    assert "shared memory 64, the GPU has 31" in result.stdout and "0 of 4 pass" in result.stdout


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit, match="unset it"):
        aot.main()
