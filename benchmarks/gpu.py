"""Everything that only a GPU can show: `make gpu`, or without a network `make gpu PY=python3`.

    tests       every kernel test, compiled instead of interpreted; addresses beyond 31 bits with
                real memory; opcheck, torch.compile, FSDP; tests/test_gpu.py
    kernels     python -m benchmarks.kernels: ours against PyTorch and against installed peers
    training    20 steps of the tiny model

    python -m benchmarks.gpu tests        one part alone, for machines that limit a command's time

Writes benchmarks/results/<gpu>-<date>.json after each part, with versions, commit and clocks; parts
that ran before on the same day and commit are kept. Exit status 1 if a part failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import machine

OUT = Path("runs/gpu")
TESTS = ["tests/test_gpu.py", *map(str, sorted(Path("tests").glob("test_kernels*.py")))]
PARTS = {
    "tests": ["-m", "pytest", "-rs", "--durations=20", f"--junitxml={OUT}/tests.xml", *TESTS],
    "kernels": ["-m", "benchmarks.kernels", "--json", f"{OUT}/kernels.json"],
    "training": ["train.py", "--model", "tiny", "--preset", "demo", "--steps", "20",
                 "--out", f"{OUT}/training"],
}  # fmt: skip
RESULTS = {"tests": "tests.xml", "kernels": "kernels.json", "training": "training/metrics.jsonl"}


def run(name: str, device: torch.device) -> dict:
    """One part in a process of its own: its command, seconds, exit status and what it measured."""
    (OUT / RESULTS[name]).unlink(missing_ok=True)  # an older one is not this run's result
    if name == "training":
        shutil.rmtree(OUT / "training", ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before, started = machine.state(device), time.perf_counter()
    process = subprocess.run([sys.executable, *PARTS[name]], env=environment)
    return {
        "command": " ".join(["python", *PARTS[name]]),
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "state": {"before": before, "after": machine.state(device)},
        "results": results(name),
    }


def results(name: str):
    """Numbers of pytest's summary, of the benchmark, or of each training step; None if missing."""
    path = OUT / RESULTS[name]
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if name == "kernels":
        return json.loads(text)
    if name == "training":
        return [json.loads(line) for line in text.splitlines()]
    suite = re.search(r"<testsuite ([^>]*)>", text).group(1)
    counts = re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', suite)
    return {word: int(count) for word, count in counts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all of them")
    o = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU; `make test` runs the kernels in Triton's interpreter")
    device = torch.device("cuda", 0)
    about = machine.about(device)
    gpu = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower().replace("nvidia", "")).strip("-")
    path = Path("benchmarks/results") / f"{gpu}-{date.today():%Y-%m-%d}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("commit") != about["commit"]:
        found = {"parts": {}}
    found |= about
    OUT.mkdir(parents=True, exist_ok=True)
    for name in o.parts or PARTS:
        found["parts"][name] = run(name, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: exit status {found['parts'][name]['exit_status']}, numbers in {path}")
    sys.exit(int(any(part["exit_status"] for part in found["parts"].values())))


if __name__ == "__main__":
    main()
