"""What `make paper` runs: every method, every ablation and post-training, over seeds.

Jobs are commands that anyone can type; the folder of each holds those that were run.
"""

from dataclasses import dataclass
from pathlib import Path

from rmt.jobs import Command, Job
from rmt.report import read_lines

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What the tables are measured with: a model, its data, and how long."""

    model: str
    train: Flags  # of train.py, for mid-training
    post: Flags  # of train.py --method grpo
    eval: Flags  # of eval.py on held-out text
    other: Flags  # of eval.py on text of another domain
    problems: Flags  # of eval.py --mode problems
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    post_steps: int = 20


# The tiny model has read nothing but its own world: the usual request would be noise to it.
PLAINLY = ("--problem-request", "")

SETTINGS = {
    "tiny": Setting(
        model="tiny",
        train=("--preset", "demo"),
        post=(
            "--preset", "demo", "--data", "assets/tiny_problems/train.jsonl", *PLAINLY,
            "--budget", "--budget-start", "40", "--budget-decay", "1", "--length-weight", "0",
        ),
        eval=(
            "--data", "assets/tiny_corpus/eval.jsonl", "--document-tokens", "512",
            "--entropy-top-k", "0", "--per-tier", "200", "--max-response", "192",
            "--decoding", "sampled", "--max-branches", "256",
        ),
        other=(
            "--data", "assets/tiny_problems/text.jsonl", "--document-tokens", "512",
            "--entropy-top-k", "0", "--per-tier", "150", "--max-response", "192",
            "--decoding", "sampled", "--max-branches", "256",
        ),
        problems=(
            "--data", "assets/tiny_problems/eval.jsonl", "--document-tokens", "512",
            "--max-response", "192", "--decoding", "sampled", "--max-branches", "256", *PLAINLY,
            "--budget", "40",
        ),
    ),
    # For a GPU: a real model on Omni-MATH text, and GSM8K afterwards.
    "smollm2-135m": Setting(
        model="smollm2-135m",
        train=(
            "--data", "../shared/data/omni-math/train.jsonl", "--batch-size", "32",
            "--budget-start", "256", "--max-response", "512", "--document-tokens", "1024",
            "--learning-rate", "1e-5",
        ),
        post=(
            "--data", "../shared/data/gsm8k/train.jsonl", "--batch-size", "32",
            "--max-response", "512", "--learning-rate", "1e-5",
        ),
        eval=(
            "--data", "../shared/data/omni-math/eval.jsonl", "--document-tokens", "1024",
            "--per-tier", "400", "--max-response", "512", "--decoding", "sampled",
        ),
        other=(
            "--data", "../shared/data/text/python_docs.jsonl", "--document-tokens", "1024",
            "--per-tier", "200", "--max-response", "512", "--decoding", "sampled",
        ),
        problems=(
            "--data", "../shared/data/gsm8k/test.jsonl", "--limit", "400",
            "--max-response", "512", "--decoding", "sampled",
        ),
        seeds=(0,),
        steps=60,
        post_steps=40,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of a table: what is measured by which evaluation of which job."""

    title: str
    job: str
    eval: str = "text"
    paper: tuple[float, ...] = ()  # easy, medium, hard, average and mean response


def jobs(setting: Setting, out: Path) -> list[Job]:
    """All jobs, those that others need first; of each a folder out/SEED/NAME."""
    return [job for seed in setting.seeds for job in _of_seed(setting, seed, out / str(seed))]


def _of_seed(s: Setting, seed: int, place: Path) -> list[Job]:
    rmt = place / "rmt"
    ntr, budget, plain = (
        {name: ("--mode", mode) for name in ("text", "other")} for mode in ("ntr", "rmt", "ntp")
    )

    def job(name, train, evals, needs=(), start=s.model) -> Job:
        """train: flags, or a function that gives them when the job starts; None: no training."""
        make = lambda: _commands(s, seed, place / name, start, train, evals)
        return Job(place / name, make, needs)

    steps = (*s.train, "--steps", str(s.steps))
    halfway = ("--resample-from", str(s.steps // 2))
    asked = lambda: ("--mode", "rmt", "--budget", str(_last_budget(rmt)))
    untrained = {"plain": ("--mode", "ntp"), "text": ("--mode", "ntr"), "budget": asked}
    untrained |= {"other-plain": ("--mode", "ntp"), "other": ("--mode", "ntr")}
    found = [
        job("rmt", (*steps, "--method", "rmt"), budget),
        job("rpt", (*steps, "--method", "rpt", *halfway), ntr),
        job("without-budget", (*steps, "--no-budget"), ntr),
        job("without-curriculum", (*steps, "--no-curriculum"), budget),
        job("without-ntp", (*steps, "--no-ntp"), budget),
        job("ntp-tokens", lambda: _matched(s, rmt, "--max-tokens"), plain, (rmt,)),
        job("ntp-minutes", lambda: _matched(s, rmt, "--max-minutes"), plain, (rmt,)),
        job("base", None, untrained, (rmt,)),
    ]
    post = (*s.post, "--method", "grpo", "--steps", str(s.post_steps))
    problems = {"problems": ("--mode", "problems")}
    for name in ("base", "ntp-tokens", "rpt", "rmt"):
        start = s.model if name == "base" else str(place / name / "model")
        for when, train in (("before", None), ("after", post)):
            found.append(job(f"{name}-{when}", train, problems, (place / name,), start))
    return found


def _commands(s: Setting, seed: int, out: Path, model: str, train, evals) -> list[Command]:
    """Of a job: training, if any, then its evaluations."""
    called = lambda flags: flags() if callable(flags) else flags
    found = []
    if train:
        flags = (*called(train), "--seed", str(seed), "--out", str(out))
        found.append(("train.py", "--model", model, *flags))
        model = str(out / "model")
    for name, flags in evals.items():
        flags = called(flags)
        # The same questions to all, chosen by the model as it was.
        domain = "other" if name.startswith("other") else "text"
        stored = ("--positions", str(out.parent.parent / f"positions-{domain}.json"))
        given = s.other if domain == "other" else s.eval
        given = (*given, *stored, "--difficulty-model", s.model)
        given = s.problems if name == "problems" else given
        written = ("--seed", str(seed), "--json", str(out / f"{name}.json"))
        found.append(("eval.py", "--model", model, *given, *flags, *written))
    return found


def _matched(s: Setting, rmt: Path, flag: str) -> Flags:
    """Next-token training with the tokens, or the minutes, of the seed's RMT run."""
    rows = _metrics(rmt)
    spent = {
        "--max-tokens": f"{sum(row['tokens/step'] + row['tokens/dropped'] for row in rows):.0f}",
        "--max-minutes": f"{sum(row['time/step'] for row in rows) / 60:.3f}",
    }
    return (*s.train, "--method", "ntp", "--steps", str(1000 * s.steps), flag, spent[flag])


def _last_budget(rmt: Path) -> int:
    return _metrics(rmt)[-1]["budget"]


def _metrics(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")
