"""Time, memory, ceilings and description of the machine that a benchmark runs on.

Every function takes the device and measures the same on a GPU and on a CPU:

seconds    CUDA events on a GPU; wall-clock time on a CPU
memory     the high-water mark of the allocator; of resident memory (Linux). Both are exact and can
           be reset before each measurement; a sampling thread would miss short-lived blocks.
           Meanwhile malloc returns blocks at once: the memory it would cache (200 MB of 450, seen
           here) does not belong to the algorithm and varies between runs.
ceilings   the fastest of several large matrix products and of several large copies
"""

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread

import torch

from rmt.system import env

PACKAGES = (
    "torch", "triton", "liger-kernel", "cut-cross-entropy", "transformers", "trl", "accelerate",
    "vllm", "nano-vllm",
)  # fmt: skip
# Option of glibc's mallopt: larger blocks return to the operating system when freed.
M_MMAP_THRESHOLD = -3
PAGE = 4096  # bytes


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, until the device has finished its work."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(2_000_000)  # a millisecond: launches are queued ahead, as in training
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak bytes of one call beyond what is already allocated; None if unknown.

    Call it after a warm-up, so that workspaces that libraries keep are not counted. On a CPU at
    least a page: less cannot be seen, and ratios divide by it.
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
    libc.malloc_trim(0)  # memory cached by malloc would hide growth
    high_water.write_text("5")
    before = _resident("VmRSS")
    fresh = Thread(target=work)  # its malloc arena has no free blocks of earlier work
    fresh.start()
    fresh.join()
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # malloc's own value after some large blocks
    return max(PAGE, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure operations per second of a matrix product, and bytes (read + written) of a copy."""
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
    """Return the ceilings that our goals refer to, measured earlier; None for other devices."""
    h200 = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    return {"flops": 790e12, "bytes": 4.3e12} if h200 and dtype == torch.bfloat16 else None


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    return min([seconds(work, device) for _ in range(8)][2:])


def state(device: torch.device) -> dict[str, str]:
    """Return clocks, power and temperature of a GPU now; the load of a CPU."""
    if device.type == "cpu":
        return {"load": f"{os.getloadavg()[0]:.2f}"}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    index = str(device.index or 0)
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=" + index]
    answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(zip(fields.split(","), answer.split(", ")))


def versions() -> dict[str, str | None]:
    """Return installed versions by package; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def about(device: torch.device) -> dict[str, object]:
    """Return versions, device and commit, to record with every number."""
    name = env.device_name(device)
    name = name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    commit = env.commit()
    return {
        "versions": versions(), "device": name,
        "commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty"),
    }  # fmt: skip
