"""Methods and presets: named values of Config's fields. All others keep their default, the paper's.

A method sets the task and the loss, a preset model, data and sizes.
"""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "rmt": {},
    # Reinforcement pre-training (arXiv 2506.08007): no budget, no curriculum, no next-token loss.
    "rpt": dict(match="prefix", budget=False, curriculum=False, ntp=False, resample_from=500),
    # Reinforcement as pretraining (arXiv 2510.01265): the reward is the gain in log-probability.
    "rlp": dict(match="gain", budget=False, curriculum=False, ntp=False, advantage_norm="none"),
    # Supervised training on own right answers and on the text, in one loss (rejection sampling).
    "rft": dict(advantage_norm="right", budget=False, curriculum=False),
    # Continual pretraining on the same text. ntp_weight only matters next to another loss.
    "ntp": dict(task="nothing", budget=False, curriculum=False, ntp_weight=1.0),
    # Before RMT, for a model that never closes a thought (ours): given responses, Eq. 15.
    "cold-start": dict(traces="own", text_in="thought", group_size=1, positions_per_document=20),
    # Post-training on problems with an answer (GRPO, arXiv 2402.03300).
    "grpo": dict(task="problems", match="answer", budget=False, curriculum=False, ntp=False),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "rpt": dict(  # its proxy for difficulty works for R1; Qwen3 has another tokenizer
        method="rpt", model="r1-distill-qwen-14b", difficulty_model="r1-distill-qwen-1.5b",
        batch_size=256, steps=1000, document_tokens=3584, max_response=8192,
    ),
    "skywork": dict(method="grpo", data=("Skywork/Skywork-OR1-RL-Data",), max_response=4096),
    "demo": dict(  # minutes on two CPU cores with --model tiny; its data have an eval.jsonl
        data=("assets/tiny_corpus/train.jsonl",), holdout=0, steps=60, batch_size=12,
        learning_rate=3e-4, budget_start=120, budget_decay=0.25, length_reward_gate="correct_only",
        advantage_norm="batch", ntp_weight=1.0, max_response=512, document_tokens=256,
        entropy_top_k=0, save_every=50, max_branches=256, recompute="none",
    ),
    # Qwen3-0.6B on a card of 24 GB; Qwen3-1.7B on one of 80 GB, or of 24 GB with --lora-rank 32.
    "one-gpu": dict(
        batch_size=32, document_tokens=512, budget_start=512, max_response=1024, learning_rate=2e-6,
    ),
    "small": dict(  # a small model on a CPU: short texts, short thoughts
        batch_size=8, text_in="thought", budget_start=24, budget_decay=0.5, max_response=48,
        document_tokens=128, tokens_per_micro_batch=4096, learning_rate=1e-5,
    ),
}  # fmt: skip
