"""The tests on CPUs that this machine is not: libraries are told to forget what it can do.

    python tests/cpus.py                      every test on each CPU, as `make test-cpus` does
    python tests/cpus.py --cpu avx2 tests/test_forest.py      one CPU, some tests

A line for each says whether the tests passed there; the exit status is 1 if any failed. It reaches
PyTorch's own loops, MKL (where AMD's CPUs have one path only), oneDNN, and NumPy with its OpenBLAS,
which Triton's interpreter computes with.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

ROOT = Path(__file__).resolve().parent.parent
BEYOND = [name for name in __cpu_dispatch__ if __cpu_features__[name]]  # NumPy's smallest CPU
ANY = {
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": " ".join(BEYOND),
}  # fmt: skip
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": " ".join(
        name for name in BEYOND if name.startswith("AVX512") or name == "X86_V4"
    ),
}  # fmt: skip
# Threads that wait for each other leave the core to others.
TWO = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
CPUS = {  # name: environment, and whether there is a process per core
    "any": (ANY, True),
    "avx2": (AVX2, True),
    "avx2-two-threads": (AVX2 | TWO, False),
    "two-threads": (TWO, False),
}
BY_FILE = ["--dist", "loadfile", "--no-loadscope-reorder"]


def tested(name: str, tests: list[str]) -> bool:
    """Run the tests as on this CPU; print a line."""
    changes, per_core = CPUS[name]
    kept = {k: v for k, v in os.environ.items() if k not in ANY | TWO}
    processes = ["-n", "auto", "--maxprocesses", "8"] if per_core else ["-n", "1"]
    command = [sys.executable, "-m", "pytest", *processes, *BY_FILE, *tests]
    started, log = time.monotonic(), ROOT / "runs" / f"test-cpus-{name}.txt"
    log.parent.mkdir(exist_ok=True)
    # torch.compile's cache does not tell CPUs apart that are one.
    with log.open("w") as file, tempfile.TemporaryDirectory() as cache:
        changes = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache} | changes
        environment = kept | changes
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    last = log.read_text().rstrip().splitlines()[-1:]
    summary = last[0].strip("= ").rsplit(" in ", 1)[0] if last else "no output"
    verdict = "passed" if code.returncode == 0 else f"FAILED, see runs/{log.name}"
    print(f"{name}: {verdict}: {summary}, {time.monotonic() - started:.0f} s", flush=True)
    return code.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", choices=CPUS, action="append", help="default: each")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, flags after --")
    o = parser.parse_args()
    return int(not all([tested(name, o.tests) for name in o.cpu or CPUS]))


if __name__ == "__main__":
    raise SystemExit(main())
