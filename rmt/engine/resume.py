"""What a run that goes on keeps of its settings, and what the new command changes.

What is learnt, and from what, stays as it was. The new command may say how long the run is, where
it runs, and what is kept of it; every other flag in it that differs from the run's is named.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from models.fingerprint import fingerprint
from rmt.budget import budget_at
from rmt.config.config import Config, from_json
from rmt.config.flags import flag
from rmt.config.presets import PRESETS
from rmt.engine import checkpoint
from rmt.engine.export import find_model
from rmt.system.dist import World, gather_objects
from rmt.system.lock import held
from rmt.system.torchrun import restarts

LENGTH = ("steps", "epochs")  # T, and the schedules with it
APPLIED = (  # docs/running.md lists them too
    *LENGTH, "max_tokens", "max_minutes",
    "weights", "max_branches", "tokens_per_micro_batch", "recompute", "offload", "compile",
    "replicate", "timeout",
    "save_every", "keep", "eval_every", "samples_per_step", "profile",
)  # fmt: skip


def claimed(config: Config, world: World) -> AbstractContextManager:
    """The directory of the run, for this process group alone. Before anything in it is touched.

    All ranks. CheckpointError when there is no run to continue, ValueError when it is in use.
    """
    if config.resume:
        checkpoint.newest(Path(config.resume))
        return held("--resume", Path(config.resume), world)
    return held("--out", Path(config.out), world)


def resolve(
    config: Config, world: World, typed: Mapping[str, Any] | None = None
) -> tuple[Config, Path | None, dict[str, Any]]:
    """The config to run: the given one, or that of the run to continue with where to read it.

    typed: the flags of the command line, see `rmt.config.config.typed`. All ranks.

    A run is continued when --resume says so, or when torchrun restarts: then the same command
    begins a run and goes on with it.
    """
    typed = typed or {}
    begun = bool(checkpoint.steps(Path(config.out)))
    if not config.resume and begun and not restarts():
        raise ValueError(
            f"--out {config.out} holds a run already; continue it with --resume {config.out}, "
            "or choose another directory"
        )
    if not config.resume and not begun:
        if (Path(config.out) / "model").exists():  # which the end of this run would replace
            raise ValueError(
                f"--out {config.out} holds a model already, {Path(config.out) / 'model'}; choose "
                "another directory, or move it away"
            )
        return config, None, {}
    directory = config.resume or config.out
    place = checkpoint.newest(Path(directory))
    saved = checkpoint.read(place, world)
    settings = {"holdout": 0} | saved["config"]  # a run may be older than the hold-out
    kept = replace(from_json(settings), out=directory, resume=directory)
    if not config.resume:
        _refuse_other_settings(config, kept)
    elif world.rank == 0 and (ignored := _ignored(typed, kept)):
        print(
            "a resumed run keeps the settings it was started with; not applied: "
            + ", ".join(ignored)
        )
    if world.rank == 0 and not config.resume:
        print(f"torchrun restarts: continuing from {place}")
    if "epochs" in typed and "steps" not in typed:
        kept = replace(kept, steps=0)
    return replace(kept, **{n: typed[n] for n in APPLIED if n in typed}), place, saved


def _refuse_other_settings(given: Config, kept: Config) -> None:
    """ValueError when a command that begins a run, or goes on with it, meets another run."""
    free = {"resume", *APPLIED} - {*LENGTH}
    names = [
        f.name
        for f in fields(Config)
        if f.name not in free and getattr(given, f.name) != getattr(kept, f.name)
    ]
    if names:
        raise ValueError(
            f"--out {given.out} holds a run with other settings ({', '.join(map(flag, names))}); "
            f"continue that one with --resume {given.out}, or choose another directory"
        )


def _ignored(typed: Mapping[str, Any], kept: Config) -> list[str]:
    """The flags of a command that differ from what the run has, as they were typed."""
    differs = lambda name, value: name not in APPLIED and value != getattr(kept, name)
    own = {name: value for name, value in typed.items() if name not in ("preset", "resume")}
    names = [
        flag(f"no_{name}" if value is False else name)
        for name, value in own.items()
        if differs(name, value)
    ]
    preset = PRESETS.get(typed.get("preset"), {})
    if any(differs(name, value) for name, value in preset.items() if name not in own):
        names.append("--preset")
    return names


def length_of(
    config: Config, typed: Mapping[str, Any] | None, epochs: int, saved: Mapping, world: World
) -> int:
    """T: of the command, or the one that a run to continue has. ValueError if it is over by then.

    epochs: steps of --epochs. Says what a new T does to the schedules.
    """
    before, given = saved.get("total_steps"), config.steps or epochs
    if before is None or not (typed and any(name in typed for name in LENGTH)):
        return before or given
    step = saved["step"]
    if given < step:
        raise ValueError(
            f"--resume {config.resume}: {given} steps are asked for, and the run has taken {step}; "
            f"take --steps {step} or more"
        )
    if given != before and world.rank == 0:
        knobs = (config.budget_start, config.budget_decay, config.budget_min)
        old, new = (budget_at(step, total, *knobs) for total in (before, given))
        budget = f"; the budget at step {step} is {new} tokens, not {old}" if config.budget else ""
        print(
            f"the run has {given} steps now, not {before}: its schedules go by the share of the "
            f"steps that is over, {step / given:.0%} instead of {step / before:.0%}{budget}"
        )
    return given


def models_of(config: Config, source: Path, world: World) -> dict[str, dict[str, str]]:
    """Fingerprints of the models that a run rests on, by flag. All ranks; rank 0 reads."""
    models = {"--model": source}
    if config.difficulty_model:
        models["--difficulty-model"] = find_model(config.difficulty_model, config.weights, world)
    found = world.rank == 0 and {name: fingerprint(path) for name, path in models.items()}
    return gather_objects(found, world)[0]


def check_models(config: Config, now: dict, saved: Mapping[str, Any], place: Path) -> None:
    """ValueError when a model is another than when the run began: tiers and KL rest on it."""
    saved = saved.get("models", {})  # none in older checkpoints
    for name, parts in now.items():
        then = saved.get(name, parts)
        known = then.items() if isinstance(then, dict) else ()
        changed = [part for part, value in parts.items() if (part, value) not in known]
        if changed:
            model = config.model if name == "--model" else config.difficulty_model
            raise ValueError(
                f"{name} {model}: its {' and '.join(changed)} have changed since {place} was "
                "saved, and tiers, KL and the tokenizer come from there; put the old files back, "
                "or start anew"
            )


def check_texts(
    config: Config, now: Mapping[str, str], saved: Mapping[str, Any], place: Path
) -> None:
    """ValueError when a text is another than when the run began.

    now: what names the tokens, by flag; a checkpoint may be older than the one of --eval-data.
    """
    for name, key in now.items():
        if saved.get(name, key) != key:
            raise ValueError(
                f"--resume {config.resume}: the text of {', '.join(getattr(config, name))} "
                f"({flag(name)}) has changed since {place} was saved; put the old text back, or "
                "start anew"
            )
