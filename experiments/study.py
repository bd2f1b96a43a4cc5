"""When does each part pay? RMT, RMT without each part, and baselines, in worlds with obstacles.

    make study                                  all jobs: days on two cores; a stopped one goes on
    python -m experiments.study --only all/rmt  the jobs whose name WORLD/METHOD/SEED begins so
    python -m experiments.study --again all/rmt/100   the same, anew, beside what is stored
    python -m experiments.study --tables        run nothing, write the pages of what is stored

A finished job is a line of docs/study.jsonl and is not run again. All jobs of a world answer the
same held-out positions, chosen by its untrained model, 200 per tier. Each is measured after T
steps. Where RMT of that seed has sampled and trained on 10 % more or less tokens than a rival in
these, the rival is trained again in so many steps that they cost as much, up to three times. The
designs (designs.py) vary RMT's settings; shares.py takes its gradient apart.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from assets.worlds import SIZES, WORLDS, as_jsonl, documents, model_of
from experiments import stored
from experiments.designs import (
    CURES,
    DESIGNS,
    HAZARD,
    LONGER,
    LONGER_WORLD,
    MIXED,
    POST,
    POST_STEPS,
    POST_WORLD,
)
from experiments.runner import Command, Job, JobFailed, run_all, side_by_side, spent
from experiments.study_page import compare_again, write_pages
from experiments.verdicts import BEYOND, CLAIMS
from rmt.config.presets import PRESETS
from rmt.system.lock import held
from rmt.system.records import write_whole
from rmt.system.terminal import safe_printing

SEEDS, FEWER_SEEDS = range(100, 110), range(100, 103)
# After 60 the easy worlds are at one ceiling.
STEPS = dict.fromkeys(WORLDS, 60) | {"none": 15, "unequal-entropy": 15}
BUDGET = 30  # B_T: a thought about a place that works step by step has 29 tokens
EQ_6, EQ_7 = ("--length-reward-gate", "none"), ("--advantage-norm", "group")  # as printed
RIVALS = {
    "as-printed": (*EQ_6, *EQ_7),
    "ungated": EQ_6,
    "group-norm": EQ_7,
    # Paid for what is measured; no dynamic sampling in so few steps (docs/log.md).
    "rpt": ("--method", "rpt", "--match", "token"),
    "without-ntp": ("--no-ntp",),
    "without-budget": ("--no-budget",),
    "without-curriculum": ("--no-curriculum",),
    "same-mixture": MIXED,
    "rft": ("--method", "rft"),
    "ntp": ("--method", "ntp"),
    "big-batch": ("--method", "ntp"),  # RMT's tokens in RMT's number of updates
    "rlp": ("--method", "rlp"),
    "entropy-budget": ("--budget-entropy", "0.5"),
}
# Next-token training reads more in the same time.
TEXT = dict.fromkeys(("ntp", "big-batch", *LONGER), "long")  # others: train
# Of 0.7, 1.4 and 2.1 nats, so that hard tokens have about BUDGET and the others less.
FINAL_BUDGET = {"entropy-budget": 22}
VARIED = {method: flags for d in DESIGNS for method, flags in d.runs.items()} | CURES
METHODS = {"rmt": (), "shares": ()} | RIVALS | VARIED
METHODS |= {method: ("--steps", str(steps)) for method, steps in LONGER.items()}
TRAIN = (
    "--preset", "demo", "--probe-documents", "0", "--save-every", "20", "--samples-per-step", "0",
    "--lr-schedule", "linear",  # at a constant rate seeds end 20 points apart (docs/log.md)
)  # fmt: skip
ASK = (
    "--document-tokens", "256", "--entropy-top-k", "0", "--per-tier", "200", "--temperature",
    str(stored.TEMPERATURE), "--tier-thresholds", "0.5", "1", "1.5",
)  # fmt: skip


def cells() -> Iterator[tuple[str, str, int]]:
    """Yield world, method and seed of each job, those that others need first."""
    yield from ((world, "base", SEEDS[0]) for world in WORLDS)
    for seed in SEEDS:
        yield from ((world, "rmt", seed) for world in WORLDS)
        yield from (
            (world, rival, seed) for rival in RIVALS for world in (CLAIMS | BEYOND)[rival].worlds
        )
        if seed in FEWER_SEEDS:
            for design in DESIGNS:
                yield from ((design.world, m, seed) for m in design.runs if m != "rmt")
            yield from ((HAZARD.world, method, seed) for method in CURES)
            yield from ((POST_WORLD, method, seed) for method in POST)
            yield from ((LONGER_WORLD, method, seed) for method in LONGER)
    yield from ((world, "shares", SEEDS[0]) for world in WORLDS)


def start_of(world: str) -> Path:
    """Return the directory of the untrained model of a world, from the repository's root."""
    return Path("assets/worlds") / model_of(WORLDS[world])


