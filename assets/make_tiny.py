"""Make assets/tiny from scratch: a tokenizer, then a model "pretrained" on tiny_world.

One run mixes the training data of an instruct model: plain documents, and prompts with a thought
and an answer; in its first half also textbooks of counts. Thoughts grow as long and as careless as
tiny_world.Habits says. The number in the budget sentence is random, so the model does not learn to
obey it. Mid-training starts from this state.

    python -m assets.make_tiny                                # 25 minutes on 2 shared cores
    python -m assets.make_tiny --steps 50 --out /tmp/rough

Shapes: N packed tokens, n rows of equal length L, S keys a row sees, H heads, D head dim.
"""

import argparse
import math
import random
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from assets import tiny_report, tiny_world
from assets.tiny_tokenizer import marks_by_position, tiny_texts, write_tokenizer
from assets.tiny_world import Habits, Mark
from models.config import TINY, ModelConfig
from models.export import export
from models.tokenizer import Tokenizer
from models.transformer import Attend, Transformer
from rmt.boxed import escape
from rmt.forest import Forest, pack
from rmt.prompt import PromptIds, next_token_prompt
from rmt.trees import Branch, Tree

STEPS, ROWS, BRANCHES = 900, 6, 4  # optimiser steps, documents a step, thoughts a document
RESPONSE_LIMIT = 280  # tokens; draw longer thoughts again
LEARNING_RATE, SAVE_EVERY = 3e-3, 60.0  # seconds
DOCUMENT, BOOK = 0, 1  # Tree.document
DOCUMENT_WEIGHT = 0.25  # of a document's token in the loss; thoughts and textbooks have 1
EASY_HABITS = Habits(careful=0.9, hasty=0.1, before=0.5, after=0.3)


def response_ids(tokenizer: Tokenizer, thought: str, answer: str) -> list[int]:
    text = f"<think>\n{thought}\n</think>\n\n\\boxed{{{answer}}}<|im_end|>"
    return tokenizer.encode_with_control(text)


def make_trees(
    tokenizer: Tokenizer,
    prompts: list[PromptIds],
    rng: random.Random,
    habits: Habits,
    avoid: frozenset[str],
    early: bool,
) -> list[Tree]:
    """Make a document with thoughts about some tokens; then textbooks (early) or bare text."""
    document, bare = tiny_world.documents(rng.getrandbits(48), 2, avoid)
    ids, marks = tokenizer.encode(document.text), marks_by_position(tokenizer, document)
    header = prompts[0].header
    branches = []
    # Prompts differ: the attention below has no stems, only whole branches.
    for number, prompt in enumerate(rng.sample(prompts, BRANCHES)):
        at = _choose(rng, marks, len(ids))
        response = None
        while response is None or len(response) > RESPONSE_LIMIT:
            thought, word = tiny_world.make_thought(rng, marks.get(at), habits)
            answer = escape(tokenizer.bytes_of([ids[at]])) if word is None else f" {word}"
            response = response_ids(tokenizer, thought, answer)
        branches.append(Branch(number, len(header) + at, prompt.footer, response))
    targets = [False] * len(header) + [True] * len(ids)
    trees = [Tree(DOCUMENT, [*header, *ids], tuple(branches), targets)]
    plain = [(BOOK, tiny_world.make_book(rng, chapter)) for chapter in ("sums", "all")]
    for sort, text in plain if early else [(DOCUMENT, bare.text)]:
        trunk = tokenizer.encode(text)
        trees.append(Tree(sort, trunk, targets=[True] * len(trunk)))
    return trees


def _choose(rng: random.Random, marks: dict[int, Mark], length: int) -> int:
    """Choose a position to think about: mostly computed words, some noise or template."""
    chance = rng.random()
    if chance > 0.95:
        return rng.randrange(16, length)
    return rng.choice([at for at, mark in marks.items() if bool(mark.operands) == (chance < 0.85)])


def habits_at(progress: float) -> Habits:
    """Interpolate from short careful thoughts, which teach counting fast, to Habits()."""
    ease = min(1.0, max(0.0, (0.75 - progress) / 0.3))
    last = Habits()
    mixed = {
        name: ease * getattr(EASY_HABITS, name) + (1 - ease) * getattr(last, name)
        for name in ("careful", "hasty", "before", "after")
    }
    return Habits(**mixed)


