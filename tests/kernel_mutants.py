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

ROOT = Path(__file__).resolve().parent.parent


LOAD = 'mask=there, other=float("-inf")).to(tl.float32)\n\n'
INSIDE = "there = column < columns\n    place = LOGITS"
REST = "tl.sum(tl.where(likeliest, 0.0, e), axis=0) + (ties - 1.0)"
LINE = "        tl.store(place, tl.zeros"
PRODUCT = "tile_statistics(matmul(x, part.t()),"
BASE = 'tl.where(top == float("-inf"), 0.0, top)'
BEYOND = 'tl.where(within_tile < columns - tile * WIDTH, z, float("-inf"))'
LIMIT = "token[None, :] < limit[:, None]"
STEPS = "tl.cdiv(longest, tl.num_programs(2))"
WEIGHT = 'tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))'
HIDDEN = "torch.arange(tokens, device=limit.device) >= limit"
MUTANTS = {  # name: (file, text to replace, with what)
    # In the Triton kernels over logits.
    "phantom columns count as logits of 0": ("tiles.py", LOAD, LOAD.replace("-inf", "0")),
    "the maximum starts at 0": (
        "tiles.py", "tl.max(z, axis=0)", "tl.maximum(tl.max(z, axis=0), 0.0)"),
    "0 times minus infinity": ("tiles.py", "tl.where(x < NEGLIGIBLE, NEGLIGIBLE, x)", "x"),
    "a tile of minus infinity has a nan for a base": ("tiles.py", BASE, "top"),
    "statistics ignore the temperature": (
        "tiles.py", "(z - base) * tl.load(INVERSE_T + row)", "z - base"),
    "the gradient is not divided by the temperature": (
        "tiles.py", "+ tilt) * inverse_t", "+ tilt)"),
    "the gradient's entropy term has the wrong sign": ("tiles.py", "+ tilt)", "- tilt)"),
    "the gradient's entropy term forgets the entropy": (
        "tiles.py", "(log_p + tl.load(ENTROPY + out_row))", "log_p"),
    "the last column is left out": (
        "tiles.py", INSIDE, INSIDE.replace("columns\n", "columns - 1\n")),
    "the target of the next tile": (
        "tiles.py", "first == target  # at", "first == target + (target % TILE == 0)  # at"),
    "the target's gradient is that of any other column": (
        "tiles.py", "dz = tl.where(column + first == target", "dz = tl.where(column + first == -1"),
    "ignored rows are read": (
        "tiles.py", "if target == IGNORE:\n" + LINE, "if target == IGNORE - 1:\n" + LINE),
    "gradients go by the number of the kept row": (
        "tiles.py", "tl.load(ROWS + out_row)", "out_row"),
    "ties count once": ("tiles.py", "+ (ties - 1.0)", "+ 0.0 * ties"),
    "the sum keeps the likeliest token": ("tiles.py", REST, "tl.sum(e, axis=0) - 1.0"),
    # In the fused kernel.
    "fused kernel, phantom columns": ("fused.py", BEYOND, "z"),
    "fused kernel, the maximum starts at 0": (
        "fused.py", "tl.max(z, axis=1)", "tl.maximum(tl.max(z, axis=1), 0.0)"),
    "fused kernel, a target in every tile": ("fused.py", " & (own >= 0) & (own < WIDTH)", ""),
    "fused kernel, C is cut to whole blocks": (
        "fused.py", "left = hidden - start", "left = hidden - start - 1"),
    "fused kernel, temperature of the next token": (
        "fused.py", "INVERSE_T + row", "INVERSE_T + row - 1"),
    # Around them.
    "entropy from unshifted logits": (
        "tile_math.py", "entropy = log_sum - weighted / (1 + rest)",
        "z = top * inverse_t; entropy = (z + log_sum) - (z + weighted / (1 + rest))"),
    "log p from z - lse": (
        "tile_math.py", "logprob = (tiles.at_target - top) * inverse_t - log_sum",
        "logprob = tiles.at_target * inverse_t - (top * inverse_t + log_sum)"),
    "tiles are added up without their factors": (
        "tile_math.py", "factor = offset.exp()", "factor = torch.ones_like(offset)"),
    "log of 1 + r": ("tile_math.py", "rest.log1p()", "(1 + rest).log()"),
    "1 - p of a sure token": ("tile_math.py", "-g * logprob.expm1()", "g * (1 - logprob.exp())"),
    "log of a rounded p": (
        "tile_math.py", "log_().clamp_(min=NEGLIGIBLE).add_(shift)",
        "mul_(shift.exp()).log_().clamp_(min=NEGLIGIBLE)"),
    "logits rounded to bf16": ("slices.py", PRODUCT, PRODUCT[:-1] + ".bfloat16().float(),"),
    "the weight's gradient is summed in bf16": (
        "one_pass.py", "torch.zeros_like(weight, dtype=dtype)", "torch.zeros_like(weight)"),
    "exponentials kept in bf16": ("slices.py", "torch.float16 if half", "torch.bfloat16 if half"),
    "padding of the vocabulary counts": ("one_pass.py", "weight[:vocab_size]", "weight"),
    "rows with an entropy slope alone are dropped": (
        "one_pass.py", "(g != 0) | (h != 0)", "g != 0"),
    "targets of the second slice count from 0": ("slices.py", "y, i * SLICE, t", "y, 0, t"),
    "the temperature of another token": (
        "one_pass.py", "inverse_t[rows]", "inverse_t[: len(rows)]"),
    "the mean is over all rows": (
        "reference.py", "mask.sum() if count is None", "mask.numel() if count is None"),
    "the mask does not weight": (
        "reference.py", "losses * mask.to(losses.dtype)", "losses * (mask != 0)"),
    # In the Triton kernels of branches.
    "branches see a token too many": ("branch_parts.py", LIMIT, LIMIT.replace("<", "<=")),
    "the last visible token is not read": (
        "branch_parts.py", "read = token < longest", "read = token < longest - 1"),
    "memory beyond the limit is read": (
        "branch_parts.py", "read = token < longest", "read = token < longest + 1"),
    "scores are not scaled": ("branch_parts.py", " * SCALE", ""),
    "queries of the next key": (
        "branch_parts.py", "kv_head * REP + row % SPAN", "kv_head + row % SPAN"),
    "all trunks begin at 0": ("branch_parts.py", "if START is not None:", "if False:"),
    "values keep old weights": ("branch_parts.py", "out = out * factor[:, None]", "out = out"),
    "the sum keeps old weights": ("branch_parts.py", "total * factor + tl", "total + tl"),
    "a branch without a token has a nan for a base": (
        "branch_parts.py", 'tl.where(new_top == float("-inf"), 0.0, new_top)', "new_top"),
    "a step belongs to two pieces": (
        "branch_parts.py", "minimum(first + size, long", "minimum(first + size + 1, long"),
    "the last piece ends early": ("branch_parts.py", STEPS, "longest // tl.num_programs(2)"),
    "pieces are merged without their weights": (
        "branch_parts.py", WEIGHT, 'tl.where(lse > float("-inf"), 1.0, 0.0)'),
    "own pieces overwrite the trunk's": ("branch_parts.py", "+ first_piece + tl", "+ tl"),
    # In PyTorch's attention of branches.
    "PyTorch, a token too many": ("branch_tiles.py", HIDDEN, HIDDEN.replace(">=", ">")),
    "PyTorch, a trunk token too many": (
        "branch_tiles.py", "_bias_beyond(limits,", "_bias_beyond(limits + 1,"),
    "PyTorch, memory beyond the limit is read": (
        "branch_attention.py", "if out.sum().isnan():", "if False:"),
    "PyTorch, an empty own cache has weight exp(0)": (
        "branch_attention.py", "return out, lse.masked_fill", "return out, lse; lse.masked_fill"),
    "PyTorch, trunk and own cache swap weights": (
        "branch_attention.py", "second[1] - lse)", "lse - second[1])"),
    "PyTorch, branches in the order of their trunks": (
        "branch_attention.py", "out.index_select(0, groups.back)", "out[:n]"),
    "PyTorch, all trunks are the first": ("branch_tiles.py", " or start[run[0]] != trunk)", ")"),
}  # fmt: skip
CONTROLS = {  # not broken: were they killed, the death of a mutant would mean nothing
    "unchanged Triton kernels": ("tiles.py", BASE, BASE),
    "unchanged fused kernel": ("fused.py", BEYOND, BEYOND),
    "unchanged PyTorch": ("slices.py", PRODUCT, PRODUCT),
    "unchanged Triton kernels of branches": ("branch_parts.py", LIMIT, LIMIT),
    "unchanged PyTorch of branches": ("branch_tiles.py", HIDDEN, HIDDEN),
}
KINDS = {"tiles.py": "triton", "branch_parts.py": "triton", "fused.py": "fused"}


