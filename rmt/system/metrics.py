"""Metrics of a step, reduced over ranks once; phase timers, the profiler, and peak memory."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from rmt.system.dist import World, reduce_max, reduce_sums
from rmt.system.env import proc_field

COSTLIEST = 10  # rows of the table that a profile prints


class Metrics:
    """Means, sums and maxima over all ranks. Every rank must add the same names, 0 if idle."""

    def __init__(self):
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = defaultdict(float)

    def add(self, name: str, total, count) -> None:
        self.totals[name] += float(total)
        self.counts[name] += float(count)

    def add_sum(self, name: str, value) -> None:
        self.sums[name] += float(value)

    def add_max(self, name: str, value) -> None:
        self.maxima[name] = max(self.maxima[name], float(value))

    def reduce(self, world: World) -> dict[str, float | None]:
        """Return name -> value; of a mean None where nothing was counted. All ranks."""
        totals, counts, sums = (
            reduce_sums(values, world) for values in (self.totals, self.counts, self.sums)
        )
        means = {name: totals[name] / counts[name] if counts[name] else None for name in totals}
        return means | sums | dict(zip(self.maxima, reduce_max(list(self.maxima.values()), world)))


class Clock:
    """Add up the seconds of named phases: `with clock("forward"): ...`. Phases may nest.

    On a GPU a phase is timed by CUDA events, which do not synchronize; `read` does, once.
    """

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.spans: list[tuple] = []  # (name, start, end)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield  # a phase that raises is not counted
        self.spans.append((name, start, self._now()))

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        if self.gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self.spans:
            took = start.elapsed_time(end) / 1e3 if self.gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + took
        self.spans.clear()
        return seconds


@contextmanager
def profiled(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Trace the body into `path`, for ui.perfetto.dev, and `say` which kernels took longest."""
    with profile() as trace:
        yield
    trace.export_chrome_trace(str(path))
    own = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    table = trace.key_averages().table(own, COSTLIEST, max_name_column_width=64)
    say(f"{table}\n{path} has the whole step; open it in ui.perfetto.dev")


def peak_memory(device: torch.device) -> int:
    """Return this process's peak bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := proc_field("self/status", "VmHWM"):  # Linux, whose ru_maxrss includes the parent's
        return 1024 * int(peak.split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
