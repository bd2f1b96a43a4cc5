"""What only a GPU can show; `make gpu` runs these. Skipped elsewhere."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from toy_forests import set_adapters

from models.config import TINY, ModelConfig
from models.transformer import Transformer
from models.weights import find
from rmt import naive
from rmt.forest import pack
from rmt.objective import Targets, target_logprobs
from rmt.rollout import generate
from rmt.sampling import Sampling
from rmt.system.dist import World, gathered_weights, load_model
from rmt.trees import Branch, Tree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WORLD = World(0, 1, torch.device("cuda"))
ROOT = Path(__file__).resolve().parent.parent


def trees(generator):
    ids = lambda n: torch.randint(0, 500, (n,), generator=generator).tolist()
    branches = [Branch(0, 1, ids(5), ids(40)), Branch(1, 90, ids(5), ids(9))]
    return [
        Tree(0, ids(90), (*branches, Branch(2, 33, ids(5), ids(64)))),
        Tree(1, ids(150), targets=[True] * 150),
    ]


def prompts(seed):
    (tree, _) = trees(torch.Generator().manual_seed(seed))
    return [replace(tree, branches=tuple(replace(b, response=()) for b in tree.branches))]


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
    asked, sampling = prompts(seed=2), Sampling(40, (1,), 500, temperature=0.8)
    with gathered_weights(model) as gathered:
        groups = generate(gathered, asked, 1, sampling)
    answered = [
        Tree(t.document, t.trunk, tuple(
            Branch(b.id, b.fork, b.stem, group[0].tokens) for b, group in zip(t.branches, groups)
        )) for t in asked
    ]  # fmt: skip
    forest = pack(answered, "cuda")
    sampled = Targets.of(forest).in_order([group[0].logprobs for group in groups])
    gap = (target_logprobs(model, forest, 0.8, 500).double() - sampled).abs()
    assert gap.mean() < limit


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 20}, {"max_new_tokens": 1}], ids=str)
def test_recorded_steps_sample_what_whole_sequences_do(cut):
    """12 responses in 5 slots: tables are written anew, slots are reused and moved."""
    model = load_model(find("tiny"), WORLD, torch.float32)
    sampling = Sampling(**{"max_new_tokens": 24, "stop_ids": (1,), "vocab_size": 500,
                           "temperature": 0.8, "max_branches": 5} | cut)  # fmt: skip
    asked = prompts(seed=3)
    with gathered_weights(model) as gathered:
        recorded, whole = (f(gathered, asked, 4, sampling) for f in (generate, naive.generate))
    tokens = lambda groups: [[response.tokens for response in group] for group in groups]
    assert tokens(recorded) == tokens(whole)


def test_offloaded_training_has_the_same_losses_and_evaluates(tmp_path):
    corpus, losses = "assets/tiny_corpus", []
    for number, more in enumerate(([], ["--offload"])):
        out = tmp_path / str(number)
        words = [
            "--model",
            "tiny",
            "--preset",
            "demo",
            "--steps",
            "2",
            "--eval-every",
            "1",
            "--eval-positions",
            "4",
            "--eval-data",
            f"{corpus}/eval.jsonl",
            "--out",
            str(out),
        ]
        run = subprocess.run([sys.executable, "train.py", *words, *more], cwd=ROOT, text=True,
                             capture_output=True, timeout=500)  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        assert len((out / "eval.jsonl").read_text().splitlines()) == 3
        rows = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss/ntp"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bf16


def test_a_checkpoint_may_be_written_while_decode_steps_are_recorded(tmp_path):
    """Recording in CUDA's default mode is made invalid by what another thread does."""
    model, over, written = load_model(find("tiny"), WORLD, torch.float32), Event(), []

    def write():
        torch.cuda.set_device(0)
        while not over.is_set():
            state = {"x": torch.zeros(1 << 16)}
            dcp.save(state, checkpoint_id=tmp_path / str(len(written)), no_dist=True)
            written.append(state)

    asked = [Tree(0, list(range(3, 40)), (Branch(0, 20, [5, 6]),))]
    thread = Thread(target=write)
    thread.start()
    try:
        with gathered_weights(model) as gathered:
            for _ in range(20):
                generate(gathered, asked, 8, Sampling(8, (1,), 500, temperature=0.8))
    finally:
        over.set()
        thread.join()
    assert written
