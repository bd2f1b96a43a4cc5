"""Reinforcement mid-training (arXiv 2509.24375): think about hard tokens, learn the rest plainly.

    python train.py --model tiny --preset demo              a few minutes on two CPU cores
    torchrun --nproc_per_node 8 train.py --model qwen3-14b  the paper's setting

Each step is one pass through `train_step`, which reads in the order of the paper:
draw positions -> budget -> rollouts -> rewards -> advantages -> one loss -> one update.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rmt.ask import ask, budget_of, deal_again, draw_questions, prompts_of
from rmt.batch import question_trees, text_trees
from rmt.config.config import parse, typed
from rmt.curriculum import low_entropy
from rmt.data.math_answers import take_failures
from rmt.engine.balance import waiting
from rmt.engine.checkpoint import export_model
from rmt.engine.flops import forward_flops, peak_flops
from rmt.engine.log import RunLog, describe, device_name, readable_samples
from rmt.engine.metrics import Metrics, add_rollout_metrics, add_speed_metrics
from rmt.engine.resume import claimed
from rmt.engine.run import Run, prepare, save
from rmt.evaluation.evaluate import nats_per_token, predict_plainly, predict_thinking, solve
from rmt.evaluation.summary import answered, table
from rmt.grpo import advantage_scale, advantages, length_share
from rmt.report.probe import ask_probes, describe_documents, probe_steps
from rmt.report.report import try_report
from rmt.rollout import Sampling
from rmt.system import dist
from rmt.system.clock import peak_memory, profiled
from rmt.system.terminal import safe_printing, stop_requests
from rmt.system.torchrun import lost_contact
from rmt.update import update

EPILOG = """\
what to watch (the README's glossary has every metric):
  match   share of responses that name the next token; should rise
  think   mean thinking length; should follow the budget it is shown against
  ntp     nats per token on the text not reasoned about; should not rise

a run leaves OUT/report.html to look at, the lines that it shows (OUT/metrics.jsonl, samples.jsonl,
probes.jsonl), OUT/checkpoints/ and OUT/model/, a Hugging Face directory. Ctrl-C finishes the step
and saves; --resume OUT continues bit for bit, and --resume OUT --steps N makes a run longer.
"""
REFUSED_IN_A_ROW = 3  # updates that were not finite before the run stops


def train_step(run: Run, step: int) -> tuple[dict, list[dict]]:
    """One step of the method: draw, think, reward, learn. All ranks."""
    c, world, metrics, started = run.config, run.world, Metrics(), time.perf_counter()

    # 1. The curriculum draws the positions C to reason about.
    # 2. The prompt of each asks for the budget of this step.
    indices, questions = draw_questions(run, step, metrics)  # about this rank's documents

    # 3. G rollouts per position: think, then predict the next token.
    # 4. Rewards (P, G): the right token, and the length that was asked for.
    run.optimizer.zero_grad(set_to_none=True)  # the last gradients make room for the cache
    with run.clock("rollout"), dist.rollout_mode(run.model) as sampler:
        questions, said = ask(run, sampler, questions, step, metrics)
    with run.clock("communication"):
        indices, questions, said = deal_again(run, indices, questions, said)
    groups, answers, rewards = said.groups, said.answers, said.rewards

    # 5. Advantages (P, G) relative to the group.
    total = rewards["total"]
    with run.clock("communication"):
        batch = dist.gather_objects(total, world)
    scale = advantage_scale(total, c.advantage_norm, c.advantage_delta, batch)
    advantage = advantages(total, scale)
    shares = length_share(total, rewards["length"], c.length_weight, scale)
    metrics.add("share/advantage_from_length", *shares)

    # 6. One loss over responses and raw text, −J_RL + λ·L_NTP, and the update.
    responses = [[rollout.tokens for rollout in group] for group in groups]
    trees = question_trees(questions, run.documents, prompts_of(run, questions), responses)
    if c.ntp:
        low = {index: low_entropy(run.tiers[index], c.min_context) for index in indices}
        trees += text_trees(
            indices, run.documents, run.tokenizer.begin_ids, questions, low, c.ntp_scope
        )
    with run.clock("update"):
        trained = update(run, trees, groups, advantage, rewards["match"], metrics)

    add_rollout_metrics(metrics, questions, answers, responses, rewards)
    cut = [not rollout.finished for group in groups for rollout in group]
    metrics.add("share/cut_off", sum(cut), len(cut))
    metrics.add("share/judge_failed", take_failures(), len(cut))
    measure_speed(run, responses, trained, started, metrics)
    row = {"step": step, "budget": budget_of(run, step)} | metrics.reduce(world)
    run.tokens += row["tokens/step"] + row["tokens/dropped"]
    run.seconds += row["time/step"]
    return row, readable_samples(run, step, questions, groups, answers, rewards)


def measure_speed(run: Run, responses, trained, started: float, metrics: Metrics) -> None:
    """Seconds, tokens per second and memory of a step that has just ended."""
    c, world, tokens = run.config, run.world, sum(map(len, trained))
    generated = sum(len(response) for group in responses for response in group)
    # A backward pass costs two forward passes; scoring, where there is any, is one without.
    scored = (c.kl_beta > 0) + (c.updates_per_batch > 1)
    flops = (3 * c.updates_per_batch + scored) * forward_flops(run.model.config, trained)
    peak = peak_flops(device_name(world), run.compute) if world.device.type == "cuda" else None
    seconds = run.clock.read()
    add_speed_metrics(metrics, seconds, generated, tokens, flops, peak, world)
    sampling, work = zip(*dist.gather_objects((seconds["sampling"], flops), world))
    metrics.add("share/waiting", waiting(sampling, work, seconds["update"]), 1)
    took = time.perf_counter() - started
    metrics.add("time/step", took, 1)
    metrics.add("speed/tokens_per_second", tokens, took / world.size)
    metrics.add("tokens/step", generated + tokens, 1 / world.size)  # a sum over ranks
    metrics.add_max("memory/peak_gb", peak_memory(world.device) / 1e9)


def evaluate(run: Run, log: RunLog) -> None:
    """Held-out accuracy and, of text, nats per token, to eval.jsonl. All ranks."""
    c, world = run.config, run.world
    documents, chosen = run.held_out
    budget = budget_of(run, run.total_steps)  # B_T
    temperature = c.temperature if c.eval_decoding == "sampled" else 0.0
    sampling = Sampling(
        c.max_response, run.tokenizer.stop_ids, run.tokenizer.vocab_size, temperature,
        c.max_branches, c.seed, "evaluate",
    )  # fmt: skip
    known = (run.model, run.tokenizer, documents)
    if c.task == "problems":
        items = solve(*known, budget, c.problem_request, sampling, world)
    elif c.task == "nothing":
        items = predict_plainly(*known, chosen.positions, c.tokens_per_micro_batch, world)
    else:
        items = predict_thinking(
            *known, chosen.positions, budget, c.budget_entropy, sampling, world
        )
    found = {"tiers": chosen.summary(items), "items": answered(items)}
    said = f"held-out accuracy after {run.step} steps\n{table(found['tiers'])}"
    if c.task != "problems":
        nats = nats_per_token(*known, c.tokens_per_micro_batch, world)
        found["nats_per_token"] = nats
        said += f"\nheld-out text: {nats:.4f} nats per token"
    log.evaluation(run.step, found)
    log.message(said)


def run_to_end(run: Run, log: RunLog) -> str:
    """All remaining steps; returns what to tell the user. All ranks."""
    c, world = run.config, run.world
    log.documents(describe_documents(run))
    with stop_requests() as asked, run.saver:
        while not run.over:
            if run.held_out and run.step % c.eval_every == 0:
                evaluate(run, log)
            if run.step in probe_steps(run):
                log.probes(ask_probes(run))
            with profile_of(run, log):
                row, samples = train_step(run, run.step)
            run.step += 1
            log.step(row, samples)
            broken = run.refused_in_a_row >= REFUSED_IN_A_ROW
            unsaved = run.saver.failed  # the next save will say why
            stop = broken or bool(dist.reduce_max([asked() or unsaved], world)[0])
            if stop or run.step % c.save_every == 0 or run.over:
                save(run, wait=stop or run.over)
            if broken:
                raise FloatingPointError(
                    f"{REFUSED_IN_A_ROW} updates in a row were not finite; the state is saved in "
                    f"{c.out}. Start anew with a lower --learning-rate, or look at the documents "
                    "named above"
                )
            if stop:
                return f"stopped after step {run.step}; continue with --resume {c.out}"
    if run.held_out:
        evaluate(run, log)
    log.probes(ask_probes(run))
    made_by = describe(c, run.total_steps, world, run.step)
    model = export_model(run.model, run.source, run.out, run.compute, world, run=made_by)
    return f"wrote {model} (Hugging Face format), {run.out / 'metrics.jsonl'} and samples.jsonl"


def profile_of(run: Run, log: RunLog) -> AbstractContextManager:
    """Traces the step that --profile names, on rank 0, and prints its costliest kernels."""
    if run.world.rank or run.step == 0 or run.step != run.config.profile:
        return nullcontext()
    return profiled(run.out / f"profile-{run.step}.json", log.message)


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(arguments, __doc__, EPILOG)
    if config.dry_run:
        # It rests on parts of PyTorch that a run should not depend on.
        from rmt.memory.dry_run import dry_run

        try:
            return print(dry_run(config))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    try:
        world = dist.start(config.replicate, config.timeout)
        with claimed(config, world):
            run = prepare(config, world, typed(arguments))
            with RunLog(run.out, run.config, run.step, run.total_steps, world) as log:
                done = run_to_end(run, log)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        reason = lost_contact(error, config.resume or config.out)
        if reason is None:
            raise
        sys.stdout.flush()
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # not by way of `stop`: threads of the group may wait for ranks that are gone
    except KeyboardInterrupt:  # outside a step: while preparing, or in the last evaluation
        sys.exit(f"interrupted; checkpoints, if any, are in {config.resume or config.out}")
    finally:
        dist.stop()
    if world.rank == 0:
        print(done)
        print(try_report(run.out))


if __name__ == "__main__":
    main()
