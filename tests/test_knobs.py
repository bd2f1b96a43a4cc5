"""Every knob is tested through a real step, and a new one cannot be added untested."""

from dataclasses import fields
from pathlib import Path

import pytest
from method_mutants import MUTANTS, all_checks

from rmt.config.config import Config

CHECKS = all_checks()
TESTED = {  # by a check of method_checks.py or method_checks_runs.py
    "batch_size": "counts", "document_tokens": "counts", "epochs": "counts",
    "data_weights": "mixture", "text_in": "loss text_in", "traces": "loss traces",
    "positions_per_document": "counts", "group_size": "counts", "max_response": "counts",
    "samples_per_step": "counts", "steps": "schedule", "seed": "seed", "max_tokens": "ends",
    "max_minutes": "ends", "min_context": "tiers", "tiers": "tiers", "tier_thresholds": "tiers",
    "entropy_top_k": "entropies", "difficulty_model": "entropies", "model": "entropies",
    "curriculum": "schedule", "curriculum_early": "schedule", "curriculum_late": "schedule",
    "curriculum_start": "schedule", "curriculum_end": "schedule",
    "resample_from": "resampling", "resample_tries": "resampling",
    "temperature": "loss temperature", "match": "matches",
    "budget": "loss no budget", "budget_start": "loss budget_start",
    "budget_decay": "loss budget_decay", "budget_min": "loss budget_min",
    "budget_entropy": "loss budget_entropy", "length_weight": "loss length_weight",
    "length_reward_max": "loss length_reward_max", "length_reward_gate": "loss gate",
    "advantage_norm": "loss batch norm", "advantage_delta": "loss advantage_delta",
    "zero_variance_groups": "loss drop", "mask_truncated": "loss truncated",
    "aggregation": "loss sequence-mean",
    "kl_beta": "loss kl_beta", "updates_per_batch": "loss updates", "clip_low": "loss updates",
    "clip_high": "loss updates", "ntp": "loss no ntp", "ntp_weight": "loss ntp_weight",
    "ntp_scope": "loss all", "ntp_reduction": "loss ntp_reduction", "learning_rate": "optimizer",
    "warmup_steps": "optimizer", "lr_schedule": "rates", "adam_betas": "optimizer",
    "weight_decay": "optimizer",
    "grad_clip": "optimizer", "tokens_per_micro_batch": "loss micro-batches", "resume": "resume",
    "eval_data": "held_out", "eval_every": "held_out", "eval_positions": "held_out",
    "eval_decoding": "held_out", "task": "task", "method": "task", "problem_request": "task",
    "lora_rank": "loss lora_rank",
}  # fmt: skip
ELSEWHERE = {  # a test file with the reason why no step of one toy run shows it
    "weights": "a place on this machine: test_find", "data": "a file: test_corpus",
    "out": "a place on this machine: test_resume", "text_fields": "reads a file: test_corpus",
    "max_branches": "changes no result: test_rollout", "keep": "of files: test_saver",
    "keep_best": "of files: test_kept", "export_every": "of files: test_kept",
    "track": "changes no result: test_track",
    "recompute": "changes no result: test_recompute", "save_every": "of files: test_resume",
    "offload": "changes no result: test_distributed", "dtype": "of the machine: test_life",
    "compile": "changes no result: test_compile", "profile": "a trace: test_clock",
    "replicate": "of the machine: test_saver_ranks", "timeout": "of the machine: test_torchrun",
    "dry_run": "plans, does not run: test_plan", "gpus": "plans, does not run: test_plan",
    "nodes": "plans, does not run: test_plan", "gpu_memory": "plans, does not run: test_plan",
    "probe_documents": "asks without learning: test_probe",
    "probe_times": "asks without learning: test_probe",
    "holdout": "which documents are read: test_holdout",
    "max_records": "which documents are read: test_holdout",
    "naive": "changes no result: test_naive",
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_a_knob_changes_a_step_as_its_formula_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    CHECKS[name](tmp_path)


def test_every_knob_has_a_check_or_a_reason():
    names = {field.name for field in fields(Config)}
    assert names <= TESTED.keys() | ELSEWHERE.keys(), "add a check, or say which test has it"
    assert not TESTED.keys() & ELSEWHERE.keys()
    assert set(TESTED.values()) <= CHECKS.keys()
    for name in names & ELSEWHERE.keys():
        file = ELSEWHERE[name].split(": ")[1]
        assert Path(__file__).with_name(f"{file}.py").is_file(), f"{name}: there is no {file}.py"


def test_every_mutant_names_a_check():
    assert {check for *_, check in MUTANTS.values()} <= CHECKS.keys()
