"""Checkpoints of a run and its final model; neither is ever half-written.

    OUT/checkpoints/step-000050/   torch.distributed.checkpoint + run.json + checksums.json
    OUT/model/                     the result as a plain Hugging Face directory

A checkpoint is written (saver.py) to a folder beside its own, which is renamed when complete: a
kill at any moment leaves the checkpoint before it intact. Any number of ranks can read it. All
ranks must see the same file system.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable
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

from models.export import RUN as MODEL_RUN
from models.export import SHARD_BYTES, export, whole_adapters, write_adapters
from models.shapes import REPOSITORIES
from rmt.config.config import wrong_types
from rmt.evaluation.summary import PROBLEMS
from rmt.system.dist import World, gather_objects
from rmt.system.records import blamed, read_lines

CHECKSUMS, RUN = "checksums.json", "run.json"
TRAINED = StateDictOptions(ignore_frozen_params=True)  # all there is, but of a LoRA run
SAVED = {  # names in run.json -> type
    "config": dict, "total_steps": int, "step": int, "data": str, "refused_in_a_row": int,
    "tokens": (int, float), "seconds": (int, float),
    "models": dict, "thresholds": list, "compute": str,
}  # fmt: skip


class CheckpointError(ValueError):
    """Saving or reading a checkpoint failed; the message says what is intact."""


def steps(out: Path) -> list[int]:
    """Return the steps of all complete checkpoints of a run, oldest first."""
    numbers = (p.name.removeprefix("step-") for p in (out / "checkpoints").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def step_dir(out: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step:06d}"


def newest(out: Path) -> Path:
    """Return the directory of a run's newest checkpoint; CheckpointError when there is none."""
    if not steps(out):
        raise CheckpointError(
            f"--resume {out}: no checkpoint in {out / 'checkpoints'}; give the --out of "
            "a run that has saved one, or start anew"
        )
    return step_dir(out, steps(out)[-1])


def best(out: Path) -> tuple[int, float] | None:
    """Return step and held-out accuracy of a run's best checkpoint, of equals the last.

    None when no checkpoint was evaluated.
    """
    saved, path = set(steps(out)), out / "eval.jsonl"
    with blamed(path):
        found = [
            (row["accuracy"], record["step"])
            for record in read_lines(path) if record["step"] in saved
            for row in record["tiers"] if row["tier"] in ("average", PROBLEMS)
        ]  # fmt: skip
        accuracy, step = max((x for x in found if x[0] is not None), default=(0.0, None))
    return None if step is None else (step, accuracy)


def read(checkpoint_dir: Path, world: World) -> dict[str, Any]:
    """Read run.json of a checkpoint; CheckpointError when one of its files is damaged. All ranks.

    Ranks share out the files whose checksums are compared.
    """
    found = gather_objects(_damaged(checkpoint_dir, world), world)
    damaged = [name for names in found for name in names]
    if damaged:
        raise CheckpointError(
            f"{checkpoint_dir / damaged[0]} is damaged (checksum differs from the one at saving); "
            f"delete {checkpoint_dir} to resume from the checkpoint before it"
        )
    return _settings(checkpoint_dir / RUN)


def _damaged(checkpoint_dir: Path, world: World) -> list[str]:
    """Name the files in this rank's share that are lost or changed."""
    try:
        saved = json.loads((checkpoint_dir / CHECKSUMS).read_text())
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict) or ".metadata" not in saved:
        return [CHECKSUMS]
    names = sorted(saved)[world.rank :: world.size]
    found = checksums(path for name in names if (path := checkpoint_dir / name).is_file())
    return [name for name in names if found.get(name) != saved[name]]


def _settings(path: Path, names: Iterable[str] = SAVED) -> dict[str, Any]:
    """Read the JSON of a run; ValueError when the file is not one that a run wrote."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        wrong = [n for n in names if not isinstance(saved[n], SAVED[n]) or saved[n] is True]
        wrong += [n for n in names if isinstance(saved[n], (int, float)) and not saved[n] >= 0]
        wrong += wrong_types(saved["config"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = [repr(error)]
    if wrong:
        raise ValueError(
            f"{path} is damaged: it has no settings of a run ({wrong[0]}); delete it or mend it"
        )
    return saved


def run_settings(path: Path) -> dict[str, Any] | None:
    """Read the settings (config, total_steps, ...) of the run that made a model, or return None.

    path: the directory of a model, a run (its newest checkpoint counts) or a checkpoint.
    ValueError when the JSON is damaged.
    """
    path = Path(path).resolve()
    newest = [step_dir(path, step) / RUN for step in steps(path)[-1:]]
    files = (path / MODEL_RUN, *newest, path / "model" / MODEL_RUN, path / RUN)
    file = next((file for file in files if file.is_file()), None)
    return file and _settings(file, ("config",))


def restore(checkpoint_dir: Path, model, optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill model, optimizer and tensors, in place, from a checkpoint. All ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
    try:
        with warnings.catch_warnings():  # a single process has no process group
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=checkpoint_dir)
    except (Exception, CheckpointException) as error:  # key and shape errors of every rank
        raise CheckpointError(
            f"{checkpoint_dir} does not fit this model or data ({reason(error)}); resume with the "
            "model and data that the run started with"
        ) from None
    whole = get_model_state_dict(model) | state["model"]
    set_state_dict(model, optimizer, model_state_dict=whole, optim_state_dict=state["optimizer"])


def export_model(
    model, model_dir: Path, out: Path, dtype: torch.dtype, world: World,
    max_shard_bytes: int = SHARD_BYTES, run: dict[str, Any] | None = None, name: str = "model",
) -> Path:  # fmt: skip
    """Write the Hugging Face directory OUT/name, and of a LoRA run the adapters beside it.

    All ranks. CheckpointError if that fails.

    model_dir: the initial model, whose configuration and tokenizer are copied. run: settings, for
    `run_settings`.
    """
    problem, state = None, get_model_state_dict(model)
    adapters = whole_adapters(state)
    try:
        export(state, model_dir, out / name, dtype, max_shard_bytes, world.rank, run)
        if adapters and world.rank == 0:
            base = REPOSITORIES.get(run["config"]["model"] if run else "", str(model_dir))
            write_adapters(adapters, base, out / name.replace("model", "adapter"))
    except (OSError, SafetensorError) as error:
        problem = reason(error)
    if problem := gather_objects(problem, world)[0]:
        raise CheckpointError(
            f"the model could not be written to {out / name} ({problem}); the last checkpoint "
            f"is intact: mend this, then --resume {out} writes the model"
        )
    return out / name


def checksums(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by file name."""
    sums = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        sums[path.name] = digest.hexdigest()
    return sums


def reason(error: BaseException) -> str:
    """Return the file system's message if an OSError caused `error`, else its own last line."""
    if isinstance(error, CheckpointException):  # errors of all ranks, each with its traceback
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    lines = str(cause or error).strip().splitlines() or [type(cause or error).__name__]
    return lines[-1].strip()
