"""Export a run's model as a Hugging Face directory, from a checkpoint of any number of ranks.

    python -m rmt.engine.export runs/rmt hf                                the newest checkpoint
    python -m rmt.engine.export runs/rmt/checkpoints/step-000050 hf

train.py, eval.py and sample.py take a run or a checkpoint as --model, too. Of a run that has ended
they take OUT/model, else its newest checkpoint, and keep the export in the checkpoint's folder.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from models.export import export
from models.fingerprint import fingerprint
from models.lora import add_adapters
from models.weights import ADAPTERS, cache_directory, find, load, on_meta
from rmt.config.flags import make_parser, parse_known
from rmt.engine import checkpoint
from rmt.engine.checkpoint import CHECKSUMS, CheckpointError
from rmt.system.dist import World, compute_dtype, from_rank_0
from rmt.system.terminal import safe_printing

ALONE = World(0, 1, torch.device("cpu"))


def find_model(model: str, weights: str, world: World) -> Path:
    """Return the Hugging Face directory of --model, which may be a run or a checkpoint. All ranks.

    Rank 0 exports a checkpoint that was not exported yet. ValueError or OSError on all ranks.
    """
    path = Path(model)
    if not _is_run(path):
        return find(model, Path(weights) if weights else None)
    exported = lambda: _final_model(path) or _exported(_checkpoint_of(path), weights)
    return from_rank_0(exported, world)


def _is_run(path: Path) -> bool:
    """Return True for a run or one of its checkpoints, False for a model or a name."""
    if _is_model(path):
        return False
    return _is_checkpoint(path) or bool(checkpoint.steps(path)) or (path / "model").is_dir()


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _is_checkpoint(path: Path) -> bool:
    return (path / CHECKSUMS).is_file()


def _checkpoint_of(path: Path) -> Path:
    return path if _is_checkpoint(path) else checkpoint.newest(path)


def _final_model(path: Path) -> Path | None:
    """Return OUT/model unless the run has no model or has newer checkpoints."""
    if _is_checkpoint(path) or not _is_model(path / "model"):
        return None
    step = (checkpoint.run_settings(path / "model") or {}).get("step")
    newer = checkpoint.steps(path) and step not in (None, checkpoint.steps(path)[-1])
    return None if newer else path / "model"


def _exported(checkpoint_dir: Path, weights: str) -> Path:
    """Export a checkpoint into its folder, or into the cache where that is read-only."""
    content = hashlib.sha256((checkpoint_dir / CHECKSUMS).read_bytes()).hexdigest()[:16]
    beside, cached = checkpoint_dir / "model", cache_directory() / "exports" / content
    for model_dir in (beside, cached):
        if _is_model(model_dir):
            return model_dir
    model_dir = beside if os.access(checkpoint_dir, os.W_OK) else cached
    try:
        write_model(checkpoint_dir, model_dir, weights)
    except OSError:
        if not _is_model(model_dir):  # another process was first
            raise
    print(f"wrote the model of {checkpoint_dir} to {model_dir}", file=sys.stderr)
    return model_dir


def write_model(checkpoint_dir: Path, out: Path, weights: str = "", dtype: str = "auto") -> None:
    """Export a checkpoint to a Hugging Face directory, which appears when it is complete.

    dtype auto: the run's compute dtype. Configuration and tokenizer are those of the model that the
    run started from. ValueError or OSError when that is gone, or the checkpoint is damaged.
    """
    saved = checkpoint.read(checkpoint_dir, ALONE)
    c = saved["config"]
    if not weights and Path(c["weights"]).is_dir():  # else it is of another machine
        weights = c["weights"]
    model_dir = find_model(c["model"], weights, ALONE)
    changed = changed_parts(saved, "--model", fingerprint(model_dir))
    rank = c["lora_rank"]
    if changed := [part for part in changed if part != "weights" or rank]:
        raise CheckpointError(
            f"the {' and '.join(changed)} of {model_dir}, from which the run of {checkpoint_dir} "
            "started, have changed since; put the old files back"
        )
    compute = compute_dtype(saved["compute"] if dtype == "auto" else dtype, ALONE)
    model = on_meta(model_dir).to(compute)
    add_adapters(model, rank)
    state = learnt = model.to_empty(device="cpu").state_dict()
    if rank:
        load(model, model_dir)
        learnt = {name: tensor for name, tensor in state.items() if name.endswith(ADAPTERS)}
    try:
        with warnings.catch_warnings():  # torch warns about a single process
            warnings.simplefilter("ignore")
            dcp.load({"model": learnt}, checkpoint_id=checkpoint_dir, no_dist=True)
        export(state, model_dir, out, compute, run=saved)
    except (SafetensorError, CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint_dir} could not be written to {out} ({checkpoint.reason(error)})"
        ) from None


def changed_parts(saved: Mapping[str, Any], flag: str, now: dict[str, str]) -> list[str]:
    """Name the parts of a model's fingerprint that changed since a run saved it."""
    then = saved.get("models", {}).get(flag, now)  # a new run has nothing saved
    known = then if isinstance(then, dict) else {}
    return [part for part, value in now.items() if known.get(part) != value]


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "")
    parser.add_argument("run", type=Path, help="a run's directory or one of its checkpoints")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--weights", default="", help="directory that holds downloaded models")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the weights; auto: the run's compute dtype",
    )  # fmt: skip
    o = parse_known(parser, sys.argv[1:] if arguments is None else arguments)
    try:
        if not _is_run(o.run):
            raise ValueError(
                f"{o.run} is neither a run nor a checkpoint; give the --out of train.py, or a "
                "folder in its checkpoints/"
            )
        if o.out.exists():
            raise ValueError(f"{o.out} exists; choose another path or delete it")
        checkpoint_dir = _checkpoint_of(o.run)
        write_model(checkpoint_dir, o.out, o.weights, o.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {o.out} (Hugging Face format) from {checkpoint_dir}")


if __name__ == "__main__":
    main()
