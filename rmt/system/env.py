"""Versions, commit, processor and GPU of this machine.

python -m rmt.system.env      print them, for a bug report or beside a measurement
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers", "math-verify")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return installed versions by package; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Return the commit of this code, -dirty if files outside of docs have changed since."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    run = lambda *words, check: subprocess.run(
        [*git, *words], capture_output=True, text=True, check=check
    )
    try:
        found = run("describe", "--always", "--abbrev=40", check=True).stdout.strip()
        changed = run("diff", "--quiet", "HEAD", "--", ".", ":!docs", check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + "-dirty" * bool(changed)


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


def about() -> dict[str, Any]:
    """Return versions, commit, operating system, processor and GPUs."""
    flags = (proc_field("cpuinfo", "flags") or proc_field("cpuinfo", "Features") or "").split()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": commit(),
        **versions(),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "instructions": " ".join(name for name in INSTRUCTIONS if name in flags),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
    }


if __name__ == "__main__":
    for name, value in about().items():
        print(f"{name:<14}{value}")
