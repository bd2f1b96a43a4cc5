"""Broken copies of the method, each with one bug in a knob, an equation, a mask, a denominator, what
a run keeps or how it evaluates; and the check that finds each out.

    python tests/method_mutants.py [NAME ...]   prints what kills each mutant; exit status 1 if one
                                                survives, or a copy without a bug does not

A mutant is a copy of rmt/, train.py and eval.py with one replacement, run in a child of a process
that has imported PyTorch.
"""

import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FROZEN = "reference.requires_grad_(False)"
MUTANTS = {  # name: (file, text to replace, with what, the check that it fails)
    # Budget and rewards.
    "B_t stays B_0": ("budget.py", "decay ** (step / total_steps)", "decay**0", "loss budget_decay"),
    "B_t a step ahead": ("budget.py", "(step / total_steps)", "((step + 1) / total_steps)", "loss"),
    "B_t rounds": ("budget.py", "math.floor(start", "round(start", "loss budget_decay"),
    "no B_min": ("budget.py", "max(floor, math", "max(1, math", "loss budget_min"),
    "gamma is 0.2": ("ask.py", "c.budget_decay, c.budget_min", "0.2, c.budget_min", "loss budget_decay"),
    "B_0 is 8": ("ask.py", "c.budget_start, c.budget_decay", "8, c.budget_decay", "loss budget_start"),
    "B_min is 1": ("ask.py", "c.budget_decay, c.budget_min", "c.budget_decay, 1", "loss budget_min"),
    "a budget although off": ("ask.py", "if not c.budget:", "if False:", "loss no budget"),
    "budgets ignore entropy": (
        "ask.py", "entropy, run.config.budget_entropy", "entropy, 0.0", "loss budget_entropy"),
    "entropy is not clipped above": (
        "budget.py", "min(2.0, max(0.5, entropy))", "max(0.5, entropy)", "loss budget_entropy"),
    "the triangle does not fall": ("budget.py", "abs(length - budget)", "max(0, budget - length)", "loss no ntp"),
    "r_max is 1": ("ask.py", "c.length_reward_max,", "1.0,", "loss length_reward_max"),
    "w is 0.1": ("ask.py", "c.length_weight, c.length_reward_max", "0.1, c.length_reward_max", "loss length_weight"),
    "matches are not weighted": ("rewards.py", "(1 - length_weight) * match", "match", "loss length_weight"),
    "w of a run without budget": (
        "rewards.py", "0.0 if None in budgets else length_weight", "length_weight", "loss no budget"),
    "the gate is open": ("ask.py", "c.length_reward_gate,", '"none",', "loss gate"),
    "the gate pays the wrong": ("rewards.py", 'correct_only" and not match', 'correct_only" and match', "loss gate"),
    "prefixes count as tokens": ("ask.py", "c.length_reward_gate, c.match", 'c.length_reward_gate, "token"', "loss prefix"),
    "any token that comes is right": ("rewards.py", "coming[:1]", "coming[:2]", "loss at step 2 of 3"),
    # Advantages.
    "sample deviation": ("grpo.py", "centred(rewards).square().mean(dim=1, keepdim=True).sqrt() + delta", "rewards.std(dim=1, keepdim=True) + delta", "loss"),
    "rewards are not centred": ("grpo.py", "return centred(rewards) / scale", "return rewards / scale", "loss"),
    "delta is 1e-4": ("../train.py", "c.advantage_norm, c.advantage_delta", "c.advantage_norm, 1e-4", "loss advantage_delta"),
    "norm is group": ("../train.py", "total, c.advantage_norm", 'total, "group"', "loss norm none"),
    "batch norm is group": ("grpo.py", 'if norm == "batch":', "if False:", "loss batch norm"),
    "batch deviation of raw rewards": ("grpo.py", "torch.cat([centred(part) for part in batch])", "torch.cat(list(batch))", "loss batch norm"),
    # The loss.
    "no clip": ("grpo.py", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio", "loss updates"),
    "clip bounds swapped": ("grpo.py", "1 - clip_low, 1 + clip_high", "1 - clip_high, 1 + clip_low", "loss updates"),
    "the clip takes the smaller loss": ("grpo.py", "torch.maximum(-advantage * ratio", "torch.minimum(-advantage * ratio", "loss updates"),
    "clip_low is 0.2": ("update.py", "c.clip_low, c.clip_high", "0.2, c.clip_high", "loss updates"),
    "clip_high is 0.2": ("update.py", "c.clip_low, c.clip_high", "c.clip_low, 0.2", "loss updates"),
    "k1 for k3": ("grpo.py", "difference.exp() - difference - 1", "-difference", "loss kl_beta"),
    "KL of the other direction": ("grpo.py", "reference_logprob - logprob\n", "logprob - reference_logprob\n", "loss kl_beta"),
    "beta does not reach the loss": ("objective.py", "o.kl_beta * (weight * kl)", "0.0 * (weight * kl)", "loss kl_beta"),
    "beta of the objective is 0": ("update.py", "c.clip_high, c.kl_beta", "c.clip_high, 0.0", "loss kl_beta"),
    "KL is not weighted": ("objective.py", "(weight * kl).sum()", "kl.mean()", "loss kl_beta"),
    "the reference is the model": ("run.py", "reference = load_model(source, world, compute, trainable=False)", "reference = model", "loss kl_beta"),
    "the reference at temperature 1": ("update.py", "score(run.reference, f, *known)", "score(run.reference, f, 1.0, known[1])", "loss kl_beta"),
    "no old policy": ("update.py", "forest, objective, old and old[i]", "forest, objective, None", "loss updates"),
    "the old policy at temperature 1": ("update.py", "score(run.model, f, *known)", "score(run.model, f, 1.0, known[1])", "loss updates"),
    "one update per batch": ("update.py", "range(c.updates_per_batch)", "range(1)", "loss updates"),
    "gradients add up over updates": ("update.py", "        run.optimizer.zero_grad(set_to_none=True)\n        culprits", "        culprits", "loss updates"),
    "token-mean always": ("update.py", "kept.flatten(), c.aggregation", 'kept.flatten(), "token-mean"', "loss sequence-mean"),
    "a mean over all tokens, dropped ones too": ("update.py", "(lengths * kept.flatten()).sum()", "lengths.sum()", "loss drop"),
    "a mean over all responses": ("grpo.py", "lengths.clamp(min=1).double() * rollouts", "lengths.clamp(min=1).double() * (rollouts + 1)", "loss sequence-mean"),
    "constant divides by the budget": ("grpo.py", "rollouts * max_tokens", "rollouts * 8", "loss constant"),
    "sequence-sum divides by tokens": ("grpo.py", '"sequence-sum": torch.full(lengths.shape, 1.0 / rollouts', '"sequence-sum": torch.full(lengths.shape, 1.0 / tokens', "loss sequence-sum"),
    "dropped groups are kept": ("update.py", 'if c.zero_variance_groups == "drop":', "if False:", "loss drop"),
    "mixed groups are dropped": ("update.py", "kept &= mixed(match)", "kept &= ~mixed(match)", "loss drop"),
    "groups are judged by their rewards": ("../train.py", 'advantage, rewards["match"], metrics', "advantage, total, metrics", "loss drop"),
    "responses scored at temperature 1": ("objective.py", "targets.per_kind(objective.temperature, 1.0)", "targets.per_kind(1.0, 1.0)", "loss temperature"),
    "text scored at the temperature": ("objective.py", "targets.per_kind(objective.temperature, 1.0)", "targets.per_kind(objective.temperature, objective.temperature)", "loss temperature"),
    "sampled at another temperature": ("ask.py", "tokenizer.vocab_size, c.temperature", "tokenizer.vocab_size, 1.0", "sampled"),
    "lambda is 0.1": ("update.py", "c.ntp_weight / denominator", "0.1 / denominator", "loss ntp_weight"),
    "text is summed": ("update.py", 'if c.ntp_reduction == "mean" else 1.0', 'if False else 1.0', "loss"),
    "text is averaged": ("update.py", 'if c.ntp_reduction == "mean" else 1.0', 'if True else 1.0', "loss ntp_reduction"),
    "text counted per micro-batch": ("update.py", "sum(tree.trunk_targets for tree in trees)", "trees[-1].trunk_targets", "loss micro-batches"),
    "text is not learnt": ("../train.py", "    if c.ntp:\n", "    if False:\n", "loss"),
    "text although off": ("../train.py", "    if c.ntp:\n", "    if True:\n", "loss no ntp"),
    "scope is not_in_C": ("../train.py", "questions, low, c.ntp_scope", 'questions, low, "not_in_C"', "loss all"),
    "positions reasoned about are text too": ("batch.py", 'if scope != "all":', "if False:", "loss"),
    "low entropy is high entropy": ("curriculum.py", "(tiers == NO_TIER) & (np", "(tiers != NO_TIER) & (np", "loss low_entropy"),
    "low entropy from the first token on": ("curriculum.py", "(tiers == NO_TIER) & (np.arange(len(tiers)) >= min_context)", "tiers == NO_TIER", "loss low_entropy"),
    "the loss of the last micro-batch is logged": ("update.py", 'metrics.add("loss/rl", sums["loss/rl"], 1 / (len(forests) * run.world.size))', 'metrics.sums["loss/rl|sum"] = float(sums["loss/rl"]); metrics.sums["loss/rl|count"] = 1.0', "logged loss"),
    # The optimiser.
    "betas are AdamW's": ("run.py", "betas=config.adam_betas", "betas=(0.9, 0.999)", "check_optimizer"),
    "weight decay is 0.01": ("run.py", "weight_decay=config.weight_decay", "weight_decay=0.01", "check_optimizer"),
    "gradients are not clipped": ("update.py", "dist.grad_norm(run.model, c.grad_clip)", "dist.grad_norm(run.model, 1e9)", "check_optimizer"),
    "learning rate of the preset": ("update.py", "rate = c.learning_rate *", "rate = 1e-3 *", "check_optimizer"),
    "no warm-up": ("update.py", "min(1.0, updates / max(1, c.warmup_steps))", "1.0", "check_optimizer"),
    "the warm-up counts steps": ("update.py", "run.step * c.updates_per_batch + number + 1", "run.step + 1", "check_optimizer"),
    "the rate is not set": ("update.py", 'group["lr"] = rate', "pass", "check_optimizer"),
    # Difficulty and curriculum.
    "tiers above their ends": ("curriculum.py", 'entropy, side="right") - 1', 'entropy, side="right")', "check_tiers"),
    "min_context ignored": ("run.py", "assign_tiers(entropy, thresholds, config.min_context)", "assign_tiers(entropy, thresholds, 8)", "check_tiers"),
    "quantiles over early positions": ("curriculum.py", "e[min_context:] for e in entropies", "e[1:] for e in entropies", "check_tiers"),
    "thresholds are absolute": ("sources.py", 'config.tiers == "quantile"', "False", "check_tiers"),
    "top-k is all": ("sources.py", "config.entropy_top_k,\n", "0,\n", "check_entropies"),
    "difficulty without the begin token": ("sources.py", "documents, tokenizer.begin_ids, config", "documents, [], config", "check_entropies"),
    "entropies one token late": ("difficulty.py", "([np.inf], entropy[start : start + len(tree) - 1])", "(entropy[start : start + len(tree)],)", "check_entropies"),
    "the model judges itself": ("sources.py", "if config.difficulty_model else source", "if False else source", "check_entropies"),
    "early is fixed": ("ask.py", "c.curriculum_early,", "(0.6, 0.3, 0.1),", "check_schedule"),
    "late is fixed": ("ask.py", "c.curriculum_late,", "(0.1, 0.3, 0.6),", "check_schedule"),
    "t1 is fixed": ("ask.py", "c.curriculum_start,", "0.15,", "check_schedule"),
    "t2 is fixed": ("ask.py", "c.curriculum_end,", "0.7,", "check_schedule"),
    "early and late swapped": ("curriculum.py", "(1 - u) * np.asarray(early) + u * np", "u * np.asarray(early) + (1 - u) * np", "check_schedule"),
    "no ramp": ("curriculum.py", "min(1.0, max(0.0, (progress - start) / (end - start)))", "float(progress > start)", "check_schedule"),
    "a curriculum although off": ("ask.py", "if not c.curriculum:", "if False:", "check_schedule"),
    "the rule is the schedule": ("ask.py", 'c.curriculum_rule == "adaptive"', "False", "check_adaptive"),
    "the floor is 0.1": ("ask.py", "rates.T, c.adaptive_floor", "rates.T, 0.1", "check_adaptive"),
    "tiers by p": ("curriculum.py", "floor + 4 * p * (1 - p)", "floor + 4 * p", "check_adaptive"),
    "match rates do not fade": ("ask.py", "    run.curriculum.fade()\n", "", "check_adaptive"),
    "answers are not observed": ("ask.py", "    _observe(run, questions, said)\n    taken", "    taken", "check_adaptive"),
    "noise is asked again": ("curriculum.py", "if position not in gone and not self._is_noise(document, position[None]).any():", "if position not in gone:", "check_adaptive"),
    "nothing is noise": ("run.py", "Curriculum(tiers, config.seed, config.noise_tries)", "Curriculum(tiers, config.seed)", "check_adaptive"),
    "a miss after a match is noise": ("curriculum.py", "elif self.misses[index] != MATCHED:", "else:", "matched"),
    # Counts.
    "one position per document": ("ask.py", "_draw(run, step, index, c.positions_per_document)", "_draw(run, step, index, 1)", "check_counts"),
    "positions of a step repeat": ("curriculum.py", "            gone.add(position)\n", "", "check_counts"),
    "G is 4": ("ask.py", "trees, c.group_size, sampling)", "trees, 4, sampling)", "check_counts"),
    "responses of any length": ("ask.py", "        c.max_response, tokenizer.stop_ids", "        24, tokenizer.stop_ids", "check_counts"),
    "documents are not cut": ("sources.py", "config.text_fields, config.document_tokens, config.min", "config.text_fields, 10**6, config.min", "check_counts"),
    "epochs are ignored": ("run.py", "int(config.epochs * len(documents)", "int(10 * len(documents)", "check_counts"),
    "tokens do not end a run": ("run.py", "0 < c.max_tokens <= self.tokens", "False", "check_ends"),
    "minutes do not end a run": ("run.py", "0 < 60 * c.max_minutes <= self.seconds", "False", "check_ends"),
    "minutes are seconds": ("run.py", "60 * c.max_minutes", "c.max_minutes", "check_ends"),
    "tokens are not added up": ("../train.py", "run.tokens += ", "run.tokens = 0 * ", "check_ends"),
    # Dynamic sampling.
    "resampling from the start": ("ask.py", "0 <= c.resample_from <= step", "0 <= c.resample_from", "check_resampling"),
    "tries are four": ("ask.py", "c.resample_tries if 0", "4 if 0", "check_resampling"),
    "tries have the same numbers": ("ask.py", "attempt * c.group_size", "0 * c.group_size", "check_resampling"),
    "a position is asked twice": ("ask.py", "        taken[question.document].add(question.position)\n", "        pass\n", "check_resampling"),
    "dropped tokens are not counted": ("ask.py", "        generated += sum", "        sum", "check_resampling"),
    # Randomness and what is kept.
    "the seed of sampling is 0": ("ask.py", "c.seed, purpose, step", "0, purpose, step", "check_seed"),
    "the order's seed is 0": ("run.py", "config.batch_size, total, config.seed", "config.batch_size, total, 0", "check_seed"),
    "misses are not saved": ("curriculum.py", '"misses": self.misses, ', "", "check_resume"),
    "rates are not saved": ("curriculum.py", ', "rates": self.rates}', "}", "check_resume"),
    "draws are not saved": ("curriculum.py", '"drawn": self.drawn, ', "", "check_resume"),
    "the step is not restored": ("run.py", 'run.step, run.refused_in_a_row = saved["step"]', 'run.step, run.refused_in_a_row = 0', "check_resume"),
    "refusals are not restored": ("run.py", 'saved["step"], saved["refused_in_a_row"]', 'saved["step"], 0', "check_resume"),
    "tokens are not restored": ("run.py", 'run.tokens, run.seconds = saved["tokens"]', "run.tokens, run.seconds = 0.0", "check_resume"),
    "seconds are not restored": ("run.py", 'saved["tokens"], saved["seconds"]', 'saved["tokens"], 0.0', "check_resume"),
    "T is not restored": ("run.py", 'saved.get("total_steps") or config.steps', "(saved and 3) or config.steps", "check_resume"),
    "moments are not restored": ("checkpoint.py", 'optim_state_dict=state["optimizer"]', "optim_state_dict=get_state_dict(model, type(optimizer)(model.parameters()))[1]", "check_resume"),
    # Evaluation.
    "a run evaluates at B_t": ("../train.py", "budget_of(run, run.total_steps)", "budget_of(run, run.step)", "check_held_out"),
    "an evaluation from the first token on": ("run.py", "documents, entropies, thresholds, config.min_context, config.eval_positions", "documents, entropies, thresholds, 1, config.eval_positions", "check_held_out"),
    "64 positions per tier": ("run.py", "config.eval_positions, config.seed", "64, config.seed", "check_held_out"),
    "an evaluation at every step": ("../train.py", "run.step % c.eval_every == 0", "run.step % 1 == 0", "check_held_out"),
    "a model is asked for B_0": ("../eval.py", "budget_at(1, 1, c.budget_start", "budget_at(0, 1, c.budget_start", "check_budget_of_a_model"),
    "eval.py is always greedy": ("../eval.py", 'if options.decoding == "sampled" else', "if False else", "check_eval_script"),
    "eval.py has a seed of its own": ("../eval.py", "        config.seed, \"evaluate\",", "        0, \"evaluate\",", "check_eval_script"),
    "eval.py ignores --budget": ("../eval.py", "        budget = options.budget or budget\n", "", "check_eval_script"),
    "eval.py ignores --per-tier": ("../eval.py", "options.per_tier, config.seed", "400, config.seed", "check_eval_script"),
    "ntr asks for a length": ("../eval.py", 'if options.mode == "rmt":', "if True:", "check_eval_script"),
}  # fmt: skip
