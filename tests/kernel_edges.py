"""What must be right, or be refused, at the edges of the kernels: each a function that raises.

test_kernels_edges.py runs them on ours, kernel_mutants.py on broken copies: `kernels` is the
package, or a mutant of it. All are of small inputs and take milliseconds.
"""

from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from kernel_branch_edges import (
    check_bounds,
    check_counts,
    check_kernel_bounds,
    check_room,
    check_strides,
    close,
    part,
    refused,
)
from kernel_branches import attend, case_of
from kernel_inputs import DEVICE, draw
from kernel_losses import USED, combined, inputs
from torch.autograd import forward_ad, grad

# Launches, and no rows.


def check_launch(kernels):
    """A kernel runs with the device of its tensor as the current one; an empty grid not at all."""
    launch, events = part(kernels, "tiles").launch, []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(self.device)

        def __exit__(self, *_):
            events.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **named: events.append((grid, len(given), named))

    x = SimpleNamespace(is_cuda=True, device="cuda:1")
    with patch.object(torch.cuda, "device", Guard):
        launch(Kernel(), (3, 1), x, None, BLOCK=2)
        launch(Kernel(), (3, 0), x, None, BLOCK=2)
    assert events == ["cuda:1", ((3, 1), 2, {"BLOCK": 2}), "left"], events


def check_no_rows(kernels):
    """Every function of no tokens, forward and backward; a GPU's blocks of no rows too."""
    blocks = part(kernels, "logits")._blocks

    class OnGpu(torch.Tensor):
        is_cuda = True

    for rows, wanted in ((0, []), (7, [slice(0, 7)])):
        z = torch.zeros(1, rows, 77).as_subclass(OnGpu)
        assert [which for which, _ in blocks(z)] == wanted
    x, w, z, y, t = inputs(0)
    mask = torch.zeros(0, device=DEVICE)
    for loss in (
        combined(*kernels.entropy_logprob(z, y, t)),
        kernels.masked_cross_entropy(z, y, mask),
        kernels.masked_cross_entropy(z, y, mask, "none").sum(),
        combined(*kernels.linear_entropy_logprob(x, w, y, t)[:2]),
        kernels.linear_objective(x, w, y, combined, t)[0],
    ):
        leaves = (x, w, z)
        given = grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert loss == 0 and not any(g.any() for g in given)
    assert [part.shape for part in kernels.linear_topk(x, w, 3)] == [(0, 3), (0, 3)]
    assert all(kernels.linear_topk_entropy(x, w, k).shape == (0,) for k in (0, 3))
    case = case_of("one branch", torch.float32)
    none = case._replace(**{name: getattr(case, name)[:0] for name in ("q", *case._fields[5:])})
    assert attend(kernels, none).shape == none.q.shape


# The loss in one pass.


def check_factor(kernels):
    """A third of the loss has a third of its gradient: no number of it is rounded before."""
    x, w, _, y, t = inputs(64, torch.bfloat16)
    loss = lambda: kernels.linear_objective(x, w, y, combined, t, USED)[0]
    whole, third = (grad(loss() * factor, (x, w)) for factor in (1, 1 / 3))
    for name, a, b in zip(("hidden", "weight"), third, whole):
        ratio = float((a.double() * b.double()).sum() / b.double().pow(2).sum()) * 3
        assert abs(ratio - 1) < 6e-4, f"{name}: {ratio:.5f} times a third"


def check_no_grad(kernels):
    """Under no_grad no gradient is made, nor are exponentials kept for one."""
    module = part(kernels, "one_pass")
    x, w, _, y, t = inputs()
    known = (x, w, y, lambda logprob, entropy, i: combined(logprob * scale, entropy), t, USED, 4)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    expected = kernels.reference.linear_objective(*known[:6])
    with patch.object(module, "products", side_effect=AssertionError("a gradient is made")):
        with torch.no_grad():
            given = kernels.linear_objective(*known)
    for a, b in zip(given, expected):
        close("under no_grad", a, b.detach())
    assert not given[0].requires_grad
    with torch.no_grad():  # where a loss may write into what it is given
        given = kernels.linear_objective(*known[:3], lambda p, h, i: p.zero_().sum(), *known[4:])
    close("log p after a loss that overwrites it", given[1], expected[1])


def check_token_loss(kernels):
    """What else needs a gradient is refused, and so is what is no scalar tensor, or fp16."""
    x, w, _, y, t = inputs()
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    run = lambda loss, x=x, w=w: kernels.linear_objective(x, w, y, loss, t, USED)[0]
    hidden = (2 * scale).exp()
    for other in (scale, hidden):
        with refused("requires a gradient", "detach"):
            run(lambda logprob, entropy, i: (other * logprob).sum())  # noqa: B023
        with refused("requires a gradient", "detach"):
            run(lambda logprob, entropy, i: other * 1, x.detach(), w.detach())  # noqa: B023
    run(lambda logprob, entropy, i: (scale.detach() * logprob).sum())
    with refused("scalar", "float", "sum it"):
        run(lambda *_: 0.5)
    for name, halves in {"hidden": (x.half(), w), "weight": (x, w.half())}.items():
        with refused(f"{name} is torch.float16", "bfloat16", "linear_entropy_logprob"):
            run(combined, *halves)


