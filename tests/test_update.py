"""An update of a real run steps on the gradient of the method's formula, written out by hand."""

import pytest
import torch
from toy_forests import alone, assert_same_gradients, gradients, sequences
from toy_runs import draw, learn, prepared

from rmt.prompt import next_token_prompt
from rmt.questions import question_trees, text_trees
from rmt.rollout import generate
from rmt.sampling import Sampling
from rmt.system.metrics import Metrics
from rmt.update import adamw


def updated(place, **changes):
    """A float64 run after one update: run, its trees, its advantages, metrics, initial gradient."""
    run = prepared(place, grad_clip=1e9, batch_size=3, **changes)
    run.model.double()
    tokenizer, documents = run.tokenizer, run.documents
    questions = draw(run)
    prompts = [next_token_prompt(tokenizer, 8)] * len(questions)
    sampling = Sampling(9, tokenizer.stop_ids, tokenizer.vocab_size, 0.8)
    groups = generate(run.model, question_trees(questions, documents, prompts), 4, sampling)
    trees = question_trees(questions, documents, prompts, groups)
    trees += text_trees(run.order[0].tolist(), documents, [], questions, "not_in_C")
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(groups), 4, generator=generator, dtype=torch.float64)
    known = dict(vocabulary=tokenizer.vocab_size)
    response, text = [], []
    for tokens, mask, branch in sequences(trees):
        if branch is None:
            text.append(alone(run.model, tokens, mask, **known))
        else:
            logprob = alone(run.model, tokens, mask, 0.8, **known)
            response.append(advantage.flatten()[branch.id] * logprob)
    metrics = Metrics()
    expected = gradients(run.model, formula(run.config, response, text))
    learn(run, trees, groups, advantage, torch.zeros_like(advantage), metrics)
    given = {name: p.grad for name, p in run.model.named_parameters()}
    return given, expected, metrics.reduce(run.world), torch.cat(text).detach()


def formula(c, response, text):
    """-J_RL + lambda L_NTP from A log pi of each response token and log p of each text token."""
    mean = {
        "token-mean": torch.cat(response).mean(),
        "sequence-mean": torch.stack([x.mean() for x in response]).mean(),
        "constant": torch.stack([x.sum() / c.max_response for x in response]).mean(),
        "sequence-sum": torch.stack([x.sum() for x in response]).mean(),
    }[c.aggregation]
    text = torch.cat(text)
    return -mean - c.ntp_weight * (text.mean() if c.ntp_reduction == "mean" else text.sum())


@pytest.mark.parametrize(
    "changes",
    [{}, {"tokens_per_micro_batch": 700}, {"aggregation": "sequence-mean"},
     {"aggregation": "constant"}, {"aggregation": "sequence-sum"}, {"ntp_reduction": "sum"},
     {"ntp_weight": 0.7}],
    ids=str,
)  # fmt: skip
def test_the_gradient_of_an_update_is_that_of_the_formula(tmp_path, changes):
    given, expected, row, _ = updated(tmp_path, **changes)
    assert_same_gradients(given, expected, 1e-9)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert row["update/grad_norm"] == pytest.approx(float(norm), rel=1e-9)


def test_the_logged_text_loss_is_the_mean_over_all_text_targets(tmp_path):
    _, _, row, text = updated(tmp_path, tokens_per_micro_batch=700)
    assert row["loss/ntp"] == pytest.approx(-float(text.mean()), rel=1e-9)


def test_the_sampler_and_the_trainer_agree_in_a_real_step(tmp_path):
    _, _, row, _ = updated(tmp_path)
    assert row["sampler_gap/max"] <= 1e-12


def test_matrices_decay_and_norms_and_biases_do_not():
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.RMSNorm(4)
    )
    groups = adamw(model, 0.1, (0.9, 0.99), 0.3).param_groups
    named = {id(p): name for name, p in model.named_parameters()}
    decays = {named[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays == {"0.weight": 0.3, "1.weight": 0.3, "1.bias": 0.0, "2.weight": 0.0}
