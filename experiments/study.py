"""When does each part pay? RMT, RMT without each part, and baselines, in worlds with obstacles.

    make study                                  all jobs: a day on two cores; a stopped one goes on
    python -m experiments.study --only all/rmt  the jobs whose name WORLD/METHOD/SEED begins so
    python -m experiments.study --tables        run nothing: docs/study.md, from what is stored

A finished job is a line of docs/study.jsonl and is not run again. All jobs of a world answer the
same held-out positions, chosen by its untrained model, 200 per tier. Each is measured after T steps
and when it had spent as many tokens, sampled and trained on, as RMT of that seed (the last model of
every fifth step before that).
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
from models.tokenizer import Tokenizer
from models.weights import build
from rmt.forest import pack
from rmt.system.lock import held
from rmt.system.records import read_lines, write_whole
from rmt.system.terminal import safe_printing
from rmt.trees import Tree

OUT, STORED = Path("runs/study"), Path("docs/study.jsonl")
SEEDS, STEPS, EVERY = range(100, 105), 60, 5
TRAIN_DOCUMENTS, EVAL_DOCUMENTS = 1000, 300
FREE = ("--no-budget",)
METHODS = {
    "rmt": (),
    "without-budget": FREE,
    "without-curriculum": ("--no-curriculum",),
    "without-ntp": ("--no-ntp",),
    "rpt": ("--method", "rpt", "--resample-from", str(STEPS // 2)),
    "rft": ("--method", "rft"),
    "ntp": ("--method", "ntp"),
}
BUDGETED = {"rmt", "without-curriculum", "without-ntp"}
BUDGET = 30  # B_T: a thought about a place that works step by step has 27 tokens
TRAIN = (
    "--preset", "demo", "--learning-rate", "3e-4", "--ntp-weight", "1", "--probe-documents", "0",
    "--save-every", "20", "--samples-per-step", "0",
)  # fmt: skip
READ = ("--document-tokens", "512", "--entropy-top-k", "0")
CURVES = ("reward/match", "length/thinking", "loss/ntp", "share/advantage_from_length")


def data_of(world: str, part: str) -> Path:
    return OUT / world / f"{part}.jsonl"


def write_data() -> None:
    """Write the text of each world: 1,000 documents to train on, 300 held out."""
    for name, world in WORLDS.items():
        for part, seed, count in (("train", 1, TRAIN_DOCUMENTS), ("eval", 2, EVAL_DOCUMENTS)):
            data_of(name, part).parent.mkdir(parents=True, exist_ok=True)
            write_whole(data_of(name, part), as_jsonl(documents(world, seed, count)))


def sizes(world: str) -> tuple[str, ...]:
    """Return the flags of a world for training: B_0 is what its model thinks, γ leads to BUDGET."""
    long = WORLDS[world].overthinking
    start, most = (150, 384) if long else (40, 128)
    return (
        "--max-response", str(most), "--budget-start", str(start),
        "--budget-decay", f"{BUDGET / start:.4f}",
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
    """Yield the commands of a job: which model has RMT's tokens is known once it is trained."""
    out, model = OUT / world / method / str(seed), str(ASSETS / "worlds" / model_of(WORLDS[world]))
    if method == "base":
        yield from evaluations(world, method, seed, model, out, "")
        return
    steps = ("--steps", str(STEPS), "--export-every", str(EVERY))
    limit = tokens_of(world, seed) if method != "rmt" else 0
    if method == "ntp":
        steps = ("--steps", "100000", "--max-tokens", str(limit), "--export-every", str(STEPS))
    yield (
        "train.py", "--model", model, "--data", str(data_of(world, "train")), *TRAIN, *sizes(world),
        *METHODS[method], *steps, "--seed", str(seed), "--out", str(out),
    )  # fmt: skip
    if method == "ntp":
        yield from evaluations(world, method, seed, str(out / f"model-{STEPS}"), out, "")
        yield from evaluations(world, method, seed, str(out / "model"), out, "-tokens")
        return
    yield from evaluations(world, method, seed, str(out / "model"), out, "")
    if method != "rmt" and (step := step_at(out, limit)) < STEPS:
        yield from evaluations(world, method, seed, str(out / f"model-{step}"), out, "-tokens")


