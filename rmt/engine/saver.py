"""Save a run while it goes on: a step waits for a copy in host memory, a thread writes it.

The thread is ours and calls torch.distributed.checkpoint's `save`, not `async_save`: checksums,
manifest and rename have to follow the writing, agreed on by all ranks, before there is a
checkpoint. It has a gloo group of its own: messages of two threads in one group could arrive in
different orders on different ranks, and NCCL cannot send from host memory.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils._pytree import tree_map_only

from rmt.engine import checkpoint
from rmt.engine.checkpoint import CHECKSUMS, RUN, TRAINED, CheckpointError, step_dir, steps
from rmt.system.dist import World, background_group, gather_objects

PATIENCE = 60  # seconds that a failed run waits for its last checkpoint to be complete


class Saver(AbstractContextManager):
    """Write checkpoints of a run, one at a time, and delete all but the newest `keep`.

    With `keep_best` the one with the best held-out accuracy stays, too.

    As a context manager, wait for the last checkpoint before the run ends.
    """

    def __init__(self, out: Path, keep: int, world: World, keep_best: bool = False):
        """All ranks."""
        self.out, self.keep, self.world, self.keep_best = out, keep, world, keep_best
        self.group = background_group(world)
        self.thread: Thread | None = None
        self.problem: BaseException | None = None
        # torch warns at each save of a single process.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif self.thread:  # other ranks may be gone, so that it never completes
            self.thread.join(min(PATIENCE, self.world.timeout))

    @property
    def failed(self) -> bool:
        """True once this rank knows that a checkpoint was not written: `wait` will raise."""
        return self.problem is not None

    def save(
        self, step: int, model, optimizer, tensors: dict[str, Tensor], run: dict[str, Any]
    ) -> None:
        """Copy the state after `step` steps, and start to write it. All ranks.

        tensors and run (JSON) are whatever else the run needs to continue. Waits for the save
        before this one; CheckpointError if that has failed.
        """
        self.wait()
        untouched = not optimizer.state
        model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINED)
        if untouched:  # get_state_dict ran a dummy step; reset its counter
            for moments in optimizer.state.values():
                moments["step"].zero_()
        state = {"model": model_state, "optimizer": optimizer_state, "tensors": tensors}
        copy = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), state)
        given = (step, copy, {"step": step} | run)
        self.thread = Thread(target=self._in_background, args=given, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint; CheckpointError on all ranks if it failed on one."""
        if self.thread:
            self.thread.join()
        self.thread, problem, self.problem = None, self.problem, None
        if problem:
            raise problem

    def _in_background(self, step: int, state: dict[str, Any], run: dict[str, Any]) -> None:
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # each thread has a current one
            _write(self.out, step, state, run, self.world, self.group)
            if self.world.rank == 0:
                self._delete_old()
        except BaseException as error:  # raised by `wait`
            self.problem = error

    def _delete_old(self) -> None:
        try:
            best, _ = (self.keep_best and checkpoint.best(self.out)) or (None, None)
        except (ValueError, OSError) as error:  # the new checkpoint is complete all the same
            print(f"no old checkpoint is deleted: {error}", file=sys.stderr)
            return
        for old in steps(self.out)[: -self.keep]:  # what cannot go is tried again next time
            if old != best:
                shutil.rmtree(step_dir(self.out, old), ignore_errors=True)


def _write(
    out: Path, step: int, state: dict[str, Any], run: dict[str, Any], world: World, group
) -> None:
    """Write a folder beside that of `step`, then rename it. All ranks; CheckpointError on all."""
    aside = step_dir(out, step).with_name(f".{step_dir(out, step).name}.saving")

    def agreed(work: Callable[[], Any]) -> list[Any]:
        """Return the results of all ranks; CheckpointError on all when one has failed."""
        try:
            mine = (work(), None)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            mine = (None, checkpoint.reason(error))
        results, problems = zip(*gather_objects(mine, world, group))
        for problem in filter(None, problems):
            if world.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(_failure(out, step, problem))
        return list(results)

    def write_shards() -> dict[str, str]:
        alone = world.size == 1
        dcp.save(state, checkpoint_id=aside, process_group=group, no_dist=alone)
        return checkpoint.checksums(aside.glob(f"__{world.rank}_*"))

    first = world.rank == 0
    agreed(lambda: first and _begin(aside))
    sums = {name: value for part in agreed(write_shards) for name, value in part.items()}
    agreed(lambda: first and _complete(aside, step_dir(out, step), run, sums))


def _begin(aside: Path) -> None:
    for unfinished in aside.parent.glob(".step-*.saving"):  # of a run that was killed
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)


def _complete(aside: Path, final: Path, run: dict[str, Any], sums: dict[str, str]) -> None:
    """Write the manifest and rename; each is on the disk before the next, whenever power fails."""
    if absent := [name for name in sums if not (aside / name).is_file()]:
        raise OSError(f"{absent[0]} is not there, another node wrote it: all must see one --out")
    (aside / RUN).write_text(json.dumps(run, indent=1))
    sums |= checkpoint.checksums([aside / RUN, aside / ".metadata"])
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for path in (aside / RUN, aside / CHECKSUMS, aside):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _failure(out: Path, step: int, problem: str) -> str:
    remedy = "there is no earlier one: mend that (full disk: free some space) and start anew"
    if newest := steps(out)[-1:]:
        remedy = f"mend that (full disk: free some space): --resume {out} continues from "
        remedy += step_dir(out, *newest).name
    folder = out / "checkpoints"
    return f"the checkpoint of step {step} could not be written to {folder} ({problem}); {remedy}"
