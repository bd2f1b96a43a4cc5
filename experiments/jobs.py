"""The jobs of `make paper` and `make beyond`: methods, ablations, post-training, over seeds.

Jobs are ordinary commands; the folder of each job records those that were run.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.runner import Command, Job
from rmt.system.records import read_lines

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """Settings of an experiment: a model, its data, steps and seeds."""

    model: str
    train: Flags  # of train.py, for mid-training
    post: Flags  # of train.py --method grpo
    eval: Flags  # of eval.py on held-out text
    other: Flags  # of eval.py on text of another domain
    problems: Flags  # of eval.py --mode problems
    few: Flags = ()  # of train.py: so few documents that positions repeat
    new: Flags = ()  # of train.py: text of the other domain
    freely: Flags = ("--no-budget",)  # of train.py: think without a budget
    ask_freely: Flags = ("--mode", "ntr")  # of eval.py
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 20
    post_steps: int = 12


# The tiny model knows only its own world: it has never seen the usual request.
PLAINLY = ("--problem-request", "")

TINY = Setting(
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
        "--entropy-top-k", "0", "--per-tier", "100", "--max-response", "192",
        "--decoding", "sampled", "--max-branches", "256",
    ),
    problems=(
        "--data", "assets/tiny_problems/eval.jsonl", "--document-tokens", "512",
        "--max-response", "192", "--decoding", "sampled", "--max-branches", "256", *PLAINLY,
        "--budget", "40",
    ),
    few=(
        "--data", "assets/tiny_corpus/few.jsonl", "--batch-size", "4",
        "--positions-per-document", "3",
    ),
    new=("--data", "assets/tiny_problems/text_train.jsonl"),
    # It has never seen a prompt without a length and fails there (7 % right): ask for B_0 at
    # every step, and reward the match alone.
    freely=(
        "--budget", "--budget-start", "90", "--budget-decay", "1", "--length-weight", "0",
    ),
    ask_freely=("--mode", "rmt", "--budget", "90"),
)  # fmt: skip


def jobs(setting: Setting, out: Path, part: str) -> list[Job]:
    """List all jobs of a part, in order of dependency; each has a folder out/SEED/NAME."""
    of_seed = {"claims": _claims, "beyond": _beyond}[part]
    return [job for seed in setting.seeds for job in of_seed(setting, seed, out / str(seed))]


PLAIN, BUDGET = ("--mode", "ntp"), ("--mode", "rmt")


def _claims(s: Setting, seed: int, place: Path) -> list[Job]:
    """List the paper's runs: methods, ablations, next-token training of equal cost, GRPO."""
    rmt, text = place / "rmt", {"text": BUDGET}
    steps = (*s.train, "--steps", str(s.steps))
    rpt = _rpt(s, steps)
    freely, plain = ({"text": ask, "other": ask} for ask in (s.ask_freely, PLAIN))
    asked = lambda: ("--mode", "rmt", "--budget", str(_last_budget(rmt)))
    untrained = {"plain": PLAIN, "text": s.ask_freely, "budget": asked}
    untrained |= {"other-plain": PLAIN, "other": s.ask_freely}
    job = lambda *what, **options: _job(s, seed, place, *what, **options)
    found = [
        _rmt_job(s, seed, place),
        job("rpt", rpt, freely),
        job("rpt-tokens", lambda: (*rpt, "--max-tokens", tokens_of(rmt)), freely, needs=(rmt,)),
        job("without-budget", (*steps, *s.freely), {"text": s.ask_freely}),
        job("without-curriculum", (*steps, "--no-curriculum"), text),
        job("without-ntp", (*steps, "--no-ntp"), text),
        job("ntp-tokens", lambda: _matched(s, rmt, "--max-tokens"), plain, needs=(rmt,)),
        job("ntp-minutes", lambda: _matched(s, rmt, "--max-minutes"), plain, needs=(rmt,)),
        job("base", None, untrained, needs=(rmt,)),
    ]
    post = (*s.post, "--method", "grpo", "--steps", str(s.post_steps))
    problems = {"problems": ("--mode", "problems")}
    for name in ("base", "ntp-tokens", "rpt", "rmt"):
        start = s.model if name == "base" else str(place / name / "model")
        for when, train in (("before", None), ("after", post)):
            needs = (place / name,)
            found.append(job(f"{name}-{when}", train, problems, needs=needs, start=start))
    return found


