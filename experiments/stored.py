"""What is kept of a finished job of the study: a line of docs/study.jsonl.

WORLD/METHOD/SEED, its commands, the commit, versions and device; tokens that it sampled and trained
on; curves of a few metrics; and of each evaluation right answers to each position, in the order of
the world's positions (`documents` and `tiers` of the untrained model's line).
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from assets.world_tokenizer import marks_by_position
from assets.worlds import CHANGED, NOISE, RAMBLE, WORLDS, Document, World, documents, work_out
from experiments.runner import spent
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import build
from rmt.forest import pack
from rmt.prompt import next_token_prompt
from rmt.system.records import read_lines, write_whole
from rmt.trees import Tree

CURVES = ("reward/match", "length/thinking", "loss/ntp", "share/advantage_from_length")
BEHIND = (0, 16, 32)  # sentences that lead nowhere behind the work; where thoughts are long, 16
TEMPERATURE = 0.8  # of the study's answers
# Folders of a rival's runs at about RMT's tokens, each scaled from the one before; the last counts.
EQUAL_TOKENS = ("equal-tokens", "equal-tokens-2", "equal-tokens-3")


def read(file: Path) -> dict[str, dict]:
    """Read the lines of a file, if it is there: WORLD/METHOD/SEED -> what was measured."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
    return {row["job"]: row for row in map(json.loads, lines)}


