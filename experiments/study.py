"""When does each part pay? RMT, RMT without each part, and baselines, in worlds with obstacles.

    make study                                  all jobs: a day on two cores; a stopped one goes on
    python -m experiments.study --only all/rmt  the jobs whose name WORLD/METHOD/SEED begins so
    python -m experiments.study --tables        run nothing: docs/study.md, from what is stored

A finished job is a line of docs/study.jsonl and is not run again. All jobs of a world answer the
same held-out positions, chosen by its untrained model, 200 per tier. Each is measured after T
steps; where these cost 5 % more or less tokens than RMT's of that seed, sampled and trained on, a
second run of so many steps that they cost as much is measured, too.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from assets.tiny_world import as_jsonl
from assets.worlds import CHANGED, WORLDS, documents, model_of
from experiments.runner import Command, Job, JobFailed, run_all, side_by_side, spent
from experiments.verdicts import write_page
from models.config import ASSETS
from models.fingerprint import fingerprint
from models.tokenizer import Tokenizer
from models.weights import build
from rmt.forest import pack
from rmt.system.lock import held
from rmt.system.records import read_lines, write_whole
from rmt.system.terminal import safe_printing
from rmt.trees import Tree

OUT, STORED = Path("runs/study"), Path("docs/study.jsonl")
SEEDS, STEPS = range(100, 105), 60
TRAIN_DOCUMENTS, EVAL_DOCUMENTS = 1000, 300
MIXTURE = (".35", ".3", ".35")  # what the curriculum draws, over all steps
METHODS = {
    "rmt": (),
    "rpt": ("--method", "rpt", "--resample-from", str(STEPS // 2)),
    "without-ntp": ("--no-ntp",),
    "without-budget": ("--no-budget",),
    "without-curriculum": ("--no-curriculum",),
    "same-mixture": ("--curriculum-early", *MIXTURE, "--curriculum-late", *MIXTURE),
    "rft": ("--method", "rft"),
    "ntp": ("--method", "ntp"),
}
FREE = {"base", "without-budget", "rpt", "rft", "ntp"}  # think without a budget
BUDGET = 30  # B_T: a thought about a place that works step by step has 29 tokens
TRAIN = (
    "--preset", "demo", "--learning-rate", "3e-4", "--ntp-weight", "1", "--probe-documents", "0",
    "--save-every", "20", "--samples-per-step", "0", "--document-tokens", "256",
)  # fmt: skip
READ = ("--document-tokens", "256", "--entropy-top-k", "0")
CURVES = ("reward/match", "length/thinking", "loss/ntp", "share/advantage_from_length")


def data_of(world: str, part: str) -> Path:
    return OUT / world / f"{part}.jsonl"


def write_data() -> None:
    """Write the text of each world: 1,000 documents to train on, 300 held out."""
    for name, world in WORLDS.items():
        for part, count in (("train", TRAIN_DOCUMENTS), ("eval", EVAL_DOCUMENTS)):
            data_of(name, part).parent.mkdir(parents=True, exist_ok=True)
            write_whole(data_of(name, part), as_jsonl(documents(world, part, count)))


def start_of(world: str) -> Path:
    """Return the directory of the untrained model of a world."""
    return ASSETS / "worlds" / model_of(WORLDS[world])


def sizes(world: str) -> tuple[str, ...]:
    """Return the flags of a world for training: from about what its model thinks to BUDGET."""
    start, most = (120, 512) if WORLDS[world].overthinking else (BUDGET, 128)
    return (
        "--max-response", str(most), "--budget-start", str(start),
        "--budget-decay", f"{BUDGET / start:g}",
    )  # fmt: skip


def jobs(stored: dict[str, dict]) -> list[Job]:
    """List the jobs that are not stored: RMT of a seed before what is measured at its tokens."""
    found = []
    for seed in SEEDS:
        for method in ("base", *METHODS):
            for world in WORLDS:
                name = f"{world}/{method}/{seed}"
                if name in stored or (method == "base" and seed != SEEDS[0]):
                    continue
                rmt, base = f"{world}/rmt/{seed}", f"{world}/base/{SEEDS[0]}"
                needs = [base] if method == "rmt" else [] if method == "base" else [rmt]
                make = lambda world=world, method=method, seed=seed: commands(world, method, seed)
                waits = tuple(OUT / need for need in needs if need not in stored)
                found.append(Job(OUT / name, make, waits))
    return found


def commands(world: str, method: str, seed: int) -> Iterator[Command]:
    """Yield the commands of a job: how many steps have RMT's tokens is known once it is trained."""
    out = OUT / world / method / str(seed)
    measured = lambda model, name="": evaluations(world, method, seed, model, out, name)
    if method == "base":
        yield from measured(start_of(world))
        return
    trained = lambda out, *length: (
        "train.py", "--model", str(start_of(world)), "--data", str(data_of(world, "train")),
        *TRAIN, *sizes(world), *METHODS[method], *length, "--seed", str(seed), "--out", str(out),
    )  # fmt: skip
    yield trained(out, "--steps", str(STEPS))
    yield from measured(out / "model")
    if method == "rmt":
        return
    tokens, again = tokens_of(world, seed), out / "equal-tokens"
    if method == "ntp":
        yield trained(again, "--steps", "100000", "--max-tokens", str(tokens))
        yield from measured(again / "model", "-tokens")
    elif abs(tokens / spent(out)[-1] - 1) > 0.05:
        yield trained(again, "--steps", str(round(STEPS * tokens / spent(out)[-1])))
        yield from measured(again / "model", "-tokens")


