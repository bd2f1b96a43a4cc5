"""Measure next-token accuracy by difficulty of a model on held-out text.

    python eval.py --model runs/rmt                       as its run: what that held out, B_T, ...
    python eval.py --model qwen3-14b --mode ntp --data omni-math/eval.jsonl   greedy next token
    python eval.py --model qwen3-14b --mode ntr ...       think first, without asking for a length
    python eval.py --model runs/rmt --mode problems --data gsm8k/test.jsonl   answer problems
    python -m rmt.evaluation.compare before.json after.json          compare two --json files

Without --data it takes held-out documents: for a run its --eval-data, or else what it held out of
its data; otherwise those of the default data. With --data it takes all, unless --holdout is given.
Other flags that are not given are those of the model's run; they are printed at the start.

Positions are chosen once per data set, by the entropies of the model that the run began with (the
first of several runs; or --difficulty-model), and stored in --positions with the settings that
chose them: every checkpoint answers the same questions.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from models.fingerprint import fingerprint
from rmt.config.config import Config
from rmt.config.flags import add_fields, as_flag, flag, knob, make_parser, parse_known
from rmt.config.validate import response_needed, sampling_problem
from rmt.data.corpus import Document
from rmt.engine.export import find_model
from rmt.engine.loading import longest_prompt, read_corpus, read_model_directory
from rmt.engine.protocol import Protocol, protocol
from rmt.engine.tiers import measure_difficulty
from rmt.evaluation.evaluate import nats_per_token, predict_plainly, predict_thinking, solve
from rmt.evaluation.positions import Chosen, choose_positions, data_key, read_positions
from rmt.evaluation.summary import say
from rmt.memory.autofit import autofit
from rmt.memory.estimate import ROW_TOKENS
from rmt.sampling import Sampling
from rmt.system import dist
from rmt.system.metrics import peak_memory
from rmt.system.records import check_writable, write_json, write_whole
from rmt.system.terminal import safe_printing
from rmt.system.torchrun import lost_contact

EPILOG = "Run it with torchrun to use several GPUs."
SHARED = (  # flags of train.py that mean the same here
    "model", "weights", "data", "text_fields", "holdout", "document_tokens", "seed", "min_context",
    "entropy_top_k", "difficulty_model", "tiers", "tier_thresholds", "max_response", "temperature",
    "max_branches", "tokens_per_micro_batch", "dtype", "problem_request", "text_in", "timeout",
)  # fmt: skip
CHOOSING = (  # flags that decide which positions are chosen
    "text_fields", "document_tokens", "seed", "min_context", "entropy_top_k", "tiers",
    "tier_thresholds",
)  # fmt: skip
OF_POSITIONS = (  # flags that mean nothing where problems are answered
    "per_tier", "difficulty_model", "min_context", "entropy_top_k", "tiers", "tier_thresholds",
)  # fmt: skip
SAMPLED = ("samples", "top_p", "top_k")  # flags of sampled decoding


@dataclass(frozen=True)
class Options:
    mode: str = knob(
        "", "ntp: plain greedy; ntr: think; rmt: think within a budget; problems: answer them; "
        "default: what the model's run taught, else rmt", ("ntp", "ntr", "rmt", "problems"),
    )  # fmt: skip
    limit: int = knob(0, "problems to answer, the first of the data; 0: all")
    budget: int = knob(
        0, "thinking tokens to ask for; 0: B_T of the model's run, or the paper's; none where its "
        "run asked for none"
    )  # fmt: skip
    per_tier: int = knob(400, "positions per tier, when they are chosen")
    positions: str = knob("", "where the positions are stored; default: beside the runs, by data")
    decoding: str = knob(
        "sampled", "responses sampled as in training, or the likeliest tokens, which loop sooner",
        ("sampled", "greedy"),
    )  # fmt: skip
    samples: int = knob(1, "responses to each position or problem: avg@k, maj@k, pass@k")
    top_p: float = knob(1.0, "sample from the fewest likeliest tokens with this probability")
    top_k: int = knob(0, "sample from the so many likeliest tokens; 0: all")
    sampling_seed: int = knob(
        -1, "of sampled decoding; -1: that of --seed, which chooses positions"
    )
    json: str = knob("", "write the table and one item per position to this file")


def read_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Return the flags of Config that were typed (and --per-tier, if it was), and the options."""
    parser = make_parser(__doc__, EPILOG)
    add_fields(parser, Options)
    add_fields(parser, Config, only=SHARED)
    typed = vars(parse_known(parser, arguments))
    own = {name: typed[name] for name in Options.__dataclass_fields__ if name in typed}
    options = replace(Options(), **own)
    if options.per_tier < 1 or min(options.budget, options.limit, options.sampling_seed + 1) < 0:
        sys.exit(
            "error: --per-tier must be above 0, --budget and --limit 0 or more, --sampling-seed "
            "-1 or more"
        )
    if typed.get("timeout", Config.timeout) <= 0:
        sys.exit(f"error: --timeout is {typed['timeout']}: seconds, so above 0")
    greedy, given = options.decoding == "greedy", (getattr(options, name) for name in SAMPLED)
    if wrong := sampling_problem(greedy, *given):
        sys.exit(f"error: {wrong}")
    return {name: typed[name] for name in (*SHARED, "per_tier") if name in typed}, options


