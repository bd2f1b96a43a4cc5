"""Write weights as a Hugging Face directory, which transformers, vLLM and others can load."""

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.config import DEFAULTS, ModelConfig
from models.files import read_json
from models.lora import SCALE, merged
from models.tokenizer_files import DEFAULT_NAMES, class_of, end_ids
from models.weights import ADAPTERS, INDEX, SINGLE, check_shapes, on_meta

# Copied from the source unchanged; weights, config and generation_config are written.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
RUN = "rmt_run.json"  # the settings of the run that made the weights
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's
TEMPLATES = "additional_chat_templates"
WRITTEN = (TEMPLATES, "config.json", "generation_config.json", INDEX, RUN)
SHARD_BYTES = 5 * 10**9  # most bytes of a file
ENDS = ("", ".new", ".old")  # of directories beside a new export: not begun, written, earlier


def export(
    state: Mapping[str, Tensor], source: Path, out: Path, dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES, rank: int = 0, run: dict | None = None,
) -> None:  # fmt: skip
    """Write a Hugging Face directory that transformers loads.

    Tensors may be sharded over ranks: then all ranks call this, tensors are gathered one by one,
    and rank 0 writes. Rank 0 holds one file's tensors and the one being gathered (gloo: twice), the
    other ranks only the latter. Configuration and tokenizer are those of `source`. `out` appears
    when it is complete; it replaces an earlier export, and nothing else (FileExistsError).
    run: the settings that made the weights, saved beside them as rmt_run.json.
    Adapters in `state` are merged into the weights. ValueError when the rest of it is not the model
    of `source`.
    """
    source, out = Path(source), Path(out).resolve()
    wanted = {name: tuple(p.shape) for name, p in on_meta(source).named_parameters()}
    own = {name: tensor for name, tensor in state.items() if not name.endswith(ADAPTERS)}
    check_shapes({name: tuple(t.shape) for name, t in own.items()}, wanted, "export")
    files = _files({n: t.numel() * dtype.itemsize for n, t in own.items()}, max_shard_bytes)
    whole = ((name, _whole(state, name, dtype)) for name in own)
    try:
        if rank == 0:
            _refuse_to_overwrite(source, out)
            _replace(out, lambda aside: _write(whole, files, source, aside, dtype, run))
    finally:  # ranks that do not or could not write still join every gather: no rank waits for them
        for _, tensor in whole:
            tensor.flatten()[:1].tolist()  # wait: a timeout begins when a gather is asked for


def whole_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the adapters in `state`; none if it has none. All ranks."""
    return {n: _gathered(t, t.dtype) for n, t in state.items() if n.endswith(ADAPTERS)}


def write_adapters(own: Mapping[str, Tensor], base: str, out: Path) -> None:
    """Write whole adapters in peft's format, to a new directory or over an earlier one.

    base: the frozen model, a name of the Hugging Face hub or a directory. FileExistsError when
    `out` is something else.
    """
    files = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if out.exists() and {path.name for path in out.iterdir()} != files:
        raise FileExistsError(f"{out} is not an earlier export and would be deleted; move it away")
    size = next(len(tensor) for name, tensor in own.items() if name.endswith(ADAPTERS[0]))
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, bias="none", r=size,
        lora_alpha=int(SCALE * size), lora_dropout=0.0, inference_mode=True,
        target_modules=sorted({name.split(".")[-2] for name in own}),
    )  # fmt: skip

    def write(aside: Path) -> None:
        tensors = ((f"base_model.model.{name}.weight", tensor) for name, tensor in own.items())
        _write_file(aside / ADAPTER_WEIGHTS, tensors, torch.float32)
        _write_json(aside / ADAPTER_CONFIG, config)

    _replace(out.resolve(), write)


def _whole(state: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Gather a tensor, its adapter merged into it; all ranks if it is sharded."""
    adapter = [name.removesuffix("weight") + end for end in ADAPTERS]
    if adapter[0] not in state:
        return _gathered(state[name], dtype)
    return merged(*(_gathered(state[n], state[n].dtype) for n in (name, *adapter))).to(dtype)