def write(file: Path, rows: dict[str, dict]) -> None:
    write_whole(file, "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))


def row(out: Path, start: Path) -> dict:
    """Reduce a finished job to a line. start: the untrained model of its world."""
    done, (world, method, seed) = json.loads((out / "done.json").read_text()), out.parts[-3:]
    found = {"job": f"{world}/{method}/{seed}", "commands": done["commands"]}
    if method == "shares":
        shares = json.loads((out / "shares.json").read_text())
        steps = shares["steps"]
        found["steps"] = {name: [short(step[name]) for step in steps] for name in steps[0]}
        return found | about(shares)
    found |= of_world(out, world, start) if method == "base" else trained(out)
    for path in sorted(out.glob("*.json")):
        if path.stem not in ("done", "run"):
            report = json.loads(path.read_text())
            found[path.stem] = answers(report, whole=method == "base")
    return found


def of_world(out: Path, world: str, start: Path) -> dict:
    """Return what the untrained model knows, and how many hard positions nobody can know."""
    tokenizer, model = Tokenizer(start), build(start, "cpu", torch.float32)
    texts = documents(WORLDS[world], "eval")
    marks = [marks_by_position(tokenizer, document) for document in texts]
    items = json.loads((out / "plain.json").read_text())["items"]
    hard = [marks[i["document"]].get(i["position"]) for i in items if i["tier"] == "hard"]
    noise = sum(mark is not None and mark.kind == NOISE for mark in hard)
    return {
        "coins": coins_known(tokenizer, model, WORLDS[world]),
        "behind": {str(n): places_right(tokenizer, model, texts, n) for n in BEHIND},
        "noise": short(noise / max(1, len(hard))),
    }


def about(run: dict) -> dict:
    """Return what describes a run."""
    return {name: run[name] for name in ("commit", "torch", "device")}


def trained(out: Path) -> dict:
    """Reduce a training run, and the one at RMT's tokens, if any."""
    found = about(json.loads((out / "run.json").read_text())) | {"tokens": spent(out)[-1]}
    for again in filter(Path.exists, (out / name for name in EQUAL_TOKENS)):
        found["tokens-tokens"] = spent(again)[-1]
    rows = read_lines(out / "metrics.jsonl")
    found["curves"] = {name: [short(line.get(name)) for line in rows] for name in CURVES}
    seconds = sum(row["time/step"] for f in out.rglob("metrics.jsonl") for row in read_lines(f))
    return found | {"minutes": round(seconds / 60, 2)}


def answers(report: dict, whole: bool) -> dict:
    """Reduce an evaluation: right answers to each position, lengths; whole: positions, too."""
    asked, items = {}, report["items"]
    for item in items:
        asked.setdefault((item["document"], item["position"]), []).append(item)
    questions = report["data"] + json.dumps(list(asked))  # chosen by the untrained model
    found = {
        "asked": hashlib.sha256(questions.encode()).hexdigest()[:12],
        "samples": len(items) // len(asked),
        "match": "".join(str(sum(int(i["match"]) for i in group)) for group in asked.values()),
        "well_formed": short(sum(i["well_formed"] for i in items) / len(items)),
        "nats": short(report.get("nats_per_token")),
    }
    if report["mode"] != "ntp":  # of a thought that does not end all tokens
        length = lambda i: i["tokens"] if i["thinking_length"] is None else i["thinking_length"]
        lengths = list(map(length, items))
        found["thinking"] = short(sum(lengths) / len(lengths))
    if whole:
        found["documents"] = [document for document, _ in asked]
        found["tiers"] = "".join(group[0]["tier"][0] for group in asked.values())
        found["correlation"] = short(correlation(items)) if report["mode"] != "ntp" else None
    return found


def correlation(items: Sequence[dict]) -> float:
    """Return that of length and match among answered questions, within tiers: their mean."""
    found = []
    for tier in sorted({item["tier"] for item in items}):
        own = [i for i in items if i["tier"] == tier and i["thinking_length"] is not None]
        pairs = np.array([(i["thinking_length"], i["match"]) for i in own], float)
        if len(own) > 1 and pairs.std(axis=0).all():
            found.append(float(np.corrcoef(pairs.T)[0, 1]))
    return sum(found) / max(1, len(found))


@torch.no_grad()
def places_right(
    tokenizer: Tokenizer, model: Transformer, texts: Sequence[Document], sentences: int
) -> float:
    """Return how often a sampled answer is right behind right work about a place.

    sentences: so many that lead nowhere stand between the work and the answer.
    """
    prompt, rng, found = next_token_prompt(tokenizer, None), random.Random(0), []
    for document in texts[:30]:
        place = rng.choice([mark for mark in document.marks if mark.kind == "place"])
        work, answer = work_out(place, careful=True)
        thought = " ".join([work, *(rng.choice(RAMBLE) for _ in range(sentences))])
        ids = [
            *prompt.header, *tokenizer.encode(document.text[: place.start]), *prompt.footer,
            *tokenizer.encode_with_control(f"<think>\n{thought}\n</think>\n\n\\boxed{{"),
        ]  # fmt: skip
        (word,) = tokenizer.encode(f" {answer}")
        forest, last = pack([Tree(0, ids)]), len(ids) - 1
        logits = model(
            forest.tokens, forest.position, forest.attend, lambda h, w, at=last: h[at] @ w.T
        )
        found.append((logits / TEMPERATURE).softmax(-1)[word].item())
    return short(sum(found) / len(found))


@torch.no_grad()
def coins_known(tokenizer: Tokenizer, model: Transformer, world: World) -> dict[str, float]:
    """Return how often the untrained model predicts the coins that a text ends with, plainly."""
    right: dict[str, list[bool]] = {"changed": [], "same": []}
    for document in documents(world, "eval", 50):
        ids = tokenizer.encode(document.text)
        forest = pack([Tree(0, ids)])
        best = model(
            forest.tokens, forest.position, forest.attend, lambda h, w: (h @ w.T).argmax(-1)
        )
        words = [tokenizer.bytes_of([index]).decode().strip() for index in ids]
        for at in range(words.index("coins") + 3, len(ids) - 1, 2):
            name = "changed" if words[at - 1] in CHANGED and world.unused_tokens else "same"
            right[name].append(best[at - 1].item() == ids[at])
    return {name: short(sum(found) / len(found)) for name, found in right.items() if found}


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
