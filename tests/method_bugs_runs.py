"""Bugs in what is asked, what a run keeps and how it evaluates. See method_mutants.py."""

RESAMPLING = "rmt/methods/dynamic_sampling.py"
MUTANTS = {  # name: (file, text to replace, with what, the check that it fails)
    # Difficulty and curriculum.
    "tiers above their ends": (
        "rmt/curriculum.py", 'entropy, side="right") - 1', 'entropy, side="right")', "tiers"),
    "min_context ignored": (
        "rmt/engine/tiers.py", "assign_tiers(entropy, thresholds, config.min_context)",
        "assign_tiers(entropy, thresholds, 8)", "tiers"),
    "quantiles over early positions": (
        "rmt/curriculum.py", "e[min_context:] for e in entropies", "e[1:] for e in entropies",
        "tiers"),
    "thresholds are absolute": (
        "rmt/engine/tiers.py", 'config.tiers == "quantile"', "False", "tiers"),
    "top-k is all": ("rmt/engine/tiers.py", "config.entropy_top_k,\n", "0,\n", "entropies"),
    "difficulty without the begin token": (
        "rmt/engine/tiers.py", "documents, tokenizer.begin_ids, config", "documents, [], config",
        "entropies"),
    "entropies one token late": (
        "rmt/difficulty.py", "([np.inf], entropy[start : start + len(tree) - 1])",
        "(entropy[start : start + len(tree)],)", "entropies"),
    "the model judges itself": (
        "rmt/engine/tiers.py", "    if not config.difficulty_model:\n", "    if True:\n",
        "entropies"),
    "early is fixed": ("rmt/questions.py", "c.curriculum_early,", "(0.6, 0.3, 0.1),", "schedule"),
    "late is fixed": ("rmt/questions.py", "c.curriculum_late,", "(0.1, 0.3, 0.6),", "schedule"),
    "t1 is fixed": ("rmt/questions.py", "c.curriculum_start,", "0.15,", "schedule"),
    "t2 is fixed": ("rmt/questions.py", "c.curriculum_start, c.curriculum_end",
        "c.curriculum_start, 0.7", "schedule"),
    "early and late swapped": (
        "rmt/curriculum.py", "(1 - u) * np.asarray(early) + u * np",
        "u * np.asarray(early) + (1 - u) * np", "schedule"),
    "no ramp": (
        "rmt/curriculum.py", "min(1.0, max(0.0, (progress - start) / (end - start)))",
        "float(progress > start)", "schedule"),
    "a curriculum although off": (
        "rmt/questions.py", "if not c.curriculum:", "if False:", "schedule"),
    # Counts.
    "one position per document": (
        "train.py", "step, i, c.positions_per_document)", "step, i, 1)", "counts"),
    "positions of a step repeat": (
        "rmt/curriculum.py", "            gone.add(position)\n", "", "counts"),
    "G is 4": ("train.py", "trees, c.group_size, sampling_at", "trees, 4, sampling_at", "counts"),
    "responses of any length": (
        "rmt/questions.py", "        c.max_response, tokenizer.stop_ids",
        "        24, tokenizer.stop_ids", "counts"),
    "documents are not cut": (
        "rmt/engine/loading.py", "config.text_fields, config.document_tokens,",
        "config.text_fields, 10**6,", "counts"),
    "epochs are ignored": (
        "rmt/engine/resume.py", "min(config.epochs * documents", "min(10 * documents", "counts"),
    "tokens do not end a run": (
        "rmt/engine/run.py", "0 < c.max_tokens <= self.tokens", "False", "ends"),
    "minutes do not end a run": (
        "rmt/engine/run.py", "0 < 60 * c.max_minutes <= self.seconds", "False", "ends"),
    "minutes are seconds": ("rmt/engine/run.py", "60 * c.max_minutes", "c.max_minutes", "ends"),
    "tokens are not added up": ("train.py", "run.tokens += ", "run.tokens = 0 * ", "ends"),
    # Dynamic sampling.
    "resampling from the start": (
        RESAMPLING, "0 <= c.resample_from <= step", "0 <= c.resample_from",
        "resampling"),
    "tries are four": (RESAMPLING, "c.resample_tries if 0", "4 if 0", "resampling"),
    "tries have the same numbers": (
        "rmt/questions.py", "attempt * c.group_size", "0 * c.group_size", "resampling"),
    "a position is asked twice": (
        RESAMPLING,
        "            taken[question.document].add(question.position)\n", "            pass\n",
        "resampling"),
    "dropped tokens are not counted": (
        RESAMPLING, "        dropped += sum", "        sum", "resampling"),
    # Tasks.
    "problems are asked as text": (
        "rmt/questions.py", "prompt_for(c.task, tokenizer", 'prompt_for("next-token", tokenizer',
        "task"),
    "the request is ours": (
        "rmt/questions.py", "(c.problem_request, c.text_in)", '("Solve it.", c.text_in)', "task"),
    "problems are asked in their middle": (
        "rmt/questions.py", "[len(data.documents[index].tokens)], 0", "[4], 0",
        "task"),
    "nothing asks a question": ("rmt/questions.py", 'if c.task == "nothing":', "if False:", "task"),
    # Randomness and what is kept.
    "the seed of sampling is 0": (
        "rmt/questions.py", "c.seed, purpose, step", "0, purpose, step", "seed"),
    "the order's seed is 0": (
        "rmt/engine/run.py", "(config.batch_size, total, config.seed)",
        "(config.batch_size, total, 0)", "seed"),
    "draws are not saved": (
        "rmt/engine/run.py", '{"drawn": torch.from_numpy(run.curriculum.drawn)}', "{}", "resume"),
    "the step is not restored": (
        "rmt/engine/run.py", 'run.step, run.refused_in_a_row = saved["step"]',
        "run.step, run.refused_in_a_row = 0", "resume"),
    "refusals are not restored": (
        "rmt/engine/run.py",
        'saved["step"], saved["refused_in_a_row"]', 'saved["step"], 0', "resume"),
    "tokens are not restored": (
        "rmt/engine/run.py",
        'run.tokens, run.seconds = saved["tokens"]', "run.tokens, run.seconds = 0.0",
        "resume"),
    "seconds are not restored": (
        "rmt/engine/run.py", 'saved["tokens"], saved["seconds"]', 'saved["tokens"], 0.0', "resume"),
    "T is not restored": (
        "rmt/engine/resume.py", "        given = before\n", "        given = 7\n", "resume"),
    "moments are not restored": (
        "rmt/engine/checkpoint.py", 'optim_state_dict=state["optimizer"]',
        "optim_state_dict=get_state_dict(model, type(optimizer)(model.parameters()))[1]",
        "resume"),
    # A mixture of sources.
    "weights of a mixture are ignored": (
        "rmt/data/order.py", "np.asarray(weights) / sum(weights)",
        "np.ones(len(weights)) / len(weights)", "mixture"),
    "all sources of a mixture are due at once": (
        "rmt/data/order.py", "+ 0.5) / w for", ") / len(shares) for", "mixture"),
    "sources of a mixture are swapped": (
        "rmt/data/order.py", "np.asarray(parts) == part", "np.asarray(parts) != part", "mixture"),
    "a document twice in a step of a mixture": (
        "rmt/data/order.py", "step_of[first])\n", "step_of[first], 'right')\n", "mixture"),
    "every document is of the first source": (
        "rmt/data/corpus.py", "piece, record.answer, record.part", "piece, record.answer, 0",
        "mixture"),
    # Adapters.
    "all weights are trained": (
        "rmt/engine/loading.py", "lora_rank=config.lora_rank", "lora_rank=0", "loss lora_rank"),
    "the reference has the adapters": (
        "rmt/engine/run.py", "reference = without_adapters(model)", "reference = model",
        "loss lora_rank"),
    "the adapters' seed is 0": (
        "rmt/engine/loading.py", "seed=config.seed,\n    )  # fmt: skip\n    # Saved",
        "seed=0,\n    )  # fmt: skip\n    # Saved", "adapters"),
    "adapters are not scaled": ("models/lora.py", "SCALE = 2.0", "SCALE = 1.0", "loss lora_rank"),
    "frozen weights are trained": (
        "models/lora.py", "model.requires_grad_(False)", "pass", "loss lora_rank"),
    "the reference switches adapters off": (
        "models/lora.py", "layer.adapted = True\n\n    return", "pass\n\n    return",
        "loss lora_rank"),
    "A sees squares": (
        "models/lora.py", "F.linear(x, a)[None]", "F.linear(x * x, a)[None]", "loss lora_rank"),
    "MLPs have no adapters": (
        "models/lora.py", "for part in parts:\n", "for part in parts[:1]:\n", "adapters"),
    "A is above 0": ("models/lora.py", "(2 * whole - 1)", "whole", "adapters"),
    "B does not start at 0": ("models/lora.py", "local.zero_()", "local.fill_(0.01)", "adapters"),
    # Evaluation.
    "a run evaluates at B_t": (
        "rmt/engine/held_out.py", "budget_of_step(c, run.total_steps, ",
        "budget_of_step(c, run.step, ", "held_out"),
    "an evaluation from the first token on": (
        "rmt/engine/tiers.py",
        "documents, entropies, thresholds, config.min_context, config.eval_positions",
        "documents, entropies, thresholds, 1, config.eval_positions", "held_out"),
    "64 positions per tier": (
        "rmt/engine/tiers.py", "config.eval_positions, config.seed", "64, config.seed",
        "held_out"),
    "an evaluation at every step": (
        "train.py", "run.step % c.eval_every == 0", "run.step % 1 == 0", "held_out"),
    "a model is asked for B_0": (
        "rmt/engine/protocol.py", "budget_at(1, 1, *schedule)", "budget_at(0, 1, *schedule)",
        "budget_of_a_model"),
    "a run's evaluation is greedy": (
        "rmt/engine/held_out.py", 'if c.eval_decoding == "sampled" else 0.0', "if False else 0.0",
        "held_out"),
    "a run's evaluation is sampled": (
        "rmt/engine/held_out.py", 'if c.eval_decoding == "sampled" else 0.0', "if True else 0.0",
        "held_out"),
    "eval.py is always greedy": (
        "eval.py", 'if options.decoding == "sampled" else', "if False else", "eval_script"),
    "eval.py has a seed of its own": (
        "eval.py", "config.seed if options.sampling_seed < 0", "0 if options.sampling_seed < 0",
        "eval_script"),
    "eval.py has one sampling seed": (
        "eval.py", "else options.sampling_seed,", "else config.seed,", "eval_script"),
    "eval.py samples at 0.8": (
        "eval.py", 'config.temperature if options.decoding', '0.8 if options.decoding',
        "eval_script"),
    "eval.py ignores --budget": (
        "eval.py", "budget = options.budget or asked.budget", "budget = asked.budget or 3",
        "eval_script"),
    "eval.py ignores --per-tier": (
        "eval.py", "options.per_tier, config.seed", "400, config.seed", "eval_script"),
    "ntr asks for a length": (
        "rmt/engine/protocol.py", "final_budget(run) if taught else None",
        "4 if not taught else None", "eval_script"),
}  # fmt: skip
