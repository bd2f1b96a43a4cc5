"""All checks that need a GPU: `make gpu`, or without a network `make gpu PY=python3`.

    tests       every kernel test, compiled instead of interpreted; addresses beyond 31 bits with
                real memory; opcheck, torch.compile, FSDP; tests/test_gpu.py
    kernels     python -m benchmarks.kernels: ours against PyTorch and against installed peers
    training    20 steps of the tiny model
    memory      python -m benchmarks.memory_check: the dry run's plan against the measured peak
    rollout, rl_step, forest, scaling     side by side in bf16, smollm2-135m (with its weights if
                present, see `make smollm2`); -4b: qwen3-4b with random weights. Lists peers that
                are not installed. Goals: rollouts at 256 branches at 60 % of the roofline,
                training at an MFU of 45 %

    python -m benchmarks.gpu tests        one part alone, where a command's time is limited

Writes benchmarks/results/<gpu>-<date>.json after each part, with versions, commit and clocks; parts
of the same day and commit that ran before are kept. Exit status 1 if a part failed.
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
    "memory": ["-m", "benchmarks.memory_check", "--json", f"{OUT}/memory.json"],
}  # fmt: skip
SIZE_4B = "--random qwen3-4b --no-check --apart --rounds 3"  # two trainers of it need 170 GB
BENCHES = {  # side by side with peers; each writes OUT/<name>.json and a plot beside it
    "rollout": "rollout --sequences 256 32 1 --rounds 9",
    "rl_step": "rl_step --documents 16 --micro 32 --response 256 --rounds 5",
    "forest": "forest --prefix 1024 --branches 64 --response 256 --dtypes bfloat16 --rounds 9",
    "scaling": "scaling --documents 8 --prefix 512 --length 64 --layers 8 --rounds 5",
    "rollout-4b": "rollout --random qwen3-4b --sequences 256 32 --response 128 --rounds 5",
    "rl_step-4b": f"rl_step {SIZE_4B} --documents 8 --prefix 512 --response 256 --micro 8",
}
RESULTS = {"tests": "tests.xml", "kernels": "kernels.json", "training": "training/metrics.jsonl"}


def command(name: str) -> list[str]:
    """Return the arguments of Python for a part."""
    if name in PARTS:
        return PARTS[name]
    return ["-m", *f"benchmarks.{BENCHES[name]} --json {OUT / file_of(name)}".split()]


def file_of(name: str) -> str:
    return RESULTS.get(name, f"{name}.json")


def run(name: str, device: torch.device) -> dict:
    """Run one part in its own process; return command, seconds, exit status and results."""
    (OUT / file_of(name)).unlink(missing_ok=True)  # remove an older run's result
    if name == "training":
        shutil.rmtree(OUT / "training", ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before, started = machine.state(device), time.perf_counter()
    process = subprocess.run([sys.executable, *command(name)], env=environment)
    return {
        "command": " ".join(["python", *command(name)]),
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "state": {"before": before, "after": machine.state(device)},
        "results": results(name),
    }


def results(name: str):
    """Read the numbers of pytest, a benchmark or each training step; None if missing."""
    path = OUT / file_of(name)
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if name == "training":
        return [json.loads(line) for line in text.strip().split("\n")]
    suite = re.search(r"<testsuite ([^>]*)>", text).group(1)
    counts = re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', suite)
    return {word: int(count) for word, count in counts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *BENCHES, []], help="default: all")
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
    for name in o.parts or [*PARTS, *BENCHES]:
        found["parts"][name] = run(name, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: exit status {found['parts'][name]['exit_status']}, numbers in {path}")
    sys.exit(int(any(part["exit_status"] for part in found["parts"].values())))


if __name__ == "__main__":
    main()
