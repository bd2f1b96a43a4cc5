"""Everything a run holds: prepared once from its config, saved and restored as a whole."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.config import ModelConfig
from models.weights import find
from rmt import checkpoint, corpus
from rmt.clock import Clock
from rmt.config import Config, from_json, in_repository
from rmt.curriculum import (
    NO_TIER,
    TIERS,
    Curriculum,
    assign_tiers,
    document_order,
    quantile_thresholds,
)
from rmt.difficulty import cached_entropies, document_entropies
from rmt.dist import World, compute_dtype, load_model, rollout_mode
from rmt.flags import flag
from rmt.memory import plan_branches
from rmt.positions import Position, choose_positions, data_key
from rmt.prompt import next_token_prompt
from rmt.tokenizer import Tokenizer


@dataclass
class Run:
    config: Config
    world: World
    source: Path  # directory of the initial model
    tokenizer: Tokenizer
    documents: list[corpus.Document]
    tiers: list[np.ndarray]  # of each position of each document
    curriculum: Curriculum
    order: np.ndarray  # (steps, batch) documents of each step
    model: Any
    reference: Any  # frozen copy of the initial model, None when beta is 0
    optimizer: torch.optim.Optimizer
    compute: torch.dtype
    clock: Clock
    held_out: tuple[list[corpus.Document], list[Position]] | None
    step: int = 0
    refused_in_a_row: int = 0  # updates refused because something was not finite

    @property
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def resolve(config: Config, world: World) -> tuple[Config, Path | None, dict[str, Any]]:
    """The config to run: the given one, or that of the run to resume with where to read it."""
    if not config.resume:
        if checkpoint.steps(Path(config.out)):
            raise ValueError(
                f"--out {config.out} holds a run already; continue it with --resume {config.out}, "
                "or choose another directory"
            )
        return config, None, {}
    place, saved = checkpoint.read_run(Path(config.resume), world)
    kept = replace(from_json(saved["config"]), out=config.resume, resume=config.resume)
    if world.rank == 0:
        _name_ignored(config, kept)
    return kept, place, saved


def _name_ignored(given: Config, kept: Config) -> None:
    values = [(f.name, getattr(given, f.name), f.default) for f in fields(Config)]
    asked = [name for name, value, default in values if value not in (default, getattr(kept, name))]
    if names := ", ".join(flag(name) for name in asked if name != "out"):
        print(f"a resumed run keeps the settings it was started with; not applied: {names}")


def read_model_directory(source: Path) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and shape of a model; ValueError when the embedding has too few rows."""
    shape, tokenizer = ModelConfig.from_directory(source), Tokenizer(source)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, config.json's vocab_size "
            f"is {shape.vocab_size}; they are not of the same model: fetch both again"
        )
    return tokenizer, shape


def prepare(config: Config, world: World) -> Run:
    """Load model and data, measure difficulty, restore a checkpoint. All ranks."""
    config, place, saved = resolve(config, world)
    source = find(config.model, Path(config.weights) if config.weights else None)
    tokenizer, shape = read_model_directory(source)
    documents = read_documents(config, config.data, tokenizer, shape, config.max_response)
    epochs = max(1, int(config.epochs * len(documents) / config.batch_size))
    total = saved.get("total_steps") or config.steps or epochs
    if config.profile >= total:
        raise ValueError(f"--profile {config.profile}: the steps of this run are 0 to {total - 1}")
    order = document_order(len(documents), config.batch_size, total, config.seed)
    compute = compute_dtype(config.dtype, world)
    model = load_model(source, world, compute)
    compiled = {"auto": world.device.type == "cuda", "on": True, "off": False}[config.compile]
    model.how_to_train(config.recompute, compiled)
    drawn = np.unique(order)  # a short run need not measure the documents it will not meet
    entropies, thresholds = measure_difficulty(
        config, config.data, world, source, tokenizer, [documents[i] for i in drawn], model
    )
    tiers = [np.full(len(document.tokens), NO_TIER) for document in documents]
    for index, entropy in zip(drawn, entropies):
        tiers[index] = assign_tiers(entropy, thresholds, config.min_context)
    _check_tiers([tiers[index] for index in drawn], thresholds, world)
    run = Run(
        config=config, world=world, source=source, tokenizer=tokenizer, documents=documents,
        tiers=tiers, curriculum=Curriculum(tiers, config.seed), order=order, model=model,
        reference=load_model(source, world, compute, trainable=False) if config.kl_beta else None,
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.adam_betas,
            weight_decay=config.weight_decay, fused=True,
        ),
        compute=compute, clock=Clock(world.device),
        held_out=_held_out(config, world, source, tokenizer, shape, model, thresholds),
    )  # fmt: skip
    if place is not None:
        if saved["data"] != data_key(documents):
            raise ValueError(
                f"--resume {config.resume}: the text of {', '.join(config.data)} has changed since "
                f"{place} was saved; put the old text back, or start anew"
            )
        _restore(run, place, saved)
    prompt = next_token_prompt(tokenizer, config.budget_start if config.budget else None)
    # Kept with the run: a resumed one decodes as many at once, and so rounds as the first did.
    branches = plan_branches(config, prompt, model, compute, world)
    run.config = replace(config, max_branches=branches)
    return run


