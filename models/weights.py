"""Find a model's directory and read its safetensors into parameters.

A directory is in Hugging Face format: config.json, tokenizer.json and either model.safetensors or
shards with model.safetensors.index.json. Parameter names are Hugging Face's, so nothing is renamed.
"""

import difflib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from models.config import TINY, ModelConfig
from models.files import (
    BLOCK_BYTES,
    EMBEDDING,
    FLOATS,
    HEAD,
    check_float,
    check_same,
    opened,
    read_json,
)
from models.rope import check_frequencies
from models.shapes import REPOSITORIES, SHAPES
from models.transformer import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("lora_A", "lora_B")  # ends of names that a model's files do not have: models/lora.py
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def cache_directory() -> Path:
    """Return the directory of models that this project made, such as `make smollm2`'s.

    A user without a home, as in a container, gets a temporary directory.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if place.is_absolute():
        return place / "rmt"
    return Path(tempfile.gettempdir()) / f"rmt-{os.getuid()}"


def find(model: str, weights: Path | None = None, download: bool = True) -> Path:
    """Find the directory of `--model`: itself a directory, or a name of the table of models.

    A name is searched in `weights` (which may be the model's own directory, if it has its sizes),
    in our cache and in Hugging Face's, then downloaded.
    ValueError for an unknown name, FileNotFoundError when it is not found nor downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    if model == "tiny":
        return TINY
    if model not in REPOSITORIES:
        close = difflib.get_close_matches(model, ["tiny", *REPOSITORIES], n=1)
        raise ValueError(
            f"--model {model} is neither a directory nor a known name. "
            + "".join(f"Did you mean {name}? " for name in close)
            + f"Known names: tiny, {', '.join(REPOSITORIES)}"
        )
    if weights is not None and not Path(weights).is_dir():
        raise FileNotFoundError(f"--weights {weights} is not a directory; give one or leave it out")
    places = [] if weights is None else [Path(weights) / model, Path(weights)]
    for place in [*places, cache_directory() / model]:
        found = os.path.isfile(place / "config.json")  # False also without permission to look
        if found and (place.name == model or _has_shape(place, model)):
            return place
    return _from_hub(model, download)


def _has_shape(place: Path, model: str) -> bool:
    """Tell whether a directory of any name may hold the model of this name."""
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    found, known = ModelConfig.from_directory(place), SHAPES[model]
    return all(getattr(found, name) == getattr(known, name) for name in sizes)


def _from_hub(model: str, download: bool) -> Path:
    """Return the snapshot in Hugging Face's cache; download it if it is missing."""
    from huggingface_hub import snapshot_download

    repository, reason = REPOSITORIES[model], "it is in no cache"
    for local_only in (True, False) if download else (True,):
        try:
            path = snapshot_download(
                repository, allow_patterns=DOWNLOADED, local_files_only=local_only
            )
            # Without a network it returns a snapshot that may hold a tokenizer only.
            shards(Path(path))
            return Path(path)
        except Exception as error:  # of requests or httpx, by huggingface_hub's version
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    own = " For this model `make smollm2` works too." if model == "smollm2-135m" else ""
    raise FileNotFoundError(
        f"no weights of {model} on this machine ({reason}); where there is a network, run "
        f"`hf download {repository} --local-dir DIR/{model}`, then pass `--weights DIR`.{own}"
    )


def load(model: nn.Module, directory: Path) -> None:
    """Read the safetensors of `directory` into the parameters of a Transformer, in place.

    The model is already on its device (built on meta, then to_empty) and may be sharded by FSDP2:
    each rank reads only the rows it owns, without a collective or a second copy of the model.
    Files are mapped one at a time: beside the parameters a process holds one block, and its rows of
    one file as pages that the operating system may evict. Parameters keep their dtype.
    ValueError or FileNotFoundError before anything is copied when files or tensors are missing,
    surplus, damaged or of another shape.
    """
    directory = Path(directory)
    parameters = dict(model.named_parameters())
    unplaced = [name for name, parameter in parameters.items() if parameter.is_meta]
    if unplaced:
        raise ValueError(f"parameter {unplaced[0]} is on meta; call model.to_empty(device=...)")
    places = check(model, directory)
    for path in sorted({path for path, _ in places.values()}):
        with opened(path) as file:  # one at a time: pages of an open file count as our memory
            for name, (place, stored) in places.items():
                if place == path:
                    _copy_rows(parameters[name], file.get_slice(stored))


def check(model: nn.Module, directory: Path) -> dict[str, tuple[Path, str]]:
    """Return parameter -> (file, name there) of a model, on meta or not.

    ValueError unless the files hold exactly these tensors, or copies of them. Adapters have none.
    """
    shapes, places = {}, {}
    for path in shards(directory):
        with opened(path) as file:
            for name in sorted(file.keys()):
                stored = file.get_slice(name)
                shapes[name], places[name] = tuple(stored.get_shape()), (path, name)
                check_float(name, stored.get_dtype(), directory)
                if name.endswith(".rotary_emb.inv_freq"):
                    check_frequencies(name, file.get_tensor(name), model.config, directory)
                    del shapes[name], places[name]
    if model.config.tie_word_embeddings and HEAD in shapes:
        if EMBEDDING not in shapes:  # some FSDP savers write only the last of the two names
            shapes[EMBEDDING], places[EMBEDDING] = shapes[HEAD], places[HEAD]
        check_same(places[EMBEDDING], places[HEAD], directory)
        del shapes[HEAD], places[HEAD]
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.endswith(ADAPTERS)}
    check_shapes(shapes, wanted, str(directory))
    return places


