"""Identify a model by hashes of its weights, configuration and tokenizer.

Hashing 28 GB would take a minute or more at each start. Eight parts of 4 KiB of each tensor show
if it was trained further, however tensors are spread over files; 14B needs 4,000 small reads.
"""

import hashlib
import json
import os
from pathlib import Path

from models.weights import shards

PARTS, PART_BYTES = 8, 4096
READS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
         "special_tokens_map.json")  # fmt: skip
COSMETIC = ("transformers_version", "_name_or_path")  # of config.json


def fingerprint(directory: Path) -> dict[str, str]:
    """Hash weights, config and tokenizer of a model directory that `load` has accepted."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in COSMETIC}
    templates = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    files = [*(directory / name for name in READS), *templates]
    return {
        "weights": _digest(sorted(part for path in shards(directory) for part in _tensors(path))),
        "config": _digest([json.dumps(config, sort_keys=True).encode()]),
        "tokenizer": _digest([path.read_bytes() for path in files if path.is_file()]),
    }


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()[:16]


def _tensors(path: Path) -> list[bytes]:
    """Read name, dtype, shape and some parts of each tensor of a safetensors file."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = []
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            size = end - begin
            part = PART_BYTES if size > PARTS * PART_BYTES else size  # or the whole, once
            places = sorted({begin + (size - part) * k // (PARTS - 1) for k in range(PARTS)})
            parts = [os.pread(file.fileno(), part, 8 + length + place) for place in places]
            described = f"{name} {tensor['dtype']} {tensor['shape']} "
            found.append(described.encode() + b"".join(parts))
    return found