def sizes(world: str, final_budget: int = BUDGET) -> tuple[str, ...]:
    """Return the flags of a world for training: from about what its model thinks to B_T."""
    start, most = (120, 512) if WORLDS[world].overthinking else (final_budget, 128)
    decay = math.ceil(1e4 * final_budget / start) / 1e4  # a budget is rounded down
    return (
        "--max-response", str(most), "--budget-start", str(start), "--budget-decay", str(decay)
    )  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Runs in a folder, and the file with a line for each that has finished."""

    out: Path = Path("runs/study")
    file: Path = Path("docs/study.jsonl")

    def data(self, world: str, part: str) -> Path:
        return self.out / world / f"{part}.jsonl"

    def write_data(self) -> None:
        """Write the text of each world."""
        for name, world in WORLDS.items():
            for part in SIZES:
                self.data(name, part).parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.data(name, part), as_jsonl(documents(world, part)))

    def jobs(self) -> list[Job]:
        """List the jobs that are not stored."""
        done, found = stored.read(self.file), []
        for world, method, seed in cells():
            name = f"{world}/{method}/{seed}"
            if name in done:
                continue
            needs = [f"{world}/base/{SEEDS[0]}"] if method != "base" else []
            if method in (*RIVALS, *POST, *LONGER):  # whose tokens are to be known
                rmt, ntp = (f"{world}/{m}/{seed}" for m in ("rmt", "ntp"))
                needs = [ntp] if method in LONGER else [rmt]
                needs += [ntp] if method in ("big-batch", *POST) else []
            waits = tuple(self.out / need for need in needs if need not in done)
            make = lambda cell=(world, method, seed): self.commands(*cell)
            found.append(Job(self.out / name, make, waits))
        return found

    def commands(self, world: str, method: str, seed: int) -> Iterator[Command]:
        """Yield the commands of a job: RMT's tokens are known once it is trained."""
        out, cell = self.out / world / method / str(seed), (world, method, seed)
        if method == "base":
            yield from self.evaluations(world, start_of(world), out, seed, mode="ntr", samples="4")
        elif method == "shares":
            yield ("-m", "experiments.shares", *self.training(*cell, out)[1:])
        elif method in POST:
            yield from self.post_training(*cell, out)
        else:
            many = ()
            if method == "big-batch":
                times = self.tokens(world, seed) / self.tokens(world, seed, "ntp")
                many = ("--batch-size", str(round(PRESETS["demo"]["batch_size"] * times)))
            yield self.training(*cell, out, *many)
            yield from self.evaluations(world, out / "model", out, seed)
        if method in LONGER:
            times = spent(out)[-1] / self.tokens(world, seed, "ntp")
            steps = ("--steps", str(round(STEPS[world] * times)))
            yield self.training(world, "ntp", seed, out / "ntp", *steps)
            yield from self.evaluations(world, out / "ntp" / "model", out, seed, "-ntp")
        if method not in RIVALS:
            return
        again, steps = out, STEPS[world]
        for name in stored.EQUAL_TOKENS:  # lengths depend on the steps, so one may miss
            share = self.tokens(world, seed) / spent(again)[-1]
            if abs(share - 1) <= 0.1:
                break
            again, steps = out / name, round(steps * share)
            yield self.training(*cell, again, "--steps", str(steps))
        if again != out:
            yield from self.evaluations(world, again / "model", out, seed, "-tokens")

    def training(
        self, world: str, method: str, seed: int, out: Path, *flags: str, start: Path | None = None
    ) -> Command:
        own = () if method in POST else METHODS[method]
        return (
            "train.py", "--model", str(start or start_of(world)),
            "--data", str(self.data(world, TEXT.get(method, "train"))), *TRAIN,
            *sizes(world, FINAL_BUDGET.get(method, BUDGET)), "--steps", str(STEPS[world]),
            *own, *flags, "--seed", str(seed), "--out", str(out),
        )  # fmt: skip

    def post_training(self, world: str, method: str, seed: int, out: Path) -> Iterator[Command]:
        """Train as the job says that comes before it, then by RL alone."""
        before, start = POST[method], start_of(world)
        if before != "base":
            share = self.tokens(world, seed) / self.tokens(world, seed, before)
            steps = ("--steps", str(round(STEPS[world] * share)))
            yield self.training(world, before, seed, out / before, *steps)
            start = out / before / "model"
        rl = ("--method", "rpt", "--match", "token", "--steps", str(2 * POST_STEPS))
        rl = (*rl, "--export-every", str(POST_STEPS))
        yield self.training(world, method, seed, out, *rl, start=start)
        half = out / f"model-{POST_STEPS:06d}"
        for name, model in (("-before", start), ("-half", half), ("", out / "model")):
            yield from self.evaluations(world, model, out, seed, name, mode="ntr")

    def evaluations(
        self, world: str, model: Path, out: Path, seed: int, name: str = "", mode: str = "rmt",
        samples: str = "1",
    ) -> Iterator[Command]:  # fmt: skip
        """Yield those with a thought and without one.

        mode "rmt": within the last budget of the model's run, or without one if it had none.
        """
        asked = (
            "eval.py", "--model", str(model), "--data", str(self.data(world, "eval")), *ASK,
            "--positions", str(self.out / world / "positions.json"),
            "--difficulty-model", str(start_of(world)),
        )  # fmt: skip
        sampled = (
            "--max-response", sizes(world)[1], "--sampling-seed", str(seed), "--samples", samples
        )  # fmt: skip
        for kind, flags in {"thought": (mode, *sampled), "plain": ("ntp",)}.items():
            yield (*asked, "--mode", *flags, "--json", str(out / f"{kind}{name}.json"))

    def tokens(self, world: str, seed: int, method: str = "rmt") -> int:
        """Return how many tokens a job of that world and seed sampled and trained on in T steps."""
        name = f"{world}/{method}/{seed}"
        done = stored.read(self.file)
        return done[name]["tokens"] if name in done else spent(self.out / name)[-1]

    def chosen(self, only: Sequence[str]) -> list[Job]:
        """Choose the jobs whose names begin with one of `only`, and those that they need."""
        names = ["/".join(map(str, cell)) for cell in cells()]
        if nothing := [word for word in only if not any(n.startswith(word) for n in names)]:
            raise ValueError(f"no job's name begins with {', '.join(nothing)}; one is {names[0]}")
        every, wanted = self.jobs(), set()
        for job in reversed(every):  # those that a job needs come before it
            if job.out in wanted or "/".join(job.out.parts[-3:]).startswith(tuple(only)):
                wanted |= {job.out, *job.needs}
        require_these_settings(stored.read(self.file), {out.parts[-3] for out in wanted})
        return [job for job in every if job.out in wanted]

    def run(self, only: Sequence[str], workers: int) -> None:
        """Run the chosen jobs and store them."""
        with held("the study's", self.out):
            self.write_data()
            self.collect()  # what an earlier command finished before it was killed
            try:
                run_all(self.chosen(only), workers)
            finally:
                self.collect()

    def collect(self) -> None:
        """Store what is finished."""
        rows = stored.read(self.file)
        for done in sorted(self.out.glob("*/*/*/done.json")):
            name = "/".join(done.parent.parts[-3:])
            if name not in rows:
                rows[name] = stored.row(done.parent, start_of(done.parent.parts[-3]))
        stored.write(self.file, rows)


