"""Held-out evaluation during a run: with thoughts, and of text without them, too."""

from dataclasses import replace
from math import nan
from pathlib import Path

from rmt.data.judge import take_failures
from rmt.engine.checkpoint import best, step_dir
from rmt.engine.log import RunLog
from rmt.engine.run import Run, Setup
from rmt.evaluation.evaluate import nats_per_token, predict_plainly, predict_thinking, solve
from rmt.evaluation.summary import table
from rmt.questions import budget_of_step, sampling_at


def evaluate_held_out(run: Run, setup: Setup, log: RunLog) -> None:
    """Write held-out accuracy to eval.jsonl; for text also the plain one, and nats. All ranks."""
    c, world, tokenizer = run.config, setup.world, setup.data.tokenizer
    documents, chosen = setup.held_out
    budget = budget_of_step(c, run.total_steps, run.total_steps)  # B_T
    temperature = c.temperature if c.eval_decoding == "sampled" else 0.0
    sampling = replace(sampling_at(c, tokenizer, 0, "evaluate"), temperature=temperature)
    known = (run.model, tokenizer, documents)
    plainly = lambda: predict_plainly(*known, chosen.positions, c.tokens_per_micro_batch, world)
    if c.task == "problems":
        items = solve(*known, budget, c.problem_request, sampling, world)
        take_failures()  # the next step counts its own
    elif c.task == "nothing":
        items = plainly()
    else:
        items = predict_thinking(
            *known, chosen.positions, budget, c.budget_entropy, sampling, world, 1, c.text_in
        )
    kept = ("document", "position", "tier", "match")  # what a paired comparison needs
    found = {"tiers": chosen.summary(items), "items": [{k: x[k] for k in kept} for x in items]}
    message = f"held-out accuracy after {run.step} steps\n{table(found['tiers'])}"
    if c.task != "problems":
        nats = nats_per_token(*known, c.tokens_per_micro_batch, world)
        found["nats_per_token"] = nats
        message += f"\nheld-out text: {nats:.4f} nats per token"
    if c.task == "next-token":
        found["plain"] = {row["tier"]: row["accuracy"] for row in chosen.summary(plainly())}
        right = {row["tier"]: row["accuracy"] for row in found["tiers"]}
        average = [100 * x.get("average", nan) for x in (found["plain"], right)]
        message += ", {:.1f} % right without a thought, {:.1f} % with one".format(*average)
    log.evaluation(run.step, found)
    if c.keep_best and run.over and world.rank == 0:
        message += _said_of_best(run.out)
    log.message(message)


def _said_of_best(out: Path) -> str:
    try:
        kept = best(out)
    except (ValueError, OSError) as error:  # the model is exported all the same
        return f"\nthe best checkpoint is not known: {error}"
    if kept is None:
        return ""
    step, accuracy = kept
    return (
        f"\nthe best checkpoint, {accuracy:.1%} right, is that of step {step}: "
        f"--model {step_dir(out, step)}"
    )
