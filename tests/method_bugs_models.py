"""Bugs that other models and other runs than the default show, in models/ too, and bugs in what a
step says. See method_mutants.py.
"""

MUTANTS = {  # name: (file, text to replace, with what, the check that it fails)
    # A begin token, two ends, padding.
    "text is learnt without its begin token": (
        "train.py", "data.documents, tokenizer.begin_ids, batch.questions",
        "data.documents, [], batch.questions", "begin"),
    "text is predicted without its begin token": (
        "rmt/evaluation/evaluate.py",
        "    begin = tokenizer.begin_ids\n", "    begin = []\n", "begin"),
    "a begin token shifts predictions": (
        "rmt/evaluation/evaluate.py",
        "start + len(begin) + p.position", "start + p.position", "begin"),
    "nats without the begin token": (
        "rmt/evaluation/evaluate.py",
        "mine, documents, tokenizer.begin_ids,", "mine, documents, [],",
        "begin"),
    "nats over padding": (
        "rmt/evaluation/evaluate.py", "1.0, tokenizer.vocab_size)", "1.0, None)", "begin"),
    "padding is predicted": (
        "rmt/evaluation/evaluate.py", "hidden[before], head, 1, tokenizer.vocab_size,",
        "hidden[before], head, 1, None,", "begin"),
    "one end of a response": (
        "rmt/questions.py", "c.max_response, tokenizer.stop_ids,",
        "c.max_response, tokenizer.stop_ids[:1],", "stops"),
    "one end of a response in an evaluation": (
        "rmt/engine/held_out.py", '"evaluate"), temp',
        '"evaluate"), stop_ids=tokenizer.stop_ids[:1], temp', "stops"),
    "one end of a response in eval.py": (
        "eval.py", "config.max_response, tokenizer.stop_ids,",
        "config.max_response, tokenizer.stop_ids[:1],", "requests"),
    "probes have the numbers of training": (
        "rmt/report/probe.py", 'questions, step, "sample")', 'questions, step, "train")', "stops"),
    "all problems are asked": (
        "eval.py", "documents[: options.limit or None]", "documents", "requests"),
    "evaluations of seed 0": (
        "rmt/engine/held_out.py", '"evaluate"), temp', '"evaluate"), seed=0, temp', "stops"),
    "an evaluation has one budget": (
        "rmt/engine/held_out.py", "chosen.positions, budget, c.budget_entropy,",
        "chosen.positions, budget, 0.0,", "stops"),
    "eval.py has one budget": (
        "eval.py", 'config.budget_entropy if mode == "rmt" else 0.0', "0.0", "taken"),
    "a prefix is a token": (
        "rmt/evaluation/evaluate.py", "match_reward(answer, question.coming))",
        'match_reward(answer, question.coming, "prefix"))', "prefix"),
    "a token is a prefix": (
        "rmt/evaluation/evaluate.py", 'question.coming, "prefix")', "question.coming)", "prefix"),
    "the first token of an answer is what it names": (
        "rmt/evaluation/evaluate.py", "ids[0] if len(ids) == 1 else None", "ids[0]", "prefix"),
    "an evaluation has a request of its own": (
        "rmt/engine/held_out.py", "budget, c.problem_request, sampling",
        'budget, "Solve.", sampling',
        "requests"),
    "eval.py has a request of its own": (
        "eval.py", "budget, config.problem_request, sampling", 'budget, "Solve.", sampling',
        "requests"),
    **{
        f"the run's {name} is not taken": (
            "rmt/engine/protocol.py", f'"{name}",', "", "taken")
        for name in (
            "weights", "text_fields", "document_tokens", "min_context", "entropy_top_k", "tiers",
            "tier_thresholds", "max_response", "temperature", "problem_request",
            "budget_entropy",
        )
    },
    "the run's judge is not taken": (
        "rmt/engine/protocol.py", 'run.get("difficulty_model") or initial_model(run)',
        "initial_model(run)", "taken"),
    # Seeds, and what is known of what was asked.
    "the curriculum's seed is 0": (
        "rmt/engine/run.py", "Curriculum(data.tiers, config.seed)", "Curriculum(data.tiers, 0)",
        "curriculum_seed"),
    "tiers are drawn by seed 0": (
        "rmt/curriculum.py", "(self.seed, step, document, attempt)",
        "(0, step, document, attempt)", "curriculum_seed"),
    "all documents draw the same tiers": (
        "rmt/curriculum.py", "(self.seed, step, document, attempt)",
        "(self.seed, step, attempt)", "curriculum_seed"),
    "positions are shuffled by seed 0": (
        "rmt/curriculum.py", "(self.seed, document, tier, shuffle)",
        "(0, document, tier, shuffle)", "curriculum_seed"),
    "positions of an evaluation by seed 0": (
        "rmt/engine/tiers.py", "config.eval_positions, config.seed", "config.eval_positions, 0",
        "curriculum_seed"),
    "difficulty of another dtype": (
        "rmt/engine/tiers.py", " {compute} of {tokenizer", " of {tokenizer", "dtype"),
    # What a step says.
    "the rate of all steps is logged as the last": (
        "rmt/update.py", '"update/learning_rate", rate, 1', '"update/learning_rate", '
        "c.learning_rate, 1", "optimizer"),
    "the share of length by a w of 0.1": (
        "rmt/engine/step_metrics.py", "length_share(*paid, c.length_weight,",
        "length_share(*paid, 0.1,", "loss length_weight"),
    "dropped groups count in the share of length": (
        "rmt/engine/step_metrics.py", 'if c.zero_variance_groups == "drop"', "if False",
        "loss drop"),
    "clipped of all tokens": (
        "rmt/update.py", 'sums["clipped"], (targets.rollout >= 0).sum()',
        'sums["clipped"], len(targets.rollout)', "loss updates"),
    "tokens after </think> from the first on": (
        "rmt/engine/step_metrics.py", "len(r.tokens) - a.thinking_length for",
        "len(r.tokens) for", "loss"),
    "the budget's error in tokens": (
        "rmt/engine/step_metrics.py", "abs(answer.thinking_length - q.budget) / q.budget",
        "abs(answer.thinking_length - q.budget)", "loss"),
    "tiers are logged with those above": (
        "rmt/engine/step_metrics.py", "q.tier == tier for q", "q.tier >= tier for q", "loss"),
    "thinking over all responses": (
        "rmt/engine/step_metrics.py", "in thought), len(thought))",
        "in thought), count)", "loss"),
    "scoring is no work": (
        "rmt/engine/step_metrics.py",
        "scored = (c.kl_beta > 0) + (c.updates_per_batch > 1)", "scored = 0",
        "work"),
    "further updates are no work": (
        "rmt/engine/step_metrics.py", " * updates + scored", " + scored", "work"),
    "frozen weights have gradients": (
        "rmt/engine/step_metrics.py", "(2 if c.lora_rank else 3)", "3", "work"),
    "a run's evaluation puts the text into the question": (
        "rmt/engine/held_out.py", "world, 1, c.text_in", 'world, 1, "question"', "text_in_taken"),
    "eval.py puts the text into the question": (
        "eval.py", "*more, config.text_in)", '*more, "question")', "text_in_taken"),
    "eval.py does not ask where the text stood": (
        "rmt/engine/protocol.py", '\n    "text_in",\n', "\n", "text_in_taken"),
    # Scaled rotary frequencies.
    "a scaling multiplies": (
        "models/rope.py", "* frequency / scaling.factor", "* frequency * scaling.factor", "scaled"),
    "a scaling divides what it should keep": (
        "models/rope.py", "(1 - kept) * frequency / scaling.factor + kept * frequency",
        "kept * frequency / scaling.factor + (1 - kept) * frequency", "scaled"),
    "Llama 3 blends from the wrong boundary": (
        "models/rope.py", "(turns - self.low_freq_factor) /", "(turns - self.high_freq_factor) /",
        "scaled"),
    "Llama 3 counts radians as turns": (
        "models/rope.py", "/ (2 * math.pi / frequency)", "/ (1 / frequency)", "scaled"),
    "YaRN counts radians as turns": (
        "models/rope.py", "(turns * 2 * math.pi)", "turns", "scaled"),
    "YaRN's boundaries are swapped": (
        "models/rope.py", "turns = self.beta_fast, self.beta_slow",
        "turns = self.beta_slow, self.beta_fast", "scaled"),
    "YaRN truncates when it is told not to": (
        "models/rope.py", "        if self.truncate:\n", "        if True:\n", "scaled"),
    "YaRN never truncates": (
        "models/rope.py", "        if self.truncate:\n", "        if False:\n", "scaled"),
    "YaRN's blend ends with the frequencies": (
        "models/rope.py", "min(last, size - 1)", "min(last, size // 2 - 1)", "scaled"),
    "YaRN's blend begins before the frequencies": (
        "models/rope.py", "max(first, 0)", "max(first, -1)", "scaled"),
    "YaRN's attention factor is not taken": (
        "models/rope.py", "if self.attention_factor is not None:", "if False:", "scaled"),
    "YaRN grows tenfold": ("models/rope.py", "0.1 * scale *", "1.0 * scale *", "scaled"),
    "YaRN takes one mscale for two": (
        "models/rope.py", "if self.mscale and self.mscale_all_dim:",
        "if self.mscale:", "scaled"),
    "YaRN scales cos alone": (
        "models/transformer.py", "amplitude * angle.sin()", "angle.sin()", "scaled"),
    # Fields that contradict each other, or that ask for what is not implemented.
    "the type of rope_scaling wins": (
        "models/rope.py", "if len(set(kinds.values())) > 1:", "if False:", "refused"),
    "the fields of rope_scaling win": (
        "models/rope.py", "if first.get(field) != last.get(field):", "if False:", "refused"),
    "the context within a scaling wins": (
        "models/rope.py", "if values.setdefault(ORIGINAL, outer) != outer:",
        "if values.setdefault(ORIGINAL, outer) and False:", "refused"),
    "unknown fields of a scaling are left out": (
        "models/rope.py", "if unknown := sorted(values.keys() - known.keys() - BESIDES):",
        "if unknown := []:", "refused"),
    "a window one short of the context": (
        "models/config.py", "if window < config.max_position_embeddings:",
        "if window + 1 < config.max_position_embeddings:", "refused"),
    "a window that is not given is none": (
        "models/config.py", 'raw.get("sliding_window", missing) is None',
        'raw.get("sliding_window") is None', "refused"),
    # OLMo 2.
    "OLMo 2 norms the sum": (
        "models/transformer.py", "x = x + self.post_attention_layernorm(self.self_attn.o_proj("
        "attended.flatten(1)))", "x = self.post_attention_layernorm(x + self.self_attn.o_proj("
        "attended.flatten(1)))", "post_norm"),
    "OLMo 2 norms attention and MLP alike": (
        "models/transformer.py", "self.post_feedforward_layernorm(self.mlp(x))",
        "self.post_attention_layernorm(self.mlp(x))", "post_norm"),
    "OLMo 2 norms before attention": (
        "models/transformer.py", "nn.Identity() if config.post_norm else norm()", "norm()",
        "post_norm"),
    "OLMo 2 norms queries alone": (
        "models/transformer.py", 'if self.qk_norm == "all":\n            q, k = self.q_norm(q), '
        "self.k_norm(k)", 'if self.qk_norm == "all":\n            q = self.q_norm(q)',
        "post_norm"),
    "OLMo 2 has the epsilon of Llama": (
        "models/config.py", ", rms_norm_eps=1e-5)", ")", "post_norm"),
}  # fmt: skip
