"""Reinforcement mid-training (arXiv 2509.24375): think about some tokens, learn the rest plainly.

    python train.py --model tiny --preset demo              a few minutes on two CPU cores
    torchrun --nproc_per_node 8 train.py --model qwen3-14b  the paper's setting

`train_step` is the method, in the order of the paper:
draw positions -> budget -> prompts -> rollouts -> rewards -> advantages -> loss -> update.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from rmt import forest, naive, rollout
from rmt.config.config import parse, typed
from rmt.engine.balance import own_documents, rebalance
from rmt.engine.held_out import evaluate_held_out
from rmt.engine.log import RunLog, readable_samples
from rmt.engine.protocol import with_shape_of_run
from rmt.engine.resume import claimed
from rmt.engine.run import Run, Setup, export, note_refusal, prepare, save
from rmt.engine.step_metrics import add_response_metrics, add_speed_metrics
from rmt.grpo import advantage_scale, advantages
from rmt.memory.dry_run import dry_run
from rmt.methods.cold_start import given_responses
from rmt.methods.dynamic_sampling import replace_zero_variance
from rmt.methods.information_gain import information_gain
from rmt.questions import (
    ask,
    budget_of_step,
    draw_positions,
    prompts_of,
    question_trees,
    reward_responses,
    sampling_at,
    text_trees,
)
from rmt.report.probe import ask_probes, describe_documents, probe_steps
from rmt.report.report import try_report
from rmt.system import dist
from rmt.system.metrics import Metrics, profiled
from rmt.system.terminal import safe_printing, stop_requests
from rmt.system.torchrun import lost_contact
from rmt.update import global_objective, update

EPILOG = """\
watch that `match` rises, `think` follows the budget beside it, and `ntp` does not rise
(docs/metrics.md). A run writes OUT/report.html, metrics.jsonl, samples.jsonl, checkpoints/ and
model/, a Hugging Face directory. Ctrl-C saves; --resume OUT continues, --steps N makes it longer.
"""
REFUSED_IN_A_ROW = 3  # updates that were not finite before the run stops


def train_step(run: Run, setup: Setup) -> tuple[dict, list[dict]]:
    """One step of the method; returns its metrics and some samples. All ranks: each must call it.

    Shapes: P questions of this rank, G responses to each.
    """
    c, step, data, world, clock = run.config, run.step, setup.data, setup.world, setup.clock
    tokenizer, metrics, started = data.tokenizer, Metrics(), time.perf_counter()
    generate, pack = (naive if c.naive else rollout).generate, (naive if c.naive else forest).pack

    # 1. Draw the positions C to reason about: a tier on a schedule, then a position of that tier.
    # All ranks draw for all documents, so that the curriculum's state is the same on all.
    drawn = {  # document -> positions, and how many draws met an empty tier
        i: draw_positions(c, data, run.curriculum, step, i, c.positions_per_document)
        for i in data.order[step].tolist()
    }
    # 2. Budget: how many tokens to think at this step.
    budget = budget_of_step(c, step, data.total_steps)
    by_document = {
        i: [ask(c, data, i, position, budget) for position in positions]
        for i, (positions, _) in drawn.items()
    }
    by_document = own_documents(c, data, by_document, world)  # this rank's share
    questions = [question for group in by_document.values() for question in group]

    # 3. Prompts: which token comes next? Please use exactly B tokens within <think></think>.
    trees = question_trees(questions, data.documents, prompts_of(c, tokenizer, questions))
    run.optimizer.zero_grad(set_to_none=True)  # free the gradients before the cache
    with clock("rollout"), dist.gathered_weights(run.model) as sampler:
        with clock("sampling"):
            # 4. Rollouts: G responses to each question, a thought and then the token.
            if c.traces:  # a cold start: they are given (Eq. 15)
                responses, guesses = given_responses(c, data, sampler, generate, questions, step)
            else:
                responses = generate(sampler, trees, c.group_size, sampling_at(c, tokenizer, step))
            # 5. Rewards (P, G): the right token, and the length that was asked for.
            batch = reward_responses(c, tokenizer, questions, responses)
            if c.match == "gain":  # RLP
                batch.rewards["total"] = information_gain(c, data, sampler, batch, pack)
        batch, dropped = replace_zero_variance(  # RPT; RMT keeps the batch as it is
            c, data, run.curriculum, batch, sampler, generate, step, world, clock
        )
    sampled = guesses if c.traces else batch.tokens
    with clock("communication"):
        documents, batch = rebalance(c, data, list(by_document), batch, world)
        all_rewards = dist.gather_objects(batch.rewards["total"], world)  # --advantage-norm batch

    # 6. Advantages (P, G): each reward relative to those of its group.
    reward = batch.rewards["total"]
    scale = advantage_scale(reward, c.advantage_norm, c.advantage_delta, all_rewards)
    taught = c.traces or c.advantage_norm == "right"  # supervised: each response that is kept
    advantage = torch.ones_like(reward) if taught else advantages(reward, scale)

    # 7. Loss: −J_RL over the responses + λ·L_NTP over the raw text without C, together:
    # each document is there twice, in its prompt with the responses, and as bare text.
    prompts = prompts_of(c, tokenizer, batch.questions)
    trees = question_trees(batch.questions, data.documents, prompts, batch.responses)
    if c.ntp:
        trees += text_trees(
            documents, data.documents, tokenizer.begin_ids, batch.questions, c.ntp_scope,
            data.tiers, c.min_context,
        )  # fmt: skip
    with clock("update"):
        objective = global_objective(c, trees, batch, advantage, tokenizer.vocab_size, world)
        # 8. Update: forward, backward, clip, AdamW.
        updated = update(
            c, run.model, run.optimizer, setup.reference, trees, objective, batch.responses, pack,
            step, data.total_steps, world, clock, metrics,
        )  # fmt: skip

    note_refusal(run, setup, updated)
    add_response_metrics(metrics, c, batch, scale, [drawn[i] for i in by_document])
    add_speed_metrics(metrics, run, setup, sampled, dropped, updated, started)
    row = {"step": step, "budget": budget} | metrics.reduce(world)
    run.tokens += row["tokens/step"] + row["tokens/dropped"]
    run.seconds += row["time/step"]
    return row, readable_samples(step, data, batch, c.samples_per_step)


def run_to_end(run: Run, setup: Setup, log: RunLog) -> str:
    """All remaining steps; returns what to tell the user. All ranks."""
    c, world, saver = run.config, setup.world, setup.saver
    log.documents(describe_documents(run, setup))
    with stop_requests() as stop_asked, saver:
        while not run.over:
            if setup.held_out and run.step % c.eval_every == 0:
                evaluate_held_out(run, setup, log)
            if run.step in probe_steps(run):
                log.probes(ask_probes(run, setup))
            trace = 0 < run.step == c.profile and world.rank == 0
            path = run.out / f"profile-{run.step}.json"
            with profiled(path, log.message) if trace else nullcontext():
                row, samples = train_step(run, setup)
            run.step += 1
            log.step(row, samples)
            broken = run.refused_in_a_row >= REFUSED_IN_A_ROW
            unsaved = saver.failed  # the next save will say why
            stop = broken or bool(dist.reduce_max([stop_asked() or unsaved], world)[0])
            if stop or run.step % c.save_every == 0 or run.over:
                save(run, setup, wait=stop or run.over)
            if c.export_every and run.step % c.export_every == 0:
                export(run, setup, f"model-{run.step:06d}")
            if broken:
                raise FloatingPointError(
                    f"{REFUSED_IN_A_ROW} updates in a row were not finite; the state is saved in "
                    f"{c.out}. Start anew with a lower --learning-rate, or look at the documents "
                    "named above"
                )
            if stop:
                return f"stopped after step {run.step}; continue with --resume {c.out}"
    if setup.held_out:
        evaluate_held_out(run, setup, log)
    log.probes(ask_probes(run, setup))
    model = export(run, setup)
    return f"wrote {model} (Hugging Face format), {run.out / 'metrics.jsonl'} and samples.jsonl"


@safe_printing()
@dist.leaving()
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(arguments, __doc__, EPILOG)
    if config.dry_run:
        try:
            return print(dry_run(with_shape_of_run(config)))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    try:
        world = dist.start(config.replicate, config.timeout)
        with claimed(config, world):
            run, setup = prepare(config, world, typed(arguments))
            with RunLog(run.out, run.config, run.step, run.total_steps, world) as log:
                done = run_to_end(run, setup, log)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        remedy = f"--resume {config.resume or config.out} continues from the newest checkpoint"
        if lost := lost_contact(error, remedy):
            sys.exit(f"error: {lost}")
        raise
    except KeyboardInterrupt:  # outside a step: while preparing, or in the last evaluation
        sys.exit(f"interrupted; checkpoints, if any, are in {config.resume or config.out}")
    if world.rank == 0:
        print(done)
        print(try_report(run.out))


if __name__ == "__main__":
    main()
