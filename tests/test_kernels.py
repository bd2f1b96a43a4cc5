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
    saved,
    token_loss,
)
from kernel_inputs import DEVICE, HEADS, LOGITS, cast, draw
from torch.autograd import grad

import kernels
from kernels import head, one_pass, slices

ROWS = [("reference", torch.float64)] + [
    (kind, dtype) for kind in ("reference", "triton") for dtype in (torch.float32, torch.bfloat16)
]
in_each_dtype = pytest.mark.parametrize(
    "kind, dtype", ROWS, ids=lambda value: str(value).removeprefix("torch.")
)
kinds = pytest.mark.parametrize("kind", ["reference", "triton"])


@pytest.fixture(autouse=True)
def choose_kernels(request, monkeypatch):
    if "kind" in request.fixturenames:
        monkeypatch.setenv("RMT_KERNELS", request.getfixturevalue("kind"))


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["reference"])  # sums over chunks are not a kernel's
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
def test_logits_whose_rows_are_not_one_after_another_are_read_in_place(kind):
    """`logits[:, :-1]` of RL trainers, and Megatron's (S, B, V)."""
    whole = draw(3, 6, 70).float().to(DEVICE).requires_grad_()
    for z in (whole[:, :-1], whole.transpose(0, 1), whole[:, 2:4, ::2]):
        y = torch.arange(z.shape[0] * z.shape[1], device=DEVICE).view(z.shape[:2]) % z.shape[2]
        ours, kept = saved(lambda z=z, y=y: kernels.entropy_logprob(z, y, 0.7))
        pointers = {x.untyped_storage().data_ptr() for x in kept if x.shape[-1:] == z.shape[-1:]}
        assert pointers == {whole.untyped_storage().data_ptr()}
        theirs = kernels.reference.entropy_logprob(z, y, 0.7)
        slope = draw(*y.shape).float().to(DEVICE)
        of = [grad(((a + b.square()) * slope).sum(), whole)[0] for a, b in (ours, theirs)]
        for a, b in zip((*ours, of[0]), (*theirs, of[1])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@kinds
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32], ids=str)
def test_a_head_of_another_dtype_is_rounded_to_that_of_hidden(kind, narrow):
    """As under autocast, whose weights are fp32; and as in hidden states of fp32 before bf16."""
    other = torch.float32 if narrow == torch.bfloat16 else torch.bfloat16
    case = cast(HEADS["50-words"](), torch.float32)
    x, y = case.hidden.detach().to(narrow).requires_grad_(), case.targets
    w = case.weight.detach().to(other).requires_grad_()
    same = w.detach().to(narrow).requires_grad_()
    real = [v.detach().double().requires_grad_() for v in (x, same)]
    expected = kernels.reference.linear_entropy_logprob(*real, y)
    wanted = grad((expected.logprob + expected.entropy).sum(), real)
    for chunk in (None, 9):
        for name in ("linear_entropy_logprob", "linear_objective"):
            if name == "linear_objective":
                loss = lambda logprob, entropy, index: (logprob + entropy).sum()
                total, logprob, _ = kernels.linear_objective(x, w, y, loss, chunk=chunk)
            else:
                logprob, entropy, *_ = kernels.linear_entropy_logprob(x, w, y, chunk=chunk)
                total = (logprob + entropy).sum()
            torch.testing.assert_close(logprob.double(), expected.logprob, rtol=1e-5, atol=1e-5)
            given = grad(total, (x, w))
            assert [g.dtype for g in given] == [narrow, other]
            for a, b in zip(given, wanted):  # dz is in the dtype of hidden, and so is rounded
                exact = narrow == a.dtype == torch.float32
                assert (a.double() - b).norm() < (1e-5 if exact else 6e-3) * b.norm()
    found = kernels.linear_topk(x, w, 4)[0]
    torch.testing.assert_close(found, kernels.linear_topk(x, same.detach(), 4)[0])


def test_the_reference_has_gradients_in_16_bits():
    x, w, y = small_head(torch.bfloat16)
    logprob, entropy, *_ = kernels.reference.linear_entropy_logprob(x, w, y)
    given = grad((logprob + entropy).sum(), (x, w))
    real = [v.detach().double().requires_grad_() for v in (x, w)]
    expected = kernels.reference.linear_entropy_logprob(*real, y)
    for a, b in zip(given, grad((expected.logprob + expected.entropy).sum(), real)):
        assert (a.double() - b).norm() < 4e-3 * b.norm()


@pytest.mark.parametrize("name", ["151936-words", "edges-and-padding"])
def test_slices_multiplied_together_as_on_a_gpu_give_the_same(monkeypatch, name):
    monkeypatch.setenv("RMT_KERNELS", "reference")
    monkeypatch.setitem(slices.TOGETHER, DEVICE, 4)
    strides = []
    products = slices.products

    def spy(gradients, *known):
        watched = (strides.append(dz.stride(0)) or (first, dz) for first, dz in gradients)
        return products(watched, *known)

    for module in (head, one_pass):
        monkeypatch.setattr(module, "products", spy)
    check_head(kernels, name, torch.float32)
    assert strides and all(stride % 8 == 0 for stride in strides)


def test_operators_that_wait_for_the_gpu_stay_out_of_cuda_graphs():
    for name in ("linear_statistics", "linear_statistics_backward"):
        operator = getattr(getattr(torch.ops, kernels.reference.NAMESPACE), name).default
        assert torch.Tag.cudagraph_unsafe in operator.tags, name
    assert isinstance(head.WAITS, tuple), "torch < 2.13 takes no tag by itself"


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
