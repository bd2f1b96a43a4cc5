"""Settings of an evaluation: those typed, else those of the run that made the model.

So `train.py` and then `eval.py --model RUN` is the paper's protocol: documents that training left
out, cut and asked about as the run did. For a model that no run made, the defaults hold.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmt.budget import budget_at
from rmt.config.config import Config, from_json, in_repository
from rmt.config.flags import flag
from rmt.data.hub import is_name
from rmt.engine.checkpoint import run_settings

TAKEN = (
    "weights", "text_fields", "document_tokens", "min_context", "entropy_top_k", "tiers",
    "tier_thresholds", "max_response", "temperature", "problem_request", "budget_entropy",
    "text_in",
)  # fmt: skip
MODES = {"problems": "problems", "nothing": "ntp"}  # by the task of the run; else rmt


@dataclass(frozen=True)
class Protocol:
    """How to evaluate a model, and what to say about it."""

    config: Config
    part: str  # of the data, and
    until: str | None  # its last hash: see rmt.engine.loading.read_corpus
    mode: str
    budget: int | None  # B_T; None: no number of tokens is asked for
    remarks: tuple[str, ...] = ()


def protocol(typed: dict[str, Any], mode: str) -> Protocol:
    """Take what typed flags leave open from the model's run.

    ValueError as of Config, and when the run held out no document.
    """
    model = typed.get("model", Config.model)
    settings = _settings(model)
    run, until = settings.get("config", {}), None
    taken = {name: run[name] for name in TAKEN if name in run and name not in typed}
    if "weights" in taken and not Path(taken["weights"]).is_dir():
        del taken["weights"]  # of another machine
    part = "held_out" if "holdout" in typed or "data" not in typed else "all"
    if run and "data" not in typed and run.get("eval_data"):
        if "holdout" in typed:
            raise ValueError(
                f"--holdout {typed['holdout']} means nothing: the run of {model} has --eval-data; "
                "leave it out"
            )
        taken["data"], part = run["eval_data"], "all"
    elif run and part == "held_out" and _overlap(typed.get("data", run["data"]), run["data"]):
        taken |= _held_out_data(model, run, typed)
        until = settings.get("held_out")
    if run and "difficulty_model" not in typed:
        taken["difficulty_model"] = run.get("difficulty_model") or initial_model(run)
    mode = mode or MODES.get(run.get("task", ""), "rmt")
    if mode in ("problems", "ntp") or typed.get("text_in") == "thought":
        taken["budget_entropy"] = 0.0  # no budget is by a token's entropy there
    config = from_json(taken | typed | {"budget": False})  # B_0 is never asked for
    if mode == "problems":
        config = replace(config, task="problems", match="answer", ntp=False)
    if mode == "ntp":
        config = replace(config, task="nothing", ntp=True)
    taught = mode == "rmt" or run.get("task") == mode
    values = {name: getattr(config, name) for name in taken}
    words = [_words(n, value) for n, value in values.items() if value != getattr(Config, n)]
    remarks = (f"as the run of {model}: {' '.join(words)}",) if words else ()
    return Protocol(config, part, until, mode, final_budget(run) if taught else None, remarks)


def _held_out_data(model: str, run: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Return flags for what a run held out of its data."""
    kept = 0 if run.get("eval_data") else run.get("holdout", 0)
    if kept == 0 or typed.get("holdout", kept) > kept:
        raise ValueError(
            f"the run of {model} held out {kept} documents of {', '.join(run['data'])}: others it "
            "was trained on; give other text with --data"
        )
    taken = {"data": run["data"], "holdout": typed.get("holdout", kept)}
    return taken | {"max_records": run.get("max_records", 0)}


def initial_model(run: dict[str, Any]) -> str:
    """Return the model that a run began with; through earlier runs, if one of those made it."""
    seen, model = set(), run["model"]
    while model not in seen:
        seen.add(model)
        before = (run_settings(Path(model)) or {}).get("config", {})
        model = before.get("model", model)
    return model


def with_shape_of_run(config: Config) -> Config:
    """Return the config of a dry run, which reads no weights: a run has the shape it began with."""
    path = Path(config.model)
    if not path.is_dir() or (path / "config.json").exists():
        return config
    settings = _settings(config.model)
    return replace(config, model=initial_model(settings["config"])) if settings else config


def _settings(model: str) -> dict[str, Any]:
    """Return the settings of the run that made a model, {} if none did; ValueError if damaged."""
    settings = run_settings(Path(model)) or {}
    run = settings.get("config")
    if lacks := [name for name in ("model", "data") if run is not None and name not in run]:
        raise ValueError(
            f"the settings of the run that made {model} have no {' and no '.join(lacks)}: the file "
            "is damaged; restore the one that the run wrote"
        )
    return settings


def _overlap(some: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether a file, folder or data set is among both, or within one of the others."""
    base = lambda path: path.partition(":")[0] if is_name(path) else in_repository(path)
    one, two = ([Path(os.path.realpath(base(path))) for path in x] for x in (some, others))
    return any(a.is_relative_to(b) or b.is_relative_to(a) for a in one for b in two)


def final_budget(run: dict[str, Any]) -> int | None:
    """Return B_T of a run's schedule, or of the paper's; None if the run asked for no length."""
    names = ("budget", "budget_start", "budget_decay", "budget_min")
    asked, *schedule = (run.get(name, getattr(Config, name)) for name in names)
    return budget_at(1, 1, *schedule) if asked else None


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{flag(name)} {shown or repr('')}"