def build(name: str, place: Path) -> None:
    """A copy of kernels/ under place with the mutant's bug in it."""
    file, old, new = (MUTANTS | CONTROLS)[name]
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
        for name in ("tiles", "fused", "branch_parts"):  # imported only when used
            importlib.import_module(f"kernels.{name}")
    finally:
        sys.path.remove(str(place))
    assert Path(package.__file__).is_relative_to(place)
    return package


def killer(kernels, file: str, dtypes) -> str | None:
    """The first check that fails, with its message."""
    for dtype in dtypes:
        for check, arguments in checks_of(file):
            try:
                check(kernels, *arguments, dtype)
            except Exception as error:
                reason = str(error).splitlines()[0]
                return f"{check.__name__}({', '.join(arguments)}) in {dtype}: {reason}"
    return None


def checks_of(file: str) -> list[tuple]:
    """Functions and their arguments: those that a bug in this file can fail."""
    import kernel_branches as branches
    import kernel_checks as checks
    from kernel_inputs import HEADS, LOGITS

    if file.startswith("branch"):
        return [(branches.check_branches, (name,)) for name in branches.PLANS]
    cases = [(checks.check_head, (name,)) for name in HEADS if name != "151936-words"]
    if file != "fused.py":  # a head's kernel
        of_logits = [(checks.check_logits, (name,)) for name in LOGITS]
        of_logits += [(checks.check_masked_cross_entropy, ()), (checks.check_broken_rows, ())]
        cases = of_logits + cases
    return [*cases, (checks.check_chunks, ())]


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
            build(name, Path(place))
            mutant = load(Path(place))
            file = every[name][0]
            usual = "passes" if passes_the_usual_test(mutant, file) else "fails"
            # The checks of kernels that are not broken are tests of their own, in both dtypes.
            one = file == "fused.py" or name in CONTROLS
            dtypes = (torch.bfloat16,) if one else (torch.float32, torch.bfloat16)
            killed_by = killer(mutant, file, dtypes)
        wrong += (killed_by is None) == (name in MUTANTS)
        seconds = time.perf_counter() - started
        print(
            f"{name}: {killed_by or 'SURVIVES'} [{usual} the usual test, {seconds:.1f} s]",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
