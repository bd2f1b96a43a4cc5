"""The kernels against fp64: all inputs of kernel_inputs.py, all checks of kernel_checks.py.

On a CPU Triton's interpreter runs the Triton kernels; with a GPU they are compiled.
"""

import math

import pytest
import torch
from kernel_checks import (
    CAPPED,
    check_broken_rows,
    check_chunks,
    check_head,
    check_logits,
    check_masked_cross_entropy,
    check_softcap_and_lse,
    check_topk,
    token_loss,
)
from kernel_inputs import DEVICE, HEADS, LOGITS, cast
from torch.autograd import grad

import kernels

ROWS = [("reference", torch.float64)] + [
    (kind, dtype) for kind in ("reference", "triton") for dtype in (torch.float32, torch.bfloat16)
]
in_each_dtype = pytest.mark.parametrize(
    "kind, dtype", ROWS, ids=lambda value: str(value).removeprefix("torch.")
)
kinds = pytest.mark.parametrize("kind", ["reference", "triton"])


@pytest.fixture(autouse=True)
def choose_kernels(request, monkeypatch):
    monkeypatch.setenv("RMT_KERNELS", request.node.callspec.params["kind"])


def small_head(dtype=torch.float32, **changes):
    case = cast(HEADS["50-words"](), dtype)._replace(**changes)
    return case.hidden, case.weight, case.targets


def objective(hidden, weight, targets, **options):
    return kernels.linear_objective(
        hidden, weight, targets, token_loss(len(hidden), hidden.detach().float()), **options
    )


@pytest.mark.parametrize("name", LOGITS)
@in_each_dtype
def test_entropy_logprob_and_its_gradient(kind, dtype, name):
    check_logits(kernels, name, dtype)


@in_each_dtype
def test_masked_cross_entropy_and_its_gradient(kind, dtype):
    check_masked_cross_entropy(kernels, dtype)


@pytest.mark.parametrize("name", HEADS)
@in_each_dtype
def test_linear_functions_and_their_gradients(kind, dtype, name):
    check_head(kernels, name, dtype)


@pytest.mark.parametrize("name", CAPPED)
@in_each_dtype
def test_logits_below_a_cap_and_their_log_sum(kind, dtype, name):
    check_softcap_and_lse(kernels, name, dtype)


@pytest.mark.slow
@in_each_dtype
def test_error_does_not_grow_with_the_number_of_chunks(kind, dtype):
    check_chunks(kernels, dtype)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of inf - inf
@in_each_dtype
def test_nan_and_infinity_stay_in_their_rows(kind, dtype):
    check_broken_rows(kernels, dtype)


@kinds
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_any_chunk_gives_the_same(kind, chunk):
    whole, split = (objective(*small_head(), chunk=size) for size in (None, chunk))
    for a, b in zip(split, whole):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@in_each_dtype
def test_a_row_does_not_depend_on_the_other_rows(kind, dtype):
    if kind == "reference" and DEVICE == "cuda":
        pytest.skip("PyTorch's sums over a row depend on the number of rows there")
    case = cast(LOGITS["1003-columns"](), dtype)
    together = kernels.entropy_logprob(*case)
    alone = [kernels.entropy_logprob(*(part[i : i + 1] for part in case)) for i in range(6)]
    for a, rows in zip(together, zip(*alone)):
        assert torch.equal(a, torch.cat(rows))


