"""Of the machine a benchmark runs on: its clock, its memory, its two ceilings, and what it is.

Every function takes the device and does the same thing on a GPU and on a CPU:

seconds    CUDA events around the work; the clock on the wall around it
memory     the allocator's high-water mark; Linux's, of resident memory. Both are exact and can be
           set back before each piece of work, where a thread that samples would miss what lives
           between two samples. Meanwhile malloc gives blocks back at once: what it would hold
           for later (200 MB of 450, seen here) is neither the algorithm's nor the same twice.
ceilings   the fastest of some large matrix products and of some large copies on random numbers
"""

import ctypes
import gc
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch

from rmt.system import env

PACKAGES = (
    "torch", "triton", "liger-kernel", "cut-cross-entropy", "transformers", "trl", "accelerate",
    "vllm", "nano-vllm",
)  # fmt: skip
# Of glibc's mallopt: larger blocks go back to the kernel as soon as they are free.
M_MMAP_THRESHOLD = -3


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, to the end of what it started on the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(2_000_000)  # a millisecond: launches run ahead, as they do in training
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at its worst beyond what is there already; None if unknown.

    Call it after a warm-up: workspaces that libraries keep for good are not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    high_water = Path("/proc/self/clear_refs")
    if not high_water.exists():
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    libc.malloc_trim(0)  # what malloc held back before would hide as much of the growth
    high_water.write_text("5")
    before = _resident("VmRSS")
    fresh = Thread(target=work)  # whose arena has no holes left by what ran before
    fresh.start()
    fresh.join()
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # where malloc itself arrives after some large blocks
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a matrix product, and bytes per second of a copy, read + written."""
    side, length = (8192, 2**31) if device.type == "cuda" else (2048, 2**28)  # length in bytes
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(length // 4, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: a @ b, device)
    return {
        "flops": 2 * side**3 / product,
        "bytes": 2 * length / _fastest(lambda: target.copy_(source), device),
    }


def known(device: torch.device, dtype: torch.dtype) -> dict[str, float] | None:
    """Ceilings that were measured before and that goals are stated in."""
    h200 = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    return {"flops": 790e12, "bytes": 4.3e12} if h200 and dtype == torch.bfloat16 else None


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    return min([seconds(work, device) for _ in range(8)][2:])


def state(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a GPU now; the load of a CPU."""
    if device.type == "cpu":
        return {"load": f"{os.getloadavg()[0]:.2f}"}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    index = str(device.index or 0)
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=" + index]
    answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(zip(fields.split(","), answer.split(", ")))


def about(device: torch.device) -> dict[str, object]:
    """Versions, device and commit: what a number means nothing without."""
    name = env.device_name(device)
    name = name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    commit = env.commit()
    return {
        "versions": env.versions(PACKAGES), "device": name,
        "commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty"),
    }  # fmt: skip