def evaluations(
    world: str, method: str, seed: int, model: str, out: Path, name: str
) -> Iterator[Command]:
    asked = (
        "eval.py", "--model", model, "--data", str(data_of(world, "eval")), *READ,
        "--positions", str(OUT / world / "positions.json"), "--per-tier", "200",
        "--difficulty-model", str(ASSETS / "worlds" / model_of(WORLDS[world])),
    )  # fmt: skip
    sampled = ("--max-response", sizes(world)[1], "--sampling-seed", str(seed))
    if method == "base":
        sampled = (*sampled, "--samples", "8")
    modes = {"thought": ("--mode", "ntr", *sampled), "plain": ("--mode", "ntp")}
    if method in BUDGETED:
        modes["thought"] = ("--mode", "rmt", "--budget", str(BUDGET), *sampled)
    for mode, flags in modes.items():
        yield (*asked, *flags, "--json", str(out / f"{mode}{name}.json"))


def tokens_of(world: str, seed: int) -> int:
    """Return how many tokens RMT of that world and seed sampled and trained on."""
    name = f"{world}/rmt/{seed}"
    stored = read_stored()
    return stored[name]["tokens"] if name in stored else spent(OUT / name)[-1]


def step_at(run: Path, tokens: int) -> int:
    """Return the last exported step that had not spent more than 2 % above `tokens`."""
    within = sum(total <= 1.02 * tokens for total in spent(run))
    return max(EVERY, within // EVERY * EVERY)


def read_stored() -> dict[str, dict]:
    """Read docs/study.jsonl: WORLD/METHOD/SEED -> what was measured."""
    return {row["job"]: row for row in read_lines(STORED)} if STORED.exists() else {}


def row_of(out: Path, tokens: int) -> dict:
    """Reduce a finished job to what tables and tests need. tokens: those of RMT, 0 for itself."""
    done, method = json.loads((out / "done.json").read_text()), out.parent.name
    row = {"job": "/".join(out.parts[-3:]), "minutes": round(done["minutes"], 2)}
    if method == "base":
        row["coins"] = coins_known(out.parts[-3])
    else:
        run, total = json.loads((out / "run.json").read_text()), spent(out)
        row |= {name: run[name] for name in ("commit", "torch", "device")}
        row |= {"command": done["commands"][0], "steps": len(total), "tokens": total[-1]}
        row["at_tokens"] = row["steps"] if method == "ntp" or not tokens else step_at(out, tokens)
        rows = read_lines(out / "metrics.jsonl")[:STEPS]
        row["curves"] = {name: [short(line.get(name)) for line in rows] for name in CURVES}
    for path in sorted(out.glob("*.json")):
        if path.stem not in ("done", "run"):
            row[path.stem] = answers(json.loads(path.read_text()), method == "base")
    return row


def answers(report: dict, whole: bool) -> dict:
    """Reduce an evaluation: right answers to each position, lengths; whole: positions, too."""
    asked, items = {}, report["items"]
    for item in items:
        asked.setdefault((item["document"], item["position"]), []).append(item)
    found = {
        "positions": hashlib.sha256(json.dumps(list(asked)).encode()).hexdigest()[:12],
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
    """Return that of length and match over computed words that were answered at all."""
    pairs = [(i["thinking_length"], i["match"]) for i in items if i["thinking_length"] is not None]
    return float(np.corrcoef(np.array(pairs, float).T)[0, 1])


@torch.no_grad()
def coins_known(world: str) -> dict[str, float]:
    """Return how often the untrained model predicts the coins that a text ends with, plainly."""
    place = ASSETS / "worlds" / model_of(WORLDS[world])
    tokenizer, model = Tokenizer(place), build(place, "cpu", torch.float32)
    right: dict[str, list[bool]] = {"changed": [], "same": []}
    for document in documents(WORLDS[world], 2, 50):
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
        out = done.parent
        world, method, seed = out.parts[-3:]
        if (name := f"{world}/{method}/{seed}") not in stored:
            tokens = 0 if method in ("rmt", "base") else tokens_of(world, int(seed))
            stored[name] = row_of(out, tokens)
    lines = (json.dumps(stored[name]) + "\n" for name in sorted(stored))
    write_whole(STORED, "".join(lines))


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
                names = lambda job: "/".join(job.out.parts[-3:])
                collect()  # what an earlier command finished before it was killed
                chosen = [j for j in jobs(read_stored()) if names(j).startswith(tuple(o.only))]
                try:
                    run_all(chosen, o.jobs)
                finally:
                    collect()
    except (JobFailed, ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")
    print(write_page(read_stored()))


if __name__ == "__main__":
    main()
