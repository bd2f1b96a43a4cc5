"""What a forest costs, counted: tokens, and the floating point operations that a model needs.

Model FLOPs, as of PaLM (arXiv 2204.02311, appendix B), are those that the method needs and not
those that were spent: a trunk counts once, padding and recomputed activations count nothing. A
product with a weight is 2 operations per weight and token. Attention is counted by the pairs that
really see each other: q·k and p·v are 2 H D each, per pair and layer. Norms, rotary and softmax are
left out. A backward pass costs twice its forward pass, so that training on T tokens with N weights
is the usual 6 N T, plus 12 L H D per pair, plus 6 V C per target, where the head is read.
"""

from collections.abc import Sequence

import torch

from models.config import ModelConfig
from rmt.trees import Tree

# Dense bf16 (without sparsity) operations per second, from NVIDIA's data sheets: A100 (2021), H100
# (2023), H200 (2023), HGX B200 and GB200 NVL72 (2024), L40S (2023). The first that fits counts.
PEAKS = (
    ("MIG", None),  # a slice of a GPU
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
)


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Operations per second that a GPU of this name has at most; None when it is not known."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAKS if name in device), None)


def visible_pairs(tree: Tree) -> int:
    """How many (i, j) there are in a tree such that token i sees token j."""
    causal = lambda n: n * (n + 1) // 2
    pairs = causal(len(tree.trunk))
    for stem in tree.stems:  # its tokens are there once, for all responses to it
        fork, prompt = stem[0].fork, len(stem[0].prompt)
        pairs += prompt * fork + causal(prompt)
        for n in (len(branch.response) for branch in stem):
            pairs += n * (fork + prompt) + causal(n)
    return pairs


def forward_flops(config: ModelConfig, trees: Sequence[Tree]) -> int:
    """Model FLOPs of one forward pass over trees; a backward pass has twice as many."""
    c = config
    tokens, pairs = sum(map(len, trees)), sum(map(visible_pairs, trees))
    targets = sum(t.trunk_targets + sum(len(b.response) for b in t.branches) for t in trees)
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # of q and o, of k and v
    weights = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)  # of a layer
    layer = 2 * weights * tokens + 4 * c.num_attention_heads * c.head_dim * pairs
    return c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size * targets
