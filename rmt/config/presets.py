"""Methods and presets: values of Config by name. What is not named has its default, the paper's.

A method says what is learnt, and is no code of its own: it chooses among the knobs of Config. A
preset says with what and how long.
"""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "rmt": {},
    # Reinforcement pre-training (arXiv 2506.08007): no budget, no curriculum, no next-token loss.
    "rpt": dict(match="prefix", budget=False, curriculum=False, ntp=False, resample_from=500),
    # Continual pretraining on the same text. The weight only matters beside another loss.
    "ntp": dict(task="nothing", budget=False, curriculum=False, ntp_weight=1.0),
    # Post-training on problems with an answer (GRPO, arXiv 2402.03300).
    "grpo": dict(task="problems", match="answer", budget=False, curriculum=False, ntp=False),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "rmt-q3": dict(model="qwen3-14b"),
    # Each measures difficulty itself (Eq. 1). RPT's proxy, --difficulty-model r1-distill-qwen-1.5b,
    # would do for R1 but is refused for Qwen3, which has another tokenizer.
    "rmt-r1": dict(model="r1-distill-qwen-14b"),
    "rpt": dict(
        method="rpt", model="r1-distill-qwen-14b", difficulty_model="r1-distill-qwen-1.5b",
        batch_size=256, steps=1000, document_tokens=3584, max_response=8192,
    ),
    "skywork": dict(method="grpo", data=("Skywork/Skywork-OR1-RL-Data",), max_response=4096),
    "demo": dict(  # minutes on two CPU cores with --model tiny; its data have an eval.jsonl
        data=("assets/tiny_corpus/train.jsonl",), holdout=0, steps=80, batch_size=12,
        learning_rate=1e-4, budget_start=90, max_response=192, document_tokens=512,
        entropy_top_k=0, save_every=50, max_branches=256, recompute="none",
    ),
    "small": dict(  # a real model on a CPU: few, short responses
        batch_size=4, group_size=4, budget_start=64, max_response=96, document_tokens=512,
        tokens_per_micro_batch=4096, learning_rate=1e-5,
    ),
}  # fmt: skip
