"""Files of a model directory: JSON objects, and safetensors whose copies agree."""

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_BYTES = 64 * 2**20  # most extra memory to read a tensor
LARGEST = 1 << 24  # a larger size means that the file is damaged
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' name of a dtype -> bytes


def read_json(path: Path) -> dict:
    """Read a JSON object, {} where there is no file; ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it again")
    return raw


def read_number(raw: dict, name: str, otherwise, kind: type, source: str):
    """Return a field as a number above 0, or `otherwise` if it is missing or null."""
    value = raw.get(name)
    if value is None:
        if otherwise is None:
            raise ValueError(f"{source}: the field {name!r} is missing")
        return otherwise
    whole = isinstance(value, int) and not isinstance(value, bool)
    largest = LARGEST if kind is int else 1e12
    if not (whole or (kind is float and isinstance(value, float))) or not 0 < value <= largest:
        raise ValueError(
            f"{source}: {name} is {str(value)[:80]!r}, but must be a "
            f"{'whole ' if kind is int else ''}number above 0; fetch it again"
        )
    return kind(value)


def read_truth(raw: dict, name: str, source: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{source}: {name} is {value!r}, neither true nor false; fetch it again")
    return bool(value)


def refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} has an adapter (adapter_config.json), which would be ignored; merge it "
            "into the weights"
        )


@contextmanager
def opened(path: Path):
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from None
    with file:
        yield file


def check_float(name: str, dtype: str, directory: Path) -> None:
    if dtype not in FLOATS:
        raise ValueError(
            f"{directory}: {name} is stored as {dtype}, quantised or no weight; "
            f"use a checkpoint in {', '.join(FLOATS)}"
        )


def check_same(embedding: tuple[Path, str], head: tuple[Path, str], directory: Path) -> None:
    """Refuse a head that config.json ties to the embedding but that differs from it."""
    with opened(embedding[0]) as one, opened(head[0]) as other:
        a, b = one.get_slice(embedding[1]), other.get_slice(head[1])
        shape = a.get_shape()
        same = shape == b.get_shape() and len(shape) == 2
        rows = max(1, BLOCK_BYTES // (8 * max(1, *shape[1:]))) if same else 1
        for begin in range(0, shape[0] if same else 0, rows):
            same &= bool((a[begin : begin + rows] == b[begin : begin + rows]).all())
    if not same:
        raise ValueError(
            f"{directory}: config.json has tie_word_embeddings true, but {HEAD} is not equal to "
            f"{EMBEDDING}; set it to false to use both, or remove {HEAD} from the file"
        )