def evaluations(
    world: str, method: str, seed: int, model: Path, out: Path, name: str
) -> Iterator[Command]:
    asked = (
        "eval.py", "--model", str(model), "--data", str(data_of(world, "eval")), *READ,
        "--positions", str(OUT / world / "positions.json"), "--per-tier", "200",
        "--difficulty-model", str(start_of(world)),
    )  # fmt: skip
    sampled = ("--max-response", sizes(world)[1], "--sampling-seed", str(seed))
    if method == "base":
        sampled = (*sampled, "--samples", "4")
    modes = {"thought": ("--mode", "ntr", *sampled), "plain": ("--mode", "ntp")}
    if method not in FREE:
        modes["thought"] = ("--mode", "rmt", "--budget", str(BUDGET), *sampled)
    for mode, flags in modes.items():
        yield (*asked, *flags, "--json", str(out / f"{mode}{name}.json"))


def tokens_of(world: str, seed: int) -> int:
    """Return how many tokens RMT of that world and seed sampled and trained on."""
    name = f"{world}/rmt/{seed}"
    stored = read_stored()
    return stored[name]["tokens"] if name in stored else spent(OUT / name)[-1]


def read_stored() -> dict[str, dict]:
    """Read docs/study.jsonl: WORLD/METHOD/SEED -> what was measured."""
    lines = STORED.read_text(encoding="utf-8").splitlines() if STORED.exists() else ()
    return {row["job"]: row for row in map(json.loads, lines)}


def row_of(out: Path) -> dict:
    """Reduce a finished job to what tables and tests need."""
    done, (world, method, seed) = json.loads((out / "done.json").read_text()), out.parts[-3:]
    row = {"job": f"{world}/{method}/{seed}", "minutes": round(done["minutes"], 2)}
    row["commands"] = [c.replace(f"{ASSETS.parent}/", "") for c in done["commands"]]
    if method == "base":
        row["coins"] = coins_known(world)
    else:
        run, again = json.loads((out / "run.json").read_text()), out / "equal-tokens"
        row |= {name: run[name] for name in ("commit", "torch", "device")}
        row["tokens"] = spent(out)[-1]
        if again.exists():
            row["tokens-tokens"] = spent(again)[-1]
        rows = read_lines(out / "metrics.jsonl")
        row["curves"] = {name: [short(line.get(name)) for line in rows] for name in CURVES}
    of_world = fingerprint(start_of(world))["weights"] + data_of(world, "eval").read_text()
    for path in sorted(out.glob("*.json")):
        if path.stem not in ("done", "run"):
            row[path.stem] = answers(json.loads(path.read_text()), of_world, method == "base")
    return row


