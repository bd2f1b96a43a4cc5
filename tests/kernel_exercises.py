"""Exercises of docs/course.md: a copy of kernels/ with a bug to be found.

python tests/kernel_exercises.py plant 1 DIR    write the copy
python tests/kernel_exercises.py check DIR      which check fails there, and how (a minute)
python tests/kernel_exercises.py answer 1       the lines, and the right ones
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kernel_mutants import build, checks_of, killer, load

BUGS = {  # name: (file, the right text, the wrong text); numbered from 1
    "s stays in bits": ("tiles.py", "tl.sum(e * x, axis=0) / LOG2_E", "tl.sum(e * x, axis=0)"),
    "columns that are not there count as logits of 0": (
        "tiles.py",
        """are −inf, not 0: never the maximum, never counted.
    z = tl.load(place, mask=there, other=float("-inf"))""",
        """are masked.
    z = tl.load(place, mask=there, other=0.0)""",
    ),
    "1 is added to r and subtracted again, which takes its digits": (
        "tile_math.py",
        "torch.where(likeliest, 0.0, factor).sum(dim=1) + (likeliest.sum(dim=1) - 1)",
        "factor.sum(dim=1) - 1",
    ),
    "a target in the first column is never found": ("tiles.py", "own >= 0:", "own > 0:"),
    "the gradient of a row is that of another one, where some rows have none": (
        "tiles.py",
        """
    if ROWS is not None:
        row = tl.load(ROWS + out_row)  # only some rows have a gradient""",
        "",
    ),
}


def plant(number: int, place: Path) -> None:
    if (place / "kernels").exists():
        sys.exit(f"error: {place / 'kernels'} is there already; name another folder")
    build(*[*BUGS.values()][number - 1], place)
    print(f"wrote {place / 'kernels'}")


def check(place: Path) -> None:
    if not (place / "kernels").is_dir():
        sys.exit(f"error: there is no {place / 'kernels'}; `plant` it first")
    os.environ |= {"RMT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}  # before torch is imported
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    found = killer(load(place), checks_of("", "tiles.py"), (torch.float32, torch.bfloat16))
    print(found or "all checks pass")


def answer(number: int) -> None:
    name, (file, right, wrong) = [*BUGS.items()][number - 1]
    print(f"{name}: {file} has\n\n    {wrong or 'nothing'}\n\nin place of\n\n    {right.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    numbers = range(1, len(BUGS) + 1)
    for action in (plant, check, answer):
        own = actions.add_parser(action.__name__)
        if action is not check:
            own.add_argument("number", type=int, choices=numbers)
        if action is not answer:
            own.add_argument("place", type=Path, metavar="DIR")
        own.set_defaults(action=action)
    chosen = vars(parser.parse_args())
    chosen.pop("action")(**chosen)


if __name__ == "__main__":
    main()
