"""Save and resume a run so that nothing is ever half-written, and export what it trained.

    OUT/checkpoints/step-000050/   torch.distributed.checkpoint + run.json + checksums.json
    OUT/model/                     the result as a plain Hugging Face directory

A checkpoint is written beside its place and renamed when complete; a kill at any moment leaves the
one before it intact. It is read by any number of ranks. All ranks must see the same file system.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from models.export import export
from rmt.dist import World, gather_objects

CHECKSUMS, RUN = "checksums.json", "run.json"


class CheckpointError(Exception):
    """Saving or reading a checkpoint failed; the message says what is intact."""


def save(
    out: Path,
    step: int,
    model,
    optimizer,
    tensors: dict[str, Tensor],
    run: dict[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. All ranks.

    tensors and run (JSON) are whatever else the run needs to continue. CheckpointError on failure.
    """
    place = _place(out, step)
    aside = place.with_name(f".{place.name}.saving")
    problem = None
    try:
        if world.rank == 0:
            for unfinished in place.parent.glob(".step-*.saving"):  # of a run that was killed
                shutil.rmtree(unfinished)
            aside.mkdir(parents=True)
        gather_objects(None, world)  # nobody writes before the folder is there
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
        _quietly(dcp.save, state, checkpoint_id=aside)
        mine = sorted(aside.glob(f"__{world.rank}_*"))
        sums = {k: v for part in gather_objects(_checksums(mine), world) for k, v in part.items()}
        if world.rank == 0:
            _write_json(aside / RUN, {"step": step} | run)
            sums |= _checksums([aside / RUN, aside / ".metadata"])
            _write_json(aside / CHECKSUMS, sums)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(aside, place)
            _sync(place.parent)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        problem = _reason(error)
    if any(gather_objects(problem, world)):
        shutil.rmtree(aside, ignore_errors=True)
        newest = steps(out)[-1:]
        remedy = "there is no earlier one: free some space and start anew"
        if newest:
            remedy = f"free some space: --resume {out} continues from {_place(out, newest[0]).name}"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {place.parent} ({problem}); "
            + remedy
        )
    if world.rank == 0:
        for old in steps(out)[:-keep]:
            shutil.rmtree(_place(out, old))
    return place


def steps(out: Path) -> list[int]:
    """Steps of all complete checkpoints of a run, oldest first."""
    numbers = (p.name.removeprefix("step-") for p in (out / "checkpoints").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def read_run(out: Path, world: World) -> tuple[Path, dict[str, Any]]:
    """Place and saved JSON of the newest checkpoint, its files checked. All ranks.

    CheckpointError when there is none or a file is damaged.
    """
    if not steps(out):
        raise CheckpointError(f"--resume {out}: no checkpoint in {out / 'checkpoints'}; start anew")
    place = _place(out, steps(out)[-1])
    damaged = [name for part in gather_objects(_damaged(place, world), world) for name in part]
    if damaged:
        raise CheckpointError(
            f"{place / damaged[0]} is damaged (checksum differs from the one at saving); "
            f"delete {place} to resume from the checkpoint before it"
        )
    return place, json.loads((place / RUN).read_text())


def restore(place: Path, model, optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill model, optimizer and tensors (in place) from a checkpoint. All ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
    try:
        _quietly(dcp.load, state, checkpoint_id=place)
    except (Exception, CheckpointException) as error:  # key and shape errors of every rank
        raise CheckpointError(
            f"{place} does not fit this model or data ({_reason(error)}); resume with the "
            "model and data that the run started with"
        ) from None
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def export_model(model, source: Path, out: Path, dtype: torch.dtype, world: World) -> Path:
    """Write a Hugging Face directory OUT/model; CheckpointError if that fails. All ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, problem = get_model_state_dict(model, options=options), None
    if world.rank == 0:
        try:
            export(state, source, out / "model", dtype)
        except (OSError, SafetensorError) as error:
            problem = _reason(error)
    if problem := gather_objects(problem, world)[0]:
        raise CheckpointError(
            f"the model could not be written to {out / 'model'} ({problem}); the last checkpoint "
            f"is intact: mend this, then --resume {out} writes the model"
        )
    return out / "model"


def _place(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def _damaged(place: Path, world: World) -> list[str]:
    """Names of files, of this rank's share, that are lost or not as they were written."""
    try:
        names = json.loads((place / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return [CHECKSUMS]
    mine = [place / name for name in sorted(names)[world.rank :: world.size]]
    lost = [path.name for path in mine if not path.is_file()]
    found = _checksums([path for path in mine if path.is_file()])
    return lost + [name for name, value in found.items() if value != names[name]]


def _checksums(paths: list[Path]) -> dict[str, str]:
    sums = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        sums[path.name] = digest.hexdigest()
    return sums


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _quietly(function, *args, **kwargs):
    """Without torch's remark that a single process has no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def _reason(error: BaseException) -> str:
    """What the file system said, if it is behind this error, else the error's last line."""
    if isinstance(error, CheckpointException):  # errors of all ranks, each with its traceback
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while follows := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(follows)
    told = next((e for e in chain if isinstance(e, OSError)), chain[0])
    lines = [line for line in str(told).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(told).__name__
