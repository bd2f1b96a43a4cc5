"""All settings of a run in one frozen dataclass; command-line flags are generated from it.

Departures: the paper does not print the values marked [ours], nor anything from `task` on.
Precedence: default < --preset < --method < command line; a resumed run has its checkpoint's config.
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

HEADINGS = {  # first field -> heading of --help-all
    "method": "used most", "epochs": "the paper's knobs; [ours]: it does not print the value",
    "task": "what the paper leaves open, baselines, beyond", "weights": "the machine",
    "save_every": "what is kept and evaluated",
}  # fmt: skip
SOLVE = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Config:
    # Used most.
    method: str = knob("rmt", "what is learnt: sets other flags, see presets.py", tuple(METHODS))
    model: str = knob("tiny", "name (tiny, qwen3-14b, ...), Hugging Face directory, or run")
    data: tuple[str, ...] = knob(
        ("KbsdJames/Omni-MATH",),
        "files or folders of .jsonl, .txt, .gz of them, .md, or a Hugging Face name, ORG/NAME",
    )
    eval_data: tuple[str, ...] = knob((), "held-out data; empty: no evaluation during the run")
    out: str = knob("runs/rmt", "where checkpoints, metrics.jsonl and samples.jsonl go")
    resume: str = knob("", "a run's directory: continue from its newest checkpoint")
    steps: int = knob(0, "T, the number of steps; 0: epochs x documents / batch-size")
    batch_size: int = knob(128, "documents per step, over all ranks")
    learning_rate: float = knob(1e-6, "of AdamW, after the warm-up")
    dry_run: bool = knob(False, "only say what the run would need, on any machine")

    # The paper's knobs.
    epochs: float = knob(10.0, "passes over the documents when --steps is 0")
    holdout: int = knob(200, "documents held out, chosen by a hash of their text; 0: none")
    entropy_top_k: int = knob(16, "entropy of the k likeliest tokens (Eq. 1); 0: of all [ours]")
    tier_thresholds: tuple[float, ...] = knob(
        (0.5, 1.0, 1.5), "lower ends of easy, medium, hard: nats, or quantiles in [0, 1) [ours]"
    )
    curriculum: bool = knob(True, "draw tiers on a schedule (Eq. 4); off: uniformly")
    curriculum_early: tuple[float, ...] = knob((0.6, 0.3, 0.1), "p_early of the tiers [ours]")
    curriculum_late: tuple[float, ...] = knob((0.1, 0.3, 0.6), "p_late of the tiers [ours]")
    curriculum_start: float = knob(0.3, "t1 / T: the ramp from early to late begins")
    curriculum_end: float = knob(0.7, "t2 / T: the ramp ends")
    budget: bool = knob(True, "ask for B_t thinking tokens and reward the length (Eq. 2, 3)")
    budget_start: int = knob(800, "B_0: thinking tokens asked for at the first step")
    budget_decay: float = knob(0.2, "gamma: B_t = B_0 gamma^(t/T)")
    budget_min: int = knob(1, "B_min: smallest budget")
    group_size: int = knob(8, "G: responses per position")
    temperature: float = knob(0.8, "of sampling and of the scored distribution [ours]")
    max_response: int = knob(2048, "tokens per response at most")
    length_weight: float = knob(0.1, "w: share of the length reward in the reward (Eq. 6) [ours]")
    length_reward_max: float = knob(1.0, "r_max: height of the length reward [ours]")
    advantage_delta: float = knob(1e-4, "delta: added to the standard deviation (Eq. 7)")
    kl_beta: float = knob(0.0, "beta: KL to the frozen initial model (Eq. 9); 0: none [ours]")
    ntp: bool = knob(True, "next-token prediction on the positions not reasoned about (Eq. 10)")
    ntp_weight: float = knob(0.1, "lambda: weight of next-token prediction")

    # What the paper leaves open, baselines, and what is beyond it.
    task: str = knob(
        "next-token", "what is reasoned about: next tokens, problems with an answer, or nothing",
        ("next-token", "problems", "nothing"),
    )  # fmt: skip
    match: str = knob(
        "token", "right is: the next token, a prefix of the text that ends with a token (RPT), or "
        "the problem's answer; gain: its log-probability behind the thought, whatever is answered "
        "(RLP)", ("token", "prefix", "answer", "gain"),
    )  # fmt: skip
    positions_per_document: int = knob(1, "positions reasoned about per document and step")
    min_context: int = knob(16, "positions before this one are never reasoned about")
    document_tokens: int = knob(
        2048, "longer texts are cut into pieces of so many tokens; problems left out"
    )
    data_weights: tuple[float, ...] = knob(
        (), "how often a document is from each path of --data; default: each document equally often"
    )
    max_records: int = knob(0, "texts or problems of --data to use, chosen by a hash; 0: all")
    text_fields: tuple[str, ...] = knob(
        (), "JSON fields joined by a blank line; default: problem and solution, else text"
    )
    tiers: str = knob("absolute", "what the thresholds are", ("absolute", "quantile"))
    difficulty_model: str = knob("", "model that measures difficulty; default: --model")
    budget_entropy: float = knob(0.0, "exponent a of Eq. 13: budgets grow with entropy; 0: equal")
    length_reward_gate: str = knob(
        "none", "responses that are paid for length; none: no gate, all (the paper)",
        ("none", "correct_only"),
    )  # fmt: skip
    resample_from: int = knob(
        -1, "step from which groups with equal matches are replaced (dynamic sampling); -1: never"
    )
    resample_tries: int = knob(4, "times that a group is replaced in one step, at most")
    advantage_norm: str = knob(
        "group", "standard deviation in Eq. 7; right: right responses have advantage 1, others are "
        "left out (supervised training on own answers)", ("group", "batch", "none", "right"),
    )  # fmt: skip
    zero_variance_groups: str = knob(
        "keep", "groups whose matches are all equal, in the loss", ("keep", "drop")
    )
    mask_truncated: bool = knob(
        False, "responses without an end token stay out of the policy term (Eq. 14)"
    )
    aggregation: str = knob(
        "token-mean", "how log pi(o) is averaged; sequence-sum is the paper's literal formula",
        ("token-mean", "sequence-mean", "constant", "sequence-sum"),
    )  # fmt: skip
    updates_per_batch: int = knob(1, "optimizer steps per batch of rollouts; 1 is on-policy")
    clip_low: float = knob(0.2, "clip of the ratio below (Eq. 8), with more than one update")
    clip_high: float = knob(0.2, "clip of the ratio above")
    ntp_scope: str = knob(
        "not_in_C", "positions trained by next-token prediction; low_entropy: below all tiers",
        ("not_in_C", "low_entropy", "all"),
    )  # fmt: skip
    ntp_reduction: str = knob("mean", "mean over tokens, or the paper's sum", ("mean", "sum"))
    text_in: str = knob(
        "question", "where the text stands; thought: each thought begins with it and goes on from "
        "it, which a small model does better", ("question", "thought"),
    )  # fmt: skip
    traces: str = knob(
        "", "cold start (Eq. 15): responses are given, not sampled; own: guesses of the model, or "
        "a .jsonl file of context, thought and answer, in place of --data"
    )  # fmt: skip
    problem_request: str = knob(SOLVE, "what is asked after a problem")
    warmup_steps: int = knob(10, "updates over which the learning rate rises")
    lr_schedule: str = knob(
        "constant", "of the learning rate after the warm-up; the others fall to 0 at T",
        ("constant", "linear", "cosine"),
    )  # fmt: skip
    adam_betas: tuple[float, ...] = knob((0.9, 0.999), "of AdamW")
    weight_decay: float = knob(0.01, "of AdamW, on matrices; norms and biases do not decay")
    grad_clip: float = knob(1.0, "largest norm of the gradient")
    lora_rank: int = knob(
        0, "R: train adapters of this rank on the layers' matrices (LoRA), not the weights; 0: off"
    )
    seed: int = knob(0, "seeds every random number of the run")
    max_tokens: int = knob(0, "end after so many tokens, sampled and trained on; 0: no limit")
    max_minutes: float = knob(0.0, "end after so many minutes of training; 0: no limit")

    # The machine.
    weights: str = knob("", "directory with downloaded models, looked at first")
    dtype: str = knob("auto", "compute dtype; auto: bf16 on GPUs", ("auto", "float32", "bfloat16"))
    max_branches: int = knob(0, "responses decoded at one time per rank; 0: what fits, up to 256")
    tokens_per_micro_batch: int = knob(0, "tokens per pass and rank; 0: what fits, up to 16384")
    recompute: str = knob(
        "auto", "activations recomputed; selective: not matmuls, attention; auto: what fits",
        ("auto", "none", "selective", "full"),
    )  # fmt: skip
    compile: str = knob("auto", "torch.compile the layers; auto: on a GPU", ("auto", "on", "off"))
    offload: bool = knob(False, "keep master weights, gradients and AdamW's state on the host")
    replicate: int = knob(0, "sharded copies of the model, on consecutive ranks; 0: one per node")
    timeout: float = knob(1800.0, "seconds that a rank waits for another before the run fails")
    naive: bool = knob(False, "no forest, no cache, one sequence per response: to compare with")
    gpus: int = knob(8, "per node, for --dry-run")
    nodes: int = knob(1, "for --dry-run")
    gpu_memory: str = knob("80GB", "per GPU, for --dry-run; GB are 10^9 bytes, GiB 2^30")

    # What is kept and evaluated.
    save_every: int = knob(50, "steps between checkpoints; the last step is always saved")
    keep: int = knob(2, "checkpoints kept: the newest")
    keep_best: bool = knob(False, "also keep the checkpoint with the best accuracy on --eval-data")
    export_every: int = knob(0, "steps between OUT/model-STEP, for Hugging Face; 0: OUT/model only")
    eval_every: int = knob(50, "steps between evaluations on --eval-data")
    eval_positions: int = knob(64, "positions per tier in such an evaluation")
    eval_decoding: str = knob(
        "sampled", "with the same random numbers each time, or greedy", ("sampled", "greedy")
    )
    samples_per_step: int = knob(4, "responses written to samples.jsonl each step")
    probe_documents: int = knob(3, "documents of which one position per tier is asked repeatedly")
    probe_times: int = knob(5, "how often: at the first step, in between, and after the last")
    track: str = knob("none", "also send the metrics there", ("none", "tensorboard", "wandb"))
    profile: int = knob(0, "step (not 0) whose kernels are traced into OUT/profile-STEP.json")

    def __post_init__(self):
        for message in problems(self):
            raise ValueError(message)


def typed(arguments: Sequence[str], description: str = "", epilog: str = "") -> dict[str, Any]:
    """Return the values of the flags that were typed. Exit with a message on an unknown flag."""
    parser = make_parser(description, epilog)
    parser.add_argument("--help-all", action="help", help="list all flags")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default=argparse.SUPPRESS,
        help="base values, see presets.py (default: paper)",
    )  # fmt: skip
    shown = len(HEADINGS) if "--help-all" in arguments else 1
    add_fields(parser, Config, headings=HEADINGS, shown=shown)
    values = vars(parse_known(parser, arguments))
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def parse(arguments: Sequence[str], description: str, epilog: str) -> Config:
    """Return the Config of a command line. Exit with a message on an unknown flag or bad value.

    With --resume only what is needed before the run's own is read, see rmt/engine/resume.py.
    """
    values = typed(arguments, description, epilog)
    preset = PRESETS[values.pop("preset", "paper")]
    if "resume" in values and not values.get("dry_run"):  # others are checked beside the run's own
        known = ("resume", "replicate", "timeout")
        preset, values = {}, {name: values[name] for name in known if name in values}
    method = values.get("method", preset.get("method", "rmt"))
    try:
        return Config(**preset | METHODS[method] | {"method": method} | values)
    except ValueError as problem:
        sys.exit(f"error: {problem}")


def from_json(raw: dict) -> Config:
    """Return the Config that a run saved. ValueError on unknown fields and wrong types."""
    if surplus := sorted(raw.keys() - {field.name for field in dataclasses.fields(Config)}):
        raise ValueError(
            f"the saved config has fields this version does not know: {', '.join(surplus)}; "
            "resume with the version that started the run"
        )
    for name in wrong_types(raw):
        raise ValueError(
            f"the saved config has {name} = {str(raw[name])[:80]!r}, which is of the wrong type; "
            "the file is damaged: restore the one that the run wrote"
        )
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def wrong_types(raw: dict) -> list[str]:
    """Return the fields in a saved config whose values are not of their type."""
    given = [f for f in dataclasses.fields(Config) if f.name in raw]
    return [f.name for f in given if not _has_type(raw[f.name], f.type)]


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        entry = get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_has_type(x, entry) for x in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def in_repository(path: str) -> Path:
    """Find a preset's relative path in the repository if it is not in the current directory."""
    inside = Path(__file__).resolve().parents[2] / path
    return inside if not Path(path).exists() and inside.exists() else Path(path)
