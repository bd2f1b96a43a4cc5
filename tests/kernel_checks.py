"""Each promise of the kernels as a function that raises AssertionError, of any implementation.

test_kernels.py runs them on ours, test_kernels_mutants.py on broken copies: `kernels` is the
package, or a mutant of it. What was observed stands beside the gates in kernels/README.md.
"""

import math

import torch
from kernel_inputs import (
    CANCELLING,
    DEVICE,
    HEADS,
    LOGITS,
    broken_rows,
    cast,
    draw,
    exact,
    oracle,
    oracle_of_head,
    same_dtype,
)
from torch.autograd import grad

HALF = torch.bfloat16
GATE = {torch.float64: 1e-12, torch.float32: 2e-6, HALF: 4e-3}  # of gradients, relative


def assert_values(name, given, expected, absolute, relative):
    """|given − expected| ≤ absolute + relative · |expected|, nan and infinities where expected."""
    given, expected = given.detach().double(), expected.detach().double()
    assert given.shape == expected.shape, f"{name}: {given.shape} is not {expected.shape}"
    finite = expected.isfinite()
    assert torch.equal(given.isfinite(), finite), f"{name}: not finite in other places"
    error = (given - expected).abs()[finite]
    gate = (torch.as_tensor(absolute).to(error).expand(len(expected))[finite]
            + relative * expected[finite].abs())  # fmt: skip
    worst = float((error - gate).max()) if len(error) else 0.0
    assert worst <= 0, f"{name}: off by {float(error.max()):.3g}, {worst:.3g} over its gate"


def distance(given, expected) -> float:
    """Relative Frobenius norm of the difference."""
    difference = float((given.detach().double() - expected).norm())
    return difference / max(float(expected.norm()), 1e-300) if difference else 0.0


def assert_gradient(name, given, expected, gate):
    assert given is not None, f"{name}: no gradient"
    assert given.shape == expected.shape, f"{name}: {given.shape} is not {expected.shape}"
    error = distance(given, expected)
    assert error <= gate, f"{name}: relative error {error:.3g} > {gate:.3g}"


def assert_gradient_rows(name, given, expected, gate, absolute=1e-12):
    """The same for each row: a sure token's small gradient counts as much as any other."""
    error = (given.detach().double() - expected).norm(dim=1)
    over = error - gate * expected.norm(dim=1) - absolute
    assert not bool((over > 0).any()), (
        f"{name}: row {int(over.argmax())} is off by {error.max():.3g}"
    )


def slopes(n, like):
    """g and h of each token: of mixed sign, some 0, some only of one kind."""
    index = torch.arange(n, device=like.device, dtype=like.dtype)
    g = torch.cos(2.1 * index) * (index % 5 != 3)
    h = 0.3 * torch.sin(1.3 * index) * (index % 4 != 2)
    return g, h


def token_loss(n, like):
    """A sum over tokens with the slopes above, given log p, entropy and index of a chunk."""
    g, h = slopes(n, like)
    return lambda logprob, entropy, index: (
        g[index].to(logprob.dtype) * logprob + h[index].to(entropy.dtype) * entropy
    ).sum()


def assert_statistics(logprob, entropy, expected, vocab_size, rounding):
    """Against the oracle, down to entropies of 1e-8, and within their bounds."""
    absolute, relative = (1e-12, 1e-12) if logprob.dtype == torch.float64 else (5e-6, 2e-6)
    assert_values("logprob", logprob, expected[0], absolute + rounding, relative)
    assert_values("entropy", entropy, expected[1], absolute + rounding, relative)
    assert not bool((logprob > 0).any()), "logprob above 0"
    assert not bool((entropy < 0).any()), "entropy below 0"
    limit = math.log(vocab_size) * (1 + 1e-6)
    assert not bool((entropy > limit).any()), "entropy above log V"


