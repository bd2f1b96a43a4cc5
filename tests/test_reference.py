"""kernels/reference.py, the specification of every kernel, against the formulas written naively."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck

import kernels
from kernels.reference import (
    entropy_logprob,
    linear_entropy_logprob,
    linear_objective,
    linear_topk_entropy,
    masked_cross_entropy,
    matmul,
)

N, C, V, USED = 23, 6, 19, 17  # the last two rows of the head are padding
CASES = {
    "temperature-1": dict(temperature=1.0),
    "one-temperature": dict(temperature=0.7),
    "temperature-per-token": dict(temperature=torch.linspace(0.3, 2.5, N, dtype=torch.float64)),
    "padded-rows": dict(temperature=0.8, vocab_size=USED),
}


@pytest.fixture
def head():
    """hidden (N, C), weight (V, C), targets (N,); the padded rows would be the likeliest."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, C, dtype=torch.float64, generator=generator)
    weight[USED:] *= 5
    targets = torch.randint(0, USED, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def naive(hidden, weight, targets, temperature=1.0, vocab_size=None):
    """log p of the targets and the entropy of each token, from the full softmax."""
    scale = torch.as_tensor(temperature, dtype=torch.float64).expand(len(hidden))[:, None]
    p = ((hidden @ weight[:vocab_size].T) / scale).softmax(dim=-1)
    return p[torch.arange(len(p)), targets].log(), -(p * p.log()).sum(dim=-1)


def some_loss(logprob, entropy, index):
    """A sum over tokens in which each counts differently and entropy is not linear."""
    return (logprob * torch.cos(index) + 0.3 * entropy.square()).sum()


def every(count):
    return torch.arange(count)


def assert_close(given, expected, names=("hidden", "weight")):
    for name, a, b in zip(names, given, expected):
        error = float((a - b).detach().abs().max())
        assert error <= 1e-12, f"{name}: {error}"


def test_entropy_logprob_is_the_naive_softmax(head):
    hidden, weight, targets = head
    temperature = CASES["temperature-per-token"]["temperature"]
    given = entropy_logprob(hidden @ weight.T, targets, temperature)
    assert_close(given, naive(hidden, weight, targets, temperature), ("logprob", "entropy"))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_linear_entropy_logprob_is_the_naive_softmax(head, options):
    given = linear_entropy_logprob(*head, **options)
    assert_close(given, naive(*head, **options), ("logprob", "entropy"))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_gradients_of_linear_entropy_logprob_are_naive(head, options):
    logprob, entropy, *_ = linear_entropy_logprob(*head, **options)
    expected = some_loss(*naive(*head, **options), every(N))
    assert_close(grad(some_loss(logprob, entropy, every(N)), head[:2]), grad(expected, head[:2]))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_linear_objective_and_its_gradients_are_naive(head, options):
    logprob, entropy = naive(*head, **options)
    expected = some_loss(logprob, entropy, every(N))
    given = linear_objective(*head, some_loss, **options)
    assert_close(given, (expected, logprob, entropy), ("loss", "logprob", "entropy"))
    assert_close(grad(given[0], head[:2]), grad(expected, head[:2]))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_loops_over_chunks_are_the_reference_to_fp64(head, options, chunk):
    expected = linear_objective(*head, some_loss, **options)
    given = kernels.linear_objective(*head, some_loss, **options, chunk=chunk)
    assert_close(given, expected, ("loss", "logprob", "entropy"))
    wanted = grad(expected[0], head[:2])
    assert_close(grad(given[0], head[:2]), wanted)
    logprob, entropy, *_ = kernels.linear_entropy_logprob(*head, **options, chunk=chunk)
    assert_close(grad(some_loss(logprob, entropy, every(N)), head[:2]), wanted)


def test_gradcheck(head):
    hidden, weight, targets = head[0][:5].detach().requires_grad_(), head[1], head[2][:5]
    recompute = lambda h, w: kernels.linear_entropy_logprob(h, w, targets, 0.8, USED, chunk=2)[:2]
    one_pass = lambda h, w: kernels.linear_objective(h, w, targets, some_loss, 0.8, USED, chunk=2)[
        0
    ]
    assert gradcheck(recompute, (hidden, weight))
    assert gradcheck(one_pass, (hidden, weight))
    assert gradcheck(lambda z: kernels.entropy_logprob(z, targets, 0.8), (hidden @ weight.T,))


def test_masked_cross_entropy_is_pytorchs():
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.manual_seed(0))
    targets, mask = torch.tensor([0, 8, 3, 3, 5, 1]), torch.tensor([1.0, 0, 2, 0.5, 0, 1])
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * mask
    for reduction, count, expected in (
        ("none", None, each),
        ("sum", None, each.sum()),
        ("mean", None, each.sum() / 4.5),
        ("mean", 7, each.sum() / 7),
        ("mean", torch.tensor(0), each.sum()),
    ):
        given = masked_cross_entropy(logits, targets, mask, reduction, count)
        torch.testing.assert_close(given, expected)


