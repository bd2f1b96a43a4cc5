"""A real model on real text: SmolLM2-135M on Omni-MATH, cold start and RMT, before and after.

    make real                             hours on two CPU cores; a stopped one goes on
    python -m experiments.real --study    RMT, baselines and RMT without each part, two seeds:
                                          minutes on a GPU, a day on two CPU cores
    python -m experiments.real --table    the table of all runs so far

Runs are saved in runs/real/NAME (of the study: SEED-NAME) and not repeated. All answer the same
held-out positions, 200 per tier, in texts of 128 tokens; each thought is sampled eight times.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from experiments.designs import MIXED
from experiments.runner import Command, Job, JobFailed, run_all, side_by_side, spent
from rmt.evaluation.compare import differences, read_report, verdict
from rmt.system.env import proc_field
from rmt.system.lock import held
from rmt.system.records import write_whole
from rmt.system.terminal import safe_printing

MODEL, OUT = "smollm2-135m", Path("runs/real")
LOCAL = Path("../shared/data")
TEXT = LOCAL / "omni-math" / "train.jsonl"
DATA = ("--data", str(TEXT) if TEXT.exists() else "KbsdJames/Omni-MATH", "--holdout", "200")
# On a CPU layers are faster in bf16 only where it has instructions for their products.
FAST = "amx_bf16" in (proc_field("cpuinfo", "flags") or "")
SMALL = ("--preset", "small", "--dtype", "bfloat16" if FAST else "auto", *DATA)
# On a GPU ten steps take less time than a checkpoint.
SAVE = ("--save-every", "200" if torch.cuda.is_available() else "10")
TRAIN = (*SMALL, "--batch-size", "4", "--probe-documents", "0", *SAVE)
COLD = (
    *TRAIN, "--method", "cold-start", "--positions-per-document", "24", "--steps", "240",
    "--learning-rate", "1e-4", "--lr-schedule", "linear",
)  # fmt: skip
SEEDS = (0, 1)
RL = (*TRAIN, "--learning-rate", "2e-5", "--warmup-steps", "3")
LONG = ("--positions-per-document", "12", "--steps", "60")
BRIEF = ("--positions-per-document", "6", "--steps", "60")  # of the study
# A method without a schedule takes as many steps as RMT's tokens allow; a schedule ends at T.
AS_MANY = ("--steps", "2000")
METHODS = {  # of the study; all start from the cold start, and stop at RMT's tokens or steps
    "rmt": (),
    "rpt": ("--method", "rpt", *AS_MANY),
    "sft": ("--method", "cold-start", *AS_MANY, *MIXED),
    "ntp": ("--method", "ntp", *AS_MANY, "--batch-size", "16"),  # else 1,400 steps of 512 tokens
    "without-budget": ("--no-budget",),
    "without-curriculum": ("--no-curriculum",),
    "without-ntp": ("--no-ntp",),
}
ASK = (
    *SMALL[2:], "--document-tokens", "128", "--max-response", "48", "--text-in", "thought",
    "--per-tier", "200", "--positions", str(OUT / "positions.json"), "--difficulty-model", MODEL,
)  # fmt: skip
EVALS = {
    "plain": ("--mode", "ntp"),
    "thought": ("--mode", "rmt", "--budget", "12", "--samples", "8"),
    "greedy": ("--mode", "rmt", "--budget", "12", "--decoding", "greedy"),
}
FREE = ("--mode", "ntr", "--samples", "8")
FREELY = {"rpt", "without-budget"}  # think without a budget
PROBLEMS = {"gsm8k": LOCAL / "gsm8k" / "test.jsonl", "math500": LOCAL / "math500" / "math500.jsonl"}


def jobs(study: bool) -> list[Job]:
    """List the jobs, in order of dependency."""
    cold = OUT / "cold"
    found = [
        Job(OUT / "base", lambda: evaluations(MODEL, OUT / "base")),
        Job(cold, lambda: commands(MODEL, COLD, cold)),
    ]
    trained = {"rmt": (*RL, *LONG)}
    if study:  # RMT of all seeds first: the others need to know its tokens
        trained = {
            f"{seed}-{name}": (*RL, *BRIEF, *flags, "--seed", str(seed))
            for name, flags in METHODS.items() for seed in SEEDS
        }  # fmt: skip
    for name, flags in trained.items():
        out = OUT / name
        rmt = OUT / f"{name.partition('-')[0]}-rmt"
        equal = study and out != rmt
        make = lambda out=out, flags=flags, rmt=rmt, equal=equal: commands(
            str(cold / "model"), (*flags, *(same_tokens(rmt) if equal else ())), out
        )
        found.append(Job(out, make, (cold, *((rmt,) if equal else ()))))
    return found


def commands(start: str, flags: Command, out: Path) -> list[Command]:
    """Return the commands of a job that trains and evaluates."""
    train = ("train.py", "--model", start, *flags, "--out", str(out))
    return [train, *evaluations(str(out / "model"), out)]


def evaluations(model: str, out: Path) -> list[Command]:
    method = out.name.partition("-")[2]  # of the study; "" for a main run
    evals = EVALS | ({"thought": FREE} if method in FREELY else {})
    if method:
        del evals["greedy"]
    asked = [
        ("eval.py", "--model", model, *ASK, *flags, "--json", str(out / f"{name}.json"))
        for name, flags in evals.items()
    ]
    for name, path in PROBLEMS.items():
        if path.exists() and not method:
            flags = ("--mode", "problems", "--data", str(path), "--limit", "200")
            flags += ("--max-response", "256", "--document-tokens", "512")
            asked.append(("eval.py", "--model", model, *flags, "--json", str(out / f"{name}.json")))
    return asked


def same_tokens(rmt: Path) -> Command:
    """Return the flag that ends a run when it has sampled and trained on as many tokens as RMT."""
    return ("--max-tokens", str(spent(rmt)[-1]))


def cell(number: float | None, form: str) -> str:
    """Format a number; – where nothing was measured, as the length where no thought is closed."""
    return "–" if number is None else form.format(number)


def table() -> str:
    """Return a row per job that is done, and what the differences are worth."""
    heads = ("", "plain", "with a thought", "majority of 8", "nats per token", "thinking tokens",
             "\\|ℓ−B\\|/B", "well-formed", "greedy", *PROBLEMS, "minutes")  # fmt: skip
    lines, reports = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], {}
    places = [done.parent for done in OUT.glob("*/done.json")]
    order = {"base": 0, "cold": 1, "rmt": 2}
    for place in sorted(places, key=lambda p: (order.get(p.name, 3), p.name)):
        found = {file.stem: read_report(file) for file in place.glob("*.json")
                 if file.stem in (*EVALS, *PROBLEMS)}  # fmt: skip
        row = {name: {r["tier"]: r for r in report["tiers"]} for name, report in found.items()}
        plain, thought = (row[name]["average"] for name in ("plain", "thought"))
        greedy = row["greedy"]["average"]["accuracy"] if "greedy" in row else None
        solved = [f"{row[n]['problems']['accuracy']:.1%}" if n in row else "–" for n in PROBLEMS]
        minutes = json.loads((place / "done.json").read_text())["minutes"]
        cells = (
            place.name, f"{plain['accuracy']:.1%}", f"{thought['accuracy']:.1%}",
            f"{thought['majority']:.1%}", f"{found['plain']['nats_per_token']:.4f}",
            cell(thought["thinking_length"], "{:.1f}"), cell(thought["budget_error"], "{:.2f}"),
            f"{thought['well_formed']:.1%}", cell(greedy, "{:.1%}"), *solved, f"{minutes:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        reports[place.name] = found
    compared = [("base", "cold"), ("cold", "rmt")]
    compared += [(f"{s}-{name}", f"{s}-rmt") for s in SEEDS for name in METHODS if name != "rmt"]
    for before, after in compared:
        if {before, after} <= reports.keys():
            items = [reports[name]["thought"]["items"] for name in (before, after)]
            (average,) = [r for r in differences(*items) if r["tier"] == "average"]
            lines.append(f"\nwith a thought, {before} to {after}: {verdict(average)}")
    return "\n".join(lines)


@safe_printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", action="store_true", help="the baselines beside RMT")
    parser.add_argument("--table", action="store_true", help="run nothing")
    o = parser.parse_args()
    try:
        if not o.table:
            with held("the experiment's", OUT):
                run_all(jobs(o.study), side_by_side() if o.study else 1)
        found = table()
        write_whole(OUT / "table.md", found + "\n")
    except (JobFailed, ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")
    print(found)
    print(f"wrote {OUT / 'table.md'}; python -m rmt.report {OUT / 'rmt'} draws the run")


if __name__ == "__main__":
    main()