def answers(report: dict, of_world: str, whole: bool) -> dict:
    """Reduce an evaluation: right answers to each position, lengths; whole: positions, too."""
    asked, items = {}, report["items"]
    for item in items:
        asked.setdefault((item["document"], item["position"]), []).append(item)
    questions = of_world + json.dumps(list(asked))
    found = {
        "asked": hashlib.sha256(questions.encode()).hexdigest()[:12],
        "samples": len(items) // len(asked),
        "match": "".join(str(sum(int(i["match"]) for i in group)) for group in asked.values()),
        "well_formed": short(sum(i["well_formed"] for i in items) / len(items)),
        "nats": short(report.get("nats_per_token")),
    }
    lengths = [i["thinking_length"] for i in items if i["thinking_length"] is not None]
    if report["mode"] != "ntp":
        found["thinking"] = short(sum(lengths) / max(1, len(lengths)))
    if whole:
        found["documents"] = [document for document, _ in asked]
        found["tiers"] = "".join(group[0]["tier"][0] for group in asked.values())
        found["correlation"] = short(correlation(items)) if report["mode"] != "ntp" else None
    return found


def correlation(items: list[dict]) -> float:
    """Return that of length and match among answered questions, within tiers: their mean."""
    found = []
    for tier in sorted({item["tier"] for item in items}):
        own = [i for i in items if i["tier"] == tier and i["thinking_length"] is not None]
        pairs = np.array([(i["thinking_length"], i["match"]) for i in own], float)
        if len(own) > 1 and pairs.std(axis=0).all():
            found.append(float(np.corrcoef(pairs.T)[0, 1]))
    return sum(found) / max(1, len(found))


@torch.no_grad()
def coins_known(world: str) -> dict[str, float]:
    """Return how often the untrained model predicts the coins that a text ends with, plainly."""
    tokenizer, model = Tokenizer(start_of(world)), build(start_of(world), "cpu", torch.float32)
    right: dict[str, list[bool]] = {"changed": [], "same": []}
    for document in documents(WORLDS[world], "eval", 50):
        ids = tokenizer.encode(document.text)
        forest = pack([Tree(0, ids)])
        best = model(
            forest.tokens, forest.position, forest.attend, lambda h, w: (h @ w.T).argmax(-1)
        )
        words = [tokenizer.bytes_of([index]).decode().strip() for index in ids]
        for at in range(words.index("coins") + 3, len(ids) - 1, 2):
            name = "changed" if words[at - 1] in CHANGED and WORLDS[world].unused_tokens else "same"
            right[name].append(best[at - 1].item() == ids[at])
    return {name: short(sum(found) / len(found)) for name, found in right.items() if found}


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def collect() -> None:
    """Add what is finished to docs/study.jsonl."""
    stored = read_stored()
    for done in sorted(OUT.glob("*/*/*/done.json")):
        row = "/".join(done.parent.parts[-3:])
        if row not in stored:
            stored[row] = row_of(done.parent)
    lines = (json.dumps(stored[name]) + "\n" for name in sorted(stored))
    write_whole(STORED, "".join(lines))


def chosen(stored: dict[str, dict], only: list[str]) -> list[Job]:
    """Choose the jobs whose names begin with one of `only`, and those that they need."""
    every, wanted = jobs(stored), set()
    for job in reversed(every):  # those that a job needs come before it
        if job.out in wanted or "/".join(job.out.parts[-3:]).startswith(tuple(only)):
            wanted |= {job.out, *job.needs}
    return [job for job in every if job.out in wanted]


@safe_printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORLD/METHOD/SEED")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    many = side_by_side()
    parser.add_argument("--jobs", type=int, default=many, help=f"at one time (here {many})")
    o = parser.parse_args()
    try:
        if not o.tables:
            with held("the study's", OUT):
                write_data()
                collect()  # what an earlier command finished before it was killed
                try:
                    run_all(chosen(read_stored(), o.only), o.jobs)
                finally:
                    collect()
        print(write_page(read_stored()))
    except (JobFailed, ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
