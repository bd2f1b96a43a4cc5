"""A run: the state that is saved and restored, and the setup around it that is not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmt.config.config import Config
from rmt.curriculum import NO_TIER, Curriculum, assign_tiers, document_order
from rmt.data.corpus import Document
from rmt.engine import checkpoint
from rmt.engine.export import find_model
from rmt.engine.resume import check_models, check_texts, length_of, models_of, resolve
from rmt.engine.saver import Saver
from rmt.engine.setup import (
    check_tiers,
    longest_prompt,
    measure_difficulty,
    name_overlap,
    read_documents,
    read_model_directory,
)
from rmt.evaluation.positions import Chosen, choose_positions, data_key
from rmt.memory.autofit import autofit
from rmt.questions import TrainingSet
from rmt.system.clock import Clock
from rmt.system.dist import World, compute_dtype, load_model
from rmt.update import Updated


@dataclass
class Run:
    """The training state after `step` steps: all that a checkpoint holds."""

    config: Config
    total_steps: int  # T of the schedules
    model: Any
    optimizer: torch.optim.Optimizer
    curriculum: Curriculum
    origin: dict[str, Any]  # what the run rests on: names of texts and models, thresholds, dtype
    step: int = 0
    refused_in_a_row: int = 0  # updates refused because something was not finite
    tokens: float = 0.0  # sampled and trained on so far, over all ranks
    seconds: float = 0.0  # of all steps so far

    @property
    def over(self) -> bool:
        """Whether the last step was taken, or the tokens or minutes that were given are used up."""
        c = self.config
        return (
            self.step >= self.total_steps
            or 0 < c.max_tokens <= self.tokens
            or 0 < 60 * c.max_minutes <= self.seconds
        )

    @property
    def out(self) -> Path:
        return Path(self.config.out)


@dataclass(frozen=True)
class Setup:
    """What a run works with: made anew when it starts or goes on."""

    data: TrainingSet
    world: World
    source: Path  # directory of the initial model
    compute: torch.dtype
    reference: Any  # frozen copy of the initial model, None when beta is 0
    # Held-out documents and the positions to be predicted; for problems no positions: their ends.
    held_out: tuple[list[Document], Chosen] | None
    clock: Clock
    saver: Saver


def prepare(
    config: Config, world: World, typed: Mapping[str, Any] | None = None
) -> tuple[Run, Setup]:
    """Load model and data, measure difficulty, restore a checkpoint. All ranks.

    typed: the flags of the command line, of which a run that goes on takes some.
    """
    config, place, saved = resolve(config, world, typed)
    source = find_model(config.model, config.weights, world)
    tokenizer, shape = read_model_directory(source)
    response = config.max_response
    documents = read_documents(config, config.data, tokenizer, shape, response, "train")
    epochs = max(1, int(min(config.epochs * len(documents) / config.batch_size, 1e18)))
    total = length_of(config, typed, epochs, saved, world)
    _check_length(config, total, world)
    order = document_order(len(documents), config.batch_size, total, config.seed)
    compute = compute_dtype(config.dtype, world)
    models = models_of(config, source, world)
    check_models(config, models, saved, place)
    model = load_model(source, world, compute, offload=config.offload)
    prompt = longest_prompt(config, tokenizer, config.budget_start if config.budget else None)
    # Kept with the run: a resumed one decodes as many at once, and so rounds as the first did.
    config = autofit(config, prompt, model, compute, world)
    compiled = {"auto": world.device.type == "cuda", "on": True, "off": False}[config.compile]
    model.configure_training(config.recompute, compiled)
    tiers = [np.full(len(document.tokens), NO_TIER) for document in documents]
    thresholds, measured = config.tier_thresholds, {}
    if config.task == "next-token" or config.ntp_scope == "low_entropy":
        drawn = np.unique(order)  # a short run need not measure the documents it will not meet
        entropies, thresholds = measure_difficulty(
            config, world, source, tokenizer, [documents[i] for i in drawn], model
        )
        measured = dict(zip(drawn.tolist(), entropies))
        thresholds = saved.get("thresholds") or thresholds  # more steps may meet more documents
        for index, entropy in measured.items():
            tiers[index] = assign_tiers(entropy, thresholds, config.min_context)
        check_tiers([tiers[index] for index in drawn], thresholds, world)
    reference = None
    if config.kl_beta:
        reference = load_model(source, world, compute, trainable=False)
    held_out = _held_out(config, world, source, tokenizer, shape, model, documents)
    texts = {"data": data_key(documents)}
    texts |= {"eval_data": data_key(held_out[0])} if held_out else {}
    run = Run(
        config=config, total_steps=total, model=model,
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.adam_betas,
            weight_decay=config.weight_decay, fused=True,
        ),
        curriculum=Curriculum(tiers, config.seed, config.noise_after),
        origin=texts | {
            "models": models, "thresholds": [float(x) for x in thresholds],
            "compute": str(compute).removeprefix("torch."),
        },
    )  # fmt: skip
    if place is not None:
        check_texts(config, texts, saved, place)
        _restore(run, place, saved)
    data = TrainingSet(tokenizer, documents, tiers, measured, order)
    saver = Saver(run.out, config.keep, world)
    return run, Setup(data, world, source, compute, reference, held_out, Clock(world.device), saver)


def _check_length(config: Config, total: int, world: World) -> None:
    if config.profile >= total:
        raise ValueError(f"--profile {config.profile}: the steps of this run are 0 to {total - 1}")
    if config.resample_from >= total and world.rank == 0:
        print(
            f"--resample-from {config.resample_from}: no group is drawn again in the {total} steps "
            f"of this run; from its middle on, as in RPT: --resample-from {total // 2}"
        )


def _held_out(config, world, source, tokenizer, shape, model, trained_on):
    """Documents and positions of the evaluations; `model` still is the initial one. All ranks."""
    if not config.eval_data:
        return None
    documents = read_documents(config, config.eval_data, tokenizer, shape, config.max_response)
    name_overlap(config, trained_on, documents, world)
    if config.task == "problems":
        return documents, Chosen([])
    entropies, thresholds = measure_difficulty(config, world, source, tokenizer, documents, model)
    return documents, choose_positions(
        documents, entropies, thresholds, config.min_context, config.eval_positions, config.seed
    )


def note_refusal(run: Run, setup: Setup, updated: Updated) -> None:
    """Count updates refused in a row, and name the documents of one that was."""
    run.refused_in_a_row = (0 if updated.count else run.refused_in_a_row) + updated.refused
    if updated.refused and setup.world.rank == 0:
        sources = [setup.data.documents[i].source for i in sorted(updated.documents)]
        print(
            f"step {run.step}: loss or gradient is not finite; no update. "
            f"Documents: {', '.join(sources) or 'unknown'}"
        )


def save(run: Run, setup: Setup, wait: bool = True) -> None:
    """Write a checkpoint of the state after `run.step` steps. All ranks.

    Without `wait` it returns when the state is copied, which may mean waiting for the save before.
    """
    extra = run.origin | {
        "config": asdict(run.config),
        "total_steps": run.total_steps,
        "refused_in_a_row": run.refused_in_a_row,
        "tokens": run.tokens,
        "seconds": run.seconds,
    }
    run.optimizer.zero_grad(set_to_none=True)  # on a CPU the copy takes the gradients' place
    with setup.clock("checkpoint"):
        setup.saver.save(run.step, run.model, run.optimizer, _tensors(run), extra)
        if wait:
            setup.saver.wait()


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in run.curriculum.arrays.items()}


def _restore(run: Run, place: Path, saved: dict[str, Any]) -> None:
    checkpoint.restore(place, run.model, run.optimizer, _tensors(run))  # in place, all of it
    run.step, run.refused_in_a_row = saved["step"], saved["refused_in_a_row"]
    run.tokens, run.seconds = saved["tokens"], saved["seconds"]
