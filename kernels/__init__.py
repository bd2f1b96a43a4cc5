"""Log-probability, entropy and losses of a head without its logits, and attention of branches.

What each function means stands in kernels/reference.py; who computes it, in kernels/dispatch.py.
"""

from kernels.branch_attention import branch_attention
from kernels.branch_tiles import Seen, Tiles
from kernels.head import linear_entropy_logprob, linear_topk, linear_topk_entropy
from kernels.logits import entropy_logprob, masked_cross_entropy
from kernels.one_pass import linear_objective
from kernels.reference import IGNORE, matmul

__all__ = [
    "IGNORE",
    "Seen",
    "Tiles",
    "branch_attention",
    "entropy_logprob",
    "linear_entropy_logprob",
    "linear_objective",
    "linear_topk",
    "linear_topk_entropy",
    "masked_cross_entropy",
    "matmul",
]
