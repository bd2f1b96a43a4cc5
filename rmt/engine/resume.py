"""Settings of a resumed run: what it keeps, and what the new command changes.

What is learnt, and from what, stays as it was. The new command may say how long the run is, where
it runs, and what is kept of it; every other flag in it that differs from the run's is named.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.fingerprint import fingerprint
from rmt.budget import budget_at
from rmt.config.config import Config, from_json
from rmt.config.flags import flag
from rmt.config.presets import PRESETS
from rmt.data.corpus import Document
from rmt.engine import checkpoint
from rmt.engine.export import changed_parts
from rmt.engine.tiers import difficulty_dir
from rmt.evaluation.positions import data_key
from rmt.memory.autofit import OPEN
from rmt.system.dist import World, from_rank_0, gather_objects
from rmt.system.env import device_name
from rmt.system.lock import held
from rmt.system.torchrun import restarts

LENGTH = ("steps", "epochs")  # T, and the schedules with it
APPLIED = (  # docs/running.md lists them too
    *LENGTH, "max_tokens", "max_minutes",
    "weights", "max_branches", "tokens_per_micro_batch", "recompute", "offload", "compile",
    "replicate", "timeout",
    "save_every", "keep", "keep_best", "export_every", "eval_every", "samples_per_step", "profile",
    "track",
)  # fmt: skip


def claimed(config: Config, world: World) -> AbstractContextManager:
    """Lock the directory of the run for this process group, before anything in it is touched.

    All ranks. CheckpointError when there is no run to resume, ValueError when it is in use.
    """
    if config.resume:
        from_rank_0(lambda: checkpoint.newest(Path(config.resume)), world)
        return held("--resume", Path(config.resume), world)
    return held("--out", Path(config.out), world)


def machine_of(world: World) -> str:
    """Describe what the memory plan of a run depends on."""
    return f"{world.size} ranks of {device_name(world.device)}, {world.replicate} copies"


def resolve(
    config: Config, world: World, typed: Mapping[str, Any] | None = None
) -> tuple[Config, Path | None, dict[str, Any]]:
    """Return the config of a new run, or that of the run to resume, its checkpoint and saved JSON.

    A run resumes with --resume, or when torchrun restarts: the same command then starts and
    resumes. typed: the flags of the command line, see `rmt.config.config.typed`. All ranks.
    """
    typed, out = typed or {}, config.resume or config.out
    if not config.resume:
        begun = bool(from_rank_0(lambda: checkpoint.steps(Path(out)), world))
        results = [Path(out) / name for name in ("model", "adapter")]
        made = from_rank_0(lambda: next((path for path in results if path.exists()), None), world)
        if begun and not restarts():
            raise ValueError(
                f"--out {out} holds a run already; continue it with --resume {out}, or choose "
                "another directory"
            )
        if made and not begun:  # the run would replace it at its end
            raise ValueError(
                f"--out {out} holds a model already, {made}; choose another directory, or move it "
                "away"
            )
        if not begun:
            return config, None, {}
    checkpoint_dir = from_rank_0(lambda: checkpoint.newest(Path(out)), world)
    saved = checkpoint.read(checkpoint_dir, world)
    kept = replace(from_json(saved["config"]), out=out, resume=out)
    rank = typed.get("lora_rank", kept.lora_rank)
    if rank != kept.lora_rank:
        raise ValueError(
            f"--lora-rank {rank}: the run of {checkpoint_dir} trains with --lora-rank "
            f"{kept.lora_rank}; leave the flag out, or start anew"
        )
    remark = f"torchrun restarts: continuing from {checkpoint_dir}"
    if config.resume:
        remark = _ignored(typed, kept)
    else:
        _refuse_other_settings(config, kept)
    machine = from_rank_0(lambda: machine_of(world), world)  # other nodes may have other devices
    if saved.get("machine", machine) != machine:
        kept = replace(kept, **OPEN)  # what fitted the other one
        remark += f"\nmemory is planned anew: the run was on {saved['machine']}"
    if world.rank == 0 and remark:
        print(remark.strip())
    if "epochs" in typed and "steps" not in typed:
        kept = replace(kept, steps=0)
    applied = {name: typed[name] for name in APPLIED if name in typed}
    return replace(kept, **applied), checkpoint_dir, saved


def _refuse_other_settings(given: Config, kept: Config) -> None:
    """ValueError when a command that starts or resumes a run meets another run."""
    free = {"resume", *APPLIED} - {*LENGTH}
    asked, own = vars(given), vars(kept)
    others = [name for name in own if name not in free and asked[name] != own[name]]
    if others:
        raise ValueError(
            f"--out {given.out} holds a run with other settings ({', '.join(map(flag, others))}); "
            f"continue that one with --resume {given.out}, or choose another directory"
        )


def _ignored(typed: Mapping[str, Any], kept: Config) -> str:
    """Name the flags of a command, as they were typed, that differ from the run's."""
    differ = lambda values: [
        n for n, value in values.items() if n not in APPLIED and value != getattr(kept, n)
    ]
    own = {name: value for name, value in typed.items() if name not in ("preset", "resume")}
    names = [flag(f"no_{name}" if own[name] is False else name) for name in differ(own)]
    if set(differ(PRESETS.get(typed.get("preset"), {}))) - own.keys():
        names.append("--preset")
    remark = "a resumed run keeps the settings it was started with; not applied: "
    return remark + ", ".join(names) if names else ""