def test_padded_rows_get_zero_gradient_and_no_probability(head):
    given = linear_objective(*head, some_loss, vocab_size=USED)
    _, gradient = grad(given[0], head[:2])
    assert gradient[USED:].abs().max() == 0
    assert gradient[:USED].abs().min(dim=1).values.max() > 0
    with torch.no_grad():
        head[1][USED:] = 1e6  # whatever they hold
        again = linear_objective(*head, some_loss, vocab_size=USED)
    assert_close(again, given, ("loss", "logprob", "entropy"))


def test_top1_says_whether_the_target_is_the_likeliest_used_row(head):
    hidden, weight, _ = head
    likeliest = (hidden @ weight[:USED].T).argmax(dim=-1)
    assert linear_entropy_logprob(hidden, weight, likeliest, vocab_size=USED)[2].all()
    other = (likeliest + 1) % USED
    assert not linear_entropy_logprob(hidden, weight, other, vocab_size=USED)[2].any()


@pytest.mark.parametrize("k", [1, 4, USED, 0, 100])
def test_topk_entropy_is_that_of_the_k_likeliest_renormalised(head, k):
    hidden, weight, _ = head
    p = (hidden @ weight[:USED].T).softmax(dim=-1).sort(descending=True).values[:, : k or None]
    p = p / p.sum(dim=-1, keepdim=True)
    given = linear_topk_entropy(hidden, weight, k, USED)
    assert_close([given], [-(p * p.log()).sum(dim=-1)], ["entropy"])


def test_equal_logits_have_the_entropy_of_the_uniform_distribution():
    logprob, entropy = entropy_logprob(torch.full((2, 50), 1e4), torch.tensor([0, 49]))
    assert logprob.tolist() == pytest.approx([-math.log(50)] * 2)
    assert entropy.tolist() == pytest.approx([math.log(50)] * 2)


def test_a_token_of_probability_zero_leaves_the_entropy_finite():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    logprob, entropy = entropy_logprob(logits, torch.tensor([0]))
    assert entropy.tolist() == pytest.approx([math.log(2)])
    assert logprob.tolist() == pytest.approx([-math.log(2)])


def test_large_logits_keep_fp32_accuracy():
    logits = 300 * torch.randn(8, 50, dtype=torch.float64, generator=torch.manual_seed(0))
    targets = logits.argmax(dim=-1)
    given, expected = entropy_logprob(logits.float(), targets), entropy_logprob(logits, targets)
    for a, b in zip(given, expected):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_bfloat16_inputs_are_multiplied_in_fp32():
    a, b = (torch.randn(4, 4, generator=torch.manual_seed(i)).bfloat16() for i in (0, 1))
    assert matmul(a, b).dtype == torch.float32
    assert torch.equal(matmul(a, b), a.float() @ b.float())


def test_no_token_at_all_is_a_loss_of_zero_with_a_gradient_of_zero(head):
    hidden, weight, targets = head[0][:0], head[1], head[2][:0]
    loss = linear_objective(hidden, weight, targets, some_loss)[0]
    assert loss == 0
    assert grad(loss, weight)[0].abs().max() == 0
