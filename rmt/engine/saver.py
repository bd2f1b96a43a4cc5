"""Save a run while it goes on: a step waits for a copy in host memory, a thread writes it.

The thread is ours and calls torch.distributed.checkpoint's `save`, not `async_save`, because the
checksums, the manifest and the rename have to follow the writing, agreed on by all ranks, before
there is a checkpoint. It talks through a gloo group of its own: messages of two threads in one
group would meet in another order on another rank, and NCCL has none for host memory.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict

from rmt.engine.checkpoint import (
    CHECKSUMS,
    RUN,
    CheckpointError,
    checksums,
    place_of,
    reason,
    steps,
    sync,
    write_json,
)
from rmt.system.dist import World, background_group, gather_objects

PATIENCE = 60  # seconds that a run which has failed gives its last checkpoint to be complete


class Saver:
    """Writes checkpoints of a run, one at a time, and deletes all but the newest `keep`.

    As a context manager it does not let a run end before its checkpoint is written.
    """

    def __init__(self, out: Path, keep: int, world: World):
        """All ranks."""
        self.out, self.keep, self.world = out, keep, world
        self.group = background_group(world)
        self.thread: Thread | None = None
        self.problem: BaseException | None = None
        # torch says at each save of a single process that it is one.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:  # other ranks may be gone, and what they would write
            self.thread.join(min(PATIENCE, self.world.timeout))

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a checkpoint was not written: `wait` will raise."""
        return self.problem is not None

    def save(
        self, step: int, model, optimizer, tensors: dict[str, Tensor], run: dict[str, Any]
    ) -> None:
        """Copy the state after `step` steps, and begin to write it. All ranks.

        tensors and run (JSON) are whatever else the run needs to continue. CheckpointError if the
        save before this one, which is waited for, has failed.
        """
        self.wait()
        untouched = not optimizer.state
        model_state, optimizer_state = get_state_dict(model, optimizer)
        if untouched:  # torch has filled it by an update of nothing, and has counted that
            for moments in optimizer.state.values():
                moments["step"].zero_()
        state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
        what = (step, _copied(state), {"step": step} | run)
        self.thread = Thread(target=self._in_background, args=what, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the checkpoint is complete; CheckpointError on all ranks if it failed on one."""
        if self.thread is not None:
            self.thread.join()
        self.thread, problem, self.problem = None, self.problem, None
        if problem is not None:
            raise problem

    def _in_background(self, step: int, state: dict[str, Any], run: dict[str, Any]) -> None:
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # each thread has a current one
            _write(self.out, step, state, run, self.world, self.group)
            if self.world.rank == 0:
                for old in steps(self.out)[: -self.keep]:  # what stays is tried again next time
                    shutil.rmtree(place_of(self.out, old), ignore_errors=True)
        except BaseException as error:  # raised where it is waited for
            self.problem = error


def _copied(value: Any) -> Any:
    """The same in host memory that no step writes to."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


class _Failed(Exception):
    """What went wrong on some rank; raised on all."""


def _write(
    out: Path, step: int, state: dict[str, Any], run: dict[str, Any], world: World, group
) -> None:
    """Write beside the place of `step`, then rename. All ranks; CheckpointError on all."""
    place = place_of(out, step)
    aside = place.with_name(f".{place.name}.saving")

    def on_all(work: Callable[[], Any]) -> list[Any]:
        """The results of all ranks; nobody goes on when one has failed."""
        try:
            mine = (work(), None)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            mine = (None, reason(error))
        results, problems = zip(*gather_objects(mine, world, group))
        if told := [problem for problem in problems if problem is not None]:
            raise _Failed(told[0])
        return list(results)

    def on_first(work: Callable[[], Any]) -> None:
        on_all(work if world.rank == 0 else lambda: None)

    def write_shards() -> dict[str, str]:
        alone = world.size == 1
        dcp.save(state, checkpoint_id=aside, process_group=group, no_dist=alone)
        return checksums(sorted(aside.glob(f"__{world.rank}_*")))

    try:
        on_first(lambda: _begin(aside))
        sums = {name: value for part in on_all(write_shards) for name, value in part.items()}
        on_first(lambda: _complete(aside, place, run, sums))
    except _Failed as problem:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(_told(out, step, problem)) from None


def _told(out: Path, step: int, problem: Exception) -> str:
    newest = steps(out)[-1:]
    remedy = "there is no earlier one: free some space and start anew"
    if newest:
        remedy = f"free some space: --resume {out} continues from {place_of(out, newest[0]).name}"
    place = place_of(out, step).parent
    return f"the checkpoint of step {step} could not be written to {place} ({problem}); {remedy}"


def _begin(aside: Path) -> None:
    for unfinished in aside.parent.glob(".step-*.saving"):  # of a run that was killed
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)


def _complete(aside: Path, place: Path, run: dict[str, Any], sums: dict[str, str]) -> None:
    write_json(aside / RUN, run)
    write_json(aside / CHECKSUMS, sums | checksums([aside / RUN, aside / ".metadata"]))
    sync(aside)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(aside, place)
    sync(place.parent)
