"""Broken kernels, each with a bug that a published one had, and a run of the checks on each.

    python tests/kernel_mutants.py        prints the check that kills each mutant; exit status 1
                                          if one survives, or a copy without a bug does not

A mutant is a copy of kernels/ with one replacement. Its process is its own: copies register their
operators again, and a bug in an offset may end the process.
"""

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kernel_faults import AT_THE_EDGES, CONTROLS, KINDS, MUTANTS

ROOT = Path(__file__).resolve().parent.parent


def build(file: str, old: str, new: str, place: Path) -> None:
    """A copy of kernels/ under place with a bug in it."""
    shutil.copytree(ROOT / "kernels", place / "kernels")
    path = place / "kernels" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} holds {old!r} not exactly once"
    path.write_text(text.replace(old, new), encoding="utf-8")


def load(place: Path):
    """The package `kernels` of this directory, in place of the one that was imported before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        del sys.modules[name]
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    try:
        package = importlib.import_module("kernels")
        for name in ("tiles", "branch_parts"):  # imported only when used
            importlib.import_module(f"kernels.{name}")
    finally:
        sys.path.remove(str(place))
    assert Path(package.__file__).is_relative_to(place)
    return package


def killer(kernels, checks: list[tuple], dtypes) -> str | None:
    """The first check that fails, with its message."""
    for dtype in dtypes:
        for check, arguments in checks:
            try:
                # Those at the edges choose their own dtypes.
                dtype_of = () if check.__module__.endswith("edges") else (dtype,)
                check(kernels, *arguments, *dtype_of)
            except Exception as error:
                reason = str(error).splitlines()[0]
                return f"{check.__name__}({', '.join(arguments)}) in {dtype}: {reason}"
    return None


def checks_of(name: str, file: str) -> list[tuple]:
    """Functions and their arguments: those that a bug in this file can fail."""
    import kernel_branches as branches
    import kernel_checks as checks
    import kernel_edges as edges
    from kernel_inputs import HEADS, LOGITS

    at_the_edges = [(check, ()) for check in (*edges.OF_BRANCHES, *edges.OF_HEADS)]
    if name in AT_THE_EDGES:
        return at_the_edges
    of_branches = [(branches.check_branches, (name,)) for name in branches.PLANS]
    if file.startswith("branch"):
        return of_branches + at_the_edges
    cases = [(checks.check_logits, (name,)) for name in LOGITS]
    for check in (checks.check_masked_cross_entropy, checks.check_broken_rows, checks.check_topk):
        cases.append((check, ()))
    cases += [(checks.check_head, (name,)) for name in HEADS if name != "151936-words"]
    cases += [(checks.check_softcap_and_lse, (name,)) for name in checks.CAPPED]
    return [*cases, (checks.check_chunks, ()), *at_the_edges]


def passes_the_usual_test(kernels, file: str) -> bool:
    """What most kernels are tested with: random numbers in fp32 and bf16, a tolerance of 5e-2."""
    import torch
    from kernel_branches import usual_test
    from kernel_checks import token_loss
    from kernel_inputs import DEVICE, draw, oracle

    if file.startswith("branch"):
        return usual_test(kernels)
    hidden, weight = (draw(32, 64) / 8).bfloat16().to(DEVICE), draw(1000, 64).bfloat16().to(DEVICE)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].T
    targets = index = torch.arange(32, device=DEVICE)
    expected = oracle(logits, targets, torch.ones(32, device=DEVICE))
    loss = token_loss(32, logits)
    wanted = torch.autograd.grad(loss(*expected, index), leaves)
    pairs = list(zip(kernels.entropy_logprob(logits.detach().float(), targets), expected))
    for dtype in (torch.float32, torch.bfloat16):
        head = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        total, *statistics = kernels.linear_objective(*head, targets, loss)
        pairs += zip(statistics, expected)
        pairs += zip(torch.autograd.grad(total, head), wanted)
    return all(torch.allclose(a.double(), b, atol=5e-2, rtol=5e-2) for a, b in pairs)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    every = MUTANTS | CONTROLS
    wanted = sys.argv[1:] or every
    wrong = 0
    for name in wanted:
        os.environ["RMT_KERNELS"] = KINDS.get(every[name][0], "reference")
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            build(*every[name], Path(place))
            mutant = load(Path(place))
            file = every[name][0]
            usual = "passes" if passes_the_usual_test(mutant, file) else "fails"
            # The checks of kernels that are not broken are tests of their own, in both dtypes.
            dtypes = (torch.float32, torch.bfloat16)
            if name in CONTROLS:
                dtypes = dtypes[1:]
            killed_by = killer(mutant, checks_of(name, file), dtypes)
        wrong += (killed_by is None) == (name in MUTANTS)
        seconds = time.perf_counter() - started
        print(
            f"{name}: {killed_by or 'SURVIVES'} [{usual} the usual test, {seconds:.1f} s]",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
