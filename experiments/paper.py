"""The paper's claims, measured: every baseline, every ablation and post-training in one command.

    make paper                          the tiny world: two CPU cores, three seeds
    make paper MODEL=smollm2-135m       the same on a real model, for a GPU
    python -m experiments.paper tiny --tables     print the tables of what has been run

Runs are kept in runs/paper/MODEL/SEED/JOB and are not repeated; one that was stopped is resumed.
On a CPU as many jobs run side by side as there are cores, with one thread each: two threads of one
job are little faster than one. The tables go into README.md and docs/paper-MODEL.md.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.jobs import SETTINGS, Job, Setting, commands, jobs
from experiments.tables import write_tables
from rmt.checkpoint import steps

OUT = Path("runs/paper")


class Failed(Exception):
    """A command of a job ended with an error; the message names its log."""


def run_all(setting: Setting, name: str, workers: int) -> None:
    """All jobs that are not done, each after those it needs. Failed, once the others have ended."""
    every = jobs(setting)
    ended = {(job.seed, job.name): threading.Event() for job in every}
    broken: list[str] = []
    bar = tqdm(total=len(every), unit="job", dynamic_ncols=True)

    def work(job: Job) -> None:
        for need in job.needs:
            ended.get((job.seed, need), threading.Event()).wait()
        try:
            if not broken:
                run(setting, job, OUT / name / str(job.seed), threads=workers > 1)
        except Failed as failure:
            broken.append(str(failure))
        finally:
            ended[job.seed, job.name].set()
            bar.set_postfix_str(f"{job.name}, seed {job.seed}")
            bar.update()

    with ThreadPoolExecutor(workers) as pool:
        wait([pool.submit(work, job) for job in every])
    bar.close()
    if broken:
        sys.exit(f"error: {broken[0]}")


def run(setting: Setting, job: Job, place: Path, threads: bool) -> None:
    """A job's commands, unless they were run; what they print goes to OUT/log.txt."""
    out = place / job.name
    if (out / "done.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    started, lines = time.perf_counter(), commands(setting, job, place, "train.py", "eval.py")
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for line in lines:
            _command(line, out, log, one_thread=threads)
    done = {"commands": [" ".join(("python", *line)) for line in lines],
            "minutes": (time.perf_counter() - started) / 60}  # fmt: skip
    aside = out / "done.json.tmp"
    aside.write_text(json.dumps(done, indent=1))
    os.replace(aside, out / "done.json")


def _command(line: Sequence[str], out: Path, log, one_thread: bool) -> None:
    """One command, unless its result is there; a training run that was stopped goes on."""
    if line[0] == "train.py":
        if (out / "model/config.json").exists():
            return
        line = ["train.py", "--resume", str(out)] if steps(out) else line
    elif Path(line[line.index("--json") + 1]).exists():
        return
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    log.write(f"$ python {' '.join(line)}\n")
    log.flush()
    ended = subprocess.run([sys.executable, *line], stdout=log, stderr=log, env=environment)
    if ended.returncode:
        raise Failed(f"`python {' '.join(line)}` failed; see {log.name}. Run it again to go on")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=SETTINGS, nargs="?", default="tiny")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help=f"side by side (here {cores})")
    o = parser.parse_args()
    if not o.tables:
        started = time.perf_counter()
        run_all(SETTINGS[o.model], o.model, max(1, o.jobs))
        print(f"all jobs are done, after {(time.perf_counter() - started) / 60:.1f} minutes")
    print(write_tables(SETTINGS[o.model], o.model, OUT / o.model))


if __name__ == "__main__":
    main()
