"""One group of eight rollouts of a real batch, from text to advantage to gradient.

    python -m experiments.worked_example     rewrites the example in docs/method.md

It is the first group of the demo's first step that has right and wrong answers; the update is on
this group alone, without next-token prediction and warm-up.
"""

import re
import tempfile
from pathlib import Path

import torch

from rmt.config.config import parse
from rmt.engine.run import Run, Setup, prepare
from rmt.forest import pack
from rmt.grpo import advantage_scale, advantages, has_both_outcomes
from rmt.objective import Targets, score
from rmt.questions import (
    RolloutBatch,
    ask,
    budget_of_step,
    draw_positions,
    prompts_of,
    question_trees,
    sampling_at,
    score_responses,
)
from rmt.rollout import generate
from rmt.system import dist
from rmt.system.metrics import Metrics
from rmt.update import global_objective, update

PAGE = Path("docs/method.md")
BEGIN, END = "<!-- worked example -->", "<!-- /worked example -->"
FLAGS = ["--model", "tiny", "--preset", "demo", "--warmup-steps", "0", "--no-ntp"]


def log_probabilities(run: Run, setup: Setup, trees) -> torch.Tensor:
    """log π of each response, summed over its tokens. (R,)"""
    c, forest = run.config, pack(trees, setup.world.device)
    targets = Targets.of(forest)
    logprob = score(run.model, forest, c.temperature, setup.data.tokenizer.vocab_size)
    sums = torch.zeros(int(targets.rollout.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, targets.rollout.cpu(), logprob.double().cpu())


def example() -> str:
    with tempfile.TemporaryDirectory() as out:
        run, setup = prepare(parse([*FLAGS, "--out", out], "", ""), dist.start())
    c, data, metrics = run.config, setup.data, Metrics()
    documents, tokenizer = data.documents, data.tokenizer
    budget = budget_of_step(c, 0, data.total_steps)
    questions = [
        ask(c, data, index, draw, budget)
        for index in data.order[0].tolist()
        for draw in draw_positions(c, data, run.curriculum, 0, index, c.positions_per_document)[0]
    ]
    trees = question_trees(questions, documents, prompts_of(c, tokenizer, questions))
    responses = generate(run.model, trees, c.group_size, sampling_at(c, tokenizer, 0))
    batch = score_responses(c, tokenizer, questions, responses)
    number = int(has_both_outcomes(batch.rewards["match"]).nonzero()[0])
    one = RolloutBatch(
        questions[number : number + 1], batch.responses[number : number + 1],
        batch.answers[number : number + 1],
        {name: values[number : number + 1] for name, values in batch.rewards.items()},
    )  # fmt: skip
    (question,), (group,), (answers,) = one.questions, one.responses, one.answers
    match, length, total = (one.rewards[name][0] for name in ("match", "length", "total"))
    scale = advantage_scale(total[None], c.advantage_norm, c.advantage_delta, [total[None]])
    advantage = advantages(total[None], scale)
    trees = question_trees([question], documents, prompts_of(c, tokenizer, [question]), [group])
    before = log_probabilities(run, setup, trees)
    objective = global_objective(c, trees, one, advantage, tokenizer.vocab_size, setup.world)
    update(
        c, run.model, run.optimizer, None, trees, objective, [group], pack, 0, setup.world,
        setup.clock, metrics,
    )  # fmt: skip
    change = log_probabilities(run, setup, trees) - before
    tokens = sum(len(r.tokens) for r in group)
    text = tokenizer.decode(documents[question.document].tokens[: question.position].tolist())
    lines = [
        f"> {text} **▯**", "",
        f"The token that comes, ▯, is `{question.truth.decode()}`. At the first step the budget "
        f"is B_0 = {question.budget}. Eight responses were sampled at temperature "
        f"{c.temperature}:", "",
        "| | the thought ends | answer | r_match | ℓ | r_len | r | A | log π | Δ log π |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for i, answer in enumerate(answers):
        shown = "–" if answer.text is None else f"`{answer.text}`"
        lines.append(
            f"| {i + 1} | … {_end(answer.thought)} | {shown} | {match[i]:.0f} | "
            f"{answer.thinking_length or '–'} | {length[i]:.3f} | {total[i]:.4f} | "
            f"{advantage[0, i]:+.3f} | {before[i]:.1f} | {change[i]:+.2f} |"
        )
    norm = metrics.reduce(setup.world)["update/grad_norm"]
    right, agree = int(match.sum()), int((change.sign() == advantage[0].sign()).sum())
    lines += [
        "",
        f"Eq. 6 with w = {c.length_weight}: the mean of r is {total.mean():.4f}, its standard "
        f"deviation {total.std(correction=0):.4f}; Eq. 7 makes A of them. {right} of 8 are right. "
        f"The {tokens} response tokens share one loss: each has weight A/{tokens} in Eq. 10, and "
        f"pulls on the logit of its own token by A/{tokens}·(1 − π)/{c.temperature}. The gradient "
        f"of all parameters has norm {norm:.3f}. After one AdamW step at learning rate "
        f"{c.learning_rate:g} log π of a whole response has changed as in the last column: with "
        f"the sign of its advantage for {agree} of 8.",
    ]
    return "\n".join(lines)


def _end(thought: str) -> str:
    words = re.sub(r"\s+", " ", thought).strip().split(" ")
    return " ".join(words[-12:]).replace("|", "\\|")


def main() -> None:
    text, page = example(), PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
