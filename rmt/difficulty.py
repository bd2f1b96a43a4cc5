"""How hard each token is to predict: its entropy under the frozen initial model (Eq. 1).

Departures: the paper does not say which policy measures, over which vocabulary, or how often. Here
the initial model measures once, over its k likeliest tokens as RPT does, and the result is kept in
the user's cache under a hash of model, tokenizer, text and method.
"""

import hashlib
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kernels import linear_topk_entropy
from models.fingerprint import fingerprint
from models.weights import cache_directory
from rmt.data.corpus import Document
from rmt.forest import pack
from rmt.system.dist import World, gather_objects
from rmt.trees import Tree, micro_batches


def document_entropies(
    model,
    documents: Sequence[Document],
    begin_ids: list[int],
    top_k: int,
    vocab_size: int,
    token_limit: int,
    world: World,
) -> list[np.ndarray]:
    """Entropy (T,) in nats of predicting each token of each document from those before it.

    The first token of a text without a begin token has nothing before it: infinite. All ranks;
    documents are shared out and every rank gets all results.
    """
    mine = documents[world.rank :: world.size]
    trees = [Tree(d.index, begin_ids + d.tokens.tolist()) for d in mine]
    device = next(model.parameters()).device
    measured: dict[int, np.ndarray] = {}
    batches = micro_batches(trees, token_limit)
    for batch in tqdm(batches, "difficulty", disable=world.rank > 0, leave=False):
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
    merged = {k: v for part in gather_objects(measured, world) for k, v in part.items()}
    return [merged[document.index] for document in documents]


def cached_entropies(
    measure, model_directory: Path, documents: Sequence[Document], method: str, world: World
) -> list[np.ndarray]:
    """`measure()`, or what an earlier run with the same model, text and method measured."""
    name = f"difficulty/{_key(model_directory, documents, method)}"
    entropies = _read(name, [len(d.tokens) for d in documents]) if world.rank == 0 else None
    entropies = gather_objects(entropies, world)[0]
    if entropies is None:
        entropies = measure()
        if world.rank == 0:
            _write(name, entropies)
    return entropies


def _key(directory: Path, documents: Sequence[Document], method: str) -> str:
    digest = hashlib.sha256(f"{method} {sorted(fingerprint(directory).items())}".encode())
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:16]


def _places() -> list[Path]:
    """Folders for a cache, the best first; another user may have made the one in /tmp."""
    last = Path(tempfile.gettempdir()) / f"rmt-{os.getuid()}"
    foreign = os.path.exists(last) and last.stat().st_uid != os.getuid()
    return [cache_directory(), *([] if foreign else [last])]


def _read(name: str, lengths: list[int]) -> list[np.ndarray] | None:
    """A hash and the numbers it is of; None where there is none, or one that is damaged."""
    for place in _places():
        try:
            content = (place / name).read_bytes()
        except OSError:
            continue
        if content[:32] == _sum(content[32:]) and len(content) == 32 + 8 * sum(lengths):
            return np.split(np.frombuffer(content[32:], "<f8").copy(), np.cumsum(lengths)[:-1])
    return None


def _write(name: str, entropies: Sequence[np.ndarray]) -> None:
    """In the first place that can be written: whole or not at all, whoever else writes it."""
    content, troubles = np.concatenate(entropies).astype("<f8").tobytes(), []
    for place in _places():
        path = place / name
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(_sum(content) + content)
            return os.replace(aside, path)
        except OSError as error:
            troubles.append(f"{place}: {error.strerror}")
            with suppress(OSError):
                aside.unlink(missing_ok=True)
    told = "; ".join(troubles)
    print(f"difficulty is not kept, the next run measures it again ({told})", file=sys.stderr)


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
