"""Log-probability, entropy and losses of a language model's head, without its logits.

Every function here has its plain-PyTorch specification in kernels/reference.py.
"""

from kernels.reference import (
    entropy_logprob,
    linear_entropy_logprob,
    linear_objective,
    linear_topk_entropy,
    matmul,
)

__all__ = [
    "entropy_logprob",
    "linear_entropy_logprob",
    "linear_objective",
    "linear_topk_entropy",
    "matmul",
]
