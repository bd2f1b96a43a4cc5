"""Measure each architecture against transformers: the table of docs/models.md.

python tests/models_table.py      a minute; the models and directories are those of test_models.py
                                  and test_as_transformers.py
"""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).resolve().parent.parent))

from test_as_transformers import ARCHITECTURES, assert_same, write_case
from test_models import CASES, TOKENS, logits_of, random_reference

from models.tokenizer import Tokenizer
from models.weights import build

DIRECTORIES = 1000


def logits_error(kind: str, changes: dict, spread: int) -> float:
    """The largest difference of logits with `spread` positions from token to token."""
    reference, positions = random_reference(kind, changes), spread * torch.arange(len(TOKENS))
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        reference.save_pretrained(place)
        mask = torch.ones(1, len(TOKENS))
        theirs = reference(TOKENS[None], position_ids=positions[None], attention_mask=mask)
        ours = logits_of(build(Path(place), "cpu", torch.float32), positions=positions)
        return float((ours - theirs.logits[0]).abs().max())


def read_directories() -> tuple[Counter, Counter]:
    """Count generated directories that have the same tokens and prompts, and those refused."""
    read, refused = Counter(), Counter()
    for seed in range(DIRECTORIES):
        rng = random.Random(seed)
        kind = rng.choice(list(ARCHITECTURES))
        with tempfile.TemporaryDirectory() as folder:
            write_case(Path(folder) / "model", rng, kind)
            try:
                ours = Tokenizer(Path(folder) / "model")
            except ValueError:
                refused[kind] += 1
                continue
            assert_same(Path(folder) / "model", ours, transformers)
            read[kind] += 1
    return read, refused


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    read, refused = read_directories()
    for kind, name in ARCHITECTURES.items():
        mine = [changes for of, changes in CASES.values() if of == kind]
        short, long = (max(logits_error(kind, c, spread) for c in mine) for spread in (1, 5701))
        print(
            f"| {name} | {len(mine)} | {short:.0e} | {long:.0e} | {read[kind]} | {refused[kind]} |"
        )


if __name__ == "__main__":
    main()
