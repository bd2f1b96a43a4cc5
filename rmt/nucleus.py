"""Cut the tail off a distribution: top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

For evaluation and sample.py only: a run trains the distribution that it samples, whole. Shapes: n
rows, V vocabulary.
"""

import torch
from torch import Tensor


def cut_tail_(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Set to -inf, in place, all logits (n, V) but those of the likeliest tokens.

    top_k keeps the k likeliest (0: all). Of these, renormalised at the temperature, top_p keeps the
    fewest likeliest that together have this probability, at least one; of equal logits the first.
    Temperature 0 takes the likeliest anyway: nothing is cut.
    """
    if temperature == 0 or (top_k == 0 and top_p == 1):
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)  # (n, V)
    ordered[:, top_k or len(ordered[0]) :] = -torch.inf
    p = (ordered / temperature).softmax(dim=-1)
    before = p.cumsum(dim=-1, dtype=torch.float64) - p
    ordered.masked_fill_(before >= top_p, -torch.inf)  # those before suffice
    return logits.scatter_(1, token, ordered)
