"""What the backward pass computes again instead of keeping changes no bit of a gradient."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_forests import adapted, toy_model, toy_trees

from kernels import linear_objective
from rmt.forest import pack
from rmt.objective import Targets

KINDS = {
    "qwen3": {},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "llama": {"architectures": ["LlamaForCausalLM"]},
}


def backward(model, forest=None):
    """Gradients of the sum of all log-probabilities, by name."""
    forest = forest or pack(toy_trees())
    targets = Targets.of(forest)
    read = lambda hidden, head: linear_objective(
        targets.read(hidden), head, targets.token, lambda logprob, *_: logprob.sum()
    )
    model.zero_grad(set_to_none=True)
    model(forest.tokens, forest.position, forest.attend, read)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("rank", [0, 3])
def test_recomputed_activations_give_equal_gradients(rank, recompute, kind, dtype):
    model = adapted(toy_model(dtype, **KINDS[kind]), rank)
    expected = backward(model)
    model.configure_training(recompute)
    for name, gradient in backward(model).items():
        assert gradient.norm() > 0, name
        assert torch.equal(gradient, expected[name]), name


def test_selective_repeats_no_matrix_product_and_full_repeats_those_of_a_layer():
    operations, forest = {}, pack(toy_trees())
    for recompute in ("none", "selective", "full"):
        model = toy_model()
        model.configure_training(recompute)
        with FlopCounterMode(display=False) as counter:
            backward(model, forest)
        operations[recompute] = counter.get_total_flops()
    # A layer's last product is not needed again; attention is not counted on a CPU.
    weights = sum(p.numel() for name, p in model.model.layers.named_parameters()
                  if p.dim() == 2 and "down_proj" not in name)  # fmt: skip
    assert operations["selective"] == operations["none"]
    assert operations["full"] == operations["none"] + 2 * weights * len(forest)
