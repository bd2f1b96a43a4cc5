"""What a run is made from: a model's directory, documents, and how hard their positions are."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from rmt.budget import budget_of_position
from rmt.config.config import Config, in_repository
from rmt.curriculum import NO_TIER, TIERS, quantile_thresholds
from rmt.data import corpus
from rmt.data.corpus import Corpus, Document
from rmt.difficulty import cached_entropies, document_entropies
from rmt.engine.export import find_model
from rmt.prompt import PromptIds, prompt_for
from rmt.system.dist import World, compute_dtype, current, load_model, rollout_mode


def read_model_directory(source: Path) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and shape of a model; ValueError when the embedding has too few rows."""
    shape, tokenizer = ModelConfig.from_directory(source), Tokenizer(source)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, config.json's vocab_size "
            f"is {shape.vocab_size}; they are not of the same model: fetch both again"
        )
    return tokenizer, shape


def longest_prompt(config: Config, tokenizer: Tokenizer, budget: int | None) -> PromptIds:
    """What is asked at a position that is given the most of that budget."""
    if budget is not None:
        budget = budget_of_position(budget, math.inf, config.budget_entropy)
    return prompt_for(config.task, tokenizer, budget, config.problem_request)


def read_documents(
    config: Config,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    shape: ModelConfig,
    response: int,
    part: str = "all",
) -> list[Document]:
    """The documents of `read_corpus`."""
    return read_corpus(config, paths, tokenizer, shape, response, part).documents


def read_corpus(
    config: Config,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    shape: ModelConfig,
    response: int,
    part: str = "all",
) -> Corpus:
    """All documents of the paths, or those to "train" on, or those "held_out" (--holdout).

    With --eval-data nothing is held out. Says what was left out. ValueError when document, prompt
    and `response` tokens exceed the context.
    """
    prompt = longest_prompt(config, tokenizer, config.budget_start if config.budget else None)
    needed = config.document_tokens + len(prompt) + response
    if needed > shape.max_position_embeddings:
        raise ValueError(
            f"--document-tokens {config.document_tokens} + {len(prompt)} tokens of prompt + "
            f"--max-response {response} = {needed} tokens exceed the model's context "
            f"of {shape.max_position_embeddings}; lower one of the two"
        )
    resolved = [str(in_repository(path)) for path in paths]
    found = corpus.read(
        resolved, tokenizer, config.text_fields, config.document_tokens,
        None if config.task == "problems" else config.min_context + 1,
        part, 0 if config.eval_data else config.holdout,
    )  # fmt: skip
    for remark in found.remarks if current().rank == 0 else ():
        print(remark, file=sys.stderr)
    return found


def name_overlap(
    config: Config, trained_on: Sequence[Document], held_out: Sequence[Document], world: World
) -> None:
    """Say how many documents of --eval-data are trained on as well."""
    known = {document.tokens.tobytes() for document in trained_on}
    both = sum(document.tokens.tobytes() in known for document in held_out)
    if both and world.rank == 0:
        print(
            f"{both:,} of the {len(held_out):,} documents of --eval-data "
            f"{', '.join(config.eval_data)} are in --data as well: accuracy there is of text that "
            "was trained on; take other text, or let --holdout set some aside",
            file=sys.stderr,
        )


def measure_difficulty(config, world, source, tokenizer, documents, model):
    """Entropies of documents under the initial model (or a proxy), and the tier thresholds."""
    judge = source
    if config.difficulty_model:
        judge = find_model(config.difficulty_model, config.weights, world)
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

    method = f"top-{config.entropy_top_k} {compute_dtype(config.dtype, world)}"
    method += f" of {tokenizer.vocab_size} after {tokenizer.begin_ids}"
    entropies = cached_entropies(measure, judge, documents, method, world)
    thresholds = config.tier_thresholds
    if config.tiers == "quantile":
        thresholds = quantile_thresholds(entropies, thresholds, config.min_context)
    return entropies, thresholds


def check_tiers(tiers: list[np.ndarray], thresholds: Sequence[float], world: World) -> None:
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
