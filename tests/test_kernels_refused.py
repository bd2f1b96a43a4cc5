"""What the kernels refuse: each message has the value, the reason and the remedy."""

import pytest
import torch
from kernel_losses import DEVICE, USED, C, V, combined, from_head, from_logits, inputs, one_pass
from toy_models import assert_holds

import kernels

# On a GPU wrong values are assertions on the device, after which nothing runs there any more.
looked_at = pytest.mark.skipif(DEVICE == "cuda", reason="values are looked at on a CPU")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(x=torch.zeros(7, C + 1)), ["(…, C)", "(V, C)", f"(7, {C + 1})", f"({V}, {C})"]),
        (dict(w=torch.zeros(V, C, dtype=torch.int8)), ["weight torch.int8", "floating dtypes"]),
        (dict(x=torch.zeros(7, C).int(), w=torch.zeros(V, C).int()), ["floating", "torch.int32"]),
        (dict(w=torch.zeros(V, C, device="meta")), ["weight torch.float32 on meta", "one device"]),
        (dict(y=torch.zeros(7, device="meta").long()), ["targets are on meta", "move"]),
        (dict(used=0), ["vocab_size 0", f"from 1 to the head's {V} rows"]),
        (dict(used=V + 1), [f"vocab_size {V + 1}", f"from 1 to the head's {V} rows"]),
        (dict(y=torch.zeros(6).long()), ["(7,) int64", "(6,) torch.int64"]),
        (dict(y=torch.zeros(7).int()), ["(7,) int64", "torch.int32"]),
        (dict(t=torch.ones(6)), ["a number or (7,)", "(6,)"]),
        (dict(t=0), ["temperature 0 must be above 0"]),
        (dict(t=-0.5), ["temperature -0.5 must be above 0"]),
        (dict(t=float("nan")), ["temperature nan must be above 0"]),
        (dict(token_loss=lambda logprob, entropy, index: logprob), ["scalar", "(3,)", "sum it"]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, said):
    x, w, _, y, t = inputs()
    known = dict(x=x, w=w, y=y, t=t, token_loss=combined, used=USED)
    here = lambda v: v if not isinstance(v, torch.Tensor) or v.is_meta else v.to(DEVICE)
    x, w, y, t, token_loss, used = map(here, (known | changes).values())
    with pytest.raises(ValueError) as error:
        kernels.linear_objective(x, w, y, token_loss, t, used, 4)
    assert_holds(error, *said)
    if token_loss is combined:
        with pytest.raises(ValueError) as error:
            kernels.linear_entropy_logprob(x, w, y, t, used)
        assert_holds(error, *said)


@looked_at
@pytest.mark.parametrize("loss", [from_logits, from_head, one_pass])
@pytest.mark.parametrize(
    "position, wrong, said",
    [
        (3, V, [f"target {V} is not in [0, 3", "-100 for rows without"]),
        (3, -1, ["target -1 is not in [0, 3", "-100 for rows without"]),
        (4, 0.0, ["temperature 0.0 must be a positive number"]),
        (4, -0.5, ["temperature -0.5 must be a positive number"]),
        (4, float("nan"), ["temperature nan must be a positive number"]),
        (4, float("inf"), ["temperature inf must be a positive number"]),
    ],
)
def test_values_that_do_not_fit_are_refused(loss, position, wrong, said):
    known = inputs()
    known[position][2] = wrong
    with pytest.raises(ValueError) as error:
        loss(*known)
    assert_holds(error, *said)


def test_logits_masks_and_reductions_that_do_not_fit_are_refused():
    *_, z, y, _ = inputs()
    for wrong, said in (
        (lambda: kernels.entropy_logprob(z[:, :0], y), ["(…, V) with rows and V > 0", "(7, 0)"]),
        (lambda: kernels.entropy_logprob(z, y[1:]), ["(7,) int64", "(6,)"]),
        (lambda: kernels.masked_cross_entropy(z, y, y >= 0, "max"), ["'max'", "mean, sum, none"]),
        (lambda: kernels.masked_cross_entropy(z, y, y[1:] >= 0), ["mask is (6,)", "(7,)"]),
        (lambda: kernels.masked_cross_entropy(z, y, y.to("meta")), ["on meta", str(y.device)]),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        assert_holds(error, *said)


@pytest.mark.parametrize(
    "kind, dtype, interpret, said",
    [
        ("fast", torch.float32, "1", ["'fast'", "auto, triton, reference", "unset it"]),
        ("triton", torch.float64, "1", ["triton", "fp32", "reference for float64"]),
        ("triton", torch.float32, "0", ["triton", "on cpu", "TRITON_INTERPRET=1"]),
    ],
)
def test_kernels_that_cannot_run_are_refused(monkeypatch, kind, dtype, interpret, said):
    monkeypatch.setenv("RMT_KERNELS", kind)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x, w, z, y, t = (part.detach().cpu() for part in inputs(dtype=dtype))
    for loss in (from_logits, from_head, one_pass):
        with pytest.raises(ValueError) as error:
            loss(x, w, z, y, t)
        assert_holds(error, *said)
