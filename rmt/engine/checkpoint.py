"""What a run leaves on disk, none of it ever half-written: checkpoints to resume, and its model.

    OUT/checkpoints/step-000050/   torch.distributed.checkpoint + run.json + checksums.json
    OUT/model/                     the result as a plain Hugging Face directory

A checkpoint is written (saver.py) beside its place and renamed when complete; a kill at any moment
leaves the one before it intact. It is read by any number of ranks. All ranks must see the
same file system.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from models.export import RUN as MODEL_RUN
from models.export import SHARD_BYTES, export
from rmt.config.config import wrong_types
from rmt.system.dist import World, gather_objects

CHECKSUMS, RUN = "checksums.json", "run.json"


class CheckpointError(ValueError):
    """Saving or reading a checkpoint failed; the message says what is intact."""


def steps(out: Path) -> list[int]:
    """Steps of all complete checkpoints of a run, oldest first."""
    numbers = (p.name.removeprefix("step-") for p in (out / "checkpoints").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def newest(out: Path) -> Path:
    """The folder of a run's newest checkpoint; CheckpointError when there is none."""
    if not steps(out):
        raise CheckpointError(
            f"--resume {out}: no checkpoint in {out / 'checkpoints'}; give the --out of "
            "a run that has saved one, or start anew"
        )
    return place_of(out, steps(out)[-1])


def read(place: Path, world: World) -> dict[str, Any]:
    """Saved JSON of a checkpoint; CheckpointError when one of its files is damaged. All ranks."""
    damaged = [name for part in gather_objects(_damaged(place, world), world) for name in part]
    if damaged:
        raise CheckpointError(
            f"{place / damaged[0]} is damaged (checksum differs from the one at saving); "
            f"delete {place} to resume from the checkpoint before it"
        )
    return _settings(place / RUN)


SAVED = {  # what is kept of a run beside tensors, and its type; the first two with a model, too
    "config": dict, "total_steps": int,
    "step": int, "data": str, "refused_in_a_row": int, "tokens": (int, float),
    "seconds": (int, float),
}  # fmt: skip
SAVED_LATER = {"models": dict, "thresholds": list, "compute": str}  # not in older checkpoints


def _settings(path: Path, names: Iterable[str] = SAVED) -> dict[str, Any]:
    """The JSON of a run; ValueError when the file is not one that a run wrote."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        wrong = [n for n in names if not isinstance(saved[n], SAVED[n]) or saved[n] is True]
        wrong += wrong_types(saved["config"])
        wrong += [n for n, t in SAVED_LATER.items() if not isinstance(saved.get(n), (t, NoneType))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = [repr(error)]
    if wrong:
        raise ValueError(
            f"{path} is damaged: it has no settings of a run ({wrong[0]}); delete it or mend it"
        )
    return {name: value for name, value in saved.items() if value is not None}


def run_settings(path: Path) -> dict[str, Any] | None:
    """JSON (config, total_steps, ...) of the run that made a model; None when no run of ours did.

    path: the model's directory, a run's (its newest checkpoint counts) or a checkpoint's.
    ValueError when the JSON is damaged.
    """
    path = Path(path).resolve()
    newest = [place_of(path, step) for step in steps(path)[-1:]]
    places = [path / MODEL_RUN, *(place / RUN for place in newest), path / RUN]
    if path.name == "model":
        places.append(path.parent / RUN)  # of a run whose model did not say yet
    for place in (place for place in places if place.is_file()):
        return _settings(place, ("config",))
    return None


def restore(place: Path, model, optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill model, optimizer and tensors (in place) from a checkpoint. All ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
    try:
        with warnings.catch_warnings():  # a single process has no process group
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=place)
    except (Exception, CheckpointException) as error:  # key and shape errors of every rank
        raise CheckpointError(
            f"{place} does not fit this model or data ({reason(error)}); resume with the "
            "model and data that the run started with"
        ) from None
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def export_model(
    model,
    source: Path,
    out: Path,
    dtype: torch.dtype,
    world: World,
    max_shard_bytes: int = SHARD_BYTES,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face directory OUT/model; CheckpointError if that fails. All ranks.

    run: its settings, for `run_settings`.
    """
    problem, state = None, get_model_state_dict(model)
    try:
        export(state, source, out / "model", dtype, max_shard_bytes, world.rank, run)
    except (OSError, SafetensorError) as error:
        problem = reason(error)
    if problem := gather_objects(problem, world)[0]:
        raise CheckpointError(
            f"the model could not be written to {out / 'model'} ({problem}); the last checkpoint "
            f"is intact: mend this, then --resume {out} writes the model"
        )
    return out / "model"


def place_of(out: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step:06d}"


def _damaged(place: Path, world: World) -> list[str]:
    """Names of files, of this rank's share, that are lost or not as they were written."""
    try:
        names = json.loads((place / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return [CHECKSUMS]
    if not isinstance(names, dict) or ".metadata" not in names:
        return [CHECKSUMS]
    mine = [place / name for name in sorted(names)[world.rank :: world.size]]
    lost = [path.name for path in mine if not path.is_file()]
    found = checksums([path for path in mine if path.is_file()])
    return lost + [name for name, value in found.items() if value != names[name]]


def checksums(paths: list[Path]) -> dict[str, str]:
    """File name -> SHA-256."""
    sums = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        sums[path.name] = digest.hexdigest()
    return sums


def write_json(path: Path, value: Any) -> None:
    """As a file that survives a power cut."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def reason(error: BaseException) -> str:
    """What the file system said, if it is behind this error, else the error's last line."""
    if isinstance(error, CheckpointException):  # errors of all ranks, each with its traceback
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while follows := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(follows)
    told = next((e for e in chain if isinstance(e, OSError)), chain[0])
    lines = [line for line in str(told).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(told).__name__