def refuse_meaningless(typed: dict[str, Any], options: Options, mode: str) -> None:
    """Raise ValueError for a flag that the mode does not use."""
    given = {n: value for n, value in vars(options).items() if value != getattr(Options, n)} | typed
    of_text, thinking = ("ntp", "ntr", "rmt"), ("ntr", "rmt", "problems")
    used = {"limit": ("problems",), "problem_request": ("problems",)}
    used |= {"budget": ("rmt", "problems")} | dict.fromkeys((*SAMPLED, "sampling_seed"), thinking)
    used |= dict.fromkeys(OF_POSITIONS, of_text)
    for name, value in given.items():
        if mode not in used.get(name, (mode,)):
            raise ValueError(f"{flag(name)} {value} means nothing to --mode {mode}; leave it out")
    if options.decoding == "greedy" and "temperature" in typed:
        raise ValueError(
            f"--temperature {typed['temperature']} means nothing to --decoding greedy; leave one "
            "of them out"
        )


def decoding(options: Options) -> str:
    """Describe the decoding: "greedy", "sampled", or "sampled --top-p 0.9"."""
    given = {name: getattr(options, name) for name in SAMPLED}
    cut = [f"{flag(n)} {v}" for n, v in given.items() if v != getattr(Options, n)]
    return " ".join([options.decoding, *cut])


def evaluate(
    typed: dict[str, Any], asked: Protocol, options: Options, world: dist.World
) -> dict[str, Any]:
    """Evaluate the model; return what the report says about it. All ranks."""
    config, mode = asked.config, asked.mode
    config = replace(config, tokens_per_micro_batch=config.tokens_per_micro_batch or ROW_TOKENS)
    source = find_model(config.model, config.weights, world)
    tokenizer, shape = read_model_directory(source)
    budget = options.budget or asked.budget
    corpus = read_corpus(config, config.data, tokenizer, shape, asked.part, asked.until, budget)
    documents = corpus.documents
    compute = dist.compute_dtype(config.dtype, world)
    model = dist.load_model(source, world, compute, trainable=False)
    report = {
        "budget": budget, "data": data_key(documents), "records": corpus.total,
        "left_out": [{"source": r.source, "why": r.trouble} for r in corpus.left_out],
    }  # fmt: skip
    chosen, known = Chosen([]), (model, tokenizer)
    if mode != "problems":
        chosen = positions_of(config, typed, options, world, source, *known, documents)
    if mode == "ntp":
        limit = config.tokens_per_micro_batch
        items = predict_plainly(*known, documents, chosen.positions, limit, world)
        report["nats_per_token"] = nats_per_token(*known, documents, limit, world)
    else:
        sampling = make_sampling(config, options, *known, budget, compute, world)
        exponent, more = config.budget_entropy if mode == "rmt" else 0.0, (world, options.samples)
        if mode == "problems":
            documents = documents[: options.limit or None]
            items = solve(*known, documents, budget, config.problem_request, sampling, *more)
        else:
            asking = (chosen.positions, budget, exponent, sampling)
            items = predict_thinking(*known, documents, *asking, *more, config.text_in)
    return report | {"tiers": chosen.summary(items), "items": items}


