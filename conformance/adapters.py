"""Three trainers in the suite of shared_prefix.py: python -m conformance.adapters

ours            the forest (rmt/forest.py) with the head's log-probabilities (kernels/head.py)
transformers    a padded batch of separate sequences: shares nothing, as a control
PrefixGrouper   arXiv 2506.05433 (pip install prefix_grouper), as its README says
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.shared_prefix import Group, check, table
from kernels import linear_entropy_logprob
from rmt import forest, naive
from rmt.objective import Targets
from rmt.trees import Branch, Tree

VOCABULARY = 64
# PrefixGrouper's prefix is one: no forks within it; a stem would be trained or copied.
WITHOUT_FORKS = ("forks", "stems")


def ours(model):
    """Return `separate` and `shared` of a models.transformer.Transformer."""

    def separate(tokens: Tensor) -> Tensor:
        row = naive.pack([Tree(0, tokens.tolist())])
        logits = lambda hidden, head: hidden @ head.t()
        return model(row.tokens, row.position, row.attend, logits)

    def shared(groups: Sequence[Group]) -> list[list[Tensor]]:
        trees, ids = [], []
        for g in groups:
            first = sum(map(len, ids))
            ids.append(range(first, first + len(g.responses)))
            branches = [
                Branch(i, len(g.prefix) if r.fork is None else r.fork, r.stem, r.tokens)
                for i, r in zip(ids[-1], g.responses)
            ]
            trees.append(Tree(len(trees), g.prefix, tuple(branches)))
        row = forest.pack(trees)
        targets = Targets.of(row)
        logprob = lambda hidden, head: linear_entropy_logprob(
            targets.read(hidden), head, targets.token
        )[0]
        found = model(row.tokens, row.position, row.attend, logprob)
        return [[found[targets.rollout == i] for i in group] for group in ids]

    return separate, shared


def of_transformers(model):
    """Return both functions of a transformers model, in padded batches."""
    separate = lambda tokens: model(input_ids=tokens[None]).logits[0]

    def shared(groups: Sequence[Group]) -> list[list[Tensor]]:
        contexts = [[g.context(r) for r in g.responses] for g in groups]
        rows = [[*c, *r.tokens] for g, cs in zip(groups, contexts) for r, c in zip(g.responses, cs)]
        padded = [torch.tensor(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)
        there = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in rows])
        logp = model(input_ids=ids, attention_mask=there.long()).logits.log_softmax(dim=-1)
        logp = iter(logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0])
        return [
            [next(logp)[len(c) - 1 : len(c) - 1 + len(r.tokens)] for r, c in zip(g.responses, cs)]
            for g, cs in zip(groups, contexts)
        ]

    return separate, shared


def as_flash_attention(module, query, key, value, mask, scaling=None, **unused):
    """Do what PrefixGrouper expects of flash attention, which needs a GPU.

    query (b, H, q, D), key and value (b, K, k, D), mask (b, k) of real tokens; the last query sees
    all keys.
    """
    q, k = query.shape[2], key.shape[2]
    sees = torch.ones(q, k, dtype=torch.bool).tril(k - q) & mask[:, None, None].bool()
    sees |= torch.eye(q, k, dtype=torch.bool).roll(k - q, 1)  # a padded query sees something
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=sees, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def prefix_grouper(model):
    """Return both functions of a transformers model with PrefixGrouper's attention."""
    from prefix_grouper import PrefixGrouper
    from prefix_grouper.utils.register_transformers import register_attention
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AttentionInterface

    register_attention()
    AttentionInterface.register("as_flash_attention", as_flash_attention)

    def separate(tokens: Tensor) -> Tensor:
        model.set_attn_implementation("sdpa")
        return model(input_ids=tokens[None]).logits[0]

    def shared(groups: Sequence[Group]) -> list[list[Tensor]]:
        padded = lambda rows: pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = lambda rows: padded([[1] * len(row) for row in rows])
        prefixes = [g.prefix for g in groups]
        answers = [r.tokens for g in groups for r in g.responses]
        sizes = [len(g.responses) for g in groups]
        grouper = PrefixGrouper.from_ungrouped_masks(
            mask(prefixes), mask(answers), sizes, padding_mode="right", device="cpu"
        )
        ids = grouper.concat_input(padded(prefixes), mask(prefixes), padded(answers), mask(answers))
        positions = padded([
            [*range(len(g.prefix)),
             *(len(g.prefix) + i for r in g.responses for i in range(len(r.tokens)))]
            for g in groups
        ])  # fmt: skip
        model.set_attn_implementation("prefix_grouper_attention")
        out = model(
            input_ids=ids, position_ids=positions, use_cache=False, prefix_grouper=grouper,
            prefix_grouper_attn_func="as_flash_attention",
        )  # fmt: skip
        _, _, logits, there = grouper.split_output(out.logits, include_prefix_last=1)
        targets = grouper.convert_padding(padded(answers), mask(answers), padding_mode="right")
        logp = logits[:, :-1].log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
        rows = iter([row[own.bool()] for row, own in zip(logp, there[:, 1:])])
        return [[next(rows) for _ in range(size)] for size in sizes]

    return separate, shared


def of_hugging_face():
    """Make a random Qwen3 of transformers, in fp64, and ours with its weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from models.config import ModelConfig
    from models.transformer import Transformer

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(config).double().eval()
    own = Transformer(ModelConfig.from_dict(config.to_dict() | {"rope_theta": 10000.0})).double()
    weights = {k: v for k, v in theirs.state_dict().items() if k in own.state_dict()}
    own.load_state_dict(weights)
    return own, theirs


def results() -> dict[str, dict[str, str]]:
    """Check all three on a random Qwen3 in fp64, PrefixGrouper in fp32 where it is installed."""
    own, theirs = of_hugging_face()
    trainers = {"ours": (own, ours(own)), "transformers": (theirs, of_transformers(theirs))}
    found = {
        name: check(*functions, list(model.parameters()), VOCABULARY)
        for name, (model, functions) in trainers.items()
    }
    if find_spec("prefix_grouper"):
        theirs = theirs.float()  # its norms round to fp32, once for a prefix or once for each copy
        parameters = list(theirs.parameters())
        found["PrefixGrouper"] = check(
            *prefix_grouper(theirs), parameters, VOCABULARY, WITHOUT_FORKS
        )
    return found


if __name__ == "__main__":
    print(table(results()))
