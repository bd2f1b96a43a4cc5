"""The kernels under FSDP: two processes hold half of each parameter, and give what one gives."""

import os
from itertools import product

import pytest
import torch
import torch.distributed
from kernel_losses import USED, from_head, one_pass
from toy_forests import toy_model
from toy_models import causal
from two_ranks import interpreted_on_two_ranks, whole

from rmt.system import dist

MASKED = torch.full((9,), -100)


def batch(share, rank):
    generator = torch.Generator().manual_seed(rank)
    tokens, targets = torch.randint(0, 97, (2, 9), generator=generator)
    targets %= USED
    everywhere = share == "masked-on-both-ranks"
    return tokens, MASKED if everywhere or (share == "masked-on-rank-1" and rank == 1) else targets


def of_batch(model, share, rank, loss):
    """The loss of a rank's batch; the head is read inside the module that owns it."""
    tokens, targets = batch(share, rank)
    readout = lambda hidden, weight: loss(hidden, weight, None, targets, 0.8)
    return model(tokens, torch.arange(len(tokens)), causal, readout)


SHARES = ("both", "masked-on-rank-1", "masked-on-both-ranks")
LOSSES = (from_head, one_pass)
SETTINGS = [
    *product(["reference"], [torch.float64], (True, False), SHARES, LOSSES),
    *product(["triton"], [torch.float32], [True], SHARES[:2], LOSSES),
]


def on_a_rank(rank, port, place):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    world, answers = dist.current(torch.device("cpu")), []
    for kind, dtype, tied, share, loss in SETTINGS:
        os.environ["RMT_KERNELS"] = kind
        alone, sharded = (toy_model(dtype, tie_word_embeddings=tied) for _ in range(2))
        sum(of_batch(alone, share, r, loss) for r in (0, 1)).backward()
        dist.shard(sharded, world, dtype)
        value = of_batch(sharded, share, rank, loss)
        value.backward()
        pairs = [(p.grad if p.grad is None else whole(p.grad), q.grad)
                 for p, q in zip(sharded.parameters(), alone.parameters())]  # fmt: skip
        answers.append((value.item(), pairs))
    torch.save(answers, place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return interpreted_on_two_ranks(tmp_path_factory.mktemp("ranks"), on_a_rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda i: "-".join(
    str(getattr(part, "__name__", part)).removeprefix("torch.") for part in SETTINGS[i]
))  # fmt: skip
def test_gradients_of_two_ranks_are_those_of_one_process(ranks, number):
    _, dtype, _, share, _ = SETTINGS[number]
    for rank, answers in enumerate(ranks):
        value, pairs = answers[number]
        if (batch(share, rank)[1] == -100).all():
            assert value == 0
        for given, expected in pairs:
            assert given is not None
            error = float((given - expected).norm())
            assert error <= (1e-12 if dtype == torch.float64 else 1e-5) * float(expected.norm())
