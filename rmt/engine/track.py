"""Send the numbers of metrics.jsonl and eval.jsonl to TensorBoard or Weights & Biases (--track).

A tracker that fails is named once and left, and never ends a run: the files have all numbers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from rmt.config.config import Config
from rmt.curriculum import TIERS
from rmt.evaluation.summary import PROBLEMS

SENT = ("accuracy", "thinking_length")  # of a tier


def check_installed(track: str) -> None:
    """ValueError when the package of --track is missing."""
    if track == "none":
        return
    found = find_spec(track)
    if not (found and found.origin):  # without an origin: a folder of that name
        raise ValueError(
            f"--track {track}: {track} is not installed; `pip install {track}`, or leave it out"
        )


class Tracker:
    """Send numbers by step to what --track names, from the process that makes one."""

    def __init__(self, config: Config, step: int, warn: Callable[[str], None]):
        """step: where the run begins or resumes; warn: prints a line."""
        self.track, self.warn = config.track, warn
        self.write = self.end = None
        if config.track != "none":
            self._attempt(self._open, config, step)

    def send(self, step: int, values: Mapping[str, Any]) -> None:
        """Send those values that are finite numbers; the step is the axis, not a value."""
        numbers = {
            name: float(value) for name, value in values.items()
            if name != "step" and isinstance(value, Real) and math.isfinite(value)
        }  # fmt: skip
        if self.write:
            self._attempt(self.write, step, numbers)

    def evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Send accuracy and thinking length by tier, and nats per token."""
        rows = [row for row in found["tiers"] if row["tier"] in (*TIERS, "average", PROBLEMS)]
        values = {f"eval/{n}/{row['tier']}": row[n] for row in rows for n in SENT}
        self.send(step, values | {"eval/nats_per_token": found.get("nats_per_token")})

    def close(self) -> None:
        if self.end:
            self._attempt(self.end)

    def _open(self, config: Config, step: int) -> None:
        opened = {"tensorboard": _tensorboard, "wandb": _wandb}[config.track]
        self.write, self.end = opened(Path(config.out), config, step)

    def _attempt(self, work: Callable[..., Any], *given) -> None:
        try:
            work(*given)
        except Exception as error:  # of another package, so of any kind
            self.write = self.end = None
            self.warn(f"--track {self.track} failed ({error!r}) and is left; the run goes on")


Opened = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]  # to write, to end


def _tensorboard(out: Path, _config: Config, step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    # After a resume, hide what was written of the steps that run again.
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step or None)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return write, writer.close


def _wandb(out: Path, config: Config, _step: int) -> Opened:
    import wandb

    # A resumed run is a new one there, of the same name: wandb takes no step twice.
    run = wandb.init(project="rmt", name=out.name, dir=str(out), config=asdict(config))
    run.define_metric("*", step_metric="step")
    return lambda step, numbers: run.log(numbers | {"step": step}), run.finish
