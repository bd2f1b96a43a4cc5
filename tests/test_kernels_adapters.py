"""Adapters against the functions whose place they take, and against plain PyTorch."""

import pytest
import torch
from kernel_checks import saved
from torch.autograd import grad

from kernels import adapters

V, C = 50, 16


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def labels(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def plain(logits, index, temperature=1.0):
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, index[..., None])[..., 0], entropy


def same(ours, theirs, *leaves):
    """Values and gradients of two functions of the same leaves."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    slopes = [draw(*x.shape, seed=9 + i).detach().to(x) for i, x in enumerate(theirs)]
    for a, b in zip(grad(ours, leaves, slopes), grad(theirs, leaves, slopes)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_head_has_the_signature_of_verl():
    x, w, y = draw(2, 5, C), draw(V, C, seed=3), labels(2, 5)
    ours = adapters.linear_cross_entropy(x, w, y, 0.7, "none", None)
    same(ours, [p.flatten() for p in plain(x @ w.T, y, 0.7)], x, w)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_head_has_the_signature_of_trl(temperature, cap):
    x, w, b, y = draw(7, C), draw(V, C, seed=3), draw(V, seed=4), labels(7)
    known = (x, w, b, y, temperature, 8192, cap, 0.5, ("log_probs", "entropy", "is_top1"))
    logprob, entropy, squares, mean, top1 = adapters.ChunkedLogProb.apply(*known)
    z = 0.5 * (x @ w.T + b)
    z = z if cap is None else cap * (z / cap).tanh()
    same((logprob, entropy), plain(z, y, temperature), x, w, b)
    assert squares is mean is None and torch.equal(top1, z.argmax(-1) == y)
    alone = adapters.ChunkedLogProb.apply(x, w, None, y, 1.0, 8192, outputs=())
    assert alone[1:] == (None,) * 4
    with pytest.raises(ValueError, match="log_sum_sq_probs"):  # TRL's default asks for it
        adapters.ChunkedLogProb.apply(x, w, None, y, 1.0, 8192)


def test_functions_of_logits_have_the_signature_of_trl():
    z, y = draw(2, 5, V), labels(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    same([adapters.selective_log_softmax(z, y)], plain(z, y)[:1], z)
    same([adapters.selective_log_softmax(z, y, 2.0, mask)], [plain(z, y, 2.0)[0] * mask], z)
    same([adapters.entropy_from_logits(z, 3)], plain(z, y)[1:], z)
    rounded = z.bfloat16()  # as TRL's on a GPU: only the logits have 16 bits
    wide = plain(rounded.double(), y)
    for given, expected in zip((adapters.selective_log_softmax(rounded, y),
                                adapters.entropy_from_logits(rounded)), wide):  # fmt: skip
        torch.testing.assert_close(given, expected.float(), rtol=1e-6, atol=5e-6)


def test_autocast_rounds_the_head_as_a_linear_layer_and_copies_no_weight():
    x, w, y = draw(7, C), draw(V, C, seed=3), labels(7)
    with torch.autocast("cpu", torch.bfloat16):
        apply = lambda: adapters.ChunkedLogProb.apply(x, w, None, y, 1.0, 8192, outputs=())[0]
        ours, kept = saved(apply)
    rounded = (x.bfloat16().double() @ w.bfloat16().double().T, y)
    assert not torch.allclose(ours.double(), plain(x @ w.T, y)[0].double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, plain(*rounded)[0].float(), rtol=1e-5, atol=1e-5)
    of_hidden, of_weight = grad(ours.sum(), (x, w))
    assert of_hidden.dtype == of_weight.dtype == torch.float32
    assert not torch.equal(of_weight, of_weight.bfloat16().float())
    assert [k.data_ptr() for k in kept if k.shape == w.shape] == [w.data_ptr()]


def test_autocast_leaves_64_bits():
    x, w, y = draw(7, C, dtype=torch.float64), draw(V, C, dtype=torch.float64, seed=3), labels(7)
    with torch.autocast("cpu", torch.bfloat16):
        ours = adapters.linear_cross_entropy(x, w, y)
    same(ours, plain(x @ w.T, y), x, w)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda x, w, y: adapters.linear_cross_entropy(x, w, y, 1.0, "mean"), "reduction = mean"),
        (lambda x, w, y: adapters.ChunkedLogProb.apply(
            x, w, None, y, 1.0, 8, -30.0, outputs=()), "softcap"),
        (lambda x, w, y: adapters.ChunkedLogProb.apply(
            x, w, None, y, 1.0, 8, None, -1.0, ()), "logit_scale -1.0"),
        (lambda x, w, y: adapters.ChunkedLogProb.apply(
            x, w, None, y, 1.0, 8, outputs=("mean_logits",)), "mean_logits"),
        (lambda x, w, y: adapters.selective_log_softmax(x @ w.T, y[:, None]), "one token"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(call, word):
    with pytest.raises(ValueError, match=word):
        call(draw(7, C).detach(), draw(V, C, seed=3).detach(), labels(7))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_that_zero_3_would_free_before_the_backward_pass_is_refused(frozen):
    x, w, y = draw(7, C), draw(V, C, seed=3).requires_grad_(not frozen), labels(7)
    w.ds_id = 1
    with pytest.raises(ValueError, match="ZeRO-3"):
        adapters.ChunkedLogProb.apply(x, w, None, y, 1.0, 8, outputs=())
    with torch.no_grad():
        adapters.ChunkedLogProb.apply(x, w, None, y, 1.0, 8, outputs=())


def test_they_agree_with_trl_and_its_patched_model_computes_the_same(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils", reason="`make bench` installs trl")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    z, y = draw(2, 5, V), labels(2, 5)
    for name, known in (("selective_log_softmax", (z, y)), ("entropy_from_logits", (z,))):
        same([getattr(adapters, name)(*known)], [getattr(utils, name)(*known)], z)
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    ids = labels(3, 9)
    given = dict(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 4, -100))
    found = []
    for function in (utils._ChunkedLogProbFunction, adapters.ChunkedLogProb):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", function)
        out = model(**given, fused_lm_head=True)
        found.append((out.log_probs, out.entropy))
    same(*found, *model.parameters())
