"""Files of a run, with a line per step, and its progress line.

metrics.jsonl, samples.jsonl, eval.jsonl and probes.jsonl grow; run.json and documents.json are
written when it starts.
"""

import json
import platform
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rmt.config.config import Config
from rmt.curriculum import NO_TIER, TIERS
from rmt.engine.track import Tracker
from rmt.prompt import escape
from rmt.questions import RolloutBatch, TrainingSet
from rmt.system.dist import World
from rmt.system.env import commit, device_name
from rmt.system.records import append, as_json, blamed, set_aside, write_json, write_whole

WATCHED = 5  # bad steps in a row before the run says why it learns nothing
RARE = 0.2  # share of right responses below which length can outweigh the match
ADVICE = {  # metric -> when it is bad (its value, all metrics), and what to do
    "share/well_formed": (
        lambda share, _: share == 0, "no response had a readable answer, \\boxed{} after </think>: "
        "look at samples.jsonl; a model that closes no thought begins with --method cold-start",
    ),
    "share/cut_off": (
        lambda share, _: share > 0.5, "most responses were cut off at --max-response: raise it, "
        "lower the budget if there is one, or begin with --method cold-start",
    ),
    "share/zero_variance_groups": (
        lambda share, _: share == 1, "the responses of each group were all right or all wrong, so "
        "nothing was learnt about tokens: take easier or harder ones, by other data or "
        "--tier-thresholds, or begin with --method cold-start",
    ),
    "share/advantage_from_length": (
        lambda share, metrics: share > 0.5 and metrics["reward/match"] < RARE,
        f"fewer than {RARE:.0%} of the responses were right and more than half of the advantage "
        "came from their length, which teaches length instead of the token: set "
        "--length-reward-gate correct_only and --advantage-norm batch",
    ),
}  # fmt: skip
LINE = {  # metric -> how the progress line shows it
    "loss/rl": "rl {:+.3f}", "loss/ntp": "ntp {:.3f}", "reward/mean": "reward {:.2f}",
    "reward/match": "match {:.0%}", "length/thinking": "think {:.0f}", "budget": "of {:.0f}",
    "speed/tokens_per_second": "{:.0f} tok/s",
}  # fmt: skip


class RunLog(AbstractContextManager):
    """Append to the files of a run; only rank 0 writes. Use as a context manager."""

    def __init__(self, out: Path, config: Config, step: int, total: int, world: World):
        self.out, self.active = out, world.rank == 0
        if not self.active:
            return
        out.mkdir(parents=True, exist_ok=True)
        # A resumed run repeats the steps after its checkpoint: set their old records aside.
        for name in ("metrics.jsonl", "samples.jsonl"):
            set_aside(out / name, step)
        # Those of the checkpoint's own step are of its weights; measured again, they are replaced.
        # Without a checkpoint they are from a run that was killed before its first.
        for name in ("eval.jsonl", "probes.jsonl"):
            set_aside(out / name, step and step + 1)
        lengths = {"lengths": _lengths(out / "run.json", step, total)}
        write_json(out / "run.json", describe(config, total, world, step) | lengths)
        # The given responses of a cold start are right or wrong by chance.
        self.streaks = dict.fromkeys(() if config.traces else ADVICE, 0)  # bad steps in a row
        if config.match == "gain" or config.advantage_norm == "right":  # equal groups teach, too
            del self.streaks["share/zero_variance_groups"]
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)
        self.tracker = Tracker(config, step, self.message)

    def __exit__(self, *_) -> None:
        if self.active:
            self.tracker.close()
            self.bar.close()

    def step(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Write the metrics and samples of a step, and advance the progress line."""
        if not self.active:
            return
        append(self.out / "metrics.jsonl", [metrics])
        append(self.out / "samples.jsonl", samples)
        self.tracker.send(metrics["step"], metrics)
        self._explain(metrics)
        shown = [form.format(metrics[k]) for k, form in LINE.items() if metrics.get(k) is not None]
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()

    def _explain(self, metrics: dict[str, float]) -> None:
        """Print advice once, when a metric was bad for WATCHED steps in a row."""
        for name, streak in list(self.streaks.items()):
            value = metrics.get(name)
            bad, reason = ADVICE[name]
            bad = value is not None and bad(value, metrics)
            self.streaks[name] = streak + 1 if bad else 0
            if self.streaks[name] == WATCHED:
                self.message(f"for {WATCHED} steps {reason}")
                del self.streaks[name]

    def documents(self, records: list[dict[str, Any]]) -> None:
        """Write the texts that probes are about; a resumed run writes the same again."""
        if self.active and records:
            content = json.dumps(as_json(records), ensure_ascii=False)
            write_whole(self.out / "documents.json", content)

    def evaluation(self, step: int, found: dict[str, Any]) -> None:
        self._replace("eval.jsonl", [{"step": step} | found])
        if self.active:
            self.tracker.evaluation(step, found)

    def probes(self, records: list[dict[str, Any]]) -> None:
        self._replace("probes.jsonl", records)

    def _replace(self, name: str, records: list[dict[str, Any]]) -> None:
        """Write records of one step; set aside what the run wrote before it resumed."""
        if self.active and records:
            set_aside(self.out / name, records[0]["step"])
            append(self.out / name, records)

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.bar.write(text)


def _lengths(path: Path, step: int, total: int) -> list[list[int]]:
    """List (first step, T): a resumed run may be made longer."""
    with blamed(path):
        before = json.loads(path.read_text(encoding="utf-8")) if step and path.is_file() else {}
        known = before.get("lengths", [[0, before.get("total_steps", total)]])
        known = [[first, length] for first, length in known if first < step]
    return known if known and known[-1][1] == total else [*known, [step, total]]


def readable_samples(
    step: int, data: TrainingSet, batch: RolloutBatch, count: int
) -> list[dict[str, Any]]:
    """Return the first response to each of this rank's first `count` questions, with rewards."""
    samples, decode = [], data.tokenizer.decode
    for index, question in enumerate(batch.questions[:count]):
        answer, document = batch.answers[index][0], data.documents[question.document]
        samples.append(dict(
            step=step, document=document.source, index=question.document,
            position=question.position, budget=question.budget, truth=escape(question.truth),
            tier=TIERS[question.tier] if question.tier != NO_TIER else "problem",
            context=decode(document.tokens[: question.position].tolist())[-200:],
            response=decode(batch.responses[index][0].tokens), answer=answer.text,
            thinking_length=answer.thinking_length,
            reward={name: float(x[index, 0]) for name, x in batch.rewards.items()},
        ))  # fmt: skip
    return samples


def describe(config: Config, total: int, world: World, step: int) -> dict[str, Any]:
    """Return what a number of the run after `step` depends on: config, commit, versions, device."""
    return dict(
        config=asdict(config), total_steps=total, step=step, commit=commit(),
        python=platform.python_version(), torch=torch.__version__,
        device=device_name(world.device), ranks=world.size, threads=torch.get_num_threads(),
    )  # fmt: skip
