"""Model FLOPs of a forest, for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

These are the operations that the method needs, not those that were spent: a trunk counts once,
padding and recomputed activations do not count. A weight costs 2 operations per token; attention 4
H D per layer and pair of tokens that see each other (q·k and p·v). Norms, rotary and softmax are
left out. A backward pass costs twice its forward pass: training on T tokens with N weights is the
usual 6 N T, plus 12 L H D per pair, plus 6 V C per target.
"""

from collections.abc import Sequence

import torch

from models.config import ModelConfig
from rmt.trees import Tree

# Dense bf16 operations per second, from NVIDIA's data sheets: A100 (2021), H100, H200 and L40S
# (2023), HGX B200 and GB200 NVL72 (2024). The first name that is part of the GPU's counts.
PEAKS = {
    "MIG": None,  # a slice of a GPU
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
    "GH200": 989e12, "H200": 989e12, "GB200": 2500e12, "B200": 2250e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Return the peak operations per second of a GPU by its name; None when it is not known."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def visible_pairs(tree: Tree) -> int:
    """Count the (i, j) in a tree such that token i sees token j."""
    causal = lambda n: n * (n + 1) // 2
    pairs = causal(len(tree.trunk))
    for group in tree.by_stem:  # a stem's tokens count once for all of its responses
        fork, stem = group[0].fork, len(group[0].stem)
        pairs += stem * fork + causal(stem)
        for n in (len(branch.response) for branch in group):
            pairs += n * (fork + stem) + causal(n)
    return pairs


def forward_flops(config: ModelConfig, trees: Sequence[Tree]) -> int:
    """Count the model FLOPs of one forward pass over trees; a backward pass has twice as many."""
    c = config
    tokens, pairs = sum(map(len, trees)), sum(map(visible_pairs, trees))
    targets = sum(t.trunk_targets + sum(len(b.response) for b in t.branches) for t in trees)
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # of q and o, of k and v
    weights = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)  # of a layer
    layer = 2 * weights * tokens + 4 * c.num_attention_heads * c.head_dim * pairs
    return c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size * targets
