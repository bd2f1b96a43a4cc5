"""Random models of a few thousand parameters and forests to run them on, for several tests."""

import numpy as np
import torch
from toy_models import causal

from models.config import ModelConfig
from models.lora import add_adapters, init_adapters
from models.transformer import Transformer
from models.weights import own_rows
from rmt.trees import Branch, Tree

TOKENS, ROWS = 97, 101  # ids of the tokenizer; rows of the head, the last four are padding
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def toy_model(dtype=torch.float64, seed=0, **changes):
    """Weights large enough that attention is peaked and every parameter matters."""
    model = Transformer(ModelConfig.from_dict(CONFIG | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.15 * noise)
    return model.to(dtype)


def adapted(model, rank, dtype=torch.float32):
    """The model with adapters; itself for rank 0."""
    add_adapters(model, rank, dtype)
    return set_adapters(model)


def set_adapters(model):
    """Neither A nor B is 0 then; the same on any number of ranks."""
    init_adapters(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                first, local = own_rows(p)
                values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                local.copy_(0.1 * values[first : first + len(local)])
    return model


def ids(rng, count):
    return rng.integers(0, TOKENS, count).tolist()


def toy_trees(seed=0):
    """Several trees with several forks each, text with and without targets, in any order."""
    rng = np.random.default_rng(seed)
    places = {  # document -> (trunk, [(fork, prompt, response)])
        5: (12, [(1, 3, 4), (12, 2, 7), (5, 1, 1), (5, 1, 6)]),
        6: (9, []),
        7: (4, [(4, 2, 5), (0, 3, 2), (3, 0, 4)]),
        8: (11, []),
        9: (6, [(2, 4, 3), (6, 1, 9), (1, 2, 2)]),
    }
    trees, number = [], 0
    for document, (trunk, branches) in places.items():
        made = []
        for fork, prompt, response in branches:
            made.append(Branch(number, fork, ids(rng, prompt), ids(rng, response)))
            number += 1
        targets = None if made else rng.random(trunk) < 0.7
        trees.append(Tree(document, ids(rng, trunk), made, targets))
    return trees


def grouped_trees(seed=1):
    """Trees whose branches share prompts, and some that only nearly do."""
    rng = np.random.default_rng(seed)
    a, b, c = ids(rng, 3), ids(rng, 1), ids(rng, 2)
    places = {  # document -> (trunk, [(fork, prompt, lengths of responses)])
        5: (
            12,
            [(1, a, (4, 2, 6)), (0, a, (5, 1)), (12, a, (3, 7)), (12, b, (2, 2)), (7, c, (6,))],
        ),
        6: (9, []),
        7: (5, [(3, a, (2, 3)), (3, c, (2,)), (3, a, (4, 1)), (3, (), (2, 5)), (5, (), (3, 1))]),
        8: (6, [(0, b, (3, 3)), (0, c, (2,)), (1, b, (1, 1))]),
    }
    trees, number = [], 0
    for document, (trunk, groups) in places.items():
        made = []
        for fork, prompt, lengths in groups:
            for length in lengths:
                made.append(Branch(number, fork, prompt, ids(rng, length)))
                number += 1
        targets = rng.random(trunk) < 0.7 if document in (6, 8) else None
        trees.append(Tree(document, ids(rng, trunk), made, targets))
    return trees


def sequences(trees):
    """Each branch, and each trunk with targets, as (ids, which of them are targets, branch)."""
    for tree in trees:
        if tree.targets is not None:
            mask = np.array(tree.targets, dtype=bool)
            mask[0] = False  # nothing precedes it
            yield list(tree.trunk), mask, None
        for branch in tree.branches:
            before = [*tree.trunk[: branch.fork], *branch.stem]
            mask = np.arange(len(before) + len(branch.response)) >= len(before)
            yield [*before, *branch.response], mask, branch


def full_logits(model, tokens, vocabulary=TOKENS):
    """Logits (T, V) of an ordinary sequence, without forest, cache or fused head."""
    tokens = torch.as_tensor(tokens)
    readout = lambda hidden, head: (hidden @ head.T)[:, :vocabulary]
    return model(tokens, torch.arange(len(tokens)), causal, readout)


def alone(model, tokens, mask, temperature=1.0, vocabulary=TOKENS):
    """log p of the masked tokens of an ordinary sequence. (n,)"""
    logprobs = (full_logits(model, tokens, vocabulary) / temperature).log_softmax(dim=-1)
    index = torch.from_numpy(np.flatnonzero(mask))
    return logprobs[index - 1, torch.as_tensor(tokens)[index]]


def gradients(model, loss):
    """name -> gradient of a scalar, without touching .grad."""
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same_gradients(given, expected, tolerance):
    """Relative in the norm of each parameter, all of them non-zero and named when they differ."""
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name}: the expected gradient says nothing"
        error = float((given[name] - gradient).norm() / gradient.norm())
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