def _gathered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a whole tensor, in the dtype that is written; all ranks if it is sharded."""
    tensor = tensor.detach()
    return tensor.to(dtype).full_tensor() if isinstance(tensor, DTensor) else tensor


def _replace(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `out`, then rename it to `out`."""
    token = secrets.token_hex(8)  # a process of another host may have our number
    begun, aside, previous = (out.with_name(f".{out.name}.{token}{end}") for end in ENDS)
    begun.mkdir(parents=True)
    with _lock(begun):
        begun.rename(aside)  # from here on others see it, and that it is locked
        _clear(out)
        try:
            write(aside)
            if out.exists():
                out.rename(previous)
            aside.rename(out)
        finally:
            _finish(out, aside, previous)


def _clear(out: Path) -> None:
    """Remove what exports left that were killed; one that was replacing `out` is undone."""
    left = lambda end: out.parent.glob(f".{glob.escape(out.name)}." + "[0-9a-f]" * 16 + end)
    for previous in left(ENDS[2]):
        if not previous.with_suffix(ENDS[1]).exists():
            _finish(out, previous.with_suffix(ENDS[1]), previous)
    for aside in left(ENDS[1]):
        with suppress(OSError), _lock(aside) as free:
            if free:  # not even by this process
                _finish(out, aside, aside.with_suffix(ENDS[2]))


def _finish(out: Path, aside: Path, previous: Path) -> None:
    if previous.exists() and not out.exists():
        previous.rename(out)
    for left in (aside, previous):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Lock a directory, until this process ends at the latest; yield False if it cannot be."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # another process has it, or the file system has no locks
            locked = False
        yield locked
    finally:
        os.close(descriptor)


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


def _files(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Group tensors into files, in order; a tensor is never split, so a file may be larger."""
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    numbered = enumerate(groups, start=1)
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in numbered}


def _write(
    whole: Iterator[tuple[str, Tensor]], files: dict[str, list[str]], source: Path,
    directory: Path, dtype: torch.dtype, run: dict | None,
) -> None:  # fmt: skip
    size = sum(_write_file(directory / f, islice(whole, len(n)), dtype) for f, n in files.items())
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)
    _write_description(source, directory, dtype)
    if run is not None:
        _write_json(directory / RUN, run)


def _write_file(path: Path, whole: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> int:
    """Write tensors to one file; return their size in bytes."""
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in whole}
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes it readable by its owner only; copy its directory's permissions.
    path.chmod(path.parent.stat().st_mode & 0o666)
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_description(source: Path, directory: Path, dtype: torch.dtype) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, directory / TEMPLATES)
    config = read_json(source / "config.json")
    # transformers reads model_type, this code architectures: write both.
    architecture = ModelConfig.from_directory(source).architecture
    whole = {"architectures": [architecture], "model_type": DEFAULTS[architecture]["model_type"]}
    whole |= {name: value for name, value in config.items() if value is not None}
    # transformers 5 writes `dtype` and reads both; earlier versions read `torch_dtype` only.
    named = str(dtype).removeprefix("torch.")
    fields = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
    _write_json(directory / "config.json", config | whole | dict.fromkeys(sorted(fields), named))
    description = read_json(source / "tokenizer_config.json")
    if class_of(source, description) == "GPT2Tokenizer":
        # transformers 5 would rebuild it and split text differently from tokenizer.json.
        names = DEFAULT_NAMES["GPT2Tokenizer"].items()
        default = {name: token for name, token in names if token in _ids(source)}
        taken = {"tokenizer_class": "PreTrainedTokenizerFast"}
        _write_json(directory / "tokenizer_config.json", default | description | taken)
    generation = source / "generation_config.json"
    said = read_json(generation)
    if not said.get("eos_token_id") and (end := _end_ids(source)) is not None:
        _write_json(directory / generation.name, said | {"eos_token_id": end})
    elif generation.is_file():
        shutil.copyfile(generation, directory / generation.name)


def _end_ids(source: Path) -> int | list[int] | None:
    """Return the ids that end a response, or None if the files do not tell: save anyway."""
    try:
        end = end_ids(source, _ids(source).get)
    except (ValueError, KeyError, TypeError):
        return None
    return end[0] if len(end) == 1 else list(end)


def _ids(source: Path) -> dict[str, int]:
    tokenizer = read_json(source / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return (tokenizer["model"]["vocab"] if tokenizer else {}) | added


def _write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold any bytes
