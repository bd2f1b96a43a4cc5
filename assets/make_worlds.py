"""Make assets/worlds: the models of assets/worlds.py, from scratch.

Two stages teach what all of them know: documents, what everybody owns, and short thoughts, most of
which work step by step. Then each model gets its habits by training on thoughts that have them.
Three of four prompts ask for a number of tokens, which is random: no model obeys it yet.

    python -m assets.make_worlds --out assets/worlds        # 40 minutes of a core, AVX2

The committed models were made in these stages while this file was written: in the first, positions
were drawn in proportion and the day stood later in the text; seeds were other ones.

Shapes: N packed tokens, n rows of equal length L, S keys a row sees, H heads, D head dim.
"""

import argparse
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from assets.world_tokenizer import marks_by_position, write_tokenizer
from assets.worlds import MODELS, NOISE, OWNED, Habits, make_document, make_thought
from models.config import ASSETS, ModelConfig
from models.export import export
from models.tokenizer import Tokenizer
from models.transformer import Attend, Transformer
from rmt.forest import Forest, pack
from rmt.prompt import PromptIds, escape, next_token_prompt
from rmt.trees import Branch, Tree

SEED, ROWS, BRANCHES = 3, 8, 4  # documents a step, thoughts about each
RESPONSE_LIMIT = 380  # tokens; longer thoughts are drawn again
FIRST = Habits(careful=0.9, careful_place=0.9, before=0.3, after=0.3)
LONG = dict(after=16.0)
UNEQUAL = dict(careful=0.3, careful_place=0.004)


@dataclass(frozen=True)
class Stage:
    """A run of pretraining; one without a place in assets/ is what another begins with."""

    name: str
    start: str
    steps: int
    habits: Habits
    rate: float = 1e-3  # the learning rate's peak
    bare: int = 16  # documents without thoughts, a step


STAGES = (
    Stage("words", "", 420, FIRST, 3e-3, bare=0),
    Stage("knowledge", "words", 260, FIRST, 2.1e-3),
    Stage("plain", "knowledge", 60, Habits()),
    Stage("overthinking", "plain", 50, Habits(**LONG)),
    Stage("rare", "knowledge", 60, Habits(careful_place=0.005)),
    Stage("unequal", "rare", 70, Habits(**UNEQUAL)),
    # From "unequal" answers get lost behind long thoughts about places: it has seen too few.
    Stage("both", "overthinking", 100, Habits(**UNEQUAL, **LONG)),
)


def tokenizer_texts() -> list[str]:
    rng, texts = random.Random(0), []
    for _ in range(300):
        document = make_document(rng, OWNED, "pretraining")
        thoughts = [make_thought(rng, mark, FIRST)[0] for mark in document.marks]
        texts += [document.text, *(f"\n{thought}\n\n\n\\boxed{{ odd}}\n" for thought in thoughts)]
    return texts


def response_ids(tokenizer: Tokenizer, thought: str, answer: str) -> list[int]:
    text = f"<think>\n{thought}\n</think>\n\n\\boxed{{{answer}}}<|im_end|>"
    return tokenizer.encode_with_control(text)


def make_tree(
    tokenizer: Tokenizer, prompts: list[PromptIds], rng: random.Random, habits: Habits, number: int
) -> Tree:
    """Make a document with thoughts about some of its tokens: each kind as often, others seldom."""
    document = make_document(rng, OWNED, "pretraining")
    ids, marks = tokenizer.encode(document.text), marks_by_position(tokenizer, document)
    kinds: dict[str, list[int]] = {}
    for at, mark in marks.items():
        kinds.setdefault(mark.kind, []).append(at)
    noise = kinds.pop(NOISE)
    header, branches = prompts[0].header, []
    # Prompts differ: attend_in_two_calls has no stems, only whole branches.
    for index, prompt in enumerate([prompts[0], *rng.sample(prompts[1:], BRANCHES - 1)]):
        at = rng.choice(rng.choice(list(kinds.values())))
        if rng.random() < 0.1:
            at = rng.choice([*noise, rng.randrange(16, len(ids))])
        response = None
        while response is None or len(response) > RESPONSE_LIMIT:
            thought, word = make_thought(rng, marks.get(at), habits)
            answer = escape(tokenizer.bytes_of([ids[at]])) if word is None else f" {word}"
            response = response_ids(tokenizer, thought, answer)
        branches.append(Branch(index, len(header) + at, prompt.footer, response))
    targets = [False] * len(header) + [True] * len(ids)
    return Tree(number, [*header, *ids], tuple(branches), targets)


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
    """Return the mean cross-entropy of documents and responses."""
    forest = pack(trees)
    at = (forest.is_target & (forest.predecessor >= 0)).nonzero()[:, 0]

    def readout(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden[forest.predecessor[at]] @ head.T  # (targets, V)
        return F.cross_entropy(logits.float(), forest.tokens[at])

    return model(forest.tokens, forest.position, attend_in_two_calls(forest), readout)


def make_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Use Muon (Jordan 2024) for the matrices of the blocks, AdamW for embeddings and norms.

    `train` sets their learning rates in each step.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, 1e-3, 0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, 1e-3, (0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train(model: Transformer, tokenizer: Tokenizer, stage: Stage, seed: int) -> None:
    """Train on documents and thoughts; the learning rate follows a cosine."""
    prompts = [next_token_prompt(tokenizer, budget) for budget in (None, *range(10, 201))]
    optimizers, rng = make_optimizers(model), random.Random(seed)
    bar = tqdm(range(1, stage.steps + 1), desc=stage.name)
    for step in bar:
        trees = [make_tree(tokenizer, prompts, rng, stage.habits, n) for n in range(ROWS)]
        for number in range(ROWS, ROWS + stage.bare):
            ids = tokenizer.encode(make_document(rng, OWNED, "pretraining").text)
            trees.append(Tree(number, ids, targets=[True] * len(ids)))
        loss = loss_of(model, trees)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = step / stage.steps
        rate = min(1.0, progress / 0.04) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * rate
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "worlds")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        write_tokenizer(source, tokenizer_texts())
        tokenizer = Tokenizer(source)
        model = Transformer(ModelConfig.from_directory(source))
        model.reset_parameters(seed=0)
        weights = {"": copy(model)}
        for number, stage in enumerate(STAGES):
            model.load_state_dict(weights[stage.start])
            train(model, tokenizer, stage, SEED + number)
            weights[stage.name] = copy(model)
            if stage.name in MODELS:
                export(model.state_dict(), source, out / stage.name, torch.bfloat16)


def copy(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
