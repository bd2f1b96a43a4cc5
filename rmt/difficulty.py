"""How hard each token is to predict: its entropy under the frozen initial model (Eq. 1).

Departures: the paper does not say which policy measures, over which vocabulary, or how often. Here
the initial model measures once, over its k likeliest tokens as RPT does, and the result is cached
beside the data under a hash of model, tokenizer, text and method.
"""

import hashlib
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kernels import linear_topk_entropy
from models.weights import cache_directory
from rmt.corpus import Document
from rmt.dist import World, gather_objects
from rmt.forest import Tree, micro_batches, pack

PROBES = 64  # places in each weight file that identify it; hashing 30 GB would take minutes
PROBE_BYTES = 1 << 16


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
    measure,
    model_directory: Path,
    documents: Sequence[Document],
    method: str,
    data: Path,
    world: World,
) -> list[np.ndarray]:
    """`measure()`, or what an earlier run with the same model, text and method measured."""
    path = _cache_path(data, _fingerprint(model_directory, documents, method))
    entropies = _read(path) if world.rank == 0 else None
    entropies = gather_objects(entropies, world)[0]
    if entropies is None:
        entropies = measure()
        if world.rank == 0:
            _write(path, entropies)
    return entropies


def _fingerprint(directory: Path, documents: Sequence[Document], method: str) -> str:
    digest = hashlib.sha256(method.encode())
    for name in ("config.json", "tokenizer.json"):
        digest.update((directory / name).read_bytes())
    for shard in sorted(directory.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            for probe in range(PROBES):
                file.seek(probe * size // PROBES)
                digest.update(file.read(PROBE_BYTES))
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:16]


def _cache_path(data: Path, key: str) -> Path:
    """Beside the data, or in the user's cache where that cannot be written."""
    beside = data if data.is_dir() else data.parent
    if not beside.is_dir() or not os.access(beside, os.W_OK):
        beside = cache_directory()
    return beside / ".rmt-difficulty" / f"{key}.npz"


def _read(path: Path) -> list[np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as saved:
            return np.split(saved["entropy"], saved["ends"][:-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # damaged: measured anew and replaced


def _write(path: Path, entropies: Sequence[np.ndarray]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    ends = np.cumsum([len(e) for e in entropies])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, entropy=np.concatenate(entropies), ends=ends)
        os.replace(temporary, path)
    except OSError as error:  # the run can go on, the next one measures again
        temporary.unlink(missing_ok=True)
        print(f"difficulty could not be kept in {path} ({error})", file=sys.stderr)
