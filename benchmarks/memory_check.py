"""Compare the dry run's memory plan for one GPU with PyTorch's peak in two real steps.

    python -m benchmarks.memory_check [--models smollm2-135m qwen3-1.7b] [--json FILE]

Models have random weights, so that nearly every response has the maximum length; documents have
exactly --document-tokens tokens. The run chooses its own knobs, and the plan is for these. On a CPU
the "measured" memory is that of the whole process, libraries included: not comparable.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.inputs import directory, flags, prompts
from benchmarks.results import write
from rmt.config.config import from_json
from rmt.memory.autofit import fixed_knobs
from rmt.memory.dry_run import plan
from rmt.memory.estimate import total

MODELS = ("smollm2-135m", "qwen3-1.7b")
SETTINGS = ("--steps", "2", "--batch-size", "16", "--tiers", "quantile", "--tier-thresholds", "0.5",
            "0.7", "0.85", "--probe-documents", "0", "--holdout", "0")  # fmt: skip


def check(model: str, tokens: int, response: int) -> dict:
    """Return peak bytes: planned for each phase, and measured for the run."""
    place = directory(argparse.Namespace(random=model, model="", layers=0))
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "text.jsonl", Path(folder) / "run"
        texts = [text for text, _ in prompts(place, 16, tokens)]
        data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        words = ("--model", place, "--data", data, "--out", out, "--document-tokens", tokens,
                 "--max-response", response, "--budget-start", response // 2)  # fmt: skip
        subprocess.run([sys.executable, "train.py", *map(str, words), *SETTINGS], check=True)
        rows = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().strip().split("\n")
        ]
        config = from_json(json.loads((out / "run.json").read_text())["config"])
    memory = "80GB"  # without a GPU: for the plan alone
    if torch.cuda.is_available():
        memory = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f}GB"
    case, phases = plan(replace(config, gpus=1, nodes=1, gpu_memory=memory))
    planned = {name: total(parts) for name, parts in phases.items()}
    measured = max(row["memory/peak_gb"] for row in rows) * 1e9
    return {"model": model, **fixed_knobs(case.config), "planned": planned, "measured": measured,
            "off": max(planned.values()) / measured - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--response", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    o = parser.parse_args()
    found = []
    for model in o.models:
        found.append(check(model, o.document_tokens, o.response))
        phases = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in found[-1]["planned"].items())
        print(f"{model}: measured {found[-1]['measured'] / 1e9:.2f} GB, planned {phases}: "
              f"{found[-1]['off']:+.1%}", flush=True)  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = f"python -m benchmarks.memory_check {' '.join(flags(o))}"
    write(o.json, {"command": command, **machine.about(device), "models": found})


if __name__ == "__main__":
    main()
