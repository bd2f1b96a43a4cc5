"""What one rank of tests/life.py does, and what it holds meanwhile."""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from safetensors import safe_open

from models.config import ASSETS, TINY
from models.weights import shards
from rmt.config.config import Config
from rmt.engine.checkpoint import export_model
from rmt.engine.run import Run, Setup, prepare, save
from rmt.system import dist
from train import train_step

SETTINGS: dict[str, Any] = dict(
    data=(str(ASSETS / "tiny_corpus" / "train.jsonl"),), max_records=4, steps=2, batch_size=4,
    group_size=2, max_response=4, budget=False, document_tokens=48, max_branches=8,
    tiers="quantile", tier_thresholds=(0.0, 0.33, 0.66), min_context=8, learning_rate=1e-3,
    warmup_steps=1,
)  # fmt: skip


def status(process: int | str, *fields: str) -> list[int]:
    """Bytes by the names of /proc/PID/status; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        lines = []
    found = dict(line.split(":", 1) for line in lines)
    return [1024 * int(found.get(field, "0").split()[0]) for field in fields]


@contextmanager
def phase(name: str, path: Path) -> Iterator[None]:
    """Append what this process held at most to `path`, and the seconds that went by."""
    dist.release_memory(torch.device("cpu"))  # what was freed before is not held
    done, seen = Event(), status("self", "RssAnon")

    def watch() -> None:
        while not done.wait(0.002):
            seen.extend(status("self", "RssAnon"))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    thread, started = Thread(target=watch), time.perf_counter()
    thread.start()
    try:
        yield
    finally:
        took = time.perf_counter() - started
        done.set()
        thread.join()
    anonymous, resident = status("self", "RssAnon", "VmHWM")
    row = dict(phase=name, before=seen[0], anonymous=max(anonymous, *seen), resident=resident)
    with path.open("a") as file:
        file.write(json.dumps(row | {"seconds": took}) + "\n")


def first_life(place: Path, config: Config, world: dist.World, path: Path) -> None:
    """To be ended from outside."""
    with phase("load", path):
        model = dist.load_model(Path(config.model), world, dist.compute_dtype(config.dtype, world))
    del model
    gc.collect()  # modules and their hooks hold each other
    with phase("prepare", path):
        run, setup = prepare(config, world)
    for step in (0, 1):
        learn(run, setup, step, place / "losses-0.jsonl", path)
        with phase(f"save {step + 1}", path):
            save(run, setup, wait=False)
            if step == 0:
                setup.saver.wait()
    setup.saver.wait()
    sys.exit("the second checkpoint was written before the kill came; take more --gigabytes")


def second_life(place: Path, config: Config, world: dist.World, path: Path, files: int) -> None:
    with phase("resume", path):
        run, setup = prepare(config, world)
    learn(run, setup, run.step, place / "losses-1.jsonl", path)
    size = sum(p.numel() for p in run.model.parameters()) * setup.compute.itemsize
    with phase("export", path):
        out = export_model(run.model, setup.model_dir, run.out, setup.compute, world, size // files)
    with dist.gathered_weights(run.model) as sampler:
        if world.rank == 0:
            same_bits(dict(sampler.named_parameters()), out)


def learn(run: Run, setup: Setup, step: int, losses: Path, path: Path) -> None:
    with phase(f"step {step + 1}", path):
        row = train_step(run, setup)[0]
    run.step += 1
    if setup.world.rank == 0:
        with losses.open("a") as file:
            file.write(json.dumps(row) + "\n")


def same_bits(sampled: dict[str, torch.Tensor], directory: Path) -> None:
    for path in shards(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if not torch.equal(sampled[name], file.get_tensor(name)):
                    raise AssertionError(f"{name} in {path} is not what the ranks sample from")


def be_a_rank(place: Path, life: int, dtype: str, files: int, environment: dict[str, str]) -> None:
    """In a process of its own, whose environment says which rank it is."""
    os.environ |= environment
    torch.set_num_threads(1)
    world, out = dist.start(), str(place / "out")
    path = place / f"memory-{life}-{world.rank}.jsonl"
    dist.load_model(TINY, world, torch.float32)  # what libraries take at first is not the phase's
    settings = SETTINGS | dict(model=str(place / "model"), out=out, dtype=dtype)
    if life == 0:
        first_life(place, Config(**settings), world, path)
    else:
        second_life(place, Config(**settings, resume=out), world, path, files)
    dist.stop()
