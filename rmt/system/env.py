"""Where something ran: versions, commit, processor, GPU.

python -m rmt.system.env      print it, for a bug report or beside a measurement
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
    """Installed versions by package; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit of this code, with -dirty behind it where files have changed."""
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.machine()


def about() -> dict[str, Any]:
    """Versions, commit, operating system, processor and GPUs of this machine."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
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


def _cpuinfo(field: str) -> str | None:
    """A field of the first core; platform.processor() is empty on most Linux systems."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    found = [line.split(":")[1].strip() for line in lines if line.startswith(field)]
    return found[0] if found else None


if __name__ == "__main__":
    for name, value in about().items():
        print(f"{name:<14}{value}")
