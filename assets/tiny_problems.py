"""Data outside the tiny model's training: statements about one more person, as problems and text.

    Coins: Mira 4 Otto 7 Pia 2 Ben 5 Ida 3 Kai 6. Mira, Otto, Pia and Ben end in          -> 8

A problem, for post-training, is the opening of a document and half a statement; its answer is the
next word. The texts are out of domain: one file to evaluate on, one to train on.
`python -m assets.tiny_problems` rewrites assets/tiny_problems.
"""

import json
import random
from pathlib import Path

from assets.tiny_world import (
    COMPUTED,
    OPERANDS,
    PEOPLE,
    VERBS,
    as_jsonl,
    make_document,
    make_opening,
    operands_of,
    running_states,
)

FOLDER = Path(__file__).resolve().parent / "tiny_problems"
TRAIN_SEED, EVAL_SEED, TEXT_SEED, TEXT_TRAIN_SEED = 11, 12, 13, 14
TRAIN_PROBLEMS, EVAL_PROBLEMS, TEXTS, TRAIN_TEXTS = 600, 300, 150, 300


def make_problem(rng: random.Random) -> dict[str, str]:
    """Make a `problem` and its `answer`."""
    people, text = make_opening(rng)
    kind = rng.choice(COMPUTED)
    operands = operands_of(people, rng.randrange(PEOPLE), OPERANDS[kind] + 1)
    *others, last = [name for name, _ in operands]
    text += f" {', '.join(others)} and {last} {VERBS[kind]}"
    return {"problem": text, "answer": running_states(kind, operands)[-1]}


def problems(seed: int, count: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(count)]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, seed, count in (
        ("train", TRAIN_SEED, TRAIN_PROBLEMS),
        ("eval", EVAL_SEED, EVAL_PROBLEMS),
    ):
        lines = (json.dumps(problem) + "\n" for problem in problems(seed, count))
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, seed, count in (
        ("text", TEXT_SEED, TEXTS),
        ("text_train", TEXT_TRAIN_SEED, TRAIN_TEXTS),
    ):
        rng = random.Random(seed)
        texts = [make_document(rng, more=1) for _ in range(count)]
        (FOLDER / f"{name}.jsonl").write_text(as_jsonl(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