def check_half(kernels):
    """With a loss scale the gradients of fp16 are those of fp16: linear_entropy_logprob."""
    x, w = (draw(16, 8).half().to(DEVICE), draw(20000, 8).half().to(DEVICE))
    y, scale = torch.arange(16, device=DEVICE), 2.0**14 / 8192
    leaves = [x.requires_grad_(), w.requires_grad_()]
    logprob, entropy, *_ = kernels.linear_entropy_logprob(x, w, y)
    given = grad(scale * combined(logprob, entropy), leaves)
    real = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = combined(*kernels.reference.linear_entropy_logprob(*real, y)[:2])
    for name, a, b in zip(("hidden", "weight"), given, grad(scale * expected, real)):
        error = float((a.double() - b).norm() / b.norm())
        assert error < 2e-3, f"{name}: relative error {error:.3g}"


def check_merge(kernels):
    """What a sure token leaves to a tile of others is not lost beside 1."""
    math, few = part(kernels, "tile_math"), torch.tensor([[0.0, -20.0]], device=DEVICE)
    tiles = math.Tiles(few, *(torch.zeros_like(few) for _ in range(2)), few[:, 0], [])
    found, _ = math.merge(tiles, torch.ones(1, device=DEVICE))
    for name, value in (("log_sum", found.log_sum), ("entropy", found.entropy / 21)):
        close(name, value.cpu() * torch.tensor(20.0).exp().item(), torch.ones(1), 1e-5)


def check_sums(kernels):
    """A product is added to a large sum as one number, not term by term, and in fp32 or wider."""
    a, b = draw(32, 4096).abs().float().to(DEVICE), draw(4096, 24).abs().float().to(DEVICE)
    out = torch.full((32, 24), 2.0**24, device=DEVICE)
    with patch.object(torch.Tensor, "addmm_", side_effect=AssertionError("added term by term")):
        kernels.reference.add_matmul(out, a, b)
    exact = a.double() @ b.double()
    plain = float(((a @ b).double() - exact).abs().max())
    close("a sum", out, 2.0**24 + exact, 2 * plain + 1.01)  # fp32 has even numbers there
    setting, found = torch.backends.mkldnn.matmul, []
    with torch.autocast(DEVICE, torch.bfloat16):
        product = kernels.matmul(a, b)
        more = torch.zeros_like(out)
        kernels.reference.add_matmul(more, a, b)
    for name, x in (("a product", product), ("a sum of products", more)):
        assert torch.equal(x, a @ b), f"autocast rounds {name}"
    before, multiply = setting.fp32_precision, torch.Tensor.__matmul__

    def look(a, b):
        found.append(setting.fp32_precision)
        return multiply(a, b)

    try:
        with patch.object(torch.Tensor, "__matmul__", look):
            product = kernels.matmul(a.bfloat16(), b.bfloat16())
        assert product.dtype == torch.float32
        assert set(found) <= {before}, "a setting of the whole process is changed"
    finally:
        setting.fp32_precision = before


# The rest.


def check_ignored(kernels):
    """masked_cross_entropy counts as F.cross_entropy does; an ignored row's temperature is none."""
    *_, z, y, t = inputs()
    ones = torch.ones(len(y), device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        for mask in (ones, ones.bool(), ones.long()):
            given = kernels.masked_cross_entropy(z, y, mask, reduction)
            close(reduction, given, F.cross_entropy(z, y, reduction=reduction))
    many = torch.full((70_001,), 0.37, device=DEVICE)  # more than fp16 and bf16 can count
    for dtype in (torch.float16, torch.bfloat16, torch.uint8, torch.bool):
        mean = kernels.reference.reduce_losses(many, torch.ones_like(many, dtype=dtype), "mean")
        close(f"mask of {dtype}", mean, many[0])
    known = kernels.masked_cross_entropy(z, y, ones, count=3)
    close("count", known, F.cross_entropy(z, y, reduction="sum") / 3)
    t[y == -100] = 0.0
    x, w, *_ = inputs()
    for loss, leaf in (
        (combined(*kernels.entropy_logprob(z, y, t)), z),
        (combined(*kernels.linear_entropy_logprob(x, w, y, t)[:2]), x),
        (kernels.linear_objective(x, w, y, combined, t)[0], x),
    ):
        assert loss.isfinite() and grad(loss, leaf)[0].isfinite().all()


def check_calls(kernels):
    """A chunk of no tokens, forward-mode derivatives, and tensors of other devices."""
    x, w, z, y, t = inputs()
    for call in (
        lambda: kernels.linear_objective(x, w, y, combined, t, chunk=-1),
        lambda: kernels.linear_entropy_logprob(x, w, y, t, chunk=0),
        lambda: kernels.linear_topk(x, w, 3, chunk=-1),
    ):
        with refused("chunk", "1 or more"):
            call()
    for call in (kernels.linear_topk, kernels.linear_topk_entropy):
        with refused("k -1", "0 or more"):
            call(x, w, -1)
    with forward_ad.dual_level(), refused("forward-mode", "backward"):
        kernels.entropy_logprob(forward_ad.make_dual(z.detach(), z.detach()), y)
    with forward_ad.dual_level(), refused("forward-mode", "backward"):
        kernels.linear_entropy_logprob(forward_ad.make_dual(x.detach(), x.detach()), w, y)
    x, w, y = (part.detach().to("meta") for part in (x, w, y))
    assert kernels.linear_entropy_logprob(x, w, y)[0].shape == y.shape
    assert kernels.linear_topk(x, w, 3)[1].shape == (len(y), 3)
    with refused("meta", "linear_entropy_logprob"):
        kernels.linear_objective(x, w, y, combined)


OF_BRANCHES = (
    check_counts,
    check_strides,
    check_bounds,
    check_kernel_bounds,
    check_room,
    check_launch,
)
OF_HEADS = (
    check_launch, check_no_rows, check_factor, check_no_grad, check_token_loss, check_half,
    check_merge, check_sums, check_ignored, check_calls,
)  # fmt: skip
