"""Addresses beyond 2³¹ numbers, which 14,135 rows of Qwen3's logits reach, without their memory.

The rows of a tensor may lie anywhere. Three of them 2³⁰ numbers apart need gigabytes of addresses,
but no memory on a CPU: pages nobody writes to do not exist. A GPU allocates them. An address cut to
32 bits ends the process, hence the checks run in a fork of their own.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from forks import SERVER, become

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
APART = 2**30 + 8  # fits 32 bits, as does the number of the row; their product does not
ENOUGH = 12 * 2**30  # bytes of a GPU
WIDEN = ".to(tl.int64)"
COLUMNS = 5000  # of two tiles

room = DEVICE == "cpu" or torch.cuda.mem_get_info()[0] > ENOUGH
pytestmark = pytest.mark.skipif(not room, reason=f"needs {ENOUGH >> 30} GB of free GPU memory")


def apart(*shape, row=APART, column=1, dtype=torch.bfloat16):
    """Random numbers, rows or columns of which are far away from each other."""
    size = 1 + (shape[0] - 1) * row + (shape[1] - 1) * column
    x = torch.empty(size, dtype=dtype, device=DEVICE).as_strided(shape, (row, column))
    return x.copy_(3 * torch.randn(shape))


def same(given, expected, tolerance=1e-5):
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)


def same_as_fp64(z):
    """Statistics and gradient of logits against the same numbers close together, in fp64."""
    import kernels
    from kernels import reference

    y, near = torch.tensor([1, -100, 2], device=DEVICE), z.detach().double().requires_grad_()
    y = y[-len(z) :]
    z.requires_grad_()
    given, expected = kernels.entropy_logprob(z, y), reference.entropy_logprob(near, y)
    for a, b in zip(given, expected):
        same(a, b)
    (g,) = torch.autograd.grad(given[0].sum() + given[1].sum(), z)
    same(g, torch.autograd.grad(expected[0].sum() + expected[1].sum(), near)[0], 1e-2)


def constants(module, kernel):
    return {name: getattr(module, name) for name in kernel.arg_names if hasattr(module, name)}


def rows_of_logits():
    same_as_fp64(apart(3, COLUMNS))


def columns_of_logits():
    same_as_fp64(apart(2, 3, row=1, column=APART))


def rows_without_a_target_are_not_read():
    """Memory of such a row is locked here: reading it ends the process."""
    import ctypes

    import kernels

    z = apart(3, COLUMNS)
    if DEVICE == "cpu":
        page = z[1].data_ptr() // 4096 * 4096
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), 16384, 0) == 0
    y = torch.tensor([1, -100, 2], device=DEVICE)
    z.requires_grad_()
    logprob, entropy = kernels.entropy_logprob(z, y)
    (g,) = torch.autograd.grad((logprob + entropy).sum(), z)
    assert logprob[1] == entropy[1] == g[1].abs().sum() == 0 and g[2].any()


def what_is_kept_for_a_gradient():
    """The first tile of rows of APART columns: exponentials, then their gradient."""
    from kernels import tiles

    z, kept, out = (apart(3, tiles.TILE, dtype=torch.float16) for _ in range(3))
    y, t = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)
    m, r, s, at = (torch.zeros(3, device=DEVICE) for _ in range(4))
    rows, where = torch.tensor([2, 0, 1], device=DEVICE), (APART, 1, APART, 0)
    known = constants(tiles, tiles.statistics)
    tiles.statistics[(3, 1)](z, y, t, m, r, s, at, kept, *where, **known)
    same(kept.float() / kept.amax(dim=1, keepdim=True), (z.float() - m[:, None]).exp(), 1e-3)
    slopes = (m, r.log1p(), 0 * t, t, t, 0 * t, 0 * t + 0.5)
    known = constants(tiles, tiles.gradient)
    where = (APART, 1, APART, APART, 0)  # and the stride of the gradient
    tiles.gradient[(3, 1)](z, out, None, y, None, *slopes, *where, 0, **known)
    expected = -z.float().softmax(dim=1)
    expected[y, y] = 0.5
    same(out, expected, 1e-3)
    slopes = (x[rows] for x in slopes)
    tiles.gradient[(3, 1)](kept, out, rows, y[rows], 0 * t, *slopes, *where, 1, **known)
    same(out, expected[rows], 1e-3)


def largest_logits():
    """Rows and columns far from each other."""
    from kernels import tiles

    for z in (apart(3, COLUMNS)[:, : tiles.TILE], apart(2, 3, row=1, column=APART)):
        values, columns = tiles.tile_topk(z, 3)
        assert torch.equal(values, z.topk(3).values.float())
        assert torch.equal(z.gather(1, columns).float(), values)


def same_as_the_specification(q, trunk, own):
    """Attention to caches, keys and values at once, against the same numbers close together."""
    import kernels
    from kernels import reference

    n, tokens = len(q), len(trunk)
    counts = [torch.full((n,), x, device=DEVICE) for x in (0, tokens, own.shape[1])]
    tiles = kernels.TrunkGroups.of([0] * n, [tokens] * n, DEVICE, q.shape[1], trunk.shape[1])
    given = kernels.branch_attention(q, trunk, trunk, own, own, kernels.Seen(*counts, tiles))
    near = [x.contiguous().double() for x in (q, trunk, trunk, own, own)]
    same(given, reference.branch_attention(*near, *counts), 1e-2)


def slots_of_branches():
    q, own = apart(3, 16).mul_(0.1), apart(3, 16)  # scores of about 1: all queries matter
    same_as_the_specification(q[:, None], own[:1, None].contiguous(), own[:, None, None])


def tokens_of_branches():
    cache = apart(3, 16)
    same_as_the_specification(cache[:1, None].contiguous(), cache[:, None], cache[None, :, None])


def heads_of_branches():
    cache = apart(3, 16)
    same_as_the_specification(cache[None].contiguous(), cache[None], cache[None, None])


def pieces_of_branches():
    """Two pieces of a head are there, out of room for 2²⁶."""
    from kernels import branch_parts

    many = 2**26
    out, lse = (apart(3, x, row=many * x // 2, dtype=torch.float32) for x in (32, 2))
    result = torch.empty(3, 16, device=DEVICE)
    known, _ = branch_parts.constants_of_merge(2, 16)
    branch_parts.merge[(3, 1)](out, lse, result, **(known | {"PIECES": many}))
    same(result, (lse.softmax(dim=1)[:, :, None] * out.view(3, 2, 16)).sum(dim=1))


CHECKS = (
    rows_of_logits, columns_of_logits, rows_without_a_target_are_not_read,
    what_is_kept_for_a_gradient, largest_logits, slots_of_branches, tokens_of_branches,
    heads_of_branches, pieces_of_branches,
)  # fmt: skip


def run(path, told):
    """The exit status of all checks, in a fork, with the package `kernels` that lies in path."""
    process = SERVER.Process(target=check_all, args=(path, told, dict(os.environ)))
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode


def check_all(path, told, environment):
    """Write down which check begins: a wrong address leaves no traceback."""
    from kernel_mutants import load

    become(environment | {"RMT_KERNELS": "triton"})
    load(path)
    torch.manual_seed(0)
    for check in CHECKS:
        with told.open("a") as file:
            print(check.__name__, file=file)
        check()
    if DEVICE == "cpu" and (status := Path("/proc/self/status")).is_file():
        lines = status.read_text().splitlines()
        resident = next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 2**20  # KiB
        assert resident < 1.5, f"{resident:.2f} GiB of memory: it was not lazy"


def test_addresses_beyond_31_bits(tmp_path):
    assert run(ROOT, tmp_path / "told") == 0, (tmp_path / "told").read_text()
    assert (tmp_path / "told").read_text().split() == [check.__name__ for check in CHECKS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, site",
    [
        (file, site)
        for file in ("tiles.py", "branch_parts.py")
        for site in range((ROOT / "kernels" / file).read_text().count(WIDEN))
    ],
)
def test_without_64_bits_in_any_one_place_it_fails(tmp_path, file, site):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    parts = (tmp_path / "kernels" / file).read_text().split(WIDEN)
    broken = WIDEN.join(parts[: site + 1]) + WIDEN.join(parts[site + 1 :])
    (tmp_path / "kernels" / file).write_text(broken)
    assert run(tmp_path, tmp_path / "told") not in (0, None)
