"""Commit of this code, processor and GPU of this machine."""

import platform
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """Return the commit of this code, -dirty if files but documents have changed since."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    compare = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs", ":!*.md"]
    quiet = dict(stderr=subprocess.DEVNULL, text=True)
    try:
        found = subprocess.check_output([*git, "describe", "--always", "--abbrev=40"], **quiet)
        changed = subprocess.call(compare, **quiet)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.strip() + "-dirty" * bool(changed)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() is empty on most Linux systems.
    return proc_field("cpuinfo", "model name") or platform.machine()


def proc_field(file: str, field: str) -> str | None:
    """Return the first value of a field of /proc/FILE; None if there is none (macOS)."""
    path = Path("/proc", file)
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), None)
