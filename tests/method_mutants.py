"""Broken copies of the method, each with one bug in a knob, an equation, a mask, a denominator,
what a run keeps or how it evaluates; and whether the check of it finds that out.

    python tests/method_mutants.py [NAME ...]   prints what kills each mutant; exit status 1 if one
                                                survives, or a copy without a bug does not

A mutant is a copy of rmt/, models/, train.py and eval.py with one replacement, checked in a child
of a process that has imported PyTorch: a fork takes milliseconds, and nothing of one reaches
another.
"""

import importlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import method_bugs
import method_bugs_models
import method_bugs_runs

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # for all checks of a copy; a bug may loop
MUTANTS = method_bugs.MUTANTS | method_bugs_runs.MUTANTS | method_bugs_models.MUTANTS
CONTROLS = {  # not broken, and run through all checks of such mutants
    "unchanged objective": ("rmt/objective.py", "return rl - ", "return rl - ", "loss"),
    "unchanged questions": (
        "rmt/questions.py",
        "if not c.budget:",
        "if not c.budget:",
        "loss no budget",
    ),
    "unchanged run": (
        "rmt/engine/run.py",
        "config.adam_betas",
        "config.adam_betas",
        "",
    ),
}


def check_names(name: str) -> list[str]:
    """The check that finds a mutant out; of a control, those of a third of all mutants."""
    if name in MUTANTS:
        return [MUTANTS[name][-1]]
    used = sorted({check for *_, check in MUTANTS.values()})
    return used[list(CONTROLS).index(name) :: len(CONTROLS)]


def all_checks() -> dict:
    """Name -> function of a folder; of the modules that are imported at the moment."""
    import method_checks as steps
    import method_checks_architectures as architectures
    import method_checks_draws as draws
    import method_checks_models as models
    import method_checks_runs as runs

    checks = {
        name.removeprefix("check_"): function
        for module in (steps, draws, runs, models, architectures)
        for name, function in vars(module).items()
        if name.startswith("check_") and name != "check_loss"
    }  # fmt: skip
    for case in steps.LOSS:
        name = case if case == "loss" else f"loss {case}"
        checks[name] = lambda place, case=case: steps.check_loss(place, case)
    return checks


def build(name: str, place: Path) -> None:
    """A copy under place with the mutant's bug in it."""
    file, old, new, _ = (MUTANTS | CONTROLS)[name]
    for package in ("rmt", "models"):  # with compiled files, which are still valid
        shutil.copytree(ROOT / package, place / package)
    for script in ("train.py", "eval.py"):
        shutil.copy2(ROOT / script, place)
    path = place / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{name}: {file} holds {old!r} {text.count(old)} times, not once"
    path.write_text(text.replace(old, new), encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def run_checks(place: Path, names: list[str]) -> str:
    """In a child: why the first check failed that does, else nothing."""
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    sys.path.insert(0, str(place / "code"))
    importlib.invalidate_caches()
    for name in names:
        try:
            own = place / name
            shutil.copytree(place / "files", own)
            all_checks()[name](own)
        except Exception as error:
            frame = error.__traceback__
            while frame.tb_next:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
            return f"{name}: {type(error).__name__} at {where} {str(error)[:100]}".replace(
                "\n", " "
            )
    import models
    import rmt

    assert all(Path(package.__file__).is_relative_to(place) for package in (models, rmt))
    return ""


def in_child(work, *given) -> str:
    """What work(*given) returns, called in a process of its own that prints nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        try:
            os.write(writer, b"+" + work(*given).encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer = b""
    if select.select([reader], [], [], SECONDS)[0]:
        answer = os.read(reader, 4096)
    else:
        answer = b"+does not end"
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    return answer[1:].decode() if answer else "the process died"


def write_files(place: Path) -> str:
    import toy_runs

    (place / "files").mkdir()
    toy_runs.write_files(place / "files")
    return ""


def import_once() -> None:
    """What all children use, of other packages: by way of the modules that they import anew."""
    import torch

    torch.set_num_threads(1)
    for late in ("torch._dynamo", "torch.distributed.checkpoint", "eval"):  # when first used
        importlib.import_module(late)
    all_checks()
    ours = ("rmt", "models", "train", "eval", "toy_runs", "toy_models", "toy_forests",
            "method_step", "method_logged", "method_checks")  # fmt: skip
    for name in [name for name in sys.modules if name.split(".")[0].startswith(ours)]:
        del sys.modules[name]


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.append(str(ROOT))
    import_once()
    wrong = 0
    with tempfile.TemporaryDirectory() as files:
        if said := in_child(write_files, Path(files)):
            raise RuntimeError(f"toy files: {said}")
        for name in sys.argv[1:] or MUTANTS | CONTROLS:
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as place:
                build(name, Path(place) / "code")
                shutil.copytree(files, place, dirs_exist_ok=True)
                killed_by = in_child(run_checks, Path(place), check_names(name))
            wrong += (not killed_by) == (name in MUTANTS)
            seconds = time.perf_counter() - started
            print(f"{name}: {killed_by or 'SURVIVES'} [{seconds:.1f} s]", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
