"""Write weights as a Hugging Face directory, so that everything else in the field can open them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.weights import INDEX, SINGLE, check_shapes, on_meta

# Copied from the source as they are; weights and the two other configurations are written.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WRITTEN = ("config.json", "generation_config.json", INDEX)


def export(
    state: Mapping[str, Tensor],
    source: Path,
    out: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write whole tensors as a Hugging Face directory that transformers opens. One rank only.

    Configuration and tokenizer are those of `source`. `out` appears when it is complete, and
    replaces an earlier export but nothing else (FileExistsError). ValueError when `state` is not
    the model of `source`.
    """
    source, out = Path(source), Path(out).resolve()
    sharded = [name for name, tensor in state.items() if isinstance(tensor, DTensor)]
    if sharded:
        raise ValueError(f"export: {sharded[0]} is sharded; gather a full state dict first")
    wanted = {name: tuple(p.shape) for name, p in on_meta(source).named_parameters()}
    check_shapes({name: tuple(t.shape) for name, t in state.items()}, wanted, "export")
    _refuse_to_overwrite(source, out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.new")
    previous = out.with_name(f".{out.name}.{os.getpid()}.old")
    aside.mkdir(parents=True)
    try:
        _write_weights(state, aside, dtype, max_shard_bytes)
        _write_description(source, aside, dtype)
        if out.exists():
            out.rename(previous)
        aside.rename(out)
    finally:
        if previous.exists() and not out.exists():
            previous.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _refuse_to_overwrite(source: Path, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or out == source.resolve():
        raise FileExistsError(f"{out} is a file or the source of this export; choose another path")
    names = {path.name for path in out.iterdir()}
    ours = {*COPIED, *WRITTEN}
    foreign = sorted(n for n in names if n not in ours and not n.endswith(".safetensors"))
    complete = "config.json" in names and names & {SINGLE, INDEX}
    if foreign or (names and not complete):
        raise FileExistsError(
            f"{out} is not an earlier export (it holds {(foreign or sorted(names))[0]}) and would "
            "be deleted; choose another path or empty it"
        )


def _write_weights(
    state: Mapping[str, Tensor], directory: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Shards in the order of `state`; one tensor is never split, so a shard may be larger."""
    groups, sizes = [[]], [0]
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if groups[-1] and sizes[-1] + size > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(name)
        sizes[-1] += size
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file = (
            SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # safetensors writes for its owner only; give it the access that its directory has.
        (directory / file).chmod(directory.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _write_description(source: Path, directory: Path, dtype: torch.dtype) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes `dtype` and reads both; earlier versions know `torch_dtype` only.
    field = "dtype" if "dtype" in config else "torch_dtype"
    _write_json(directory / "config.json", config | {field: str(dtype).removeprefix("torch.")})
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    elif (end := _end_id(source, config)) is not None:
        _write_json(directory / generation.name, {"eos_token_id": end})


def _end_id(source: Path, config: dict) -> int | list[int] | None:
    """The id that ends a text: the tokenizer's eos_token, as in sampling, else config.json's."""
    try:
        eos = json.loads((source / "tokenizer_config.json").read_text("utf-8")).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        added = json.loads((source / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    except FileNotFoundError:
        return config.get("eos_token_id")
    ids = [entry["id"] for entry in added if entry["content"] == eos]
    return ids[0] if ids else config.get("eos_token_id")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
