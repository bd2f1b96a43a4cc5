"""Who may import whom, and that what points somewhere points at something."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import prepared, stepped

from rmt.config.config import Config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "eval", "sample")
PACKAGES = ("kernels", "models", "rmt")
SOURCES = sorted(
    [ROOT / f"{name}.py" for name in SCRIPTS]
    + [
        path
        for package in (*PACKAGES, "assets", "experiments")
        for path in (ROOT / package).rglob("*.py")
    ]
)
# Rooms from below; what is in one imports from itself and from those before it.
ROOMS = (
    "kernels", "models", "rmt.system", "rmt.config", "rmt.data", "rmt", "rmt.methods", "rmt.memory",
    "rmt.evaluation", "rmt.engine", "rmt.report",
)  # fmt: skip
MATHS = (
    "attention", "budget", "curriculum", "rewards", "grpo", "objective", "forest", "trees",
    "sampling", "naive",
)  # fmt: skip
HARMLESS = {  # of the standard library: nothing that reads, writes or waits
    "math", "collections", "dataclasses", "functools", "itertools", "typing",
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:  # the wheel of kernels/ has another name
                assert node.level == 1 and path.parent == ROOT / "kernels", f"{path}:{node.lineno}"
                module = f"kernels.{module}" if module else "kernels"
            own = module.split(".")[0] in PACKAGES
            names |= {f"{module}.{alias.name}" if own else module for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def of(package: str):
    paths = sorted((ROOT / package).rglob("*.py"))
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def room_of(name: str) -> str | None:
    """The room of a file or of an imported name: of the method's own files "rmt"."""
    parts = name.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in ROOMS else parts[0] if parts[0] in ROOMS else None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


INSIDE = [path for path in SOURCES if room_of(module_of(path))]


@pytest.mark.parametrize("path", INSIDE, ids=module_of)
def test_arrows_between_rooms_go_down(path):
    allowed = ROOMS[: ROOMS.index(room_of(module_of(path))) + 1]
    assert {room_of(name) for name in imported(path)} - {None} <= set(allowed)


def test_no_file_imports_one_that_imports_it():
    files = {module_of(path): path for path in INSIDE}
    needs = {
        module: {next((m for m in (n, n.rpartition(".")[0]) if m in files), None) for n in names}
        - {None, module}
        for module, names in ((m, imported(path)) for m, path in files.items())
    }
    while leaves := [module for module, needed in needs.items() if not needed & needs.keys()]:
        for module in leaves:
            del needs[module]
    assert not needs, "a circle of imports"


@of("kernels")
def test_kernels_import_torch_and_triton_only(path):
    outside = packages(path) - {"kernels", "torch", "triton"} - set(sys.stdlib_module_names)
    assert not outside


@of("models")
def test_models_import_no_rmt_and_no_script(path):
    assert not packages(path) & {"rmt", *SCRIPTS}


@pytest.mark.parametrize("name", MATHS)
def test_maths_files_see_neither_rank_nor_config_nor_file(name):
    path = ROOT / "rmt" / f"{name}.py"
    assert packages(path) <= HARMLESS | {"numpy", "torch", "kernels", "rmt"}
    assert not {n for n in imported(path) if n.startswith(("torch.distributed", "torch.utils"))}
    own = {n.split(".")[1] for n in imported(path) if n.startswith("rmt.")}
    assert own <= {*MATHS, "prompt", "data"}
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert "open" not in {getattr(call, "id", getattr(call, "attr", "")) for call in calls}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_experiments_import_the_scripts(path):
    assert path.parent.name == "experiments" or not packages(path) & set(SCRIPTS)


SILENT = """
import os, random, socket, sys
import numpy, torch, torch.distributed.fsdp, torch.distributed.checkpoint, safetensors, tokenizers
def refuse(*_): raise OSError("network")
socket.socket.connect = refuse
state = lambda: (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(),
                 dict(os.environ), torch.get_default_dtype(), torch.get_num_threads())
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert state() == before, "an import changed global state"
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""


def test_importing_every_module_is_silent():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] != "assets" and not path.stem.startswith("__")
    ]
    assert {"train", "rmt.update", "models.kv_cache", "kernels.reference"} <= set(modules)
    command = [sys.executable, "-c", SILENT, *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def equations() -> list[int]:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    return [int(number) for number in re.findall(r"^\*\*Eq\. (\d+)\*\*", text, re.MULTILINE)]


def citations(path: Path) -> set[int]:
    return set(map(int, re.findall(r"Eq\. (\d+)", path.read_text(encoding="utf-8"))))


def test_equations_are_numbered_without_gaps():
    assert equations() == list(range(1, len(equations()) + 1))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_cited_equations_exist(path):
    assert citations(path) <= set(equations())


def test_every_equation_is_cited_in_code():
    assert set().union(*map(citations, SOURCES)) == set(equations())


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_knob_has_a_help_line(field):
    assert len(field.metadata["help"].split()) >= 2


def test_every_metric_of_a_run_is_in_the_glossary(tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    known = set(re.findall(r"`([^`]+)`", table))
    row, _ = stepped(prepared(tmp_path))
    assert set(json.loads(json.dumps(row))) - known == set()
