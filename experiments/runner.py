"""Run many commands in parallel, each once: for study.py and real.py.

A job has a folder and is complete when `done.json` is in it. A stopped job continues: training is
resumed, and an evaluation that wrote its file is not repeated. A complete job keeps its model, not
its checkpoints: three times the model's size and more, of each job. One job runs per core, with one
thread: two threads make a job little faster.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rmt.engine.checkpoint import steps
from rmt.system.records import read_lines

Command = Sequence[str]  # arguments of Python: a script and its flags


@dataclass(frozen=True)
class Job:
    """Commands with a folder. They are made when it starts: flags may depend on `needs`."""

    out: Path
    commands: Callable[[], Iterable[Command]]  # one at a time, each after the one before has ended
    needs: tuple[Path, ...] = ()  # folders of other jobs


class JobFailed(Exception):
    """A command ended with an error; the message names it and its log."""


def side_by_side() -> int:
    """Return how many jobs this machine runs in parallel; those of small models share a GPU."""
    return min(os.cpu_count() or 1, 12)


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """Run all jobs, the first that waits for no other one next.

    After a failure no job starts; JobFailed is raised when the running jobs have ended.
    """
    left, running, failures = list(jobs), {}, []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), unit="job") as bar:
        while True:
            unfinished = {job.out for job in (*left, *running.values())}
            ready = [job for job in left if unfinished.isdisjoint(job.needs)]
            for job in ready[: workers - len(running)]:
                left.remove(job)
                running[pool.submit(_run, job, one_thread=workers > 1)] = job
            if not running:
                break
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                bar.set_postfix_str(running.pop(ended).out.name)
                bar.update()
                if failure := ended.exception():
                    failures.append(failure)
                    left.clear()
    if failures:
        raise failures[0]


def _run(job: Job, one_thread: bool) -> None:
    if (job.out / "done.json").exists():
        return
    job.out.mkdir(parents=True, exist_ok=True)
    started, commands = time.perf_counter(), []
    with (job.out / "log.txt").open("a", encoding="utf-8") as log:
        for command in job.commands():
            _command(list(command), log, one_thread)
            commands.append(" ".join(("python", *command)))
    done = {"commands": commands, "minutes": (time.perf_counter() - started) / 60}
    aside = job.out / "done.json.tmp"
    aside.write_text(json.dumps(done, indent=1), encoding="utf-8")
    for checkpoints in list(job.out.rglob("checkpoints")):
        shutil.rmtree(checkpoints, ignore_errors=True)
    os.replace(aside, job.out / "done.json")


def _command(command: list[str], log, one_thread: bool) -> None:
    if command[0] == "train.py":
        out = Path(command[command.index("--out") + 1])
        if (out / "model" / "config.json").exists():
            return
        command = ["train.py", "--resume", str(out)] if steps(out) else command
    elif "--json" in command and Path(command[command.index("--json") + 1]).exists():
        return
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    log.write(f"$ python {' '.join(command)}\n")
    log.flush()
    ended = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=environment)
    if ended.returncode:
        raise JobFailed(
            f"`python {' '.join(command)}` ended with status {ended.returncode}; {log.name} says "
            "why. The same command again goes on from there"
        )
    if command[0] == "train.py" and not (out / "model" / "config.json").exists():
        raise JobFailed(f"{out} was stopped. The same command again goes on from there")


def spent(run: Path) -> list[int]:
    """Return the tokens that a run had sampled and trained on after each step."""
    total, found = 0.0, []
    for row in read_lines(run / "metrics.jsonl"):
        total += row["tokens/step"] + row["tokens/dropped"]
        found.append(round(total))
    return found
