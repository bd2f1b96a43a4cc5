"""Everything a run holds: prepared once from its config, saved and restored as a whole."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.tokenizer import Tokenizer
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
from rmt.memory.autofit import fitted
from rmt.system.clock import Clock
from rmt.system.dist import World, compute_dtype, load_model


@dataclass
class Run:
    config: Config
    world: World
    source: Path  # directory of the initial model
    tokenizer: Tokenizer
    documents: list[Document]
    tiers: list[np.ndarray]  # of each position of each document
    curriculum: Curriculum
    order: np.ndarray  # (steps, batch) documents of each step
    model: Any
    reference: Any  # frozen copy of the initial model, None when beta is 0
    optimizer: torch.optim.Optimizer
    compute: torch.dtype
    clock: Clock
    saver: Saver
    # Documents with the positions that are asked about; of problems, none: all are asked
    held_out: tuple[list[Document], Chosen] | None
    entropies: dict[int, np.ndarray] = field(default_factory=dict)  # nats, of documents it meets
    models: dict[str, dict[str, str]] = field(default_factory=dict)  # fingerprints, by flag
    thresholds: list[float] = field(default_factory=list)  # of the tiers, in nats
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
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def prepare(config: Config, world: World, typed: Mapping[str, Any] | None = None) -> Run:
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
    if config.profile >= total:
        raise ValueError(f"--profile {config.profile}: the steps of this run are 0 to {total - 1}")
    if config.resample_from >= total and world.rank == 0:
        print(
            f"--resample-from {config.resample_from}: no group is drawn again in the {total} steps "
            f"of this run; from its middle on, as in RPT: --resample-from {total // 2}"
        )
    order = document_order(len(documents), config.batch_size, total, config.seed)
    compute = compute_dtype(config.dtype, world)
    models = models_of(config, source, world)
    check_models(config, models, saved, place)
    model = load_model(source, world, compute, offload=config.offload)
    prompt = longest_prompt(config, tokenizer, config.budget_start if config.budget else None)
    # Kept with the run: a resumed one decodes as many at once, and so rounds as the first did.
    config = fitted(config, prompt, model, compute, world)
    compiled = {"auto": world.device.type == "cuda", "on": True, "off": False}[config.compile]
    model.how_to_train(config.recompute, compiled)
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
    curriculum, reference = Curriculum(tiers, config.seed, config.noise_tries), None
    if config.kl_beta:
        reference = load_model(source, world, compute, trainable=False)
    run = Run(
        config=config, world=world, source=source, tokenizer=tokenizer, documents=documents,
        tiers=tiers, curriculum=curriculum, order=order, model=model, reference=reference,
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.adam_betas,
            weight_decay=config.weight_decay, fused=True,
        ),
        compute=compute, clock=Clock(world.device),
        saver=Saver(Path(config.out), config.keep, world),
        held_out=_held_out(config, world, source, tokenizer, shape, model, documents),
        entropies=measured, models=models, thresholds=[float(x) for x in thresholds],
    )  # fmt: skip
    if place is not None:
        check_texts(config, _data_keys(run), saved, place)
        _restore(run, place, saved)
    return run


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


def save(run: Run, wait: bool = True) -> None:
    """Checkpoint of the state after `run.step` steps. All ranks.

    Without `wait` it returns when the state is copied, which may mean waiting for the save before.
    """
    extra = {
        "config": asdict(run.config),
        "total_steps": run.total_steps,
        **_data_keys(run),
        "models": run.models,
        "thresholds": run.thresholds,
        "compute": str(run.compute).removeprefix("torch."),
        "refused_in_a_row": run.refused_in_a_row,
        "tokens": run.tokens,
        "seconds": run.seconds,
    }
    run.optimizer.zero_grad(set_to_none=True)  # on a CPU the copy takes the gradients' place
    with run.clock("checkpoint"):
        run.saver.save(run.step, run.model, run.optimizer, _tensors(run), extra)
        if wait:
            run.saver.wait()


def _data_keys(run: Run) -> dict[str, str]:
    """The flags that name texts, with what names their tokens."""
    held_out = {"eval_data": data_key(run.held_out[0])} if run.held_out else {}
    return {"data": data_key(run.documents)} | held_out


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in run.curriculum.arrays.items()}


def _restore(run: Run, place: Path, saved: dict[str, Any]) -> None:
    checkpoint.restore(place, run.model, run.optimizer, _tensors(run))  # in place, all of it
    run.step, run.refused_in_a_row = saved["step"], saved["refused_in_a_row"]
    run.tokens, run.seconds = saved["tokens"], saved["seconds"]