def saved(function):
    """What a function returns, and the tensors that it saves for its backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        return function(), found


def check_logits(kernels, name, dtype):
    """entropy_logprob and its gradient."""
    case = cast(LOGITS[name](), dtype)
    real = exact(case)
    logprob, entropy = kernels.entropy_logprob(*case)
    expected = oracle(*real)
    assert_statistics(logprob, entropy, expected, case.logits.shape[1], 0.0)
    sure = (expected[1] > 1e-8) & (expected[1] < 1e-3)
    assert_values("small entropies", entropy[sure], expected[1][sure], 0.0, 1e-4)
    g, h = slopes(len(case.logits), expected[0])
    wanted = grad((g * expected[0] + h * expected[1]).sum(), real.logits)[0]
    loss = (g.to(logprob.dtype) * logprob + h.to(logprob.dtype) * entropy).sum()
    given = grad(loss, case.logits)[0]
    assert given.dtype == dtype
    gate = 5e-6 if dtype == torch.float32 else GATE[dtype]
    assert_gradient("logits", given, wanted, gate)
    # log p + H of a token's equally likely words cancels, which only matters where h does.
    cancels = 1e-12 + 5e-7 * h.abs()
    assert_gradient_rows("logits", given, wanted, gate if dtype == HALF else 1e-4, cancels)


def check_broken_rows(kernels, dtype):
    """nan and infinity stay in their rows, and are noticed there."""
    case = cast(broken_rows(), dtype)
    logprob, entropy = kernels.entropy_logprob(*case)
    gradient = grad((logprob + entropy).sum(), case.logits)[0]
    for name, values in zip(
        ("logprob", "entropy", "gradient"), (logprob, entropy, gradient.sum(1))
    ):
        assert values.isnan().tolist() == [i in (1, 3, 5) for i in range(7)], f"{name}: nan"


def check_topk(kernels, dtype):
    """The k largest: of a tile with ties, all −inf, nan, strides; of a head with three slices."""
    z = draw(6, 1003).to(dtype).to(DEVICE)
    z[1] = -3.0
    z[2] = -math.inf
    z[3, 5:] = -math.inf
    z[4, [7, 900]] = torch.tensor([math.inf, math.nan], dtype=dtype, device=DEVICE)
    for logits in (z, z[:, :70], z.t().contiguous().t(), z[::2, ::3]):
        for k in (1, 5, 64, 65):
            values, columns = kernels.dispatch.tiles_of(logits).tile_topk(logits, k)
            expected = logits.topk(k).values.to(values.dtype)
            assert columns.min() >= 0 and columns.max() < logits.shape[1], "no such column"
            assert all(len(set(row)) == k for row in columns.tolist()), "a column twice"
            same = torch.allclose(values, expected, rtol=0, atol=0, equal_nan=True)
            assert same, "not the largest"
            own = logits.gather(1, columns).to(values.dtype)
            assert torch.equal(own.nan_to_num(7.0), values.nan_to_num(7.0)), "of other columns"
    hidden, weight = draw(3, 4).to(dtype).to(DEVICE), draw(9000, 4, seed=1).to(dtype).to(DEVICE)
    whole = hidden.double() @ weight.double().T
    for k in (7, 600):  # merged once, and more often
        values, tokens = kernels.linear_topk(hidden, weight, k)
        assert all(len(set(row)) == k for row in tokens.tolist()), "a token twice"
        for expected in (whole.topk(k).values, whole.gather(1, tokens)):
            torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def check_masked_cross_entropy(kernels, dtype):
    """Weights, the three reductions, a given count, and rows that must not be read."""
    case = cast(LOGITS["1003-columns"](), dtype)
    mask = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0, 1.0], device=case.logits.device)
    with torch.no_grad():
        case.logits[1] = math.nan
    targets = case.targets.clone()
    targets[4] = 10**9  # of a masked row: whatever stands there
    real = exact(case)
    nll = -oracle(real.logits, targets.where(mask != 0, -100), real.temperature)[0]
    losses = mask.double() * nll
    for reduction, count, expected in (
        ("none", None, losses),
        ("sum", None, losses.sum()),
        ("mean", None, losses.sum() / 4.25),
        ("mean", 100, losses.sum() / 100),
    ):
        given = kernels.masked_cross_entropy(case.logits, targets, mask, reduction, count)
        assert_values(reduction, given[None] if given.dim() == 0 else given,
                      expected[None] if expected.dim() == 0 else expected, 2e-6, 2e-6)  # fmt: skip
        wanted = grad(expected.sum(), real.logits, retain_graph=True)[0]
        assert_gradient(
            "logits", grad(given.sum(), case.logits)[0], wanted.nan_to_num(), GATE[dtype]
        )


def check_head(kernels, name, dtype, chunk=None):
    """linear_entropy_logprob and linear_objective: statistics, loss and gradients by name."""
    case = cast(HEADS[name](), dtype)
    real = exact(case)
    *expected, top1 = oracle_of_head(real)
    loss_of = token_loss(len(case.hidden), expected[0])
    learns = (real.targets != -100).nonzero()[:, 0]
    total = loss_of(expected[0][learns], expected[1][learns], learns)
    wanted = [g.nan_to_num() for g in grad(total, (real.hidden, real.weight))]
    plain = [distance(*pair) for pair in zip(same_dtype(case, loss_of), wanted)]
    # Sums of C products in fp32, scaled up by a low temperature.
    length = real.hidden.detach().nan_to_num().norm(dim=1) / real.temperature
    epsilon = 1e-14 if dtype == torch.float64 else 2e-7
    longest = real.weight.detach().norm(dim=1).max()
    rounding = epsilon * length * longest
    # Logits that are computed twice, in products of other shapes, differ in their last bits, and p
    # then does not quite add up to 1: an eighth of the bound above is seven times what was seen.
    g, h = slopes(len(case.hidden), real.hidden)
    off = rounding / 8 * (g.abs() + h.abs()) / real.temperature * longest
    options = (case.temperature, case.vocab_size, chunk)
    one_pass = kernels.linear_objective(*case[:3], loss_of, *options)
    recompute = kernels.linear_entropy_logprob(*case[:3], *options)
    again = loss_of(recompute[0][learns], recompute[1][learns], learns)
    assert_top1(recompute[2], top1, real)
    for form, loss, statistics in (
        ("one pass", one_pass[0], one_pass[1:]),
        ("recompute", again, recompute[:2]),
    ):
        assert_statistics(*statistics, expected, case.vocab_size, rounding)
        allowed = float(rounding.sum()) + 1e-5 * len(learns)
        assert_values(f"{form}: loss", loss[None], total[None], allowed, 1e-5)
        given = grad(loss, (case.hidden, case.weight))
        for which, a, b, error in zip(("hidden", "weight"), given, wanted, plain):
            assert a.dtype == dtype
            twice = form == "recompute" and which == "hidden" and name in CANCELLING
            more = float(off.norm() / b.norm()) if twice else 0.0
            assert_gradient(f"{form}: {which}", a, b, head_gate(name, dtype, error) + more)
        assert not given[1][case.vocab_size :].any(), f"{form}: padding has a gradient"
        if dtype != HALF and name not in CANCELLING:
            cancels = 1e-9 + 5e-7 * slopes(len(case.hidden), expected[0])[1].abs()
            assert_gradient_rows(f"{form}: hidden", given[0], wanted[0], 2e-4, cancels)


CAPPED = ("1003-words", "edges-and-padding", "half-ignored")


def check_softcap_and_lse(kernels, name, dtype):
    """The log-sum-exp of logits, capped or not, and all gradients, in fp64 from the same inputs."""
    case = cast(HEADS[name](), dtype)
    real = exact(case)
    learns = real.targets != -100
    g, h = slopes(len(case.hidden), real.hidden)
    of_lse = torch.where(g + h == 0, 1.0, g.flip(0))
    for cap in (None, 3.0):
        found = kernels.linear_entropy_logprob(
            *case[:3], case.temperature, case.vocab_size, softcap=cap
        )
        z = real.hidden.nan_to_num() @ real.weight[: case.vocab_size].T
        z = z if cap is None else cap * (z / cap).tanh()
        wanted = oracle(z, real.targets, real.temperature)
        lse = (z / real.temperature[:, None]).logsumexp(1) * learns
        for part, given, expected in zip(
            ("logprob", "entropy", "lse"), (found.logprob, found.entropy, found.lse), (*wanted, lse)
        ):
            assert_values(f"cap {cap}: {part}", given, expected, 2e-5, 1e-5)
        total = lambda logprob, entropy, lse: (
            g.to(lse) * logprob + h.to(lse) * entropy + of_lse.to(lse) * lse
        ).sum()
        of = grad(total(found.logprob, found.entropy, found.lse), (case.hidden, case.weight))
        exactly = grad(total(*wanted, lse), (real.hidden, real.weight))
        gate = {torch.float64: 1e-12, torch.float32: 1e-5, HALF: 8e-3}[dtype]
        for which, a, b in zip(("hidden", "weight"), of, exactly):
            assert a.dtype == dtype
            assert_gradient(f"cap {cap}: {which}", a, b.nan_to_num(), gate)


def head_gate(name, dtype, plain):
    """Of a gradient whose relative error in PyTorch, in the same dtype, is `plain`."""
    relative = max(1e-12, 1.1 * plain if dtype == HALF else 1.5 * plain)
    if name in CANCELLING:
        return relative
    # fp32 and fp64 are as exact as the matrix products of the machine: some reach no 2e-6.
    return min(GATE[dtype], relative + 1e-5) if dtype == HALF else max(GATE[dtype], 2 * plain)


def assert_top1(given, expected, real):
    """Right wherever the two largest logits are not within rounding of each other."""
    logits = real.hidden.detach().nan_to_num() @ real.weight.detach()[: real.vocab_size].T
    if logits.shape[1] > 1 and len(logits):
        best = logits.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 1e-4
        given, expected = given[clear], expected[clear]
    assert torch.equal(given, expected), "top1"


def check_chunks(kernels, dtype):
    """As exact in 64 chunks as in one: sums over chunks are kept in fp32."""
    for form in ("one pass", "recompute"):
        _check_chunks(kernels, dtype, form)


def product_in_pieces(weight) -> float:
    """How much less exact an fp32 product of PyTorch is here two rows at a time: 2.2 × on AVX2."""
    rows = torch.randn(128, len(weight), generator=torch.Generator().manual_seed(0))
    rows, weight = rows.to(weight.device), weight.detach().float()
    exact_product = rows.double() @ weight.double()
    pieces = torch.cat([piece @ weight for piece in rows.split(2)])
    return max(1.0, distance(pieces, exact_product) / distance(rows @ weight, exact_product))


def _check_chunks(kernels, dtype, form):
    errors, here = {}, product_in_pieces(HEADS["1003-words"]().weight)
    for chunk in (128, 2):
        case = cast(HEADS["1003-words"](), dtype)
        hidden = case.hidden.detach().repeat(4, 1)[:128].requires_grad_()
        many = case._replace(
            hidden=hidden,
            targets=case.targets.repeat(4)[:128],
            temperature=case.temperature.repeat(4)[:128],
        )
        real = exact(many)
        loss_of = token_loss(128, real.hidden)
        wanted = grad(
            loss_of(*oracle_of_head(real)[:2], torch.arange(128, device=real.hidden.device)),
            (real.hidden, real.weight),
        )
        options, index = (many.temperature, None, chunk), torch.arange(128, device=hidden.device)
        if form == "one pass":
            loss = kernels.linear_objective(*many[:3], loss_of, *options)[0]
        else:
            loss = loss_of(*kernels.linear_entropy_logprob(*many[:3], *options)[:2], index)
        given = grad(loss, (many.hidden, many.weight))
        errors[chunk] = [distance(a, b) for a, b in zip(given, wanted)]
    # A row's own gradient is a product of its chunk; that of the weight is summed over chunks.
    slack = (here if dtype == torch.float32 else 1.0, 1.0)
    for name, many, one, factor in zip(("hidden", "weight"), errors[2], errors[128], slack):
        assert many <= 1.05 * factor * one + 1e-7, (
            f"{form}: {name}: {many:.3g} in 64 chunks, {one:.3g} in one"
        )
