"""A head whose rows two processes hold gives what one process gives that holds them all."""

import os

import pytest
import torch
import torch.distributed
from kernel_inputs import HEADS, cast
from torch.autograd import grad
from two_ranks import on_two_ranks

import kernels
from kernels.adapters import linear_cross_entropy

CASES = [
    (kind, dtype, name, cap)
    for kind, dtype in (
        ("reference", torch.float64), ("reference", torch.bfloat16), ("triton", torch.float32),
        ("fused", torch.bfloat16),
    )
    for name, cap in (("50-words", None), ("50-words", 2.0), ("1024-words", None),
                      ("half-ignored", 2.0), ("all-ignored", None))
]  # fmt: skip


def slopes_of(found):
    """A loss of all that has a gradient."""
    index = torch.arange(found.lse.numel()).to(found.lse)
    return (index.cos() * found.logprob + index.sin() * found.entropy + 0.1 * found.lse**2).sum()


def on_a_rank(rank, port, place):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group, answers = torch.distributed.group.WORLD, []
    for kind, dtype, name, cap in CASES:
        os.environ["RMT_KERNELS"] = kind
        case = cast(HEADS[name](), dtype)
        size = len(case.weight) - 3  # the last rank has three rows of padding
        case = case._replace(targets=case.targets.clamp(max=size - 1))
        known = dict(temperature=case.temperature, vocab_size=size, chunk=4, softcap=cap)
        alone = kernels.linear_entropy_logprob(*case[:3], **known)
        wanted = grad(slopes_of(alone), (case.hidden, case.weight))
        half = case.weight.detach().chunk(2)[rank].clone().requires_grad_()
        found = kernels.vocab_parallel_entropy_logprob(
            case.hidden, half, case.targets, group, **known
        )
        given = grad(slopes_of(found), (case.hidden, half))
        answers.append((found, alone, given, (wanted[0], wanted[1].chunk(2)[rank])))
    os.environ["RMT_KERNELS"] = "reference"
    case = cast(HEADS["50-words"](), torch.float32)
    half = case.weight.chunk(2)[rank]
    answers.append(linear_cross_entropy(*(case.hidden, half, case.targets), 0.7, "none", group))
    answers.append(linear_cross_entropy(*case[:3], 0.7))
    for size, vocab_size in ((25, 25), (25, 51)):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size} .* 26 to 50"):
            known = case.hidden, half[:size], case.targets, group, 1.0, vocab_size
            kernels.vocab_parallel_entropy_logprob(*known)
    torch.save(answers, place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the new processes, which use the CPU
        return on_two_ranks(tmp_path_factory.mktemp("ranks"), on_a_rank)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(
    str(part).removeprefix("torch.") for part in CASES[i]
))  # fmt: skip
def test_two_ranks_give_what_one_gives(ranks, number):
    dtype = CASES[number][1]
    near = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for answers in ranks:
        found, alone, given, wanted = answers[number]
        for a, b in zip(found, alone):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(given, wanted, strict=True):
            assert a.dtype == dtype
            assert float((a - b).double().norm()) <= near * float(b.double().norm())
    for a, b in zip(ranks[0][number][0], ranks[1][number][0]):
        assert torch.equal(a, b), "ranks disagree"


def test_verls_function_takes_the_group(ranks):
    for *_, given, expected in ranks:
        torch.testing.assert_close(given, expected)
