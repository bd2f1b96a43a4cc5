"""Follow one document through one step, with real shapes and numbers: docs/tour.md.

    python -m experiments.tour      rewrites it: experiments/tour.md.in with the numbers filled in

The document is the first of `make demo`'s first step whose group has right and wrong responses. The
update uses this document alone, without warm-up.
"""

import re
import tempfile
from pathlib import Path

import torch

from experiments.links import ROOT, refreshed
from rmt import naive
from rmt.config.config import parse
from rmt.curriculum import TIERS
from rmt.engine.run import Run, Setup, prepare
from rmt.forest import pack
from rmt.grpo import advantage_scale, advantages, has_both_outcomes
from rmt.objective import Targets, target_logprobs
from rmt.questions import (
    RolloutBatch,
    ask,
    budget_of_step,
    draw_positions,
    prompts_of,
    question_trees,
    reward_responses,
    sampling_at,
    text_trees,
    tier_schedule,
)
from rmt.rollout import generate
from rmt.system import dist
from rmt.system.metrics import Metrics
from rmt.update import global_objective, update

FLAGS = ["--model", "tiny", "--preset", "demo", "--warmup-steps", "0"]


def log_probabilities(run: Run, setup: Setup, trees) -> torch.Tensor:
    """Return log π of each response, summed over its tokens (G,)."""
    c, row = run.config, pack(trees, setup.world.device)
    targets = Targets.of(row)
    logprob = target_logprobs(run.model, row, c.temperature, setup.data.tokenizer.vocab_size)
    sums = torch.zeros(c.group_size, dtype=torch.float64)
    return sums.index_add_(0, targets.rollout.cpu(), logprob.double().cpu())


def first_mixed(run: Run, setup: Setup) -> RolloutBatch:
    """Find the first question of the step with right and wrong responses; return its group."""
    c, data = run.config, setup.data
    budget = budget_of_step(c, 0, data.total_steps)
    questions = [
        ask(c, data, index, position, budget)
        for index in data.order[0].tolist()
        for position in draw_positions(c, data, run.curriculum, 0, index, 1)[0]
    ]
    trees = question_trees(questions, data.documents, prompts_of(c, data.tokenizer, questions))
    responses = generate(run.model, trees, c.group_size, sampling_at(c, data.tokenizer, 0))
    batch = reward_responses(c, data.tokenizer, questions, responses)
    i = int(has_both_outcomes(batch.rewards["match"]).nonzero()[0])
    one = slice(i, i + 1)
    rewards = {name: values[one] for name, values in batch.rewards.items()}
    return RolloutBatch(questions[one], batch.responses[one], batch.answers[one], rewards)


def numbers() -> dict[str, object]:
    """Return the numbers of the page by name."""
    with tempfile.TemporaryDirectory() as out:
        run, setup = prepare(parse([*FLAGS, "--out", out], "", ""), dist.start())
    c, data, tokenizer, world = run.config, setup.data, setup.data.tokenizer, setup.world
    one = first_mixed(run, setup)
    (question,), (group,), rewards = one.questions, one.responses, one.rewards["total"]
    index = question.document
    scale = advantage_scale(rewards, c.advantage_norm, c.advantage_delta, [rewards])
    advantage = advantages(rewards, scale)
    (prompt,) = prompts = prompts_of(c, tokenizer, [question])
    answered = question_trees([question], data.documents, prompts, [group])
    begin, scope = tokenizer.begin_ids, "not_in_C"
    text = text_trees([index], data.documents, begin, [question], scope)
    before, metrics = log_probabilities(run, setup, answered), Metrics()
    trees = answered + text
    objective = global_objective(c, trees, one, advantage, tokenizer.vocab_size, world)
    update(
        c, run.model, run.optimizer, None, trees, objective, [group], pack, 0,
        data.total_steps, world, setup.clock, metrics,
    )  # fmt: skip
    change = log_probabilities(run, setup, answered) - before
    row, tiers, everything = metrics.reduce(world), data.tiers[index], pack(trees)
    rl, ntp = row["loss/rl"], row["loss/ntp"]
    counts = [f"{int((tiers == k).sum())} {name}" for k, name in enumerate(TIERS)]
    schedule = tier_schedule(c, 0.0)
    shown = tokenizer.decode(data.documents[index].tokens[: question.position].tolist())
    return {
        "T": len(tiers), "tiers": ", ".join(counts), "none": int((tiers < 0).sum()),
        "min_context": c.min_context, "schedule": ", ".join(f"{p:.1f}" for p in schedule),
        "tier": TIERS[question.tier], "position": question.position,
        "entropy": f"{data.entropies[index][question.position]:.2f}", "text": shown,
        "truth": question.truth.decode(), "B_0": c.budget_start, "steps": data.total_steps,
        "B_T": budget_of_step(c, data.total_steps, data.total_steps),
        "header": len(prompt.header), "footer": len(prompt.footer),
        "trunk": len(answered[0].trunk), "prompt": tokenizer.decode(list(prompt.footer)).strip(),
        "G": c.group_size, "generated": sum(len(r.tokens) for r in group),
        "V": run.model.config.vocab_size, "C": run.model.config.hidden_size,
        "rows": _rows(one, advantage[0], before, change), "w": c.length_weight,
        "one_minus_w": 1 - c.length_weight, "mean": f"{rewards.mean():.4f}",
        "std": f"{rewards.std(correction=0):.4f}", "packed": len(pack(answered)),
        "alone": len(naive.pack(answered).tokens), "text_tokens": len(text[0]),
        "first": "" if begin else " and the first, which nothing precedes",
        "everything": len(everything), "targets": len(Targets.of(everything).token),
        "temperature": c.temperature, "lambda": c.ntp_weight,
        "text_targets": text[0].trunk_targets, "rl": f"{rl:.4f}", "ntp": f"{ntp:.4f}",
        "loss": f"{rl + c.ntp_weight * ntp:.4f}", "norm": f"{row['update/grad_norm']:.3f}",
        "clip": f"{c.grad_clip:g}", "lr": f"{c.learning_rate:g}",
        "agree": int((change.sign() == advantage[0].sign()).sum()),
    }  # fmt: skip


def _rows(one: RolloutBatch, advantage, before, change) -> str:
    """Return a line of the table for each response."""
    lines, rewards = [], {name: values[0] for name, values in one.rewards.items()}
    for i, answer in enumerate(one.answers[0]):
        words = re.sub(r"\s+", " ", answer.thought).strip().split(" ")[-9:]
        cells = [
            str(i + 1), f"… {' '.join(words)}", "–" if answer.text is None else f"`{answer.text}`",
            f"{rewards['match'][i]:.0f}", str(answer.thinking_length or "–"),
            f"{rewards['length'][i]:.3f}", f"{rewards['total'][i]:.4f}", f"{advantage[i]:+.3f}",
            f"{before[i]:.1f}", f"{change[i]:+.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    page = (Path(__file__).parent / "tour.md.in").read_text(encoding="utf-8")
    for name, value in numbers().items():
        page = page.replace(f"{{{{{name}}}}}", str(value))
    out = ROOT / "docs" / "tour.md"
    out.write_text(page, encoding="utf-8")
    out.write_text(refreshed(out), encoding="utf-8")


if __name__ == "__main__":
    main()
