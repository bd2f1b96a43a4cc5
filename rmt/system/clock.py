"""Where the time of a step goes: seconds of its phases, a trace of its kernels. And its memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COSTLIEST = 10  # lines of the table that a profile prints


class Clock:
    """Adds up the seconds of named phases: `with clock("forward"): ...`. Phases may nest.

    On a GPU the ends of a phase are events in its stream, which wait for nobody; `read` waits for
    the last of them, once.
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
        """Seconds of each phase since the last call."""
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
    """Trace what happens inside into `path`, for ui.perfetto.dev, and say what cost most."""
    gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as trace:
        yield
    trace.export_chrome_trace(str(path))
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in trace.key_averages() if e.device_type == kind and not e.is_user_annotation]
    cost = (lambda e: e.self_device_time_total) if gpu else (lambda e: e.self_cpu_time_total)
    rows = [(event.key, event.count, cost(event) / 1e6) for event in events]
    say(f"{costliest(rows)}\n{path} has the whole step; open it in ui.perfetto.dev")


def costliest(rows: list[tuple[str, int, float]]) -> str:
    """A table of the rows (name, calls, seconds of its own) that took most of the time."""
    total = sum(seconds for *_, seconds in rows) or 1.0
    lines = ["   share   seconds    calls  kernel or operator"]
    for name, calls, seconds in sorted(rows, key=lambda row: -row[2])[:COSTLIEST]:
        lines.append(f"{seconds / total:8.1%} {seconds:9.3f} {calls:8d}  {name[:64]}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU by PyTorch, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage: on Linux it keeps across exec what the parent had held.
    marks = (x.split() for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(next(marks)[1])