def require_these_settings(rows: dict[str, dict], worlds: Collection[str]) -> None:
    """Raise ValueError if a stored job of these worlds ran with other settings than there are now.

    Its world's jobs would be compared with it.
    """
    for name, row in rows.items():
        world, method, _ = name.split("/")
        wanted = [ASK] if method == "base" else [TRAIN, ("--steps", str(STEPS[world]))]
        for settings in map(" ".join, wanted):
            if world in worlds and not any(f"{settings} " in line for line in row["commands"]):
                raise ValueError(
                    f"{name} is stored and ran without `{settings}`, which the study has now: "
                    f"remove the lines of {world} from docs/study.jsonl and its folder of "
                    "runs/study, and run it whole"
                )


def run_again(before: dict[str, dict], names: Sequence[str], workers: int) -> str:
    """Run jobs anew and compare them with what is stored; return what is wrong, if anything."""
    if missing := [name for name in names if "thought" not in before.get(name, {})]:
        return f"error: {', '.join(missing)}: not stored, so there is nothing to compare with"
    require_these_settings({name: before[name] for name in names}, WORLDS)
    out = Path("runs/again")
    shutil.rmtree(out, ignore_errors=True)
    again = Study(out, out / "study.jsonl")
    again.run(names, workers)
    return compare_again(before, stored.read(again.file))


@safe_printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", default=[""], metavar="WORLD/METHOD/SEED")
    what.add_argument("--again", nargs="+", metavar="WORLD/METHOD/SEED")
    what.add_argument("--tables", action="store_true", help="run nothing")
    many = side_by_side()
    parser.add_argument("--jobs", type=int, default=many, help=f"at one time (here {many})")
    o = parser.parse_args()
    study = Study()
    try:
        if o.again:
            sys.exit(run_again(stored.read(study.file), o.again, o.jobs) or None)
        if not o.tables:
            study.run(o.only, o.jobs)
        write_pages(stored.read(study.file))
        print("wrote docs/study.md, docs/reviewers.md and a table of README.md")
    except (JobFailed, ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