def attend_in_two_calls(forest: Forest) -> Attend:
    """Compute forest.attend with one call for all trunks and one for all branches.

    On a CPU at this size padded bf16 products are faster than SDPA's backward pass with a mask.
    """
    calls = _calls(forest)
    order = torch.cat([rows[real] for rows, real, _, _ in calls]).argsort()

    @torch.autocast("cpu", enabled=False)
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        q, k, v = (x.to(v.dtype) for x in (q * q.shape[-1] ** -0.5, k, v))
        out = []
        for rows, real, seen, bias in calls:
            query = q[rows].transpose(1, 2)  # (n, H, L, D)
            key, value = (x[seen].repeat_interleave(repeat, 2).transpose(1, 2) for x in (k, v))
            weight = (query @ key.transpose(2, 3)).add_(bias.to(v.dtype))  # (n, H, L, S)
            out.append((weight.softmax(-1) @ value).transpose(1, 2)[real])
        return torch.cat(out)[order]  # (N, H, D)

    return attend


def _calls(forest: Forest) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Index trunks, then branches: queries (n, L), not padding, keys (n, S), bias (n, 1, L, S)."""
    index, trunks, branches, trunk_of = torch.arange(len(forest)), [], [], []
    for number, tree in enumerate(forest.trees):
        own = index[forest.tree == number]
        trunks.append(own[: len(tree.trunk)])
        if tree.branches:
            lengths = [len(branch) for branch in tree.branches]
            branches += own[len(tree.trunk) :].split(lengths)
            trunk_of += [number] * len(lengths)
    trunk, branch = (nn.utils.rnn.pad_sequence(x, True, -1) for x in (trunks, branches))
    calls = []
    for rows, keys in ((trunk, trunk), (branch, torch.cat((trunk[trunk_of], branch), dim=1))):
        real, rows_at, keys_at = rows >= 0, rows.clamp(min=0), keys.clamp(min=0)
        seen = forest.sees(rows_at[:, :, None], keys_at[:, None]) & (keys >= 0)[:, None]
        bias = torch.where(seen, 0.0, -1e4)[:, None]
        calls.append((rows_at, real, keys_at, bias))
    return calls


def loss_of(model: Transformer, trees: list[Tree]) -> Tensor:
    """Return weighted cross-entropy: most of a document's entropy is noise, so it weighs less."""
    forest = pack(trees)
    at = (forest.is_target & (forest.predecessor >= 0)).nonzero()[:, 0]
    is_book = torch.tensor([tree.document == BOOK for tree in trees])[forest.tree[at]]
    weight = torch.where(is_book | (forest.branch[at] > 0), 1.0, DOCUMENT_WEIGHT)

    def readout(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden[forest.predecessor[at]] @ head.T  # (targets, V)
        losses = F.cross_entropy(logits.float(), forest.tokens[at], reduction="none")
        return (weight * losses).sum() / weight.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(forest.tokens, forest.position, attend_in_two_calls(forest), readout)


def make_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Use Muon (Jordan 2024) for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, LEARNING_RATE, 0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, LEARNING_RATE, (0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def learning_rate_at(progress: float) -> float:
    """Warm up over the first 2 % of the run, then follow a cosine down to 2 %."""
    warm = min(1.0, progress / 0.02)
    return LEARNING_RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train(source: Path, out: Path, steps: int) -> None:
    """Train from scratch on documents and thoughts; export every minute."""
    tokenizer = Tokenizer(source)
    prompts = [next_token_prompt(tokenizer, budget) for budget in range(10, 201)]
    held_out = frozenset(document.text for document in tiny_world.eval_documents())
    model = Transformer(ModelConfig.from_directory(source))
    model.reset_parameters(seed=0)
    optimizers = make_optimizers(model)
    rng, saved = random.Random(tiny_world.PRETRAIN_SEED), time.monotonic()
    bar = tqdm(range(1, steps + 1), desc="pretraining")
    for step in bar:
        habits, trees = habits_at(step / steps), []
        for _ in range(ROWS):
            trees += make_trees(tokenizer, prompts, rng, habits, held_out, early=step < steps / 2)
        loss = loss_of(model, trees)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step / steps)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step == steps or time.monotonic() - saved > SAVE_EVERY:
            export(model.state_dict(), source, out, torch.float32)
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=TINY, help="Hugging Face directory to write")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as source:
        write_tokenizer(Path(source), tiny_texts())
        train(Path(source), arguments.out, arguments.steps)
    tiny_report.report(arguments.out)


if __name__ == "__main__":
    main()