def positions_of(
    config: Config, typed: dict[str, Any], options: Options, world: dist.World, source: Path,
    model, tokenizer, documents: Sequence[Document],
) -> Chosen:  # fmt: skip
    """Read the stored positions, or choose and store new ones. All ranks."""
    stored = Path(options.positions or f"runs/positions-{data_key(documents)}.json")
    choosing = {name: getattr(config, name) for name in CHOOSING} | {"per_tier": options.per_tier}
    by = config.difficulty_model or config.model
    known = dist.from_rank_0(stored.is_file, world)
    if not known or "difficulty_model" in typed:
        with as_flag("model", "difficulty_model"):  # of the run, or typed
            judge = find_model(by, config.weights, world)
        choosing["difficulty_model"] = fingerprint(judge)["weights"]  # the same wherever it is
    if known:
        asked = {name: value for name, value in choosing.items() if name in typed}
        chosen = read_positions(stored, documents, asked)
        if world.rank == 0:
            print(f"answering the {len(chosen.positions)} positions stored in {stored}")
        return chosen
    check_writable("--positions", stored)
    entropies, thresholds = measure_difficulty(config, world, source, tokenizer, model, documents)
    chosen = choose_positions(
        documents, entropies, thresholds, config.min_context, options.per_tier, config.seed,
        choosing | {"difficulty_name": by},
    )  # fmt: skip
    if world.rank == 0:
        write_whole(stored, json.dumps(asdict(chosen)))
        print(f"chose {len(chosen.positions)} positions by the entropies of {by}: {stored}")
    return chosen


def make_sampling(
    config: Config, options: Options, model, tokenizer, budget: int | None, compute, world
) -> Sampling:
    """Return how responses are sampled; ValueError if they have no room. All ranks."""
    needed = response_needed(budget, config.budget_entropy) if budget else 0
    if config.max_response < needed:
        raise ValueError(
            f"--max-response {config.max_response} is too short for the {budget} tokens of thought "
            f"that are asked for and an answer; use --max-response {needed} or more"
        )
    prompt = longest_prompt(config, tokenizer, budget)
    return Sampling(
        config.max_response, tokenizer.stop_ids, tokenizer.vocab_size,
        config.temperature if options.decoding == "sampled" else 0.0,
        autofit(config, prompt, model, compute, world).max_branches,
        config.seed if options.sampling_seed < 0 else options.sampling_seed, "evaluate",
        top_p=options.top_p, top_k=options.top_k,
    )  # fmt: skip


@safe_printing()
@dist.leaving()
def main(arguments: Sequence[str] | None = None) -> None:
    typed, options = read_arguments(sys.argv[1:] if arguments is None else arguments)
    started = time.perf_counter()
    try:
        world = dist.start(timeout=typed.get("timeout", Config.timeout))
        asked = protocol({k: v for k, v in typed.items() if k != "per_tier"}, options.mode)
        refuse_meaningless(typed, options, asked.mode)
        if options.json:
            check_writable("--json", Path(options.json))
        for remark in asked.remarks if world.rank == 0 else ():
            print(remark)
        report = {
            "model": asked.config.model, "mode": asked.mode,
            "decoding": "greedy" if asked.mode == "ntp" else decoding(options),
            **evaluate(typed, asked, options, world),
            "seconds": time.perf_counter() - started,
            "peak_memory_gb": peak_memory(world.device) / 1e9,
        }  # fmt: skip
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted'}")
    except RuntimeError as error:
        if lost := lost_contact(error, "run the command again"):
            sys.exit(f"error: {lost}")
        raise
    if world.rank:
        return
    try:
        if options.json:  # before printing, which may fail
            write_json(Path(options.json), report)
    except OSError as error:
        sys.exit(f"error: {error}")
    finally:
        say(report)
    if options.json:
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
