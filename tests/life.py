"""The life of a run, with the memory of every rank: load, learn, save, be killed, resume, export.

    python tests/life.py --gigabytes 2

A random model of Qwen3's shape, with so many gigabytes of fp32 weights in eight files, learns on
four ranks (gloo, FSDP) for two steps and saves after each. All ranks are killed (-9) while the
second checkpoint is being written. Two ranks resume from the first, do the second step again, and
export the model in eight files. Then the loss of the second step must be the same in both lives
(fp32), the files must hold the bits that the ranks sample from, and transformers must open them
and have our logits.

Memory is Linux's. `anonymous` is what a rank allocated, at its most in a phase (looked at every two
milliseconds); `resident` adds the pages of files it has mapped, libraries too, which the kernel may
take back (its own high-water mark of the phase, exact). `together` is the anonymous memory of all
ranks at one moment. A phase "load" is load_model alone; "prepare" does it again, and measures
difficulty with gathered weights. --dtype bfloat16 (of the forward and backward pass, and of the
export) halves what is gathered on each rank; sampled tokens then depend on the number of ranks.
"""

import argparse
import json
import multiprocessing
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from life_rank import be_a_rank, status

from models.config import TINY, ModelConfig
from models.export import export
from models.transformer import Transformer
from models.weights import build
from rmt.attention import attend_by_call
from rmt.engine.checkpoint import steps

FILES = 8  # of the model, before and after
RANKS = (4, 2)  # of the first life and of the second
LIMIT = 14 * 2**30  # anonymous bytes of all ranks together, after which they are ended
SERVER = multiprocessing.get_context("forkserver")  # PyTorch is imported once for all ranks


def shape(gigabytes: float) -> dict[str, Any]:
    """config.json of a model with so many gigabytes in fp32."""
    parameters = gigabytes * 1e9 / 4
    width = 128 * max(1, round((parameters / 1.25e7) ** (1 / 3) * 3))
    vocabulary, layer = 16 * width, 15 * width**2
    return json.loads((TINY / "config.json").read_text(encoding="utf-8")) | dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, head_dim=64,
        num_attention_heads=width // 64, num_key_value_heads=width // 128,
        num_hidden_layers=max(1, round((parameters - vocabulary * width) / layer)),
    )  # fmt: skip


def write_model(place: Path, gigabytes: float) -> None:
    """The tiny model's tokenizer and random weights, as a Hugging Face directory with shards."""
    described = place / "described"
    shutil.copytree(TINY, described, ignore=shutil.ignore_patterns("*.safetensors"))
    (described / "config.json").write_text(json.dumps(shape(gigabytes)), encoding="utf-8")
    model = Transformer(ModelConfig.from_directory(described))
    model.reset_parameters(seed=0)
    size = int(gigabytes * 1e9 / FILES)
    export(model.state_dict(), described, place / "model", torch.float32, size)


def live(place: Path, life: int, dtype: str, until: Callable[[], bool]) -> dict[str, Any]:
    """Run all ranks of a life to their end, or kill them when `until` says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks, together, killed = RANKS[life], 0, False
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    try:
        for rank in range(ranks):
            known = (place, life, dtype, FILES, address | sizes | {"RANK": str(rank)})
            processes.append(SERVER.Process(target=be_a_rank, args=known))
            processes[-1].start()
        while not killed and any(process.is_alive() for process in processes):
            together = max(together, sum(status(p.pid, "RssAnon")[0] for p in processes))
            if any(process.exitcode for process in processes) or together > LIMIT:
                raise RuntimeError(f"a rank has failed, or {together / 2**30:.1f} GiB are too much")
            killed = until()
            time.sleep(0.002)
    finally:
        for process in processes:
            process.kill()  # SIGKILL
        for process in processes:
            process.join()
    return dict(ranks=ranks, killed=killed, together=together)


def compare(place: Path) -> float:
    """Largest difference of transformers' logits and ours, of the exported model in fp32."""
    from transformers import AutoModelForCausalLM

    directory, tokens = place / "out" / "model", torch.arange(3, 40)
    whole = slice(0, len(tokens))
    attend = lambda _, q, k, v: attend_by_call([(whole, whole)], q, k, v)
    with torch.no_grad():
        ours = build(directory, "cpu", torch.float32)
        logits = ours(tokens, torch.arange(len(tokens)), attend, lambda x, head: x @ head.T)
        del ours
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return float((theirs(tokens[None]).logits[0] - logits).abs().max())


def whole_life(place: Path, gigabytes: float, dtype: str) -> dict[str, Any]:
    """Everything that the head of this file says; what it found, for `table` and for tests."""
    write_model(place, gigabytes)
    unfinished = place / "out" / "checkpoints" / ".step-000002.saving"
    lives = [live(place, 0, dtype, until=unfinished.exists)]
    kept = steps(place / "out")
    lives.append(live(place, 1, dtype, until=lambda: False))
    losses = [
        json.loads((place / f"losses-{i}.jsonl").read_text().strip().split("\n")[-1])
        for i in (0, 1)
    ]
    rows = [
        dict(life=life, rank=rank, **json.loads(line))
        for life, ranks in enumerate(RANKS)
        for rank in range(ranks)
        for line in (place / f"memory-{life}-{rank}.jsonl").read_text().strip().split("\n")
    ]
    return dict(lives=lives, kept=kept, losses=losses, rows=rows, difference=compare(place))


def table(found: dict[str, Any]) -> str:
    lines = ["| ranks | phase | anonymous GiB, by rank | resident GiB, by rank | seconds |"]
    lines.append("|---|---|---|---|---:|")
    for life, summary in enumerate(found["lives"]):
        rows = [row for row in found["rows"] if row["life"] == life]
        for name in dict.fromkeys(row["phase"] for row in rows):
            of_phase = [row for row in rows if row["phase"] == name]
            cells = [
                " ".join(f"{row[field] / 2**30:.2f}" for row in of_phase)
                for field in ("anonymous", "resident")
            ]
            seconds = max(row["seconds"] for row in of_phase)
            lines.append(f"| {summary['ranks']} | {name} | {' | '.join(cells)} | {seconds:.1f} |")
    together = ", ".join(f"{life['together'] / 2**30:.2f}" for life in found["lives"])
    kept, (first, second) = found["kept"], (row["loss/ntp"] for row in found["losses"])
    return "\n".join(lines) + (
        f"\nanonymous GiB together: {together}; checkpoints after the kill: {kept}"
        f"\nloss/ntp of step 2: {first:.7f} and {second:.7f}"
        f"\nlargest difference of transformers' logits and ours: {found['difference']:.1e}"
    )


def main() -> None:
    SERVER.set_forkserver_preload(["life_rank"])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2, help="of fp32 weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(table(whole_life(Path(place), o.gigabytes, o.dtype)))


if __name__ == "__main__":
    main()
