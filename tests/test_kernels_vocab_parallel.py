"""A head whose rows two processes hold gives what one process gives that holds them all."""

import os

import pytest
import torch
import torch.distributed
from kernel_inputs import HEADS, cast
from torch.autograd import grad
from two_ranks import interpreted_on_two_ranks

import kernels
from kernels.adapters import linear_cross_entropy

CASES = [
    (kind, dtype, name, cap)
    for kind, dtype in (
        ("reference", torch.float64), ("reference", torch.bfloat16), ("triton", torch.float32),
        ("triton", torch.bfloat16),
    )
    for name, cap in (("50-words", None), ("50-words", 2.0), ("1024-words", None),
                      ("half-ignored", 2.0), ("all-ignored", None))
]  # fmt: skip


def on_cpu(case):
    """gloo's ranks work there, also where there is a GPU."""
    parts = (x.detach().cpu().requires_grad_(x.requires_grad) for x in case[:4])
    return type(case)(*parts, case.vocab_size)


def slopes_of(found):
    """A loss of all that has a gradient."""
    index = torch.arange(found.lse.numel()).to(found.lse)
    return (index.cos() * found.logprob + index.sin() * found.entropy + 0.1 * found.lse**2).sum()


def refused(case, own, group):
    """Errors are the same on all ranks: else one would wait for the other."""
    known = case.hidden, own, case.targets, group
    for vocab_size in (25, 51):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size} .* 26 to 50"):
            kernels.vocab_parallel_entropy_logprob(*known, 1.0, vocab_size)
    last = torch.distributed.get_rank() == 1
    for wrong in (own[:0], own.int(), own[:, :-1]):
        with pytest.raises(ValueError, match=r"rank 1 of the group|vocab_size 0|floating|must be"):
            kernels.vocab_parallel_entropy_logprob(known[0], wrong if last else own, *known[2:])
    loss = kernels.vocab_parallel_entropy_logprob(*known).logprob.sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        grad(loss, own, create_graph=True)
    alone = [torch.distributed.new_group([rank]) for rank in (0, 1)]
    with pytest.raises(ValueError, match="not in the group"):
        other = alone[1 - torch.distributed.get_rank()]
        kernels.vocab_parallel_entropy_logprob(*known[:3], other)


def on_a_rank(rank, port, place):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group, answers = torch.distributed.group.WORLD, []
    for kind, dtype, name, cap in CASES:
        os.environ["RMT_KERNELS"] = kind
        case = on_cpu(cast(HEADS[name](), dtype))
        size = len(case.weight) - 3  # the last rank has three rows of padding
        case = case._replace(targets=case.targets.clamp(max=size - 1))
        known = dict(temperature=case.temperature, vocab_size=size, chunk=4, softcap=cap)
        alone = kernels.linear_entropy_logprob(*case[:3], **known)
        wanted = grad(slopes_of(alone), (case.hidden, case.weight))
        own = case.weight.detach().tensor_split([20 if "50" in name else len(case.weight) // 2])
        own = own[rank].clone().requires_grad_()
        known = (case.hidden, own, case.targets, group), known
        found = kernels.vocab_parallel_entropy_logprob(*known[0], **known[1])
        given = grad(slopes_of(found), (case.hidden, own))
        part = kernels.vocab_parallel_entropy_logprob(*known[0], **known[1], sum_hidden=False)
        (part,) = grad(slopes_of(part), case.hidden)
        first = 0 if rank == 0 else len(case.weight) - len(own)
        answers.append((found, alone, given, (wanted[0], wanted[1][first:][: len(own)]), part))
    os.environ["RMT_KERNELS"] = "reference"
    case = on_cpu(cast(HEADS["50-words"](), torch.float32))
    own = case.weight.detach().chunk(2)[rank].requires_grad_()
    leaf = case.hidden.detach().requires_grad_()
    for weight, where in ((own, group), (case.weight, None)):
        found = linear_cross_entropy(leaf, weight, case.targets, 0.7, "none", where)
        answers.append((*found, *grad(sum(found).sum(), (leaf, weight))))
    refused(case, own, group)
    torch.save(answers, place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return interpreted_on_two_ranks(tmp_path_factory.mktemp("ranks"), on_a_rank)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(
    str(part).removeprefix("torch.") for part in CASES[i]
))  # fmt: skip
def test_two_ranks_give_what_one_gives(ranks, number):
    dtype = CASES[number][1]
    near = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-3}[dtype]
    for answers in ranks:
        found, alone, given, wanted, _ = answers[number]
        for a, b in zip(found, alone):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(given, wanted, strict=True):
            assert a.dtype == dtype
            assert float((a - b).double().norm()) <= near * float(b.double().norm())
    for a, b in zip(ranks[0][number][0], ranks[1][number][0]):
        assert torch.equal(a, b), "ranks disagree"
    parts = ranks[0][number][4].double() + ranks[1][number][4].double()
    whole = ranks[0][number][3][0].double()
    assert float((parts - whole).norm()) <= 2 * near * float(whole.norm())


def test_verls_function_takes_the_group(ranks):
    """The gradient of hidden is a part, that of the head is of the rank's own rows."""
    whole = ranks[0][-1]
    for number in (0, 1):  # log p and entropy
        for rank in ranks:
            torch.testing.assert_close(rank[-2][number], whole[number])
    torch.testing.assert_close(ranks[0][-2][2] + ranks[1][-2][2], whole[2])
    torch.testing.assert_close(torch.cat((ranks[0][-2][3], ranks[1][-2][3])), whole[3])
