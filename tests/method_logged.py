"""What a step says of its responses, by hand; see tests/method_step.py."""

import numpy as np
from method_step import centred, rewards, scale_of


def assert_logged(seen) -> None:
    """What a step says of its responses."""
    run, c, row = seen.run, seen.run.config, seen.row
    match, paid, total = rewards(seen)
    scale = scale_of(c, total)
    w = c.length_weight if c.budget else 0
    both = centred(total) / scale, w * centred(paid) / scale
    if c.zero_variance_groups == "drop":
        both = [x[match.min(axis=1) < match.max(axis=1)] for x in both]
    advantage, of_length = both
    all_of_it, from_length = (advantage**2).sum(), (advantage * of_length).sum()
    share = from_length / all_of_it if all_of_it else None
    end = run.tokenizer.encode_with_control("</think>")[0]
    before, off, after = [], [], []
    for question, group in zip(seen.questions, seen.groups):
        for tokens in (rollout.tokens for rollout in group if end in rollout.tokens):
            before.append(tokens.index(end))
            after.append(len(tokens) - tokens.index(end))
            off += [abs(tokens.index(end) - b) / b for b in [question.budget] if b]
    wanted = {"share/advantage_from_length": share, "length/answer": np.mean(after),
              "length/budget_error": np.mean(off) if off else None,
              "reward/mean": total.mean(), "reward/match": match.mean(),
              "length/thinking": np.mean(before), "reward/length": paid.mean(),
              "policy/clipped": np.mean(seen.clipped)}  # fmt: skip
    tiers = np.array([question.tier for question in seen.questions])
    for tier, name in enumerate(("easy", "medium", "hard")):
        wanted[f"draw/{name}"] = (tiers == tier).mean()
        wanted[f"match/{name}"] = match[tiers == tier].mean() if tier in tiers else None
    for name, value in wanted.items():
        given = row[name]
        assert (given is None) == (value is None), (name, given, value)
        assert given == value or abs(given - value) < 1e-9, (name, given, value)
