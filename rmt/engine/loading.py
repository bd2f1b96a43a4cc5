"""Parts of a run's setup: the model, and the documents."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from rmt.budget import budget_of_position
from rmt.config.config import Config, in_repository
from rmt.config.flags import as_flag
from rmt.data import corpus
from rmt.data.corpus import Corpus, Document
from rmt.memory.autofit import autofit
from rmt.methods.cold_start import answer_ids, trace_ids
from rmt.prompt import PromptIds, prompt_for, think_ids
from rmt.questions import asks_at_end
from rmt.system.dist import World, current, load_model

# ---- the model


def read_model_directory(model_dir: Path) -> tuple[Tokenizer, ModelConfig]:
    """Read tokenizer and shape of a model; ValueError when the embedding has too few rows."""
    shape, tokenizer = ModelConfig.from_directory(model_dir), Tokenizer(model_dir)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{model_dir}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json's "
            f"vocab_size is {shape.vocab_size}: they are of different models; fetch both again"
        )
    return tokenizer, shape


def load_trainable(
    config: Config, world: World, model_dir: Path, tokenizer: Tokenizer, compute: torch.dtype
) -> tuple[Config, Transformer]:
    """Load the model to train, and the config with the batch sizes that fit. All ranks."""
    model = load_model(
        model_dir, world, compute, offload=config.offload, lora_rank=config.lora_rank,
        seed=config.seed,
    )  # fmt: skip
    # Saved with the run: resumed on the same machine it decodes as many at once, and rounds alike.
    config = autofit(config, longest_prompt(config, tokenizer), model, compute, world)
    compiled = {"auto": world.device.type == "cuda", "on": True, "off": False}[config.compile]
    model.configure_training(config.recompute, compiled)
    return config, model


def longest_prompt(config: Config, tokenizer: Tokenizer, budget: int | None = None) -> PromptIds:
    """Return the longest prompt of a run, or of an evaluation that asks for `budget` tokens."""
    if config.budget:
        budget = config.budget_start
    if budget is not None:
        budget = budget_of_position(budget, math.inf, config.budget_entropy)
    known = (config.problem_request, config.text_in)
    return prompt_for(config.task, tokenizer, budget, *known)


# ---- the documents


def read_texts(
    config: Config, tokenizer: Tokenizer, shape: ModelConfig, world: World
) -> tuple[list[Document], list[Document], str | None]:
    """Read the documents to train on, and those of --eval-data; warn about common ones.

    Also returns the last hash of what is held out, see `read_corpus`; None if traces are read.
    """
    read = lambda paths: read_corpus(config, paths, tokenizer, shape, "train")
    traced = config.traces and asks_at_end(config)
    found = None if traced else read(config.data)
    documents = found.documents if found else read_traces(config, tokenizer, shape)
    with as_flag("data", "eval_data"):
        held_out = read(config.eval_data).documents if config.eval_data else []
    _remark_on_room(config, tokenizer, world)
    wanted = {document.tokens.tobytes() for document in held_out}
    known = wanted.intersection(document.tokens.tobytes() for document in documents)
    both = sum(document.tokens.tobytes() in known for document in held_out)
    if both and world.rank == 0:
        print(
            f"{both:,} of the {len(held_out):,} documents of --eval-data "
            f"{', '.join(config.eval_data)} are in --data as well, so accuracy is measured on "
            "text that was trained on; take other text, or let --holdout set some aside",
            file=sys.stderr,
        )
    return documents, held_out, found and found.held_out


def _remark_on_room(config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Say so if --max-response cuts off the answer to the longest thought that is asked for.

    With a </think> that is no token of its own an answer has more tokens than Config checks.
    """
    longest = budget_of_position(config.budget_start, math.inf, config.budget_entropy)
    needed = longest + len(answer_ids(tokenizer, [0]))
    asks = config.budget and config.task != "nothing"
    if asks and config.max_response < needed and world.rank == 0:
        print(
            f"--max-response {config.max_response} cuts off the answer behind a thought of "
            f"{longest} tokens: with this tokenizer use {needed} or more, or lower --budget-start",
            file=sys.stderr,
        )


def read_traces(config: Config, tokenizer: Tokenizer, shape: ModelConfig) -> list[Document]:
    """Read the documents of --traces; ValueError if none has a response within --max-response."""
    _check_context(config, tokenizer, shape)
    path = str(in_repository(config.traces))
    with as_flag("data", "traces"):
        found = corpus.read([path], tokenizer, (), config.document_tokens, None, traces=True)
    room, opening = config.max_response, think_ids(tokenizer, config.text_in)
    documents = [replace(d, thought=(*opening, *d.thought)) for d in found.documents]
    fitting = [d for d in documents if len(trace_ids(tokenizer, d)) <= room]
    if long := len(documents) - len(fitting):
        found.remarks.append(
            f"left out {long:,} of {found.total:,} traces: more than --max-response {room} tokens"
        )
    for remark in found.remarks if current().rank == 0 else ():
        print(remark, file=sys.stderr)
    if not fitting:
        raise ValueError(f"--traces {path}: no trace has {room} tokens or less; raise "
                         "--max-response")  # fmt: skip
    return [replace(document, index=i) for i, document in enumerate(fitting)]


def read_corpus(
    config: Config, paths: Sequence[str], tokenizer: Tokenizer, shape: ModelConfig,
    part: str = "all", until: str | None = None, budget: int | None = None,
) -> Corpus:  # fmt: skip
    """Read all documents of the paths, or those to "train" on, or those "held_out" (--holdout).

    until: the last hash of what was held out when a run began; none beyond it is used. budget: of
    an evaluation. With --eval-data nothing is held out. Prints what was left out. ValueError when
    document, prompt and response exceed the context.
    """
    _check_context(config, tokenizer, shape, budget)
    found = corpus.read(
        [str(in_repository(path)) for path in paths], tokenizer,
        config.text_fields, config.document_tokens,
        None if config.task == "problems" else config.min_context + 1,
        part, 0 if config.eval_data else config.holdout,
        config.max_records if tuple(paths) == config.data else 0, until=until,
    )  # fmt: skip
    for remark in found.remarks if current().rank == 0 else ():
        print(remark, file=sys.stderr)
    return found


def _check_context(
    config: Config, tokenizer: Tokenizer, shape: ModelConfig, budget: int | None = None
) -> None:
    prompt = longest_prompt(config, tokenizer, budget)
    response = 0 if config.task == "nothing" else config.max_response
    if config.match == "gain":  # an answer is put behind a response, to score it
        response += len(answer_ids(tokenizer, [0]))
    needed = config.document_tokens + len(prompt) + response
    if needed > shape.max_position_embeddings:
        raise ValueError(
            f"--document-tokens {config.document_tokens} + {len(prompt)} tokens of prompt + "
            f"--max-response {response} = {needed} tokens exceed the model's context "
            f"of {shape.max_position_embeddings}; lower one of the two"
            + ", or use --preset demo, whose sizes are the tiny model's"
            * (config.model == "tiny")
        )