def own_rows(parameter: Tensor) -> tuple[int, Tensor]:
    """Return the rows that this rank holds, and the number of the first."""
    if not isinstance(parameter, DTensor):
        return 0, parameter
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0], parameter.to_local()


@torch.no_grad()
def _copy_rows(parameter: Tensor, stored) -> None:
    """Copy this rank's rows of a stored tensor, a block at a time."""
    first, local = own_rows(parameter)
    row_bytes = FLOATS[stored.get_dtype()] * max(1, local[:1].numel())
    block = max(1, BLOCK_BYTES // row_bytes)
    for begin in range(0, local.shape[0], block):
        end = min(begin + block, local.shape[0])
        local[begin:end].copy_(stored[first + begin : first + end])


def shards(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory; check that all exist."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors are read: "
            "download or convert them"
        )
    weight_map = read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):  # no folder
        raise ValueError(f"{index} is not an index of shards; fetch it again")
    held = {name: set() for name in sorted(weight_map.values())}
    for tensor, name in weight_map.items():
        held[name].add(tensor)
    for name, tensors in held.items():
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}, named by {INDEX}, does not exist; the download is "
                "incomplete: fetch it again"
            )
        with opened(directory / name) as file:
            if other := sorted(tensors ^ set(file.keys())):
                raise ValueError(
                    f"{index} and {name} do not agree on where {other[0]} is; fetch both again"
                )
    return [directory / name for name in held]


def check_shapes(given: Mapping[str, tuple], wanted: Mapping[str, tuple], source: str) -> None:
    """Refuse names and shapes that are not those of the model."""
    for problem, names in (
        ("is missing", [name for name in wanted if name not in given]),
        ("has no place in this model", [name for name in given if name not in wanted]),
    ):
        if names:
            reason = "config.json and the weights are not of the same model: fetch both again"
            alike = [n for n in given if n.endswith(names[0]) or names[0].endswith("." + n)]
            if alike and names[0] not in given:
                reason = f"the file calls it {alike[0]}: save the whole model as transformers does"
            raise ValueError(f"{source}: tensor {names[0]} {problem} ({len(names)} such); {reason}")
    for name, shape in wanted.items():
        if given[name] != shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {given[name]}, config.json asks for {shape}; "
                "fetch both of the same model"
            )


def on_meta(directory: Path) -> Transformer:
    """Build the model of a directory on meta: shard it, then to_empty, then `load`."""
    with torch.device("meta"):
        return Transformer(ModelConfig.from_directory(directory))


def build(directory: Path, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """Build and load the model of a directory on one device, for a single process."""
    model = on_meta(directory).to(dtype)
    check(model, Path(directory))  # before memory is allocated
    model.to_empty(device=device)
    load(model, directory)
    return model
