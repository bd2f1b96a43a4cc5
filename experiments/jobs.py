"""What `make paper` runs: every method, every ablation and post-training, over seeds.

A job is a training run with its evaluations, a folder of its own and a `done.json` when it has
ended. Jobs are commands that anyone can type; each folder holds those that were run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What the tables are measured with: a model, its data, and how long."""

    model: str
    train: Flags  # of train.py, for mid-training
    post: Flags  # of train.py --method grpo
    eval: Flags  # of eval.py on held-out text
    problems: Flags  # of eval.py --mode problems
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    post_steps: int = 20


SETTINGS = {
    "tiny": Setting(
        model="tiny",
        train=("--preset", "demo"),
        post=(
            "--preset", "demo", "--data", "assets/tiny_problems/train.jsonl", "--batch-size", "12",
        ),
        eval=(
            "--data", "assets/tiny_corpus/eval.jsonl", "--document-tokens", "512",
            "--entropy-top-k", "0", "--per-tier", "200", "--max-response", "192",
            "--decoding", "sampled", "--max-branches", "256",
        ),
        problems=(
            "--data", "assets/tiny_problems/eval.jsonl", "--max-response", "192",
            "--decoding", "sampled", "--max-branches", "256",
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
class Job:
    """train: flags of train.py, or None for a model as it is; a function is asked when it starts,
    since some flags follow from jobs before. evals: name -> flags of eval.py.
    """

    name: str
    seed: int
    train: Callable[[Path], Flags] | None
    evals: dict[str, Flags]
    needs: tuple[str, ...] = ()  # names of jobs of the same seed
    model: str | None = None  # a job whose model it starts from; None: the setting's


@dataclass(frozen=True)
class Row:
    """A line of a table: what is measured by which evaluation of which job."""

    title: str
    job: str
    eval: str = "text"
    paper: tuple[float, ...] = ()  # easy, medium, hard, average; mean response, of Qwen3-14B
    note: str = field(default="", compare=False)


def jobs(setting: Setting) -> list[Job]:
    """All jobs, those that others need first."""
    return [job for seed in setting.seeds for job in _of_seed(setting, seed)]


def _of_seed(s: Setting, seed: int) -> list[Job]:
    same = lambda *more: lambda _: (*s.train, "--steps", str(s.steps), *more)
    ntr, rmt, plain = (("--mode", mode) for mode in ("ntr", "rmt", "ntp"))
    budget = lambda place: (*rmt, "--budget", str(_last_budget(place / "rmt")))
    found = [
        Job("rmt", seed, same("--method", "rmt"), {"text": rmt}),
        Job("rpt", seed, same("--method", "rpt", "--resample-from", str(s.steps // 2)),
            {"text": ntr}),
        Job("base", seed, None, {"plain": plain, "text": ntr, "budget": budget}, needs=("rmt",)),
        Job("without-budget", seed, same("--no-budget"), {"text": ntr}),
        Job("without-curriculum", seed, same("--no-curriculum"), {"text": rmt}),
        Job("without-ntp", seed, same("--no-ntp"), {"text": rmt}),
        Job("ntp-tokens", seed, lambda place: _matched(s, place, "--max-tokens"),
            {"plain": plain}, needs=("rmt",)),
        Job("ntp-minutes", seed, lambda place: _matched(s, place, "--max-minutes"),
            {"plain": plain}, needs=("rmt",)),
    ]  # fmt: skip
    post = lambda _: (*s.post, "--method", "grpo", "--steps", str(s.post_steps))
    for start in ("base", "ntp-tokens", "rpt", "rmt"):
        problems = {"problems": ("--mode", "problems")}
        source = None if start == "base" else start
        found.append(Job(f"{start}-before", seed, None, problems, (start,), source))
        found.append(Job(f"{start}-after", seed, post, problems, (start,), source))
    return found


def _matched(s: Setting, place: Path, flag: str) -> Flags:
    """Next-token training with the tokens, or the minutes, of the seed's RMT run."""
    rows = [json.loads(line) for line in (place / "rmt/metrics.jsonl").read_text().splitlines()]
    spent = {
        "--max-tokens": sum(row["tokens/step"] + row["tokens/dropped"] for row in rows),
        "--max-minutes": sum(row["time/step"] for row in rows) / 60,
    }[flag]
    limit = f"{spent:.0f}" if flag == "--max-tokens" else f"{spent:.3f}"
    return (*s.train, "--method", "ntp", "--steps", str(1000 * s.steps), flag, limit)


def _last_budget(run: Path) -> int:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["budget"]


def commands(s: Setting, job: Job, place: Path, train: str, evaluate: str) -> list[Sequence[str]]:
    """Command lines of a job, in order; `place` is the folder of its seed."""
    out, lines = place / job.name, []
    model = str(place / job.model / "model") if job.model else s.model
    if job.train:
        lines.append((train, "--model", model, *job.train(place), "--seed", str(job.seed),
                      "--out", str(out)))  # fmt: skip
        model = str(out / "model")
    for name, flags in job.evals.items():
        asked = flags(place) if callable(flags) else flags
        text = s.problems if "problems" in asked else s.eval
        shared = (
            () if "problems" in asked else ("--positions", str(place.parent / "positions.json"))
        )
        lines.append((evaluate, "--model", model, *text, *asked, *shared, "--seed", str(job.seed),
                      "--json", str(out / f"{name}.json")))  # fmt: skip
    return lines
