"""Check the values of a Config. Each message has the value, the reason and the remedy."""

import math
from collections.abc import Iterator

from rmt.config.flags import flag, read_bytes

# Tokens after the thought: </think>, a blank line, \\, boxed, {, a token, }, and the end. Where
# </think> is spelled there are more: loading.py looks at the tokenizer.
ANSWER_ROOM = 8
POSITIVE = (
    "document_tokens", "batch_size", "min_context", "positions_per_document", "max_response",
    "updates_per_batch", "save_every", "keep", "gpus", "nodes", "eval_every", "eval_positions",
    "grad_clip", "learning_rate", "epochs", "advantage_delta", "resample_tries",
    "timeout",
)  # fmt: skip


def problems(c) -> Iterator[str]:
    """Yield a message for each value that cannot work."""
    for name, value in vars(c).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            yield f"{flag(name)} is {value}; give finite numbers"
        if any(isinstance(x, int) and abs(x) >= 2**63 for x in numbers):
            yield f"{flag(name)} has {len(str(value))} digits; give a number below 2^63"
        if name in POSITIVE and value <= 0:
            yield f"{flag(name)} is {value} but must be greater than 0"
    yield from _reward_problems(c)
    yield from _file_problems(c)
    yield from _curriculum_problems(c)
    yield from _task_problems(c)
    for name, value in vars(c).items():
        if isinstance(value, (int, float)) and value < 0 and name != "resample_from":
            yield f"{flag(name)} is {value} but must be 0 or more"
    if c.dry_run and c.resume:
        yield (
            f"--dry-run with --resume {c.resume}: a dry run plans from the flags typed, not from a "
            "run's; give those flags in place of --resume"
        )
    try:
        read_bytes(c.gpu_memory)
    except ValueError as problem:
        yield f"--gpu-memory: {problem}"


def response_needed(budget: int, exponent: float) -> int:
    """Return the smallest --max-response that fits the largest budget (Eq. 13) and an answer."""
    return max(1, math.floor(budget * 2.0**exponent)) + ANSWER_ROOM


def temperature_problem(temperature: float) -> str:
    """Describe what is wrong with --temperature; "" if nothing is."""
    if 1e-6 <= temperature <= 1e6:  # logits / T stay numbers
        return ""
    return f"--temperature is {temperature}: choose one in [1e-6, 1e6]"


def sampling_problem(greedy: bool, samples: int, top_p: float, top_k: int) -> str:
    """Describe what is wrong with these flags of eval.py and sample.py; "" if nothing is."""
    if samples < 1:
        return f"--samples is {samples}: how many responses to each question, so 1 or more"
    if not 0 < top_p <= 1:
        return f"--top-p is {top_p}: a share of probability, so choose it in (0, 1]; 1 keeps all"
    if top_k < 0:
        return f"--top-k is {top_k}: how many tokens are kept, so 1 or more; 0 keeps all"
    given = {"samples": (samples, 1), "top_p": (top_p, 1), "top_k": (top_k, 0)}
    for name, (value, default) in given.items():
        if greedy and value != default:
            return f"{flag(name)} {value} means nothing to greedy decoding; leave one of them out"
    return ""


def _reward_problems(c) -> Iterator[str]:
    if c.budget_min < 1:
        yield f"--budget-min is {c.budget_min}: a length reward needs a budget of at least 1 token"
    if c.budget_start < c.budget_min:
        yield f"--budget-start {c.budget_start} is below --budget-min {c.budget_min}; raise it"
    if not 0 <= c.budget_entropy <= 1:
        yield f"--budget-entropy is {c.budget_entropy}: an exponent, so choose it in [0, 1]"
    if c.budget_entropy and c.task != "next-token":
        yield (
            f"--budget-entropy is set, but --task {c.task} has no position with an entropy: use "
            "--task next-token"
        )
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
    needed = response_needed(c.budget_start, c.budget_entropy)
    if c.budget and c.task != "nothing" and c.max_response < needed:
        yield (
            f"--max-response is {c.max_response}: a thought of --budget-start {c.budget_start} "
            f"tokens (--budget-entropy {c.budget_entropy}) would be cut off before its answer; use "
            f"--max-response {needed} or more, or a lower --budget-start"
        )
    if c.max_response < 4:
        yield f"--max-response is {c.max_response}: a response needs room for \\boxed{{}}"
    if c.group_size < 2 and not c.traces:
        yield f"--group-size is {c.group_size}: advantages compare responses, so at least 2"
    if wrong := temperature_problem(c.temperature):
        yield wrong
    if c.probe_times < 2:
        yield f"--probe-times is {c.probe_times}: at least 2, the start and the end of a run"
    if len(c.adam_betas) != 2 or not all(0 <= beta < 1 for beta in c.adam_betas):
        yield f"--adam-betas is {c.adam_betas}: give two numbers in [0, 1)"


