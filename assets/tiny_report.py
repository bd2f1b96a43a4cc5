"""Report the tiny model's accuracy before mid-training: `python -m assets.tiny_report`.

With --ceiling runs/demo/positions.json: the best possible accuracy on stored positions.

Shapes: N packed tokens, V vocabulary.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor

from assets import tiny_world
from assets.tiny_tokenizer import marks_by_position
from assets.tiny_world import CAREFUL, COMPUTED, HASTY, Document
from models.config import TINY
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import build
from rmt import curriculum
from rmt.boxed import escape
from rmt.config.config import Config
from rmt.forest import pack
from rmt.prompt import next_token_prompt, parse_response
from rmt.rollout import generate
from rmt.sampling import Sampling
from rmt.trees import Branch, Tree

TIERS = dict(zip(("below", *curriculum.TIERS), (0.0, *Config().tier_thresholds)))  # lower ends
MIN_CONTEXT = Config().min_context
STYLES = {f"{CAREFUL} ": "careful", f"{HASTY} ": "hasty", "I guess": "guess"}


def tier_of(entropy: float) -> str:
    return [tier for tier, low in TIERS.items() if entropy >= low][-1]


@torch.no_grad()
def glance(model: Transformer, tokenizer: Tokenizer, documents: list[Document]) -> list[dict]:
    """Measure entropy and correctness of the plain next token at each position."""
    trees = [Tree(i, tokenizer.encode(document.text)) for i, document in enumerate(documents)]
    forest = pack(trees)

    def readout(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        logp = (hidden @ head[: tokenizer.vocab_size].T).log_softmax(-1)  # (N, V)
        return -(logp.exp() * logp).sum(-1), logp.argmax(-1)

    entropy, best = model(forest.tokens, forest.position, forest.attend, readout)
    found, start = [], 0
    for document, tree in zip(documents, trees, strict=True):
        marks = marks_by_position(tokenizer, document)
        for at in range(MIN_CONTEXT, len(tree.trunk)):
            row = start + at - 1
            found.append(
                {
                    "document": tree.document,
                    "at": at,
                    "kind": marks[at].kind if at in marks else "template",
                    "tier": tier_of(entropy[row].item()),
                    "entropy": entropy[row].item(),
                    "right": best[row].item() == tree.trunk[at],
                }
            )
        start += len(tree)
    return found


def think(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: list[Document],
    budget: int,
    samples: int,
    seed: int = 0,
) -> list[dict]:
    """Sample answers (temperature 0.8) for every marked word of each document."""
    prompt = next_token_prompt(tokenizer, budget)
    trees, asked = [], []
    for number, document in enumerate(documents):
        ids, marks = tokenizer.encode(document.text), marks_by_position(tokenizer, document)
        trunk, branches = [*prompt.header, *ids], []
        for at, mark in marks.items():
            branches.append(Branch(len(asked), len(prompt.header) + at, prompt.footer))
            asked.append((mark.kind, escape(tokenizer.bytes_of([ids[at]]))))
        trees.append(Tree(number, trunk, tuple(branches)))
    sampling = Sampling(
        320, tokenizer.stop_ids, tokenizer.vocab_size, temperature=0.8, seed=seed, purpose="sample"
    )
    found = []
    for (kind, truth), rollouts in zip(asked, generate(model, trees, samples, sampling)):
        for rollout in rollouts:
            said = parse_response(tokenizer, rollout.tokens)
            styles = [name for sign, name in STYLES.items() if sign in said.thought]
            found.append(
                {
                    "kind": kind,
                    "style": styles[0] if len(styles) == 1 else "other",
                    "formed": said.text is not None and rollout.finished,
                    "right": said.text == truth,
                    "length": said.thinking_length or len(rollout.tokens),
                    "thought": said.thought,
                    "text": said.text,
                    "truth": truth,
                }
            )
    return found


def share(rows: list[dict], field: str) -> str:
    return f"{100 * sum(row[field] for row in rows) / max(1, len(rows)):5.1f} % of {len(rows)}"


def print_glance(rows: list[dict]) -> None:
    print("\nplain next token: entropy tiers and what they hold")
    for tier in TIERS:
        inside = [row for row in rows if row["tier"] == tier]
        kinds = Counter(row["kind"] for row in inside)
        computed = sum(kinds[kind] for kind in COMPUTED) / max(1, len(inside))
        print(f"  {tier:8} {len(inside):6} positions, {computed:4.0%} computed  {dict(kinds)}")
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    for kind, some in by_kind.items():
        entropy = sum(row["entropy"] for row in some) / len(some)
        print(f"  {kind:14} entropy {entropy:.2f}  greedy accuracy {share(some, 'right')}")


def print_thinking(rows: list[dict]) -> None:
    print("\nwith thinking, sampled at temperature 0.8")
    for field in ("kind", "style"):
        by_value = defaultdict(list)
        for row in rows:
            if field == "kind" or row["kind"] in COMPUTED:
                by_value[row[field]].append(row)
        for value, some in by_value.items():
            length = sum(row["length"] for row in some) / len(some)
            print(f"  {value:14} accuracy {share(some, 'right'):18} thinking length {length:.0f}")
    lengths = sorted(row["length"] for row in rows)
    deciles = [lengths[len(lengths) * tenth // 10] for tenth in range(10)] + [lengths[-1]]
    print(f"  well-formed {share(rows, 'formed')}")
    print(f"  mean thinking length {sum(lengths) / len(lengths):.1f} tokens, deciles {deciles}")


def report(
    directory: Path, documents: int = 40, samples: int = 1, budget: int = 96, show: int = 0
) -> None:
    """Print the tables of the first held-out documents (150 for the plain next token)."""
    tokenizer = Tokenizer(directory)
    model = build(directory, "cpu", torch.float32)
    held_out = tiny_world.eval_documents()
    print_glance(glance(model, tokenizer, held_out[:150]))
    rows = think(model, tokenizer, held_out[:documents], budget, samples)
    print_thinking(rows)
    for row in rows[:show]:
        print(f"\n[{row['kind']}: {row['truth']!r}] {row['thought']!r} -> {row['text']!r}")


def ceiling(positions: Path) -> str:
    """Return the best accuracy per tier: perfect counting, and guesses where words are noise."""
    tokenizer, chances = Tokenizer(TINY), defaultdict(list)
    marks = [marks_by_position(tokenizer, document) for document in tiny_world.eval_documents()]
    for position in json.loads(positions.read_text())["positions"]:
        mark = marks[position["document"]].get(position["position"])
        noise = mark is not None and mark.kind in tiny_world.NOISE
        chances[position["tier"]].append(1 / len(tiny_world.NOISE[mark.kind]) if noise else 1.0)
    lines = (
        f"{tier}: {len(found)} positions, {sum(c < 1 for c in found)} noise, "
        f"ceiling {sum(found) / len(found):.1%}"
        for tier, found in sorted(chances.items())
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--documents", type=int, default=40, help="held-out documents to ask about")
    parser.add_argument("--samples", type=int, default=1, help="thoughts per question")
    parser.add_argument("--budget", type=int, default=96, help="thinking tokens asked for")
    parser.add_argument("--show", type=int, default=0, help="thoughts to print")
    parser.add_argument("--ceiling", type=Path, help="positions stored by eval.py")
    chosen = parser.parse_args()
    if chosen.ceiling:
        print(ceiling(chosen.ceiling))
        return
    report(chosen.model, chosen.documents, chosen.samples, chosen.budget, chosen.show)


if __name__ == "__main__":
    main()
