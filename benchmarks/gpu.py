"""All checks that need a GPU: `make gpu`, or without a network `make gpu PY=python3`.

    tests       kernel tests, compiled instead of interpreted; addresses beyond 31 bits with real
                memory; opcheck, torch.compile; tests/test_gpu.py
    training    20 steps of the tiny model
    rl_step, rollout     side by side in bf16, smollm2-135m (with its weights if present, see
                `make smollm2`). Lists peers that are not installed
    kernels     python -m benchmarks.kernels: ours against PyTorch and against installed peers
    memory      python -m benchmarks.memory_check: the dry run's plan against the measured peak
    real        ten minutes of train.py --preset one-gpu --model qwen3-0.6b; without a network its
                weights are random
    forest, scaling, rollout-4b, rl_step-4b     more side by side; -4b: qwen3-4b, random weights.
                Goals: rollouts at 256 branches at 60 % of the roofline, training at an MFU of 45 %
    slow        the slow kernel tests: FSDP

    python -m benchmarks.gpu tests        one part alone, where a command's time is limited

The most valuable first: on one H200 the first three took four minutes. A part that takes longer
than LIMIT is asked to stop.
Writes benchmarks/results/<gpu>-<date>.json after each part, with versions, commit and clocks; parts
of the same day and commit that ran before are kept. Exit status 1 if a part failed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.inputs import TEXT, directory

OUT = Path("runs/gpu")
LIMIT = 600  # seconds of a part
TESTS = ["tests/test_gpu.py", *map(str, sorted(Path("tests").glob("test_kernels*.py")))]
TOGETHER = ["-n", "8", "--dist", "worksteal"] if find_spec("xdist") else []  # compiling takes CPUs
PYTEST = ["-m", "pytest", "-rs", *TOGETHER, *TESTS]
PARTS = {
    "tests": [*PYTEST, "-m", "not slow and not mutants", f"--junitxml={OUT}/tests.xml"],
    "training": ["train.py", "--model", "tiny", "--preset", "demo", "--steps", "20",
                 "--out", f"{OUT}/training"],
    "kernels": ["-m", "benchmarks.kernels", "--json", f"{OUT}/kernels.json"],
    "memory": ["-m", "benchmarks.memory_check", "--json", f"{OUT}/memory.json"],
    "real": ["train.py", "--preset", "one-gpu", "--data", str(TEXT), "--out", f"{OUT}/real"],
    "slow": [*PYTEST, "-m", "slow", f"--junitxml={OUT}/slow.xml"],
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
FIRST = ("tests", "training", "rl_step", "rollout", "kernels", "memory", "real")
ORDER = [*FIRST, *(name for name in (*BENCHES, *PARTS) if name not in FIRST)]
STEPS = ("training", "real")
RESULTS = {"tests": "tests.xml", "slow": "slow.xml"}
RESULTS |= {name: f"{name}/metrics.jsonl" for name in STEPS}


def command(name: str) -> list[str]:
    """Return the arguments of Python for a part."""
    if name == "real":
        return [*PARTS[name], "--model", str(real_model())]
    if name in PARTS:
        return PARTS[name]
    return ["-m", *f"benchmarks.{BENCHES[name]} --json {OUT / file_of(name)}".split()]


def real_model() -> Path:
    """Return the directory of Qwen3-0.6B; one with random weights where it cannot be had."""
    return directory(Namespace(random="", model="qwen3-0.6b", layers=0))


def file_of(name: str) -> str:
    return RESULTS.get(name, f"{name}.json")


def run(name: str, device: torch.device) -> dict:
    """Run one part in its own process; return command, seconds, exit status and results."""
    (OUT / file_of(name)).unlink(missing_ok=True)  # remove an older run's result
    if name in STEPS:
        shutil.rmtree(OUT / name, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before, started = machine.state(device), time.perf_counter()
    words = command(name)
    process = subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True)
    try:
        process.wait(LIMIT)
    except BaseException as error:  # what ends this process would leave that one running
        stop(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return {
        "command": " ".join(["python", *words]),
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "state": {"before": before, "after": machine.state(device)},
        "results": results(name),
    }


def stop(process: subprocess.Popen) -> None:
    """Ask a part and all it started to end: train.py saves. After a minute, end them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(60)


def results(name: str):
    """Read the numbers of pytest, a benchmark or each training step; None if missing."""
    path = OUT / file_of(name)
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if name in STEPS:
        return [json.loads(line) for line in text.strip().split("\n")]
    suite = re.search(r"<testsuite ([^>]*)>", text).group(1)
    counts = re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', suite)
    return {word: int(count) for word, count in counts}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*ORDER, []], help="default: all")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of `stop`
    for name in o.parts or ORDER:
        found["parts"][name] = run(name, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: exit status {found['parts'][name]['exit_status']}, numbers in {path}")
    sys.exit(int(any(part["exit_status"] for part in found["parts"].values())))


if __name__ == "__main__":
    main()
