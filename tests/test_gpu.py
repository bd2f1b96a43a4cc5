"""What only a GPU can show; `make gpu` runs these. Skipped elsewhere."""

from threading import Event, Thread

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from toy_forests import set_adapters

from models.config import TINY, ModelConfig
from models.transformer import Transformer
from models.weights import find
from rmt.forest import pack
from rmt.objective import Targets, target_logprobs
from rmt.rollout import generate
from rmt.sampling import Sampling
from rmt.system.dist import World, gathered_weights, load_model
from rmt.trees import Branch, Tree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WORLD = World(0, 1, torch.device("cuda"))


def trees(generator):
    ids = lambda n: torch.randint(0, 500, (n,), generator=generator).tolist()
    branches = [Branch(0, 1, ids(5), ids(40)), Branch(1, 90, ids(5), ids(9))]
    return [
        Tree(0, ids(90), (*branches, Branch(2, 33, ids(5), ids(64)))),
        Tree(1, ids(150), targets=[True] * 150),
    ]


def test_flex_attention_has_the_values_and_gradients_of_the_dense_mask():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_directory(TINY)).cuda()
    forest = pack(trees(torch.Generator().manual_seed(1)), "cuda")
    index = torch.arange(len(forest), device="cuda")
    real = forest.tree >= 0
    mask = forest.sees(index[:, None], index[None])

    def dense(layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)

    def run(attend):
        model.zero_grad()
        out = model(forest.tokens, forest.position, attend, lambda hidden, head: hidden[real])
        out.square().mean().backward()
        found = [p.grad.double() for p in model.parameters() if p.grad is not None]
        return [out.detach().double(), *found]

    flex, usual = run(forest.attend), run(dense)
    model.double()
    exact = run(dense)
    whole = sum(g.square().sum() for g in exact[1:]).sqrt()  # some gradients are almost 0
    for found, plain, truth in zip(flex, usual, exact):
        rounding = 4 * (plain - truth).norm() + 1e-5 * max(truth.norm(), whole)
        assert (found - truth).norm() <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
def test_sampled_log_probabilities_are_those_of_training(dtype, rank):
    model = set_adapters(load_model(find("tiny"), WORLD, dtype, lora_rank=rank))
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    prompts = [
        Tree(t.document, t.trunk, tuple(Branch(b.id, b.fork, b.stem) for b in t.branches))
        for t in trees(torch.Generator().manual_seed(2))[:1]
    ]
    sampling = Sampling(40, (1,), 500, temperature=0.8)
    with gathered_weights(model) as gathered:
        groups = generate(gathered, prompts, 1, sampling)
    answered = [
        Tree(t.document, t.trunk, tuple(
            Branch(b.id, b.fork, b.stem, group[0].tokens) for b, group in zip(t.branches, groups)
        )) for t in prompts
    ]  # fmt: skip
    forest = pack(answered, "cuda")
    sampled = Targets.of(forest).in_order([group[0].logprobs for group in groups])
    gap = (target_logprobs(model, forest, 0.8, 500).double() - sampled).abs()
    assert gap.mean() < limit


def test_a_checkpoint_may_be_written_while_decode_steps_are_recorded(tmp_path):
    """Recording in CUDA's default mode is made invalid by what another thread does."""
    model, over, written = load_model(find("tiny"), WORLD, torch.float32), Event(), []

    def write():
        torch.cuda.set_device(0)
        while not over.is_set():
            state = {"x": torch.zeros(1 << 16)}
            dcp.save(state, checkpoint_id=tmp_path / str(len(written)), no_dist=True)
            written.append(state)

    prompts = [Tree(0, list(range(3, 40)), (Branch(0, 20, [5, 6]),))]
    thread = Thread(target=write)
    thread.start()
    try:
        with gathered_weights(model) as gathered:
            for _ in range(20):
                generate(gathered, prompts, 8, Sampling(8, (1,), 500, temperature=0.8))
    finally:
        over.set()
        thread.join()
    assert written