def resolve_total_steps(
    config: Config, typed: Mapping[str, Any] | None, documents: int, saved: Mapping, world: World
) -> int:
    """Return T, of the command or of the run to resume, and say what a new T does to schedules.

    ValueError when the run has taken more steps, or does not reach the step of --profile.
    """
    epochs = max(1, int(min(config.epochs * documents / config.batch_size, 1e18)))
    before, given = saved.get("total_steps"), config.steps or epochs
    if before and not any(name in (typed or {}) for name in LENGTH):
        given = before
    step = saved.get("step", 0)
    if given < step:
        raise ValueError(
            f"--resume {config.resume}: {given} steps are asked for, and the run has taken {step}; "
            f"take --steps {step} or more"
        )
    gone = "profile" in (typed or {}) and 0 < config.profile < step
    if gone or config.profile >= given:
        raise ValueError(
            f"--profile {config.profile}: the steps of this run are {step} to {given - 1}"
        )
    if before and given != before and world.rank == 0:
        knobs = (config.budget_start, config.budget_decay, config.budget_min)
        old, new = (budget_at(step, total, *knobs) for total in (before, given))
        budget = f"; the budget at step {step} is {new} tokens, not {old}" if config.budget else ""
        print(
            f"the run has {given} steps now, not {before}: its schedules go by the share of the "
            f"steps that is over, {step / given:.0%} instead of {step / before:.0%}{budget}"
        )
    if config.resample_from >= given and world.rank == 0:
        print(
            f"--resample-from {config.resample_from}: no group is drawn again in the {given} steps "
            f"of this run; from its middle on, as in RPT: --resample-from {given // 2}"
        )
    return given


def origin_of(
    config: Config, model_dir: Path, documents: Sequence[Document], held_out: Sequence[Document],
    saved: Mapping[str, Any], checkpoint_dir: Path | None, world: World,
) -> dict[str, Any]:  # fmt: skip
    """Fingerprint the models and texts that a run is made from. All ranks.

    ValueError when one has changed since the run began, or is not the same on all ranks.
    """
    dirs = {"--model": model_dir}
    if config.difficulty_model:
        dirs["--difficulty-model"] = difficulty_dir(config, model_dir, world)
    models = {name: fingerprint(path) for name, path in dirs.items()}
    texts = {"data": documents, "eval_data": held_out}
    found = {name: data_key(text) for name, text in texts.items() if text} | {"models": models}
    every = gather_objects(found, world)
    if differ := [name for name in found if any(o.get(name) != found[name] for o in every)]:
        raise ValueError(
            f"ranks have read different files ({', '.join(differ)}); give all nodes the same "
            "--data or --traces, --eval-data, --model and --difficulty-model"
        )
    for name, now in models.items():
        if changed := changed_parts(saved, name, now):
            model = config.model if name == "--model" else config.difficulty_model
            raise ValueError(
                f"{name} {model}: its {' and '.join(changed)} have changed since {checkpoint_dir} "
                "was saved, and tiers, KL and the tokenizer come from there; put the old files "
                "back, or start anew"
            )
    for name in texts.keys() & found.keys():
        if saved.get(name, found[name]) != found[name]:
            raise ValueError(
                f"--resume {config.resume}: the text of {', '.join(getattr(config, name))} "
                f"({flag(name)}) has changed since {checkpoint_dir} was saved; put the old text "
                "back, or start anew"
            )
    return found
