"""A run's model as a Hugging Face directory: from any checkpoint, of any number of ranks.

    python -m rmt.engine.export runs/rmt hf                                the newest checkpoint
    python -m rmt.engine.export runs/rmt/checkpoints/step-000050 hf

train.py, eval.py and sample.py take a run or a checkpoint as --model, too: a run that has ended is
its OUT/model, another its newest checkpoint, whose model is then kept in the checkpoint's folder.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from models.export import export
from models.fingerprint import fingerprint
from models.weights import cache_directory, find, on_meta
from rmt.config.flags import make_parser, parse_known
from rmt.engine.checkpoint import (
    CHECKSUMS,
    CheckpointError,
    newest,
    read,
    reason,
    run_settings,
    steps,
)
from rmt.system.dist import World, compute_dtype, gather_objects
from rmt.system.terminal import safe_printing

ALONE = World(0, 1, torch.device("cpu"))


def find_model(model: str, weights: str, world: World) -> Path:
    """The Hugging Face directory of --model, which may be a run or a checkpoint. All ranks.

    ValueError or OSError on all ranks: rank 0 writes what was not written yet.
    """
    if not _of_a_run(Path(model)):
        return find(model, Path(weights) if weights else None)
    found = None
    if world.rank == 0:
        try:
            found = _model_of(Path(model), weights)
        except (ValueError, OSError) as error:
            found = CheckpointError(str(error))
    found = gather_objects(found, world)[0]
    if isinstance(found, CheckpointError):
        raise found
    return found


def _of_a_run(path: Path) -> bool:
    if (path / "config.json").is_file():
        return False
    return (path / CHECKSUMS).is_file() or bool(steps(path)) or (path / "model").is_dir()


def _model_of(path: Path, weights: str) -> Path:
    if not (path / CHECKSUMS).is_file() and (path / "model" / "config.json").is_file():
        made = run_settings(path / "model") or {}
        if not steps(path) or made.get("step") in (None, steps(path)[-1]):
            return path / "model"
    place = _checkpoint(path)
    places = (place / "model", _cached(place))
    for into in places:
        if (into / "config.json").is_file():
            return into
    into = places[0] if os.access(place, os.W_OK) else places[1]
    try:
        write_model(place, into, weights)
    except OSError:
        if not (into / "config.json").is_file():  # another process was first
            raise
    print(f"wrote the model of {place} to {into}", file=sys.stderr)
    return into


def _checkpoint(path: Path) -> Path:
    return path if (path / CHECKSUMS).is_file() else newest(path)


def _cached(place: Path) -> Path:
    """Where the model of a checkpoint goes whose folder cannot be written."""
    content = hashlib.sha256((place / CHECKSUMS).read_bytes()).hexdigest()[:16]
    return cache_directory() / "exports" / content


def write_model(place: Path, out: Path, weights: str = "", dtype: str = "auto") -> None:
    """A checkpoint as a Hugging Face directory, which appears when it is complete.

    dtype auto: as the run computes. Configuration and tokenizer are those of the model that the run
    started from; ValueError or OSError when it is not there any more, or the checkpoint is damaged.
    """
    saved = read(place, ALONE)
    c = saved["config"]
    source = find_model(c["model"], weights or c["weights"], ALONE)
    _check_source(source, saved, place)
    chosen = saved.get("compute", c["dtype"]) if dtype == "auto" else dtype
    compute = compute_dtype(chosen, ALONE)
    model = on_meta(source).to(compute).to_empty(device="cpu")
    try:
        with warnings.catch_warnings():  # torch says that a single process is one
            warnings.simplefilter("ignore")
            dcp.load({"model": model.state_dict()}, checkpoint_id=place, no_dist=True)
        export(model.state_dict(), source, out, compute, run=saved)
    except (SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{place} could not be written to {out} ({reason(error)})") from None


def _check_source(source: Path, saved: dict[str, Any], place: Path) -> None:
    then, now = saved.get("models", {}).get("--model"), fingerprint(source)
    changed = [part for part in ("config", "tokenizer") if then and now[part] != then[part]]
    if changed:
        raise CheckpointError(
            f"the {' and '.join(changed)} of {source}, from which the run of {place} started, have "
            "changed since; put the old files back"
        )


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "")
    parser.add_argument("run", type=Path, help="a run's directory or one of its checkpoints")
    parser.add_argument("out", type=Path, help="a directory that is not there yet")
    parser.add_argument("--weights", default="", help="directory that holds downloaded models")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the weights; auto: as the run computes",
    )  # fmt: skip
    o = parse_known(parser, sys.argv[1:] if arguments is None else arguments)
    try:
        if not _of_a_run(o.run):
            raise ValueError(
                f"{o.run} is neither a run nor a checkpoint; give the --out of train.py, or a "
                "folder in its checkpoints/"
            )
        if o.out.exists():
            raise ValueError(f"{o.out} exists; choose another path or delete it")
        place = _checkpoint(o.run)
        write_model(place, o.out, o.weights, o.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {o.out} (Hugging Face format) from {place}")


if __name__ == "__main__":
    main()
