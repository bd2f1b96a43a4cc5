"""Bugs in what is learnt: rewards, advantages, the loss, the optimiser. See method_mutants.py."""

COLD_START = "rmt/methods/cold_start.py"
GAIN = "rmt/methods/information_gain.py"
MUTANTS = {  # name: (file, text to replace, with what, the check that it fails)
    # Cold start.
    "given responses have advantages of their rewards": (
        "train.py", "c.traces or c.advantage_norm", "c.advantage_norm", "loss traces"),
    "a cold start samples": (
        "train.py", "if c.traces:  # a cold", "if False:  # a cold", "cold_start"),
    "a cold start asks for B_t": (
        "rmt/questions.py", "    if c.traces:\n", "    if False:\n", "cold_start"),
    "no budget of a cold start is B_0": (
        "rmt/questions.py", "c.budget_start + 1))", "c.budget_start))", "cold_start"),
    "all documents of a cold start have one budget": (
        "rmt/questions.py", "default_rng((c.seed, index)).integers", "default_rng(c.seed).integers",
        "cold_start"),
    "budgets of a cold start ignore the seed": (
        "rmt/questions.py", "default_rng((c.seed, index)).integers", "default_rng(index).integers",
        "cold_start"),
    "the gain is behind the whole response": (
        GAIN, "response.tokens[: answer.thinking_length]", "response.tokens",
        "gain"),
    "the gain is behind the thought, without a box": (
        GAIN, "*thought, *box))", "*thought))", "gain"),
    "the gain is of the token before": (
        GAIN, ".tokens[question.position])", ".tokens[question.position - 1])",
        "gain"),
    "the gain is at the sampling temperature": (
        GAIN, "forest, 1.0, tok", "forest, c.temperature, tok", "gain"),
    "the gain is not the reward": (
        "train.py", 'batch.rewards["total"] = information_gain',
        'batch.rewards["length"] = information_gain', "gain"),
    "guesses are drawn at temperature 1": (
        COLD_START, "max_new_tokens=1)", "max_new_tokens=1, temperature=1.0)",
        "cold_start"),
    "guesses are drawn behind the question": (
        COLD_START, "trees = question_trees(questions, data.documents, raw)",
        "trees = question_trees(questions, data.documents, "
        "__import__('rmt.questions').questions.prompts_of(c, data.tokenizer, questions))",
        "cold_start"),
    "the answer is the first guess": (
        COLD_START, "Counter(guesses).most_common(1)[0][0]", "guesses[0]", "cold_start"),
    "the answer is the last guess": (
        COLD_START, "Counter(guesses).most_common(1)[0][0]", "guesses[-1]", "cold_start"),
    "a guess repeats five tokens": (COLD_START, "TAIL = 4", "TAIL = 5", "cold_start"),
    "no guess repeats more": (
        COLD_START, "max(1, TAIL + room - count * (TAIL + beside))", "TAIL", "cold_start"),
    "all responses have the same guesses": (
        COLD_START, "guesses[i :: c.group_size]", "guesses[:]", "cold_start"),
    "the first guess is where the thought begins": (
        COLD_START, 'plain = [0] * (c.text_in == "thought")', "plain = [0]",
        "cold_start"),
    "the text's last token is there twice": (
        "rmt/questions.py", "fork, footer = fork - 1, (int(last),)", "footer = (int(last),)",
        "cold_start"),
    "the text stands in the question": (
        "rmt/questions.py", "known = (c.problem_request, c.text_in)",
        'known = (c.problem_request, "question")', "loss text_in"),
    # Budget and rewards.
    "B_t stays B_0": (
        "rmt/budget.py", "decay ** (step / total_steps)", "decay**0", "loss budget_decay"),
    "B_t a step ahead": (
        "rmt/budget.py", "(step / total_steps)", "((step + 1) / total_steps)", "loss"),
    "B_t rounds": ("rmt/budget.py", "math.floor(exact", "round(exact", "loss budget_decay"),
    "no B_min": ("rmt/budget.py", "max(floor, math", "max(1, math", "loss budget_min"),
    "gamma is 0.2": (
        "rmt/questions.py", "c.budget_decay, c.budget_min", "0.2, c.budget_min",
        "loss budget_decay"),
    "B_0 is 8": (
        "rmt/questions.py", "c.budget_start, c.budget_decay", "8, c.budget_decay",
        "loss budget_start"),
    "B_min is 1": (
        "rmt/questions.py", "c.budget_decay, c.budget_min", "c.budget_decay, 1", "loss budget_min"),
    "a budget although off": (
        "rmt/questions.py", "if not c.budget:", "if False:", "loss no budget"),
    "budgets ignore entropy": (
        "rmt/questions.py", "budget, entropy, c.budget_entropy)", "budget, entropy, 0.0)",
        "loss budget_entropy"),
    "entropy is not clipped above": (
        "rmt/budget.py", "min(2.0, max(0.5, entropy))", "min(9.0, max(0.5, entropy))",
        "loss budget_entropy"),
    "the triangle does not fall": (
        "rmt/budget.py", "abs(length - budget)", "max(0, budget - length)", "loss budget_start"),
    "r_max is 1": ("rmt/questions.py", "c.length_reward_max,", "1.0,", "loss length_reward_max"),
    "w is 0.1": (
        "rmt/questions.py", "c.length_weight, c.length_reward_max", "0.1, c.length_reward_max",
        "loss length_weight"),
    "matches are not weighted": (
        "rmt/rewards.py", "(1 - length_weight) * match", "match", "loss length_weight"),
    "w of a run without budget": (
        "rmt/rewards.py", "0.0 if None in budgets else length_weight", "length_weight",
        "loss no budget"),
    "the gate is open": ("rmt/questions.py", "c.length_reward_gate,", '"none",', "loss gate"),
    "the gate pays the wrong": (
        "rmt/rewards.py", 'correct_only" and not match', 'correct_only" and match', "loss gate"),
    "prefixes count as tokens": (
        "rmt/questions.py", "c.length_reward_gate, c.match", 'c.length_reward_gate, "token"',
        "matches"),
    "any token that comes is right": (
        "rmt/rewards.py", "coming[:1]", "coming[:2]", "matches"),
    # Advantages.
    "sample deviation": (
        "rmt/grpo.py", "centred(rewards).square().mean(dim=1, keepdim=True).sqrt() + delta",
        "rewards.std(dim=1, keepdim=True) + delta", "loss"),
    "rewards are not centred": (
        "rmt/grpo.py", "return centred(rewards) / scale", "return rewards / scale", "loss"),
    "delta is 1e-4": (
        "train.py", "c.advantage_norm, c.advantage_delta", "c.advantage_norm, 1e-4",
        "loss advantage_delta"),
    "norm is group": ("train.py", "reward, c.advantage_norm", 'reward, "group"', "loss norm none"),
    "wrong answers are taught": ("rmt/update.py", "kept &= match > 0", "pass", "loss norm right"),
    "right answers have advantages": (
        "train.py", 'c.traces or c.advantage_norm == "right"', "c.traces", "loss norm right"),
    "batch norm is group": ("rmt/grpo.py", 'if norm == "batch":', "if False:", "loss batch norm"),
    "batch deviation of raw rewards": (
        "rmt/grpo.py", "torch.cat([centred(part) for part in batch])", "torch.cat(list(batch))",
        "loss batch norm"),
    # The loss.
    "no clip": ("rmt/grpo.py", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio", "loss updates"),
    "clip bounds swapped": (
        "rmt/grpo.py", "1 - clip_low, 1 + clip_high", "1 - clip_high, 1 + clip_low",
        "loss updates"),
    "the clip takes the smaller loss": (
        "rmt/grpo.py", "torch.maximum(-advantage * ratio", "torch.minimum(-advantage * ratio",
        "loss updates"),
    "clip_low is 0.2": (
        "rmt/update.py", "c.clip_low, c.clip_high", "0.2, c.clip_high", "loss updates"),
    "clip_high is 0.2": (
        "rmt/update.py", "c.clip_low, c.clip_high", "c.clip_low, 0.2", "loss updates"),
    "k1 for k3": (
        "rmt/grpo.py", "difference.exp() - difference - 1", "-difference", "loss kl_beta"),
    "KL of the other direction": (
        "rmt/grpo.py", "reference_logprob - logprob\n", "logprob - reference_logprob\n",
        "loss kl_beta"),
    "beta does not reach the loss": (
        "rmt/objective.py", "o.kl_beta * (weight * kl)", "0.0 * (weight * kl)", "loss kl_beta"),
    "beta of the objective is 0": (
        "rmt/update.py", "c.clip_high, c.kl_beta", "c.clip_high, 0.0", "loss kl_beta"),
    "KL is not weighted": ("rmt/objective.py", "(weight * kl).sum()", "kl.mean()", "loss kl_beta"),
    "the reference is the model": (
        "rmt/engine/run.py", "reference = load_model(model_dir, world, compute, trainable=False)",
        "reference = model", "loss kl_beta"),
    "the reference at temperature 1": (
        "rmt/update.py", "logprobs(reference)",
        "[target_logprobs(reference, f, 1.0, known[1]) for f in forests]", "loss kl_beta"),
    "no old policy": (
        "rmt/update.py", "forest, objective, old and old[i]", "forest, objective, None",
        "loss updates"),
    "the old policy at temperature 1": (
        "rmt/update.py", "logprobs(model)",
        "[target_logprobs(model, f, 1.0, known[1]) for f in forests]",
        "loss updates"),
    "one update per batch": (
        "rmt/update.py", "range(c.updates_per_batch)", "range(1)", "loss updates"),
    "gradients add up over updates": (
        "rmt/update.py", "        optimizer.zero_grad(set_to_none=True)\n        bad",
        "        bad", "loss updates"),
    "token-mean always": (
        "rmt/update.py", "kept.flatten(), c.aggregation", 'kept.flatten(), "token-mean"',
        "loss sequence-mean"),
    "a mean over all tokens, dropped ones too": (
        "rmt/update.py", "(lengths * kept.flatten()).sum()", "lengths.sum()", "loss drop"),
    "a mean over all responses": (
        "rmt/grpo.py", "lengths.clamp(min=1).double() * rollouts",
        "lengths.clamp(min=1).double() * (rollouts + 1)", "loss sequence-mean"),
    "constant divides by the budget": (
        "rmt/grpo.py", "rollouts * max_tokens", "rollouts * 8", "loss constant"),
    "sequence-sum divides by tokens": (
        "rmt/grpo.py", '"sequence-sum": torch.full(lengths.shape, 1.0 / rollouts',
        '"sequence-sum": torch.full(lengths.shape, 1.0 / tokens', "loss sequence-sum"),
    "dropped groups are kept": (
        "rmt/update.py", 'if c.zero_variance_groups == "drop":', "if False:", "loss drop"),
    "truncated responses are kept": (
        "rmt/update.py", "if c.mask_truncated:", "if False:", "loss truncated"),
    "truncated responses are masked although off": (
        "rmt/update.py", "if c.mask_truncated:", "if True:", "loss"),
    "truncated responses count in the denominator": (
        "rmt/update.py", "(lengths * kept.flatten()).sum()", "lengths.sum()", "loss truncated"),
    "truncated responses count in the number of responses": (
        "rmt/update.py", '"rollouts": float(kept.sum())', '"rollouts": float(kept.numel())',
        "loss truncated mean"),
    "finished responses are masked": (
        "rmt/update.py", "r.finished for r in rollouts", "not r.finished for r in rollouts",
        "loss truncated"),
    "truncated responses leave their group's mean": (
        "train.py", "else advantages(reward, scale)",
        "else advantages(reward * reward.new_tensor([[r.finished for r in group] for group "
        "in batch.responses]), scale)", "loss truncated"),
    "mixed groups are dropped": (
        "rmt/update.py", "kept &= has_both_outcomes(match)",
        "kept &= ~has_both_outcomes(match)", "loss drop"),
    "groups are judged by their rewards": (
        "rmt/update.py", 'match = batch.rewards["match"]', 'match = batch.rewards["total"]',
        "loss drop"),
    "responses scored at temperature 1": (
        "rmt/objective.py", "targets.per_kind(objective.temperature, 1.0)",
        "targets.per_kind(1.0, 1.0)", "loss temperature"),
    "text scored at the temperature": (
        "rmt/objective.py", "targets.per_kind(objective.temperature, 1.0)",
        "targets.per_kind(objective.temperature, objective.temperature)", "loss temperature"),
    "sampled at another temperature": (
        "rmt/questions.py", "tokenizer.vocab_size, c.temperature", "tokenizer.vocab_size, 1.0",
        "loss temperature"),
    "lambda is 0.1": (
        "rmt/update.py", "c.ntp_weight / denominator", "0.1 / denominator", "loss ntp_weight"),
    "text is summed": (
        "rmt/update.py", 'if c.ntp_reduction == "mean" else 1.0', "if False else 1.0", "loss"),
    "text is averaged": (
        "rmt/update.py", 'if c.ntp_reduction == "mean" else 1.0', "if True else 1.0",
        "loss ntp_reduction"),
    "text counted per micro-batch": (
        "rmt/update.py", "sum(tree.trunk_targets for tree in trees)", "trees[-1].trunk_targets",
        "loss micro-batches"),
    "text is not learnt": ("train.py", "    if c.ntp:\n", "    if False:\n", "loss"),
    "text although off": ("train.py", "    if c.ntp:\n", "    if True:\n", "loss no ntp"),
    "scope is not_in_C": (
        "train.py", "questions, c.ntp_scope", 'questions, "not_in_C"', "loss all"),
    "positions reasoned about are text too": (
        "rmt/questions.py", 'if scope != "all":', "if False:", "loss"),
    "low entropy is high entropy": (
        "rmt/curriculum.py", "(tiers == NO_TIER) & (np", "(tiers != NO_TIER) & (np",
        "loss low_entropy"),
    "low entropy from the first token on": (
        "rmt/curriculum.py", "(tiers == NO_TIER) & (np.arange(len(tiers)) >= min_context)",
        "tiers == NO_TIER", "loss low_entropy"),
    "the loss of the last micro-batch is logged": (
        "rmt/update.py",
        'metrics.add_sum("loss/rl", sums["loss/rl"])',
        'metrics.sums["loss/rl"] = float(sums["loss/rl"])',
        "loss micro-batches"),
    # The optimiser.
    "betas are AdamW's": (
        "rmt/engine/run.py", "config.adam_betas", "(0.9, 0.999)", "optimizer"),
    "weight decay is 0.01": (
        "rmt/engine/run.py", "config.weight_decay", "0.01", "optimizer"),
    "norms and biases decay": (
        "rmt/update.py", '"weight_decay": 0.0', '"weight_decay": decay', "optimizer"),
    "nothing decays": (
        "rmt/update.py", '"weight_decay": decay', '"weight_decay": 0.0', "optimizer"),
    "the rate of one group is set": (
        "rmt/update.py", "in optimizer.param_groups:", "in optimizer.param_groups[:1]:",
        "optimizer"),
    "gradients are not clipped": (
        "rmt/update.py", "dist.grad_norm(model, grad_clip)", "dist.grad_norm(model, 1e9)",
        "optimizer"),
    "learning rate of the preset": (
        "rmt/update.py", "learning_rate(c.learning_rate,", "learning_rate(1e-3,", "optimizer"),
    "no warm-up": (
        "rmt/update.py", "(done + 1) / warmup", "1.0", "optimizer"),
    "the warm-up begins at 0": (
        "rmt/update.py", "(done + 1) / warmup", "done / warmup", "optimizer"),
    "the warm-up counts steps": (
        "rmt/update.py", "step * c.updates_per_batch + number", "step", "optimizer"),
    "the rate never falls": (
        "rmt/update.py", "c.lr_schedule, c.warmup_steps", '"constant", c.warmup_steps', "rates"),
    "T of a schedule counts steps": (
        "rmt/update.py", "total_steps * c.updates_per_batch", "total_steps", "rates"),
    "the fall begins at step 0": (
        "rmt/update.py", "max(1, total - warmup)", "total", "rates"),
    "the fall is over an update early": (
        "rmt/update.py", "(total - done)", "(total - done - 1)", "rates"),
    "half the cosine's fall": ("rmt/update.py", "math.pi * left", "math.pi * left / 2", "rates"),
    "linear for cosine": (
        "rmt/update.py", "(1 - math.cos(math.pi * left)) / 2", "left", "rates"),
    "the rate is not set": ("rmt/update.py", 'group["lr"] = rate', "pass", "optimizer"),
}  # fmt: skip
