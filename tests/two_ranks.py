"""What one process and two do with the same work; test_distributed.py compares the answers."""

import os
from dataclasses import replace

import pytest
import torch
import toy_runs
from many_ranks import join, on_ranks
from toy_forests import toy_trees
from toy_runs import prepared, stepped

import train
from models.weights import load, on_meta
from rmt.difficulty import document_entropies
from rmt.engine.log import RunLog
from rmt.evaluation.evaluate import predict_plainly, predict_thinking, solve
from rmt.evaluation.positions import Position
from rmt.sampling import Rollout, Sampling
from rmt.system import dist
from rmt.system.metrics import Metrics

RL, TEXT = (5, 7, 9), (6, 8)  # documents of toy_trees with responses, and with text
SHARES = {  # which documents each of two ranks gets
    "uneven": ((5, 6), (7, 8, 9)),
    "no-response-on-one-rank": (RL, TEXT),
    "nothing-on-one-rank": ((), RL + TEXT),
}

# Three documents and two: unequal shares, with no sample left out of the report.
STEPS = dict(batch_size=5, steps=4, advantage_norm="batch", samples_per_step=9)
# What is known of answers, and groups that are drawn again or dropped, in unequal shares.
KNOWING = STEPS | dict(group_size=3, resample_from=1,
                       zero_variance_groups="drop", kl_beta=0.1, updates_per_batch=2)  # fmt: skip


# A cold start, whose guesses and budgets are drawn.
GIVEN = dict(batch_size=5, steps=3, traces="own", text_in="thought", group_size=1,
             positions_per_document=2, max_response=90)  # fmt: skip


def on_two_ranks(place, work=None):
    """[results of rank 0, of rank 1] of `everything`, or of work(rank, port, place)."""
    return on_ranks(2, place, work or _work)


def interpreted_on_two_ranks(place, work):
    """The same, with Triton's kernels interpreted: the new processes use the CPU.

    Where kernels are compiled, forks have a triton that compiles: these processes are no forks.
    """
    method = "forkserver" if os.environ.get("TRITON_INTERPRET") else "spawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return on_ranks(2, place, work, method)


def _work(rank, port, place):
    world = join(rank, 2, port)
    results = everything(world, place)
    results["hybrid"] = hybrid(world, place)
    results["bfloat16"] = in_bfloat16(world, place)
    torch.save(results, place / f"rank{rank}.pt")


def everything(world, place):
    run = prepared(place, world, grad_clip=1e9)
    small = prepared(place, world, grad_clip=1e9, tokens_per_micro_batch=30)
    clipped = prepared(place, world, grad_clip=1e-3)
    untied = prepared(place / "untied", world, grad_clip=1e9)
    results = {f"updates/{name}": learn(run, name) for name in SHARES}
    results |= {
        "updates/micro-batches": learn(small, "uneven"),
        "updates/clipped": learn(clipped, "uneven"),
        "updates/untied": learn(untied, "uneven"),
        "updates/two-per-batch": learn(prepared(place, world, updates_per_batch=2), "uneven"),
        "float32": learn(run, "uneven", torch.float32),
        "entropies": entropies(run),
        "evaluation": evaluation(run),
        "steps": steps(prepared(place, world, **STEPS)),
        "knowing": steps(prepared(place, world, **KNOWING)),
        "given": steps(prepared(place, world, **GIVEN)),
        "run": whole_run(place, world),
    }
    return results


def fresh_model(run, dtype):
    """Like dist.load_model, in any dtype."""
    model = on_meta(run.model_dir).to(dtype)
    if run.world.size > 1:
        dist.shard(model, run.world, dtype)
    model.to_empty(device="cpu")
    load(model, run.model_dir)
    return model


