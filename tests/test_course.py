"""docs/course.md: its blocks print what stands under them, and its exercises can be done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kernel_exercises
import pytest
from kernel_faults import AT_THE_EDGES, MUTANTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
EXERCISES = ROOT / "tests/kernel_exercises.py"


def run(*command, **more):
    ended = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RMT_KERNELS": "auto"} | more,
    )  # fmt: skip
    return ended.stdout + ended.stderr


def test_it_and_the_readme_count_the_broken_copies():
    readme = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert f"[all {len(MUTANTS)}]" in PAGE
    assert f"catch all {len(MUTANTS) - len(AT_THE_EDGES)}\n" in readme
    assert f" {len(AT_THE_EDGES)} more\n" in readme


def test_its_blocks_print_what_stands_under_them(tmp_path):
    lesson = tmp_path / "lesson.py"
    lesson.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), "utf-8")
    wanted = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    assert run(lesson, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == wanted


@pytest.mark.parametrize("number", range(1, len(kernel_exercises.BUGS) + 1))
def test_an_exercise_is_one_bug_and_its_answer(number, tmp_path):
    assert "wrote" in run(EXERCISES, "plant", number, tmp_path / "bug")
    file, right, wrong = [*kernel_exercises.BUGS.values()][number - 1]
    ours, theirs = ((place / "kernels" / file).read_text() for place in (ROOT, tmp_path / "bug"))
    assert ours.replace(right, wrong) == theirs != ours
    said = run(EXERCISES, "answer", number)
    assert wrong.strip() in said and right.strip() in said
    again = run(EXERCISES, "plant", number, tmp_path / "bug")
    assert again.startswith("error:") and "Traceback" not in again


def test_the_check_of_an_exercise_fails(tmp_path):
    run(EXERCISES, "plant", 1, tmp_path)
    assert run(EXERCISES, "check", tmp_path).startswith("check_")


def test_a_folder_without_a_copy_is_refused(tmp_path):
    said = run(EXERCISES, "check", tmp_path)
    assert said.startswith("error:") and "Traceback" not in said
