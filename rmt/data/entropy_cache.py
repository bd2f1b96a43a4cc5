"""Keep entropies in the user's cache, under a hash of model, tokenizer, text and method."""

import hashlib
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.fingerprint import fingerprint
from models.weights import cache_directory
from rmt.data.corpus import Document
from rmt.system.dist import World, gather_objects


def cached_entropies(
    measure: Callable[[], list[np.ndarray]],
    model_directory: Path,
    documents: Sequence[Document],
    method: str,
    world: World,
) -> list[np.ndarray]:
    """Return what an earlier run with the same model, text and method measured, or `measure()`.

    All ranks; rank 0 reads and writes the cache.
    """
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
    """Return folders for the cache, the best first; one in /tmp only if it is this user's."""
    last = Path(tempfile.gettempdir()) / f"rmt-{os.getuid()}"
    foreign = os.path.exists(last) and last.stat().st_uid != os.getuid()
    return [cache_directory(), *([] if foreign else [last])]


def _read(name: str, lengths: list[int]) -> list[np.ndarray] | None:
    """Read a file of a hash and the numbers it is of; None if there is none, or it is damaged."""
    for place in _places():
        with suppress(OSError):
            content = (place / name).read_bytes()
            if content[:32] == _hash(content[32:]) and len(content) == 32 + 8 * sum(lengths):
                return np.split(np.frombuffer(content[32:], "<f8").copy(), np.cumsum(lengths)[:-1])
    return None


def _write(name: str, entropies: Sequence[np.ndarray]) -> None:
    """Write to the first place that can be written, aside and then renamed."""
    content, troubles = np.concatenate(entropies).astype("<f8").tobytes(), []
    for place in _places():
        path = place / name
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(_hash(content) + content)
            return os.replace(aside, path)
        except OSError as error:
            troubles.append(f"{place}: {error.strerror}")
            with suppress(OSError):
                aside.unlink(missing_ok=True)
    told = "; ".join(troubles)
    print(f"difficulty is not kept, the next run measures it again ({told})", file=sys.stderr)


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
