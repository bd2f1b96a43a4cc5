"""Every knob of a run in one frozen record; command-line flags are generated from it.

Departures: fields marked [ours] are not published by the paper; the others have its values.
Precedence: default < --method < --preset < command line. A resumed run takes its checkpoint's
config.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from rmt.config.flags import add_fields, knob, make_parser, parse_known
from rmt.config.presets import METHODS, PRESETS
from rmt.config.validate import problems

SOLVE = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Config:
    # ---- what is learnt
    method: str = knob("rmt", "values for the knobs below: presets.py", tuple(METHODS))
    task: str = knob(
        "next-token", "what is reasoned about: next tokens of text, problems with an answer, or "
        "nothing", ("next-token", "problems", "nothing"),
    )  # fmt: skip
    # ---- input and output
    model: str = knob(
        "tiny", "name (tiny, qwen3-14b, smollm2-135m, ...) or a Hugging Face directory"
    )
    weights: str = knob("", "directory that holds downloaded models, looked at first")
    data: tuple[str, ...] = knob(
        ("KbsdJames/Omni-MATH",),
        "files or folders of .jsonl, .txt, .md, or the Hugging Face name KbsdJames/Omni-MATH",
    )
    text_fields: tuple[str, ...] = knob(
        (), "JSON fields joined by a blank line; default: problem and solution, else text"
    )
    holdout: int = knob(
        200, "documents held out of training and taken by evaluation, chosen by a hash of their "
        "text [the paper's number]; 0: none",
    )  # fmt: skip
    document_tokens: int = knob(
        2048, "longer documents are cut into pieces of this many tokens [ours]"
    )
    out: str = knob("runs/rmt", "where checkpoints, metrics.jsonl and samples.jsonl go")
    resume: str = knob("", "a run's directory: continue from its newest checkpoint")
    seed: int = knob(0, "seeds every random number of the run")
    # ---- length of the run
    steps: int = knob(0, "updates; 0 = epochs x documents / batch-size. T of the schedules")
    epochs: float = knob(10.0, "passes over the documents when --steps is 0")
    max_tokens: int = knob(0, "end after so many tokens, sampled and trained on; 0: do not")
    max_minutes: float = knob(0.0, "end after so many minutes of training; 0: do not")
    batch_size: int = knob(128, "documents per step, over all ranks")
    # ---- difficulty and curriculum
    min_context: int = knob(16, "positions before this one are never reasoned about [ours]")
    entropy_top_k: int = knob(16, "difficulty: entropy of the k likeliest tokens; 0 = all [ours]")
    difficulty_model: str = knob("", "model that measures difficulty; default: --model [ours]")
    tiers: str = knob("absolute", "what the thresholds are [ours]", ("absolute", "quantile"))
    tier_thresholds: tuple[float, ...] = knob(
        (0.5, 1.0, 1.5), "lower ends of easy, medium, hard: nats, or quantiles in [0, 1) [ours]"
    )
    curriculum: bool = knob(True, "draw tiers on a schedule; off: uniformly over all tiers")
    curriculum_rule: str = knob(
        "schedule", "from early to late (the paper), or by what each tier can teach, measured",
        ("schedule", "adaptive"),
    )  # fmt: skip
    adaptive_floor: float = knob(0.1, "adaptive: how often a tier that teaches nothing is asked")
    noise_after: int = knob(
        0, "responses after which a position that none has matched is left out as noise; 0: never"
    )
    curriculum_early: tuple[float, ...] = knob(
        (0.6, 0.3, 0.1), "p_early of easy, medium, hard [ours]"
    )
    curriculum_late: tuple[float, ...] = knob(
        (0.1, 0.3, 0.6), "p_late of easy, medium, hard [ours]"
    )
    curriculum_start: float = knob(0.3, "t1 / T: the ramp from early to late begins")
    curriculum_end: float = knob(0.7, "t2 / T: the ramp ends")
    positions_per_document: int = knob(1, "positions reasoned about per document and step [ours]")
    resample_from: int = knob(
        -1, "step from which groups of equal matching rewards are replaced by those of other "
        "positions (dynamic sampling, DAPO); -1: never"
    )  # fmt: skip
    resample_tries: int = knob(4, "how often, before they stay as they are [ours]")
    # ---- rollouts
    group_size: int = knob(8, "G: responses per position")
    temperature: float = knob(0.8, "of sampling and of the scored distribution [ours]")
    max_response: int = knob(2048, "tokens per response at most")
    # 48 responses of 2,200 tokens of a 14B model: 17 GB of cache beside 30 GB of gathered weights.
    max_branches: int = knob(0, "responses decoded at one time per rank; 0: as many as fit")
    problem_request: str = knob(SOLVE, "what is asked after a problem")
    # ---- budget and reward
    match: str = knob(
        "token", "a right answer is the next token, or a prefix of the text that ends with a "
        "token (RPT), or the problem's answer", ("token", "prefix", "answer"),
    )  # fmt: skip
    budget: bool = knob(True, "dynamic token budget: ask for B_t tokens and reward the length")
    budget_start: int = knob(800, "B_0: thinking tokens asked for at the first step")
    budget_decay: float = knob(0.2, "gamma: B_t = B_0 gamma^(t/T)")
    budget_min: int = knob(1, "B_min: the budget never falls below it")
    budget_entropy: float = knob(
        0.0, "budgets by position: B_t H^this, H its entropy in nats, from 1/2 to 2; 0 is the paper"
    )
    length_weight: float = knob(0.1, "w: share of the length reward in the reward [ours]")
    length_reward_max: float = knob(1.0, "r_max: height of the length reward [ours]")
    length_reward_gate: str = knob(
        "none", "who gets the length reward; none is the paper", ("none", "correct_only")
    )
    # ---- objective
    advantage_norm: str = knob("group", "what divides advantages", ("group", "batch", "none"))
    advantage_delta: float = knob(1e-4, "added to the standard deviation")
    zero_variance_groups: str = knob(
        "keep", "groups whose matching rewards are all equal; keep is the paper", ("keep", "drop")
    )
    aggregation: str = knob(
        "token-mean", "how log pi(o) is averaged; sequence-sum is the literal formula [ours]",
        ("token-mean", "sequence-mean", "constant", "sequence-sum"),
    )  # fmt: skip
    kl_beta: float = knob(0.0, "beta: KL to the frozen initial model; 0 keeps no reference [ours]")
    updates_per_batch: int = knob(
        1, "updates on the same rollouts and text; 1 is exactly on-policy"
    )
    clip_low: float = knob(0.2, "ratio clip below, for more than one update per batch")
    clip_high: float = knob(0.2, "ratio clip above")
    ntp: bool = knob(True, "next-token prediction on the positions not reasoned about")
    ntp_weight: float = knob(0.1, "lambda: weight of next-token prediction")
    ntp_scope: str = knob(
        "not_in_C", "which positions it trains; not_in_C is the paper; low_entropy: outside all "
        "tiers but not too early",
        ("not_in_C", "low_entropy", "all"),
    )  # fmt: skip
    ntp_reduction: str = knob(
        "mean", "mean over target tokens [ours], or the paper's sum", ("mean", "sum")
    )
    # ---- optimiser
    learning_rate: float = knob(1e-6, "AdamW's, constant after the warm-up")
    warmup_steps: int = knob(10, "updates over which the learning rate rises [ours]")
    adam_betas: tuple[float, ...] = knob((0.9, 0.999), "AdamW's betas [ours]")
    weight_decay: float = knob(0.01, "AdamW's weight decay [ours]")
    grad_clip: float = knob(1.0, "largest norm of the gradient [ours]")
    # ---- machine
    naive: bool = knob(
        False, "without the forest: each response a sequence of its own, no cache; to learn from"
    )
    tokens_per_micro_batch: int = knob(
        0, "tokens per forward and backward pass per rank; 0: what fits, up to 16384"
    )
    recompute: str = knob(
        "auto", "activations that the backward pass computes again: less memory, more time; "
        "selective: all but matrix products and attention; auto: as little as fits",
        ("auto", "none", "selective", "full"),
    )  # fmt: skip
    offload: bool = knob(
        False, "keep master weights, their gradients and AdamW's state on the host"
    )
    compile: str = knob("auto", "torch.compile the layers; auto: on a GPU", ("auto", "on", "off"))
    dtype: str = knob("auto", "compute dtype; auto: bf16 on a GPU, fp32 on a CPU",
                      ("auto", "float32", "bfloat16"))  # fmt: skip
    replicate: int = knob(
        0,
        "copies of the model, each sharded over ranks / copies consecutive ranks; 0: one per node",
    )
    timeout: float = knob(600.0, "seconds that a rank waits for another before the run fails")
    # ---- planning
    dry_run: bool = knob(False, "only say what the run would need, on a machine of any kind")
    gpus: int = knob(8, "of each node, for --dry-run")
    nodes: int = knob(1, "for --dry-run")
    gpu_memory: str = knob("80GB", "of each GPU, for --dry-run; GB are 10^9 bytes, GiB 2^30")
    # ---- what is kept
    save_every: int = knob(50, "steps between checkpoints; the last step is always saved")
    keep: int = knob(2, "checkpoints kept")
    profile: int = knob(0, "the step (not 0) whose kernels are traced, into OUT/profile-STEP.json")
    samples_per_step: int = knob(4, "rollouts written to samples.jsonl each step")
    probe_documents: int = knob(3, "documents of which one position per tier is asked repeatedly")
    probe_times: int = knob(5, "how often: at the first step, in between, and after the last")
    eval_data: tuple[str, ...] = knob((), "held-out data; empty: no evaluation during the run")
    eval_every: int = knob(50, "steps between evaluations, when there is held-out data")
    eval_positions: int = knob(64, "positions per tier in an evaluation during the run")
    eval_decoding: str = knob(
        "sampled", "responses in an evaluation during the run: sampled as in training, with the "
        "same random numbers each time, or the likeliest tokens [ours]", ("sampled", "greedy"),
    )  # fmt: skip

    def __post_init__(self):
        for message in problems(self):
            raise ValueError(message)


def typed(arguments: Sequence[str], description: str = "", epilog: str = "") -> dict[str, Any]:
    """The flags of a command line and their values, and no defaults. Exits on unknown ones."""
    parser = make_parser(description, epilog)
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default=argparse.SUPPRESS,
        help="base values (default: paper)",
    )  # fmt: skip
    add_fields(parser, Config)
    values = vars(parse_known(parser, arguments))
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def parse(arguments: Sequence[str], description: str, epilog: str) -> Config:
    """Command line -> Config. Exits with a message on bad values."""
    values = typed(arguments, description, epilog)
    preset = PRESETS[values.pop("preset", "paper")]
    method = values.get("method", preset.get("method", "rmt"))
    try:
        return Config(**METHODS[method] | preset | {"method": method} | values)
    except ValueError as problem:
        sys.exit(f"error: {problem}")


def from_json(raw: dict) -> Config:
    """A Config from the JSON a run saved."""
    known = {field.name for field in dataclasses.fields(Config)}
    surplus = sorted(set(raw) - known)
    if surplus:
        raise ValueError(
            f"the saved config has fields this version does not know: {', '.join(surplus)}; "
            "resume with the version that started the run"
        )
    for name in wrong_types(raw):
        raise ValueError(
            f"the saved config has {name} = {str(raw[name])[:80]!r}, which is not of its type: the "
            "file is damaged; put the one that the run wrote back"
        )
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def wrong_types(raw: dict) -> list[str]:
    """Fields of a saved config, or some of them, that cannot be a Config's."""
    given = [f for f in dataclasses.fields(Config) if f.name in raw]
    return [f.name for f in given if not _has_type(raw[f.name], f.type)]


def _has_type(value: Any, kind: Any) -> bool:
    """Whether it is of a field's type, of which a tuple has one for all entries."""
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(
            _has_type(x, get_args(kind)[0]) for x in value
        )
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def in_repository(path: str) -> Path:
    """Relative paths of presets point into the repository, wherever the script was started."""
    beside = Path(__file__).resolve().parent.parent / path
    return beside if not Path(path).exists() and beside.exists() else Path(path)
