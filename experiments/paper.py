"""Measure the paper's claims: every baseline, every ablation and post-training in one command.

    make paper                          the tiny world: two CPU cores, three seeds
    make beyond                         not in the paper: each of our own flags beside RMT
    python -m experiments.paper --tables     the tables of all runs so far

A real model has a study of its own: python -m experiments.real --study.

Runs are saved in runs/paper/MODEL/SEED/JOB and not repeated; a stopped one is resumed. The tables
go into docs/paper-MODEL.md, and into docs/results.md between the markers that name the model.
"""

import argparse
import sys
import time
from pathlib import Path

from experiments.jobs import TINY, jobs
from experiments.runner import JobFailed, run_all, side_by_side
from experiments.tables import write_tables
from rmt.system.lock import held
from rmt.system.terminal import safe_printing


@safe_printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("claims", "beyond"), default="claims")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    many = side_by_side()
    parser.add_argument("--jobs", type=int, default=many, help=f"at one time (here {many})")
    o = parser.parse_args()
    out, started = Path("runs/paper") / TINY.model, time.perf_counter()
    if not o.tables:
        try:
            with held("the experiment's", out):
                run_all(jobs(TINY, out, o.part), max(1, o.jobs))
        except (JobFailed, ValueError) as failure:
            sys.exit(f"error: {failure}")
        print(f"all jobs are done, after {(time.perf_counter() - started) / 60:.1f} minutes")
    print(write_tables(TINY, out))


if __name__ == "__main__":
    main()
