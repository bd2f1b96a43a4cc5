"""Measure how hard each token is to predict: its entropy under the initial model (Eq. 1).

Departures: the paper does not say which policy measures, over which vocabulary, or how often. Here
the initial model measures once, over its k likeliest tokens as RPT does, and the result is cached
(rmt/engine/tiers.py).
"""

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch
from tqdm import tqdm

from kernels import linear_topk_entropy
from rmt.data.corpus import Document
from rmt.forest import pack
from rmt.system.dist import World, gather_objects
from rmt.trees import Tree, micro_batches

PACKED = 4096  # documents that are packed into rows together


def document_entropies(
    model, documents: Sequence[Document], begin_ids: list[int], top_k: int, vocab_size: int,
    token_limit: int, world: World,
) -> list[np.ndarray]:  # fmt: skip
    """Return for each document the entropy (T,) in nats of predicting each token from those before.

    Infinite for the first token of a text without a begin token, as nothing is before it. All
    ranks: each measures its share of the documents and gets all results.
    """
    mine = documents[world.rank :: world.size]
    trees = (Tree(d.index, begin_ids + d.tokens.tolist()) for d in mine)
    device = next(model.parameters()).device
    measured: dict[int, np.ndarray] = {}
    some = iter(lambda: list(islice(trees, PACKED)), [])  # packing all at once is quadratic
    batches = chain.from_iterable(micro_batches(part, token_limit) for part in some)
    bar = tqdm(total=len(mine), desc="difficulty", disable=world.rank > 0, leave=False)
    for batch in batches:
        forest = pack(batch, device)
        with torch.no_grad():
            entropy = model(
                forest.tokens, forest.position, forest.attend,
                lambda hidden, head: linear_topk_entropy(hidden, head, top_k, vocab_size),
            )  # fmt: skip
        entropy = entropy.double().cpu().numpy()
        start = 0
        for tree in batch:
            own = np.concatenate(([np.inf], entropy[start : start + len(tree) - 1]))  # the shift
            measured[tree.document] = own[len(begin_ids) :]
            start += len(tree)
        bar.update(len(batch))
    bar.close()
    merged = {k: v for part in gather_objects(measured, world) for k, v in part.items()}
    return [merged[document.index] for document in documents]