@kinds
def test_two_runs_give_the_same_bits(kind):
    runs = []
    for _ in range(2):
        hidden, weight, targets = small_head(torch.bfloat16)
        out = objective(hidden, weight, targets, chunk=4)
        runs.append([*out, *grad(out[0], (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(kind, dtype):
    """Transposed weight, every second hidden state, targets not aligned to 16 bytes."""
    hidden, weight, targets = small_head(dtype)
    columns = weight.detach().t().contiguous().t().requires_grad_()
    every_second = torch.empty(18, 48, dtype=dtype, device=DEVICE)[::2, ::2]
    every_second = every_second.copy_(hidden.detach()).requires_grad_()
    shifted = torch.cat((targets[:1], targets))[1:]
    assert not (columns.is_contiguous() or every_second.is_contiguous())
    plain, strided = objective(hidden, weight, targets), objective(every_second, columns, shifted)
    for a, b in zip(strided, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    wanted = grad(plain[0], (hidden, weight))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(grad(strided[0], (every_second, columns)), wanted):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@kinds
def test_strides_of_logits_change_nothing(kind):
    case = cast(LOGITS["1003-columns"](), torch.float32)
    expected = kernels.entropy_logprob(*case)
    wanted = grad(sum(expected).sum(), case.logits)[0]
    tall = case.logits.detach().t().contiguous().t().requires_grad_()
    wide = torch.empty(12, 2006, device=DEVICE)[::2, ::2].copy_(case.logits.detach())
    targets = torch.empty(12, dtype=torch.int64, device=DEVICE)[::2].copy_(case.targets)
    for logits in (tall, wide.requires_grad_()):
        given = kernels.entropy_logprob(logits, targets, case.temperature)
        for a, b in zip(given, expected):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad(sum(given).sum(), logits)[0], wanted)


@kinds
def test_gradients_that_were_changed_do_not_change_the_next_ones(kind):
    hidden, weight, targets = small_head(torch.bfloat16)
    for loss in (objective(hidden.view(3, 3, 24).flatten(0, 1), weight, targets)[0],
                 objective(hidden, weight, targets)[0]):  # fmt: skip
        first = [g.clone() for g in grad(loss, (hidden, weight), retain_graph=True)]
        for g in grad(loss, (hidden, weight), retain_graph=True):
            g.data.mul_(0.1)
        hidden.grad = weight.grad = None
        for _ in range(3):
            loss.backward(retain_graph=True)
        for leaf, g in zip((hidden, weight), first):
            torch.testing.assert_close(leaf.grad, 3 * g, rtol=2e-2, atol=1e-3)


@kinds
def test_tokens_without_a_slope_leave_the_matrix_products(kind):
    """An infinite hidden state would make any gradient it is multiplied with nan."""
    hidden, weight, targets = small_head()
    with torch.no_grad():
        hidden[2] = math.inf
    others = torch.arange(len(hidden), device=DEVICE) != 2

    def loss_of_others(logprob, entropy, index):
        return logprob[others[index]].sum()

    loss, logprob, _ = kernels.linear_objective(hidden, weight, targets, loss_of_others)
    gradients = grad(loss, (hidden, weight))
    assert logprob.isnan().tolist() == [i == 2 for i in range(len(hidden))]
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][2].any()
    statistics = kernels.linear_entropy_logprob(hidden, weight, targets)
    for g in grad(statistics[0][others].sum(), (hidden, weight)):
        assert g.isfinite().all()


@kinds
def test_a_loss_of_one_statistic_alone_has_the_gradient_of_that_one(kind):
    for which in (0, 1):
        hidden, weight, targets = small_head()
        one = lambda *statistics: statistics[which].sum()  # noqa: B023 - called at once
        expected = kernels.reference.linear_objective(hidden, weight, targets, one)[0]
        recompute = kernels.linear_entropy_logprob(hidden, weight, targets)[which].sum()
        for loss in (kernels.linear_objective(hidden, weight, targets, one)[0], recompute):
            for a, b in zip(
                *(grad(x, (hidden, weight), retain_graph=True) for x in (loss, expected))
            ):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@kinds
def test_a_loss_without_a_slope_has_a_gradient_of_zero(kind):
    hidden, weight, targets = small_head()
    for constant in (lambda *_: hidden.new_zeros(()) + 3, lambda lp, h, i: (0 * lp).sum()):
        loss = kernels.linear_objective(hidden, weight, targets, constant)[0]
        assert not any(g.any() for g in grad(loss, (hidden, weight)))


@kinds
def test_no_target_at_all_is_a_loss_of_zero_with_gradients_of_zero(kind):
    hidden, weight, targets = small_head(targets=torch.full((9,), kernels.IGNORE, device=DEVICE))
    for loss in (
        objective(hidden, weight, targets)[0],
        kernels.linear_entropy_logprob(hidden, weight, targets)[0].sum(),
        kernels.masked_cross_entropy(hidden, targets, torch.zeros(9, device=DEVICE))[None].sum(),
    ):
        gradients = grad(loss, (hidden, weight), materialize_grads=True, allow_unused=True)
        assert loss == 0 and loss.requires_grad
        assert not any(g.any() for g in gradients)


@in_each_dtype
def test_the_largest_logits_of_a_tile_and_of_a_head(kind, dtype):
    check_topk(kernels, dtype)


@kinds
@pytest.mark.parametrize("k", [1, 4, 0, 1000])
def test_topk_and_its_entropy_are_the_references(kind, k):
    hidden, weight, _ = small_head()
    given = kernels.linear_topk_entropy(hidden, weight, k, 47, chunk=4)
    expected = kernels.reference.linear_topk_entropy(hidden, weight, k, 47)
    torch.testing.assert_close(given, expected, atol=5e-6, rtol=5e-6)
    logits, tokens = kernels.linear_topk(hidden, weight, k or 5, 47, chunk=4)
    expected = kernels.reference.linear_topk(hidden, weight, k or 5, 47)
    torch.testing.assert_close(logits, expected[0])
    assert torch.equal(tokens, expected[1])
