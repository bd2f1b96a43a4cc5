"""Values of a Config that cannot work: each message has the value, the reason and the remedy."""

import dataclasses
import math
from collections.abc import Iterator

from rmt.config.flags import flag, read_bytes

# After the thought: </think>, a blank line, \\, boxed, {, a token, }, and the end.
ANSWER_ROOM = 8


def problems(c) -> Iterator[str]:
    """Messages about values that cannot work: value, reason, remedy."""
    yield from _number_problems(c)
    yield from _reward_problems(c)
    yield from _curriculum_problems(c)
    yield from _task_problems(c)


def response_needed(budget: int, exponent: float) -> int:
    """The shortest --max-response in which every position's budget is thought and answered."""
    return max(1, math.floor(budget * 2.0**exponent)) + ANSWER_ROOM  # the largest of Eq. 14


def _number_problems(c) -> Iterator[str]:
    positive = (
        "document_tokens", "batch_size", "min_context", "positions_per_document", "max_response",
        "updates_per_batch", "save_every", "keep", "gpus", "nodes",
        "eval_every", "eval_positions", "grad_clip", "learning_rate", "epochs", "advantage_delta",
        "resample_tries", "adaptive_floor", "timeout",
    )  # fmt: skip
    not_negative = (
        "entropy_top_k", "seed", "steps", "length_reward_max", "kl_beta", "profile", "max_branches",
        "clip_low", "clip_high", "ntp_weight", "warmup_steps", "weight_decay", "samples_per_step",
        "max_tokens", "max_minutes", "noise_after", "probe_documents", "tokens_per_micro_batch",
        "replicate", "holdout",
    )  # fmt: skip
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            yield f"{flag(field.name)} is {value}; give finite numbers"
    for name in positive:
        if not getattr(c, name) > 0:
            yield f"{flag(name)} is {getattr(c, name)} but must be greater than 0"
    for name in not_negative:
        if getattr(c, name) < 0:
            yield f"{flag(name)} is {getattr(c, name)} but must be 0 or more"
    if c.dry_run and c.resume:
        yield (
            f"--dry-run with --resume {c.resume}: a dry run plans the flags that are typed, not "
            "those of a run; give these in place of --resume"
        )
    try:
        read_bytes(c.gpu_memory)
    except ValueError as problem:
        yield f"--gpu-memory: {problem}"


def _reward_problems(c) -> Iterator[str]:
    if c.budget_min < 1:
        yield f"--budget-min is {c.budget_min}: a length reward needs a budget of at least 1 token"
    if c.budget_start < c.budget_min:
        yield f"--budget-start {c.budget_start} is below --budget-min {c.budget_min}; raise it"
    if not 0 <= c.budget_entropy <= 1:
        yield (
            f"--budget-entropy is {c.budget_entropy}: choose it in [0, 1], from one budget for all "
            "to budgets in proportion to entropy"
        )
    if c.budget_entropy and c.task != "next-token":
        yield "--budget-entropy is set, but a problem has no entropy: only next tokens have one"
    if not 0 < c.budget_decay <= 1:
        yield f"--budget-decay is {c.budget_decay}: the budget shrinks, so choose it in (0, 1]"
    if not 0 <= c.length_weight < 0.5:
        yield (
            f"--length-weight is {c.length_weight}: choose it in [0, 0.5), "
            "or a wrong answer of the right length could beat a right one"
        )
    elif c.length_weight * c.length_reward_max >= 1 - c.length_weight:
        yield (
            f"--length-reward-max is {c.length_reward_max}: with --length-weight {c.length_weight} "
            "a wrong answer of the right length could beat a right one; lower it"
        )
    if c.budget and c.task != "nothing":
        needed = response_needed(c.budget_start, c.budget_entropy)
        if c.max_response < needed:
            yield (
                f"--max-response is {c.max_response}: a response that thinks as long as "
                f"--budget-start {c.budget_start} asks for (with --budget-entropy "
                f"{c.budget_entropy}) would be cut off before its answer; use --max-response "
                f"{needed} or more, or a lower --budget-start"
            )
    if c.max_response < 4:
        yield f"--max-response is {c.max_response}: a response needs room for \\boxed{{}}"
    if c.group_size < 2:
        yield f"--group-size is {c.group_size}: advantages compare responses, so at least 2"
    if not c.temperature > 0:
        yield f"--temperature is {c.temperature}: rollouts need a temperature above 0"
    if c.probe_times < 2:
        yield f"--probe-times is {c.probe_times}: at least 2, the start and the end of a run"
    if len(c.adam_betas) != 2 or not all(0 <= beta < 1 for beta in c.adam_betas):
        yield f"--adam-betas is {c.adam_betas}: give two numbers in [0, 1)"


def _curriculum_problems(c) -> Iterator[str]:
    if c.document_tokens <= c.min_context:
        yield (
            f"--document-tokens {c.document_tokens} leaves nothing after --min-context "
            f"{c.min_context}; raise the one or lower the other"
        )
    thresholds = c.tier_thresholds
    if len(thresholds) != 3 or list(thresholds) != sorted(set(thresholds)):
        yield f"--tier-thresholds is {thresholds}: give three rising numbers, easy medium hard"
    if c.tiers == "quantile" and not all(0 <= x < 1 for x in thresholds):
        yield f"--tier-thresholds is {thresholds}: quantiles lie in [0, 1); try 0.5 0.7 0.85"
    if c.curriculum_rule == "adaptive" and not c.curriculum:
        yield (
            "--curriculum-rule adaptive with --no-curriculum: without a curriculum positions are "
            "drawn uniformly, by no rule; use --curriculum, or leave the rule out"
        )
    for name in ("curriculum_early", "curriculum_late"):
        p = getattr(c, name)
        if len(p) != 3 or min(p) < 0 or abs(sum(p) - 1) > 1e-6:
            yield f"{flag(name)} is {p}: give three probabilities that sum to 1"
    if not 0 <= c.curriculum_start < c.curriculum_end <= 1:
        yield (
            f"--curriculum-start {c.curriculum_start} and --curriculum-end {c.curriculum_end}: "
            "choose 0 <= start < end <= 1"
        )


def _task_problems(c) -> Iterator[str]:
    if (c.task == "problems") != (c.match == "answer"):
        yield (
            f"--task {c.task} with --match {c.match}: a problem is right by its answer, a next "
            "token by its bytes; use --method grpo, or rmt or rpt"
        )
    if c.task == "problems" and c.resample_from >= 0:
        yield (
            f"--resample-from {c.resample_from} with --task problems: a problem has no other "
            "position to ask about; leave it out"
        )
    if c.task == "nothing" and not c.ntp:
        yield "--task nothing with --no-ntp: there is nothing to learn; use --ntp"
    if c.task == "problems" and c.ntp:
        yield "--task problems with --ntp: problems are no text to learn by heart; use --no-ntp"
