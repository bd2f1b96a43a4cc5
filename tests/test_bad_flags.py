"""A value that cannot work is refused before anything is loaded: value, reason, remedy."""

import pytest
from small_run import flags, refusal

import eval as evaluation
import sample
import train
from rmt.config.config import Config
from rmt.config.flags import flag

NO_FLAG = {
    "unknown-flag": (["--learning-rat", "1"], "--learning-rat", "did you mean --learning-rate?"),
    "another-trainer's-flag": (["--num-generations", "8"], "did you mean --group-size?"),
    "unknown-flag-with-value": (["--budgets=3"], "--budgets=3", "did you mean --budget?"),
    "underscores": (["--batch_size", "4"], "--batch_size", "did you mean --batch-size?"),
    "stray-word": (["runs"], "runs", "see --help"),
    "unknown-preset": (["--preset", "large"], "'large'", "demo", "small"),
    "bad-choice": (["--tiers", "percentile"], "--tiers", "'percentile'", "absolute", "quantile"),
    "word-for-integer": (["--steps", "many"], "--steps", "int", "'many'"),
    "fraction-for-integer": (["--batch-size", "1.5"], "--batch-size", "int", "'1.5'"),
    "word-for-number": (["--tier-thresholds", "low"], "--tier-thresholds", "float", "'low'"),
    "value-of-a-switch": (["--ntp", "false"], "argument false", "--ntp or --no-ntp takes no value"),
    "nothing-like-it": (["--vvv", "1"], "--vvv", "see --help"),
    "empty-resume": (["--resume", ""], "--resume is empty", "give a path"),
    "empty-data": (["--data", "a.txt", ""], "--data is empty", "give a path"),
    "value-left-out": (["--model"], "--model", "expected one argument"),
}
BAD_VALUE = {
    "budget-min-0": (dict(budget_min=0), "--budget-min is 0", "at least 1 token"),
    "budget-start-below-min": (dict(budget_start=5, budget_min=9), "5 is below", "raise it"),
    "gamma-1.5": (dict(budget_decay=1.5), "--budget-decay is 1.5", "in (0, 1]"),
    "gamma-0": (dict(budget_decay=0), "--budget-decay is 0.0", "in (0, 1]"),
    "w-1.2": (dict(length_weight=1.2), "--length-weight is 1.2", "[0, 0.5)", "could beat"),
    "group-of-1": (dict(group_size=1), "--group-size is 1", "at least 2"),
    "temperature-0": (dict(temperature=0), "--temperature is 0.0", "[1e-6, 1e6]"),
    "temperature-hot": (dict(temperature=1e7), "--temperature is 10000000.0", "[1e-6, 1e6]"),
    "temperature-nan": (dict(temperature="nan"), "--temperature is nan", "finite"),
    "nan-threshold": (dict(tier_thresholds=(0.5, 1, "nan")), "(0.5, 1.0, nan)", "finite"),
    "nan-probability": (dict(curriculum_early=("nan", 0.5, 0.5)), "--curriculum-early", "finite"),
    "endless-memory": (dict(gpu_memory="inf"), "--gpu-memory: 'inf'", "write 80GB"),
    "no-number-of-bytes": (dict(gpu_memory="nan"), "--gpu-memory: 'nan'", "write 80GB"),
    "plan-of-a-run": (dict(dry_run=True, resume="runs/x"), "--dry-run with --resume runs/x"),
    "endless-number": (dict(budget_start="1" + "0" * 400), "--budget-start", "below 2^63"),
    "infinite-epochs": (dict(epochs="inf"), "--epochs is inf", "finite"),
    "probabilities": (
        dict(curriculum_late=(0.5, 0.5, 0.5)), "--curriculum-late is (0.5, 0.5, 0.5)", "sum to 1"
    ),
    "resample-problems": (
        dict(task="problems", match="answer", ntp=False, resample_from=3),
        "--resample-from 3 with --task problems", "leave it out",
    ),
    "answers-of-text": (dict(match="answer"), "--task next-token with --match answer", "grpo"),
    "nothing-to-learn": (dict(task="nothing", ntp=False), "--task nothing", "use --ntp"),
    "problems-by-heart": (
        dict(task="problems", match="answer"), "--task problems with --ntp", "use --no-ntp",
    ),
    "two-probabilities": (dict(curriculum_early=(0.5, 0.5)), "--curriculum-early", "three"),
    "ramp-backwards": (dict(curriculum_start=0.8), "0.8", "0 <= start < end <= 1"),
    "falling-thresholds": (dict(tier_thresholds=(1, 2, 1.5)), "(1.0, 2.0, 1.5)", "three rising"),
    "two-thresholds": (dict(tier_thresholds=(1, 2)), "(1.0, 2.0)", "three rising"),
    "quantiles-above-1": (
        dict(tiers="quantile", tier_thresholds=(0.5, 0.9, 1.5)), "1.5)", "[0, 1)", "try 0.5"
    ),
    "batch-of-0": (dict(batch_size=0), "--batch-size is 0", "greater than 0"),
    "negative-steps": (dict(steps=-1), "--steps is -1", "0 or more"),
    "negative-seed": (dict(seed=-1), "--seed is -1", "0 or more"),
    "no-context": (dict(min_context=0), "--min-context is 0", "greater than 0"),
    "negative-kl": (dict(kl_beta=-0.1), "--kl-beta is -0.1", "0 or more"),
    "three-betas": (dict(adam_betas=(0.9, 0.9, 0.9)), "--adam-betas", "two numbers in [0, 1)"),
    "beta-1": (dict(adam_betas=(0.9, 1)), "--adam-betas is (0.9, 1.0)", "[0, 1)"),
    "response-of-2": (dict(max_response=2, budget=False), "--max-response is 2", "\\boxed{}"),
    "no-room-to-answer": (
        dict(max_response=800), "--max-response is 800", "--budget-start 800", "808 or more"
    ),
    "no-room-at-the-hardest": (
        dict(budget_start=100, max_response=200, budget_entropy=1), "208 or more", "--budget-start",
    ),
    "r_max-above-a-right-answer": (
        dict(length_weight=0.4, length_reward_max=1.5), "--length-reward-max is 1.5", "lower it",
    ),
    "entropy-budget-2": (dict(budget_entropy=2, max_response=4096), "--budget-entropy is 2.0",
                         "[0, 1]"),
    "entropy-budget-of-problems": (
        dict(method="grpo", budget_entropy=0.5), "--budget-entropy is set", "has no position",
    ),
    "one-weight-for-two": (
        dict(data=("a.txt", "b.txt"), data_weights=(1,)), "--data-weights is (1.0,)", "2 paths",
    ),
    "weight-of-0": (
        dict(data=("a.txt", "b.txt"), data_weights=(1, 0)), "(1.0, 0.0)", "a number above 0",
    ),
    "best-of-nothing": (dict(keep_best=True), "--keep-best without --eval-data", "give text"),
    "best-without-checkpoints": (
        dict(keep_best=True, eval_data="x.jsonl", eval_every=50, save_every=20), "--eval-every 50",
        "--save-every 20", "not saved", "make it one",
    ),
    "traces-of-problems": (
        dict(task="problems", match="answer", ntp=False, traces="own"), "--traces own", "leave it",
    ),
    "traces-and-resampling": (
        dict(traces="own", resample_from=3), "--resample-from 3 with --traces own", "are given",
    ),
    "traces-and-equal-groups": (
        dict(traces="a.jsonl", zero_variance_groups="drop"), "--zero-variance-groups drop",
    ),
    "budgets-by-position-before-the-text": (
        dict(text_in="thought", budget_entropy=1.0, max_response=2048), "--budget-entropy 1.0",
        "--text-in thought", "leave one",
    ),
    "right-answers-and-lengths": (
        dict(advantage_norm="right"), "--advantage-norm right", "ignores any other reward",
        "--method rft",
    ),
    "right-answers-and-gain": (
        dict(method="rlp", advantage_norm="right"), "--match gain", "--method rft",
    ),
    "updates-of-what-is-taught": (
        dict(method="rft", updates_per_batch=2), "--updates-per-batch 2", "Eq. 8", "use 1",
    ),
    "documents-too-short": (dict(document_tokens=8), "--document-tokens 8", "--min-context 16"),
}  # fmt: skip
LIMITS = {  # the first value that is refused
    0: "document_tokens positions_per_document updates_per_batch save_every keep gpus nodes "
    "eval_every eval_positions grad_clip learning_rate epochs advantage_delta resample_tries "
    "timeout max_response",
    -1: "entropy_top_k length_reward_max profile max_branches clip_low clip_high ntp_weight "
    "warmup_steps weight_decay samples_per_step max_tokens max_minutes probe_documents "
    "tokens_per_micro_batch replicate holdout export_every",
}
ELSEWHERE = {
    "eval-unknown-flag": (evaluation, ["--mod", "ntp"], "--mod", "did you mean --mode?"),
    "eval-mode": (evaluation, ["--mode", "both"], "'both'", "ntp", "ntr", "rmt"),
    "eval-per-tier": (evaluation, ["--per-tier", "0"], "--per-tier", "above 0"),
    "eval-response": (evaluation, ["--max-response", "1"], "--max-response is 1", "room"),
    "eval-thresholds": (evaluation, ["--tier-thresholds", "3", "2", "1"], "rising", "3.0"),
    "eval-json": (evaluation, ["--json", "/"], "--json /", "directory", "give a file"),
    "sample-temperature": (sample, ["--temperature", "0"], "--temperature is 0.0", "[1e-6, 1e6]"),
    "sample-length": (sample, ["--max-new-tokens", "0"], "--max-new-tokens is 0", "at least 1"),
    "sample-budget": (sample, ["--budget", "-3"], "--budget", "0 or more"),
    "sample-budget-of-nothing": (sample, ["--budget", "9"], "--budget 9", "add it", "--think-next"),
    "sample-too-cold": (
        sample,
        ["--temperature", "1e-39"],
        "--temperature is 1e-39",
        "[1e-6, 1e6]",
    ),
    "sample-too-hot": (sample, ["--temperature", "inf"], "--temperature is inf", "[1e-6, 1e6]"),
    "sample-both": (sample, ["--chat", "--think-next"], "--chat with --think-next", "leave one"),
    **{
        f"{name}-{flag}-{value}": (script, [f"--{flag}", value], f"--{flag} is", *fragments)
        for name, script in (("eval", evaluation), ("sample", sample))
        for flag, value, *fragments in (
            ("top-p", "0", "0.0", "in (0, 1]"),
            ("top-p", "1.01", "in (0, 1]"),
            ("top-p", "nan", "in (0, 1]"),
            ("top-k", "-1", "-1", "1 or more; 0 keeps all"),
        )
    },
    "eval-no-samples": (evaluation, ["--samples", "0"], "--samples is 0", "1 or more"),
    "eval-greedy-samples": (
        evaluation,
        ["--decoding", "greedy", "--samples", "3"],
        "--samples 3",
        "greedy",
        "leave one of them out",
    ),
    "eval-samples-of-plain": (
        evaluation,
        ["--mode", "ntp", "--samples", "3"],
        "--samples 3",
        "--mode ntp",
        "leave it out",
    ),
    "eval-greedy-top-p": (
        evaluation,
        ["--decoding", "greedy", "--top-p", "0.9"],
        "--top-p 0.9",
        "greedy",
        "leave one of them out",
    ),
    "eval-tiers-of-problems": (
        evaluation,
        ["--mode", "problems", "--per-tier", "9"],
        "--per-tier 9",
        "--mode problems",
        "leave it out",
    ),
    "eval-seed-of-plain": (
        evaluation,
        ["--mode", "ntp", "--sampling-seed", "3"],
        "--sampling-seed 3",
        "--mode ntp",
    ),
    "eval-cold-greedy": (
        evaluation,
        ["--mode", "ntr", "--decoding", "greedy", "--temperature", "0.7"],
        "--temperature 0.7",
        "--decoding greedy",
        "leave one of them out",
    ),
    "eval-top-k-of-plain": (
        evaluation,
        ["--mode", "ntp", "--top-k", "3"],
        "--top-k 3",
        "--mode ntp",
        "leave it out",
    ),
    "sample-greedy-top-k": (sample, ["--greedy", "--top-k", "3"], "--top-k 3", "greedy"),
    "eval-empty": (evaluation, ["--json", ""], "--json is empty", "leave the flag out"),
    "sample-unknown-flag": (sample, ["--max-tokens", "3"], "did you mean --max-new-tokens?"),
}


@pytest.mark.parametrize("case", NO_FLAG.values(), ids=NO_FLAG)
def test_what_is_not_a_flag_is_answered_with_what_is(case, capsys):
    arguments, *fragments = case
    refusal(train, arguments, fragments, capsys)


@pytest.mark.parametrize("case", BAD_VALUE.values(), ids=BAD_VALUE)
def test_value_that_cannot_work_is_refused(case, capsys):
    values, *fragments = case
    refusal(train, flags(**values), fragments, capsys)


@pytest.mark.parametrize("value, names", LIMITS.items())
def test_numbers_below_their_limit_are_refused_by_name(value, names):
    for name in names.split():
        with pytest.raises(ValueError) as error:
            Config(**{name: value})
        assert flag(name) in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("case", ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_scripts_refuse_in_the_same_way(case, capsys):
    script, arguments, *fragments = case
    refusal(script, arguments, fragments, capsys)
