"""The kernels together with autograd, autocast and torch.compile."""

import math
import shutil

import pytest
import torch
from kernel_losses import (
    DEVICE,
    USED,
    C,
    V,
    combined,
    cross_entropy,
    from_head,
    from_logits,
    inputs,
    one_pass,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad
from torch.library import opcheck

import kernels
from kernels import head, logits, reference

kinds = pytest.mark.parametrize("kind", ["reference", "triton"])


@pytest.fixture(autouse=True)
def choose_kernels(request, monkeypatch):
    spec = getattr(request.node, "callspec", None)
    monkeypatch.setenv("RMT_KERNELS", spec.params.get("kind", "auto") if spec else "auto")
    torch._dynamo.reset()


losses = pytest.mark.parametrize("loss", [from_logits, cross_entropy, from_head, one_pass])


def results(loss, x, w, z, y, t, wanted=None):
    """The loss and the gradients of those of x, w, z that it depends on."""
    leaves = (z,) if loss in (from_logits, cross_entropy) else (x, w)
    value = (wanted or loss)(x, w, z, y, t)
    return [value, *grad(value, leaves)]


def assert_equal(given, expected):
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@kinds
@pytest.mark.parametrize("shape", [(2, 3), (1, 6), (3, 1, 2), (0, 3)])
def test_leading_dimensions_are_kept(kind, shape):
    """As of the rows one after another, and each result has its name."""
    x, w, z, y, t = inputs(math.prod(shape))
    several = [a.unflatten(0, shape) if a.numel() else a.view(*shape, *a.shape[1:])
               for a in (x, z, y, t)]  # fmt: skip
    for module in (kernels, reference):
        flat = module.linear_entropy_logprob(x, w, y, t, USED)
        found = module.linear_entropy_logprob(several[0], w, *several[2:], USED)
        for name in flat._fields:
            assert torch.equal(getattr(found, name), getattr(flat, name).view(shape))
        whole = module.linear_objective(x, w, y, combined, t, USED)
        found = module.linear_objective(several[0], w, several[2], combined, several[3], USED)
        assert torch.equal(found.loss, whole.loss) and found.logprob.shape == shape
        assert_equal(grad(found.loss, (x, w)), grad(whole.loss, (x, w)))
        flat, found = module.entropy_logprob(z, y, t), module.entropy_logprob(*several[1:])
        assert torch.equal(found.entropy, flat.entropy.view(shape))
        assert torch.equal(found.logprob, flat.logprob.view(shape))
        values, tokens = module.linear_topk(several[0], w, 3)
        assert torch.equal(tokens, module.linear_topk(x, w, 3)[1].view(*shape, 3))
        assert module.linear_topk_entropy(several[0], w, 3).shape == values.shape[:-1] == shape
        mask = several[2] >= 0
        mean = module.masked_cross_entropy(several[1], several[2], mask)
        assert torch.equal(mean, module.masked_cross_entropy(z, y, y >= 0))


# The custom operators, and torch.compile.


@pytest.mark.parametrize(
    "kind, n, dtype",
    [
        ("reference", 0, torch.float32),
        ("reference", 6, torch.float32),
        ("triton", 6, torch.bfloat16),
    ],
)
def test_operators_are_what_they_say_they_are(kind, n, dtype):
    x, w, z, y, t = inputs(n, dtype)
    g, h, of_lse = torch.randn(3, n, device=DEVICE)
    sizes = (USED, 4, 3.0)
    with torch.no_grad():
        of_logits = logits._entropy_logprob(z[None], y, t)
        of_head = head._statistics(x, w, y, t, *sizes)
    opcheck(logits._entropy_logprob, (z.detach()[None].requires_grad_(), y, t))
    for values in (z.detach()[None], z.detach().t().contiguous().t()[None]):
        opcheck(logits._entropy_logprob_backward, (values, y, t, list(of_logits), g, h))
    opcheck(head._statistics, (x, w, y, t, *sizes))
    opcheck(head._topk, (x.detach(), w.detach(), 3, USED, 4))
    x, w = x.detach(), w.detach().t().contiguous().t()
    for wanted in ((True, True), (True, False), (False, True)):
        opcheck(
            head._statistics_backward, (x, w, y, t, list(of_head), g, h, of_lse, *sizes, *wanted)
        )


@pytest.mark.parametrize("kind", ["reference"])  # a graph holds operators, not what they choose
@pytest.mark.parametrize("scalar", [True, False], ids=["one-temperature", "per-token"])
@losses
def test_compiled_once_for_all_numbers_of_tokens_and_temperatures(kind, loss, scalar):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=loss is not one_pass)
    counts = []
    for n, temperature in ((6, 0.7), (9, 0.9), (12, 1.1), (5, 1.3), (7, 0.4)):
        *known, per_token = inputs(n, seed=n)
        known.append(temperature if scalar else per_token)
        assert_equal(results(loss, *known, wanted=compiled), results(loss, *known))
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 4, "compiled again"  # the second call is why sizes vary


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["reference"])
def test_inductor_computes_what_eager_does(kind):
    every = lambda *known: sum(loss(*known) for loss in (from_logits, cross_entropy, from_head))
    x, w, z, y, t = inputs()
    given, expected = (f(x, w, z, y, t) for f in (torch.compile(every, fullgraph=True), every))
    torch.testing.assert_close(grad(given, (x, w, z)), grad(expected, (x, w, z)))


# Autograd.


@kinds
@losses
def test_autocast_changes_no_bit(kind, loss):
    known = inputs()
    expected = results(loss, *known)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_equal(results(loss, *known), expected)


@kinds
@losses
def test_second_derivatives_are_refused(kind, loss):
    x, w, *rest = inputs()
    with pytest.raises(RuntimeError):
        value = loss(x, w, *rest)
        leaves = (rest[0],) if loss in (from_logits, cross_entropy) else (x, w)
        first = grad(value, leaves, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in first)
        grad(value + penalty + sum(leaf.sum() for leaf in leaves), leaves)


@kinds
@pytest.mark.parametrize("loss", [from_head, one_pass])
def test_frozen_inputs_have_no_gradient_and_change_no_other(kind, loss):
    known = inputs()
    _, *expected = results(loss, *known)
    for index in (0, 1):
        x, w, *rest = inputs()
        (x, w)[index].requires_grad_(False)
        assert_equal(grad(loss(x, w, *rest), (x, w)[1 - index]), expected[1 - index : 2 - index])
    assert not loss(x.detach(), w.detach(), *rest).requires_grad


@kinds
@losses
def test_a_factor_of_the_loss_is_one_of_its_gradients(kind, loss):
    known = inputs()
    _, *expected = results(loss, *known)
    _, *given = results(loss, *known, wanted=lambda *inputs: loss(*inputs) * -0.5)
    assert_equal(given, [-0.5 * g for g in expected])


@kinds
@pytest.mark.parametrize("loss", [from_head, one_pass])
def test_a_tied_weight_has_the_gradients_of_both_its_uses(kind, loss):
    *_, z, y, t = inputs()
    table = torch.randn(V, C, device=DEVICE).requires_grad_()
    tokens = y.clamp(min=0)
    (given,) = grad(loss(table[tokens], table, z, y, t), table)
    hidden = table.detach()[tokens].requires_grad_()
    by_hidden, by_weight = grad(loss(hidden, table, z, y, t), (hidden, table))
    expected = by_weight.clone().index_add_(0, tokens, by_hidden)
    torch.testing.assert_close(given, expected)