def _file_problems(c) -> Iterator[str]:
    if c.data_weights and (len(c.data_weights) != len(c.data) or min(c.data_weights) <= 0):
        yield (
            f"--data-weights is {c.data_weights}: give a number above 0 for each of the "
            f"{len(c.data)} paths of --data"
        )
    if c.keep_best and not c.eval_data:
        yield "--keep-best without --eval-data: nothing says which is best; give text to measure on"
    if c.keep_best and c.save_every > 0 and c.eval_every % c.save_every:
        yield (
            f"--keep-best with --eval-every {c.eval_every}, no multiple of --save-every "
            f"{c.save_every}: what is evaluated is not saved; make it one"
        )


def _curriculum_problems(c) -> Iterator[str]:
    if c.document_tokens <= c.min_context:
        yield (
            f"--document-tokens {c.document_tokens} leaves nothing after --min-context "
            f"{c.min_context}; raise one or lower the other"
        )
    thresholds = c.tier_thresholds
    if len(thresholds) != 3 or list(thresholds) != sorted(set(thresholds)):
        yield f"--tier-thresholds is {thresholds}: give three rising numbers, easy medium hard"
    if c.tiers == "quantile" and not all(0 <= x < 1 for x in thresholds):
        yield f"--tier-thresholds is {thresholds}: quantiles lie in [0, 1); try 0.5 0.7 0.85"
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
    if c.traces and c.task != "next-token":
        yield f"--traces {c.traces} with --task {c.task}: they are about next tokens; leave it out"
    by_own = {"resample_from": -1, "zero_variance_groups": "keep"}
    for name, unset in by_own.items():
        if c.traces and getattr(c, name) != unset:
            yield (
                f"{flag(name)} {getattr(c, name)} with --traces {c.traces}: it goes by the model's "
                "own responses, but these are given; leave one of them out"
            )
    if c.text_in == "thought" and c.budget_entropy:
        yield (
            f"--budget-entropy {c.budget_entropy} with --text-in thought: there all positions of a "
            "document share the sentence before it, and so the budget; leave one of them out"
        )
    if (c.task == "problems") != (c.match == "answer"):
        yield (
            f"--task {c.task} with --match {c.match}: a problem is right by its answer, a next "
            "token by its bytes; use --method grpo, or rmt or rpt"
        )
    by_match = {"budget": False, "resample_from": -1, "zero_variance_groups": "keep", "traces": ""}
    for name, unset in by_match.items():
        if c.match == "gain" and getattr(c, name) != unset:
            yield (
                f"{flag(name)} {getattr(c, name)} with --match gain: its reward is a "
                "log-probability, not a match; use --method rlp and leave the flag out"
            )
    if c.advantage_norm == "right" and (c.match == "gain" or (c.budget and c.length_weight)):
        yield (
            "--advantage-norm right takes right responses as they are and ignores any other "
            "reward, of lengths or of --match gain; use --method rft, without a budget"
        )
    if c.updates_per_batch > 1 and (c.traces or c.advantage_norm == "right"):
        yield (
            f"--updates-per-batch {c.updates_per_batch} clips by the ratio to the sampling policy "
            "(Eq. 8), but responses here are taught as they are; use 1"
        )
    if c.task == "problems" and c.resample_from >= 0:
        yield (
            f"--resample-from {c.resample_from} with --task problems, which have no other "
            "positions to draw; leave it out"
        )
    if c.task == "nothing" and not c.ntp:
        yield "--task nothing with --no-ntp: there is nothing to learn; use --ntp"
    if c.task == "problems" and c.ntp:
        yield "--task problems with --ntp: the next-token loss needs raw text; use --no-ntp"
