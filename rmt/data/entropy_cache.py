"""Keep entropies in the user's cache, under a hash of model, tokenizer, text and method."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.fingerprint import fingerprint
from models.weights import cache_directory
from rmt.data.corpus import Document
from rmt.system.dist import World, gather_objects
from rmt.system.records import write_whole


def cached_entropies(
    measure: Callable[[], list[np.ndarray]], model_directory: Path,
    documents: Sequence[Document], method: str, world: World,
) -> list[np.ndarray]:  # fmt: skip
    """Return what an earlier run with the same model, text and method measured, or `measure()`.

    All ranks; rank 0 reads and writes the cache.
    """
    path = cache_directory() / "difficulty" / _key(model_directory, documents, method)
    entropies = _read(path, [len(d.tokens) for d in documents]) if world.rank == 0 else None
    entropies = gather_objects(entropies, world)[0]
    if entropies is None:
        entropies = measure()
        if world.rank == 0:
            _write(path, entropies)
    return entropies


def _key(directory: Path, documents: Sequence[Document], method: str) -> str:
    digest = hashlib.sha256(f"{method} {sorted(fingerprint(directory).items())}".encode())
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:16]


def _read(path: Path, lengths: list[int]) -> list[np.ndarray] | None:
    """Read a file of a hash and the numbers it is of; None if there is none, or it is damaged."""
    with suppress(OSError):
        content = path.read_bytes()
        if content[:32] == _hash(content[32:]) and len(content) == 32 + 8 * sum(lengths):
            return np.split(np.frombuffer(content[32:], "<f8").copy(), np.cumsum(lengths)[:-1])
    return None


def _write(path: Path, entropies: Sequence[np.ndarray]) -> None:
    content = np.concatenate(entropies).astype("<f8").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _hash(content) + content)
    except OSError as error:
        print(
            f"difficulty is not kept, the next run measures it again ({path}: {error.strerror})",
            file=sys.stderr,
        )


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
