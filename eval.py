"""Next-token accuracy by difficulty of a model on held-out text.

    python eval.py --model qwen3-14b --mode ntp --data omni-math/eval.jsonl   greedy next token
    python eval.py --model qwen3-14b --mode ntr ...      think first, without asking for a length
    python eval.py --model runs/rmt/model --mode rmt ... think within the budget B_T
    python eval.py --model runs/rmt/model --mode problems --data gsm8k/test.jsonl    answer problems

Positions are chosen once per data set, by the entropies of the first model that is evaluated on
it (or --difficulty-model), and stored in --positions: every checkpoint answers the same questions.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rmt import dist
from rmt.budget import budget_at, response_needed
from rmt.clock import peak_memory
from rmt.config import Config, from_json
from rmt.evaluate import predict_plainly, predict_thinking, solve, summarise, table
from rmt.export import find_model
from rmt.fit import fitted
from rmt.flags import add_fields, knob, make_parser, parse_known
from rmt.memory import ROW_TOKENS
from rmt.positions import choose_positions, data_key, read_positions, write_positions
from rmt.records import as_json, check_writable, write_whole
from rmt.rollout import Sampling
from rmt.sources import (
    longest_prompt,
    measure_difficulty,
    read_documents,
    read_model_directory,
)
from rmt.terminal import safe_printing

EPILOG = "Run it with torchrun to share the positions out over several GPUs."
# Knobs of training that mean the same here.
SHARED = (
    "model", "weights", "data", "text_fields", "document_tokens", "seed", "min_context",
    "entropy_top_k", "difficulty_model", "tiers", "tier_thresholds", "max_response",
    "max_branches", "tokens_per_micro_batch", "dtype", "problem_request",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    mode: str = knob(
        "rmt", "ntp: plain greedy; ntr: think; rmt: think within a budget; problems: answer them",
        ("ntp", "ntr", "rmt", "problems"),
    )  # fmt: skip
    limit: int = knob(0, "problems to answer, the first of the data; 0: all")
    budget: int = knob(
        0, "thinking tokens to ask for; 0: B_T of the model's run, or the paper's; of problems none"
    )
    per_tier: int = knob(400, "positions per tier, when they are chosen")
    positions: str = knob("", "where the positions are stored; default: beside the runs, by data")
    decoding: str = knob("greedy", "of thinking modes", ("greedy", "sampled"))
    temperature: float = knob(0.8, "of sampled decoding")
    json: str = knob("", "write the table and one item per position to this file")


def read_arguments(arguments: Sequence[str]) -> tuple[Config, Options]:
    parser = make_parser(__doc__, EPILOG)
    add_fields(parser, Options)
    add_fields(parser, Config, only=SHARED)
    values = vars(parse_known(parser, arguments))
    own = {key: values.pop(key) for key in Options.__dataclass_fields__ if key in values}
    options = replace(Options(), **own)
    if (
        options.per_tier < 1
        or min(options.budget, options.limit) < 0
        or not options.temperature > 0
    ):
        sys.exit(
            "error: --per-tier and --temperature must be above 0, --budget and --limit 0 or more"
        )
    try:
        if options.json:
            check_writable("--json", Path(options.json))
        return from_json(values | {"budget": False}), options
    except ValueError as problem:
        sys.exit(f"error: {problem}")


def final_budget(model: str) -> tuple[int, float]:
    """B_T, and how it follows entropy, of the run that made a model; or of the paper."""
    record = Path(model).resolve().parent / "run.json"
    c = from_json(json.loads(record.read_text())["config"]) if record.is_file() else Config()
    budget = budget_at(1, 1, c.budget_start, c.budget_decay, c.budget_min)
    return budget, c.budget_entropy


def evaluate(config: Config, options: Options, world: dist.World) -> tuple[list, list, int | None]:
    """Rows of the table, items and the budget asked for. All ranks."""
    source = find_model(config.model, config.weights, world)
    config = replace(config, tokens_per_micro_batch=config.tokens_per_micro_batch or ROW_TOKENS)
    tokenizer, shape = read_model_directory(source)
    if options.mode == "problems":
        config = replace(config, task="problems", match="answer", budget=False, ntp=False)
    response = 0 if options.mode == "ntp" else config.max_response
    documents = read_documents(config, config.data, tokenizer, shape, response)
    compute = dist.compute_dtype(config.dtype, world)
    model = dist.load_model(source, world, compute, trainable=False)
    if options.mode == "problems":
        documents = documents[: options.limit or None]
        budget = options.budget or None
        sampling = make_sampling(config, options, tokenizer, budget, model, compute, world)
        request = config.problem_request
        items = solve(model, tokenizer, documents, budget, request, sampling, world)
        return summarise(items), items, budget
    stored = Path(options.positions or f"runs/positions-{data_key(documents)}.json")
    if dist.gather_objects(stored.is_file(), world)[0]:
        positions = read_positions(stored, documents)
        if world.rank == 0:
            print(f"answering the {len(positions)} positions stored in {stored}")
    else:
        entropies, thresholds = measure_difficulty(
            config, config.data, world, source, tokenizer, documents, model
        )
        positions = choose_positions(
            documents, entropies, thresholds, config.min_context, options.per_tier, config.seed
        )
        if world.rank == 0:
            write_positions(stored, positions)
            print(f"chose {len(positions)} positions by the entropies of {config.model}: {stored}")
    if options.mode == "ntp":
        limit = config.tokens_per_micro_batch
        items = predict_plainly(model, tokenizer, documents, positions, limit, world)
        return summarise(items), items, None
    budget = None
    if options.mode == "rmt":
        budget, exponent = final_budget(config.model)
        budget = options.budget or budget
        config = replace(config, budget_entropy=exponent)
    sampling = make_sampling(config, options, tokenizer, budget, model, compute, world)
    items = predict_thinking(
        model, tokenizer, documents, positions, budget, config.budget_entropy, sampling, world
    )
    return summarise(items), items, budget


def make_sampling(config, options, tokenizer, budget, model, compute, world) -> Sampling:
    """All ranks."""
    needed = response_needed(budget, config.budget_entropy) if budget else 0
    if config.max_response < needed:
        raise ValueError(
            f"--max-response {config.max_response} is too short for the {budget} tokens of thought "
            f"that are asked for and an answer; use --max-response {needed} or more"
        )
    prompt = longest_prompt(config, tokenizer, budget)
    return Sampling(
        config.max_response, tokenizer.stop_ids, tokenizer.vocab_size,
        options.temperature if options.decoding == "sampled" else 0.0,
        fitted(config, prompt, model, compute, world).max_branches,
        config.seed, "evaluate",
    )  # fmt: skip


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    config, options = read_arguments(sys.argv[1:] if arguments is None else arguments)
    world, started = dist.start(), time.perf_counter()
    try:
        rows, items, budget = evaluate(config, options, world)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        dist.stop()
    if world.rank:
        return
    report = {
        "model": config.model, "mode": options.mode, "budget": budget,
        "decoding": "greedy" if options.mode == "ntp" else options.decoding,
        "seconds": time.perf_counter() - started,
        "peak_memory_gb": peak_memory(world.device) / 1e9,
        "tiers": rows, "items": items,
    }  # fmt: skip
    if options.json:  # before anything is printed
        content = json.dumps(as_json(report), indent=1, ensure_ascii=False)
        write_whole(Path(options.json), content + "\n")
    asked = f", {budget} tokens asked for" if budget else ""
    print(f"{config.model}, mode {options.mode}, {report['decoding']}{asked}\n\n{table(rows)}\n")
    print(f"{report['seconds']:.0f} s, peak memory {report['peak_memory_gb']:.1f} GB")
    if options.json:
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