def learn(run, share, dtype=torch.float64, model=None):
    """One update on this rank's trees: metrics, gradients as they were stepped on, weights.

    model: in place of that of the run's directory.
    """
    world, advantage, groups, trees = run.world, [], [], []
    documents = SHARES[share][world.rank] if world.size > 1 else RL + TEXT
    for tree in (tree for tree in toy_trees() if tree.document in documents):
        branches = []
        for branch in tree.branches:
            advantage.append([(-1) ** branch.id * (1 + 0.1 * branch.id)])
            branches.append(replace(branch, id=len(groups)))
            groups.append([Rollout(branch.response, [0.0] * len(branch.response))])
        trees.append(replace(tree, branches=branches))
    model, metrics = model or fresh_model(run, dtype), Metrics()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    advantage = torch.tensor(advantage, dtype=torch.float64).view(-1, 1)
    run = run.having(model=model, optimizer=optimizer)
    toy_runs.learn(run, trees, groups, advantage, torch.zeros_like(advantage), metrics)
    return dict(
        metrics=metrics.reduce(world),
        gradients={n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad},
        weights={name: whole(p) for name, p in model.named_parameters()},
    )


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def hybrid(world, place):
    """As if each rank were a node of its own: replicated across, not sharded."""
    run = prepared(place, replace(world, replicate=2), grad_clip=1e9)
    mesh = next(run.model.parameters()).device_mesh
    os_results = dict(mesh=tuple(mesh.shape), names=mesh.mesh_dim_names)
    return os_results | learn(run, "uneven")


def in_bfloat16(world, place):
    """Weights before and after whole steps, and what the sampler is then given."""
    run = prepared(place, world, dtype="bfloat16", learning_rate=1e-2, **STEPS)
    weights = lambda model: {name: whole(p) for name, p in model.named_parameters()}
    before = weights(run.model)
    rows = steps(run)["rows"]
    with dist.gathered_weights(run.model) as sampler:
        given = weights(sampler)
    return dict(before=before, after=weights(run.model), given=given, rows=rows)


def entropies(run):
    with dist.gathered_weights(run.model) as gathered:
        return document_entropies(
            gathered, run.documents, run.tokenizer.begin_ids, 0, run.tokenizer.vocab_size, 100,
            run.world,
        )  # fmt: skip


def evaluation(run):
    """Items of both modes; three documents, so that the ranks have unequal shares."""
    positions = [
        Position(d, p, 2.0, "hard", int(run.documents[d].tokens[p]))
        for d, p in ((0, 9), (0, 11), (3, 10), (5, 8))
    ]
    known = (run.model, run.tokenizer, run.documents, positions)
    sampling = Sampling(9, run.tokenizer.stop_ids, run.tokenizer.vocab_size, 0.8, 2)
    return dict(
        plain=predict_plainly(*known, 200, run.world),
        thinking=predict_thinking(*known, 6, 1.0, sampling, run.world),
        problems=solve(*known[:2], run.documents[:5], 6, "Solve it.", sampling, run.world),
    )


def steps(run):
    """Metrics and responses of whole steps, and what the curriculum knows afterwards."""
    rows, responses = [], []
    for step in range(run.total_steps):
        row, samples = stepped(run, step)
        run.step += 1
        rows.append(row)
        responses += [s for part in dist.gather_objects(samples, run.world) for s in part]
    texts = sorted((s["step"], s["document"], s["position"], s["response"]) for s in responses)
    return dict(rows=rows, responses=texts, drawn=run.curriculum.drawn.tolist())


def whole_run(place, world):
    """A run with evaluations, from preparing it to the exported model."""
    out = place / f"out{world.size}"
    data = str(place / "data.jsonl")
    run = prepared(
        place, world, out=str(out), steps=2, eval_data=(data,), eval_every=1, eval_positions=2
    )
    with RunLog(run.out, run.config, 0, run.total_steps, world) as log:
        done = train.run_to_end(*run, log)
    lines = {
        name: (out / f"{name}.jsonl").read_text().strip().split("\n") for name in ("eval", "probes")
    }
    return dict(said=done, evaluations=len(lines["eval"]), probes=lines["probes"])