def _beyond(s: Setting, seed: int, place: Path) -> list[Job]:
    """List runs of our own flags, beside RMT. The noise filter needs positions that repeat."""
    steps = (*s.train, "--steps", str(s.steps))
    flags = {
        "adaptive": ("--curriculum-rule", "adaptive"),
        "correct-only": ("--length-reward-gate", "correct_only"),
        "budget-entropy": ("--budget-entropy", "1"),
    }
    if s.few:
        flags |= {"few": s.few, "few-noise-filter": (*s.few, "--noise-after", "8")}
    found = [_rmt_job(s, seed, place)] + [
        _job(s, seed, place, name, (*steps, "--method", "rmt", *added), {"text": BUDGET})
        for name, added in flags.items()
    ]
    return found + (_new_text(s, seed, place) if s.new else [])


def _new_text(s: Setting, seed: int, place: Path) -> list[Job]:
    """List runs on text that is new to the model: next-token prediction, RMT and RPT."""
    steps = (*s.train, *s.new, "--steps", str(s.steps))
    both = {"other": BUDGET, "other-plain": PLAIN}
    rmt = place / "new-rmt"
    ntp = lambda: (*_matched(s, rmt, "--max-tokens"), *s.new)
    rpt = _rpt(s, steps)
    freely = {"other": s.ask_freely, "other-plain": PLAIN}
    return [
        _job(s, seed, place, "new-rmt", (*steps, "--method", "rmt"), both),
        _job(s, seed, place, "new-without-ntp", (*steps, "--no-ntp"), both),
        _job(s, seed, place, "new-rpt", rpt, freely),
        _job(s, seed, place, "new-ntp", ntp, {"other-plain": PLAIN}, needs=(rmt,)),
    ]


def _rpt(s: Setting, steps: Flags) -> Flags:
    """Return flags of RPT: no budget, and dynamic sampling from the middle of the run on."""
    return (*steps, "--method", "rpt", *s.freely, "--resample-from", str(s.steps // 2))


def _rmt_job(s: Setting, seed: int, place: Path) -> Job:
    train = (*s.train, "--steps", str(s.steps), "--method", "rmt")
    return _job(s, seed, place, "rmt", train, {"text": BUDGET, "other": BUDGET})


def _job(
    s: Setting, seed: int, place: Path, name: str, train, evals, *, needs=(), start: str = ""
) -> Job:
    """Make a job; train: flags, or a function that returns them at its start, or None."""
    make = lambda: _commands(s, seed, place / name, start or s.model, train, evals)
    return Job(place / name, make, needs)


def _commands(s: Setting, seed: int, out: Path, model: str, train, evals) -> list[Command]:
    """Return the commands of a job: training, if any, then its evaluations."""
    called = lambda flags: flags() if callable(flags) else flags
    found = []
    if train:
        # The probe would be a sixth of the sampling, and no table needs it.
        flags = (*called(train), "--probe-documents", "0", "--seed", str(seed), "--out", str(out))
        found.append(("train.py", "--model", model, *flags))
        model = str(out / "model")
    for name, flags in evals.items():
        flags = called(flags)
        # The same questions for all, chosen by the initial model.
        domain = "other" if name.startswith("other") else "text"
        stored = ("--positions", str(out.parent.parent / f"positions-{domain}.json"))
        given = s.other if domain == "other" else s.eval
        given = (*given, *stored, "--difficulty-model", s.model)
        given = s.problems if name == "problems" else given
        written = ("--sampling-seed", str(seed), "--json", str(out / f"{name}.json"))
        found.append(("eval.py", "--model", model, *given, *flags, *written))
    return found


def _matched(s: Setting, rmt: Path, flag: str) -> Flags:
    """Return flags of next-token training with the tokens or minutes of the seed's RMT run."""
    minutes = sum(row["time/step"] for row in _metrics(rmt)) / 60
    spent = {"--max-tokens": tokens_of(rmt), "--max-minutes": f"{minutes:.3f}"}
    return (*s.train, "--method", "ntp", "--steps", str(1000 * s.steps), flag, spent[flag])


def tokens_of(rmt: Path) -> str:
    """Return the number of tokens that a run sampled and trained on."""
    rows = _metrics(rmt)
    return f"{sum(row['tokens/step'] + row['tokens/dropped'] for row in rows):.0f}"


def _last_budget(rmt: Path) -> int:
    return _metrics(rmt)[-1]["budget"]


def _metrics(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")
