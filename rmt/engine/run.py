"""A training run: the state that checkpoints hold, and the setup around it that they do not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.lora import without_adapters
from rmt.config.config import Config
from rmt.curriculum import Curriculum
from rmt.data.corpus import Document
from rmt.data.order import document_order
from rmt.engine import checkpoint, loading, tiers
from rmt.engine.export import find_model
from rmt.engine.log import describe
from rmt.engine.resume import machine_of, origin_of, resolve, resolve_total_steps
from rmt.engine.saver import Saver
from rmt.engine.track import check_installed
from rmt.evaluation.positions import Chosen
from rmt.questions import TrainingSet
from rmt.system.dist import World, compute_dtype, load_model
from rmt.system.metrics import Clock
from rmt.update import Updated, adamw


@dataclass
class Run:
    """The training state after `step` steps: all that a checkpoint holds."""

    config: Config
    total_steps: int  # T of the schedules
    model: Any
    optimizer: torch.optim.Optimizer
    curriculum: Curriculum
    origin: dict[str, Any]  # fingerprints of models and texts, tier thresholds, compute dtype
    step: int = 0
    refused_in_a_row: int = 0  # updates refused because something was not finite
    tokens: float = 0.0  # sampled and trained on so far, over all ranks
    seconds: float = 0.0  # of all steps so far

    @property
    def over(self) -> bool:
        """True after the last step, or when --max-tokens or --max-minutes are used up."""
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
    """Objects that a run works with; made anew when it starts or resumes."""

    data: TrainingSet
    world: World
    model_dir: Path  # of the initial model
    compute: torch.dtype
    reference: Any  # the frozen initial model, None when beta is 0
    # --eval-data and the positions to predict there; for problems no positions: their ends.
    held_out: tuple[list[Document], Chosen] | None
    clock: Clock
    saver: Saver


def prepare(
    config: Config, world: World, typed: Mapping[str, Any] | None = None
) -> tuple[Run, Setup]:
    """Load model and data, measure difficulty, restore a checkpoint. All ranks.

    typed: the flags of the command line; a resumed run applies those in resume.APPLIED.
    """
    config, checkpoint_dir, saved = resolve(config, world, typed)
    check_installed(config.track)
    model_dir = find_model(config.model, config.weights, world)
    tokenizer, shape = loading.read_model_directory(model_dir)
    documents, held_out, last_held_out = loading.read_texts(config, tokenizer, shape, world)
    total = resolve_total_steps(config, typed, len(documents), saved, world)
    parts, sizes = [d.part for d in documents], (config.batch_size, total, config.seed)
    order = document_order(parts, config.data_weights, *sizes)
    origin = origin_of(config, model_dir, documents, held_out, saved, checkpoint_dir, world)
    compute = compute_dtype(config.dtype, world)
    config, model = loading.load_trainable(config, world, model_dir, tokenizer, compute)
    # Not trained yet, so it measures.
    initial = (config, world, model_dir, tokenizer, model)
    data, thresholds = tiers.make_training_set(*initial, documents, order, saved.get("thresholds"))
    chosen = tiers.choose_held_out(*initial, held_out) if held_out else None
    reference = None
    if config.kl_beta and config.lora_rank:
        reference = without_adapters(model)
    elif config.kl_beta:
        reference = load_model(model_dir, world, compute, trainable=False)
    optimizer = adamw(model, config.learning_rate, config.adam_betas, config.weight_decay)
    curriculum = Curriculum(data.tiers, config.seed)
    origin |= {"thresholds": thresholds, "held_out": last_held_out}
    origin["compute"] = str(compute).removeprefix("torch.")
    run = Run(config, total, model, optimizer, curriculum, origin)
    if checkpoint_dir is not None:
        checkpoint.restore(checkpoint_dir, model, optimizer, _tensors(run))  # in place
        run.step, run.refused_in_a_row = saved["step"], saved["refused_in_a_row"]
        run.tokens, run.seconds = saved["tokens"], saved["seconds"]
    clock, saver = Clock(world.device), Saver(run.out, config.keep, world, config.keep_best)
    return run, Setup(data, world, model_dir, compute, reference, chosen, clock, saver)


def note_refusal(run: Run, setup: Setup, updated: Updated) -> None:
    """Count updates refused in a row, and name the documents of a refused one."""
    run.refused_in_a_row = (0 if updated.count else run.refused_in_a_row) + updated.refused
    if updated.refused and setup.world.rank == 0:
        sources = [setup.data.documents[i].source for i in sorted(updated.documents)]
        print(
            f"step {run.step}: loss or gradient is not finite; no update. "
            f"Documents: {', '.join(sources) or 'unknown'}"
        )


def save(run: Run, setup: Setup, wait: bool = True) -> None:
    """Write a checkpoint of the state after `run.step` steps. All ranks.

    Without `wait`, return when the state is copied; an earlier save is waited for first.
    """
    names = ("total_steps", "refused_in_a_row", "tokens", "seconds")
    settings = run.origin | {"config": asdict(run.config), "machine": machine_of(setup.world)}
    settings |= {name: getattr(run, name) for name in names}
    run.optimizer.zero_grad(set_to_none=True)  # on a CPU the copy takes the gradients' place
    with setup.clock("checkpoint"):
        setup.saver.save(run.step, run.model, run.optimizer, _tensors(run), settings)
        if wait:
            setup.saver.wait()


def export(run: Run, setup: Setup, name: str = "model") -> Path:
    """Write the model as the Hugging Face directory OUT/name. All ranks."""
    made_by = describe(run.config, run.total_steps, setup.world, run.step)
    made_by["held_out"] = run.origin["held_out"]
    known = (setup.model_dir, run.out, setup.compute, setup.world)
    return checkpoint.export_model(run.model, *known, run=made_by, name=name)


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    return {"drawn": torch.from_numpy(run.curriculum.drawn)}