def read_documents(
    config: Config, paths: Sequence[str], tokenizer: Tokenizer, shape: ModelConfig, response: int
) -> list[corpus.Document]:
    """The corpus; ValueError when document, prompt and `response` tokens exceed the context."""
    prompt = next_token_prompt(tokenizer, config.budget_start if config.budget else None)
    needed = config.document_tokens + len(prompt) + response
    if needed > shape.max_position_embeddings:
        raise ValueError(
            f"--document-tokens {config.document_tokens} + {len(prompt)} tokens of prompt + "
            f"--max-response {response} = {needed} tokens exceed the model's context "
            f"of {shape.max_position_embeddings}; lower one of the two"
        )
    resolved = [str(in_repository(path)) for path in paths]
    return corpus.load(
        resolved, tokenizer, config.text_fields, config.document_tokens, config.min_context + 1
    )


def measure_difficulty(config, data, world, source, tokenizer, documents, model):
    """Entropies of documents under the initial model (or a proxy), and the tier thresholds."""
    weights = Path(config.weights) if config.weights else None
    judge = find(config.difficulty_model, weights) if config.difficulty_model else source
    if (
        judge != source
        and (judge / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes()
    ):
        raise ValueError(
            f"--difficulty-model {config.difficulty_model} has another tokenizer than "
            f"{config.model}; positions would not correspond: take a model of the same family"
        )

    def measure():
        frozen = model
        if judge != source:
            frozen = load_model(judge, world, compute_dtype(config.dtype, world), trainable=False)
        with rollout_mode(frozen) as gathered:
            entropies = document_entropies(
                gathered, documents, tokenizer.begin_ids, config.entropy_top_k,
                tokenizer.vocab_size, config.tokens_per_micro_batch, world,
            )  # fmt: skip
        broken = [d.source for d, entropy in zip(documents, entropies) if np.isnan(entropy).any()]
        if broken:
            raise ValueError(
                f"{judge} predicts nan for {len(broken)} of {len(documents)} documents, the first "
                f"{broken[0]}; its weights are damaged, or --dtype {config.dtype} overflows"
            )
        return entropies

    place = in_repository(data[0])
    method = f"top-{config.entropy_top_k} {compute_dtype(config.dtype, world)}"
    entropies = cached_entropies(measure, judge, documents, method, place, world)
    thresholds = config.tier_thresholds
    if config.tiers == "quantile":
        thresholds = quantile_thresholds(entropies, thresholds, config.min_context)
    return entropies, thresholds


def _check_tiers(tiers: list[np.ndarray], thresholds: Sequence[float], world: World) -> None:
    """ValueError when there is nothing to reason about, a remark when a whole tier is empty."""
    sizes = {name: sum(int((t == k).sum()) for t in tiers) for k, name in enumerate(TIERS)}
    lowest = ", ".join(f"{x:.2f}" for x in thresholds)
    if not any(sizes.values()):
        raise ValueError(
            f"all tiers are empty: no token's entropy reaches the thresholds {lowest} nats; "
            "lower --tier-thresholds, or use --tiers quantile --tier-thresholds 0.5 0.7 0.85"
        )
    if world.rank == 0:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        easy = sum(int((t == NO_TIER).sum()) for t in tiers)
        print(f"positions by tier (from {lowest} nats): {shown}; {easy} below")
        for name in (name for name, size in sizes.items() if not size):
            print(f"tier {name} is empty: its probability goes to the others")


def _held_out(config, world, source, tokenizer, shape, model, thresholds):
    if not config.eval_data:
        return None
    documents = read_documents(config, config.eval_data, tokenizer, shape, config.max_response)
    entropies, _ = measure_difficulty(
        config, config.eval_data, world, source, tokenizer, documents, model
    )
    return documents, choose_positions(
        documents, entropies, thresholds, config.min_context, config.eval_positions, config.seed
    )


def save(run: Run) -> Path:
    """Checkpoint of the state after `run.step` steps. All ranks."""
    extra = {
        "config": asdict(run.config),
        "total_steps": run.total_steps,
        "data": data_key(run.documents),
        "refused_in_a_row": run.refused_in_a_row,
    }
    return checkpoint.save(
        run.out, run.step, run.model, run.optimizer, _tensors(run), extra, run.config.keep,
        run.world,
    )  # fmt: skip


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    return {"drawn": torch.from_numpy(run.curriculum.drawn)}


def _restore(run: Run, place: Path, saved: dict[str, Any]) -> None:
    checkpoint.restore(place, run.model, run.optimizer, _tensors(run))  # in place: `drawn` too
    run.step, run.refused_in_a_row = saved["step"], saved["refused_in_a_row"]
