"""One group of eight rollouts of a real batch, from text to advantage to gradient.

    python -m experiments.worked_example     rewrites the example in rmt/README.md

It is the first group of the demo's first step that has right and wrong answers; the update is on
this group alone, without next-token prediction and warm-up.
"""

import re
import tempfile
from pathlib import Path

import torch

from rmt.ask import ask, draw_questions, prompts_of
from rmt.batch import question_trees
from rmt.config.config import parse
from rmt.engine.metrics import Metrics, mixed
from rmt.engine.run import Run, prepare
from rmt.forest import pack
from rmt.grpo import advantage_scale, advantages
from rmt.objective import Targets, score
from rmt.system import dist
from rmt.update import update

PAGE = Path("rmt/README.md")
BEGIN, END = "<!-- worked example -->", "<!-- /worked example -->"
FLAGS = ["--model", "tiny", "--preset", "demo", "--warmup-steps", "0", "--no-ntp"]


def log_probabilities(run: Run, trees) -> torch.Tensor:
    """log π of each response, summed over its tokens. (R,)"""
    c, forest = run.config, pack(trees, run.world.device)
    targets = Targets.of(forest)
    logprob = score(run.model, forest, c.temperature, run.tokenizer.vocab_size)
    sums = torch.zeros(int(targets.rollout.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, targets.rollout.cpu(), logprob.double().cpu())


def example() -> str:
    with tempfile.TemporaryDirectory() as out:
        run = prepare(parse([*FLAGS, "--out", out], "", ""), dist.start())
    c, metrics = run.config, Metrics()
    _, questions = draw_questions(run, 0, metrics)
    with dist.rollout_mode(run.model) as sampler:
        questions, said = ask(run, sampler, questions, 0, metrics)
    number = int(mixed(said.rewards["match"]).nonzero()[0])
    question, group, answers = questions[number], said.groups[number], said.answers[number]
    match, length, total = (said.rewards[k][number] for k in ("match", "length", "total"))
    scale = advantage_scale(total[None], c.advantage_norm, c.advantage_delta, [total[None]])
    advantage = advantages(total[None], scale)
    prompts, responses = prompts_of(run, [question]), [[r.tokens for r in group]]
    trees = question_trees([question], run.documents, prompts, responses)
    before = log_probabilities(run, trees)
    update(run, trees, [group], advantage, match[None], metrics)
    change = log_probabilities(run, trees) - before
    tokens = sum(len(r.tokens) for r in group)
    document = run.documents[question.document]
    text = run.tokenizer.decode(document.tokens[: question.position].tolist())
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
    norm = metrics.reduce(run.world)["update/grad_norm"]
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
