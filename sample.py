"""Continue a text, chat, or watch a model think about one next token.

python sample.py --model tiny --prompt "People: Kai Mira"
python sample.py --model qwen3-0.6b --chat --prompt "What is 7 times 8?"
python sample.py --model runs/rmt --think-next --prompt "The derivative of sin x is"
"""

import codecs
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import linear_entropy_logprob, linear_topk
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from rmt.config.flags import add_fields, knob, make_parser, parse_known
from rmt.config.validate import response_needed, sampling_problem, temperature_problem
from rmt.engine.checkpoint import run_settings
from rmt.engine.export import find_model
from rmt.engine.loading import read_model_directory
from rmt.engine.protocol import final_budget
from rmt.forest import pack
from rmt.prompt import next_token_prompt, parse_response
from rmt.rollout import stream
from rmt.sampling import Sampling
from rmt.system import dist
from rmt.system.terminal import nobody_reads, safe_printing
from rmt.trees import Branch, Tree


@dataclass(frozen=True)
class Options:
    model: str = knob("tiny", "name, Hugging Face directory, run or checkpoint")
    weights: str = knob("", "directory that holds downloaded models, looked at first")
    prompt: str = knob("", "text to continue; without it, standard input")
    chat: bool = knob(False, "put the prompt into the model's chat template")
    think_next: bool = knob(False, "reason about the next token of the prompt")
    budget: int = knob(
        0, "with --think-next, thinking tokens asked for; 0: B_T of the model's run, or the paper's"
    )
    ask_budget: bool = knob(True, "with --think-next, ask for a number of tokens, if its run did")
    greedy: bool = knob(False, "take the likeliest token")
    temperature: float = knob(0.8, "of sampling")
    top_p: float = knob(1.0, "sample from the fewest likeliest tokens with this probability")
    top_k: int = knob(0, "sample from the so many likeliest tokens; 0: all")
    seed: int = knob(0, "of sampling")
    max_new_tokens: int = knob(512, "stop after this many")
    json: bool = knob(False, "print one line: prompt_tokens, tokens, text, logprobs")
    dtype: str = knob("auto", "compute dtype", ("auto", "float32", "bfloat16"))


def read_options(arguments: Sequence[str]) -> Options:
    parser = make_parser(__doc__, "")
    add_fields(parser, Options)
    options = replace(Options(), **vars(parse_known(parser, arguments)))
    if options.max_new_tokens < 1:
        sys.exit(f"error: --max-new-tokens is {options.max_new_tokens}: at least 1")
    wrong = sampling_problem(options.greedy, 1, options.top_p, options.top_k)
    if wrong := wrong or temperature_problem(options.temperature):
        sys.exit(f"error: {wrong}")
    if options.budget < 0 or options.seed < 0:
        sys.exit("error: --budget and --seed must be 0 or more")
    if options.chat and options.think_next:
        sys.exit("error: --chat with --think-next: a chat has no next token; leave one of them out")
    if options.budget and not options.ask_budget:
        sys.exit(f"error: --budget {options.budget} with --no-ask-budget; leave one of them out")
    if options.budget and not options.think_next:
        sys.exit(f"error: --budget {options.budget} means nothing without --think-next; add it")
    return options


def read_prompt(options: Options) -> str:
    """Read --prompt or standard input as UTF-8; ValueError if it is empty or no UTF-8."""
    given = os.fsencode(options.prompt)
    if not given and sys.stdin:  # None: it is closed
        given = sys.stdin.buffer.read()
    try:
        text = given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8 (byte {given[error.start]:#x} at {error.start}); "
            "give it in UTF-8, for example through iconv -t UTF-8"
        ) from None
    if not text:
        raise ValueError("the prompt is empty; give --prompt TEXT or text on standard input")
    return text


def asked_budget(options: Options, run: dict) -> int | None:
    """Return --budget, else B_T of the run that made the model, or the paper's; None: no sentence.

    run: its config, {} if there is none. ValueError when --max-new-tokens has no room for it.
    """
    if not options.ask_budget:
        return None
    budget = options.budget or final_budget(run)
    needed = response_needed(budget, 0) if budget else 0
    if options.max_new_tokens < needed:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens} is too short for the {budget} tokens of "
            f"thought that are asked for and an answer; use --max-new-tokens {needed} or more, "
            "another --budget, or --no-ask-budget"
        )
    return budget


def prompt_ids(options: Options, tokenizer: Tokenizer, text: str, source: Path) -> list[int]:
    """Return the tokens that the model continues."""
    if options.think_next:
        run = (run_settings(source) or {}).get("config", {})
        text_in = run.get("text_in", "question")
        around = next_token_prompt(tokenizer, asked_budget(options, run), text_in)
        return [*around.header, *tokenizer.encode(text), *around.footer]
    if options.chat:
        return tokenizer.chat(text)
    return tokenizer.begin_ids + tokenizer.encode(text)


def complete(model: Transformer, tokenizer: Tokenizer, ids: list[int], options: Options, show):
    """Continue ids, passing readable pieces to `show`; return tokens and logprobs.

    logprobs: of the distribution sampled from, at the temperature and within top-k and top-p; with
    --greedy of the whole one at temperature 1.
    """
    sampling = Sampling(
        options.max_new_tokens, tokenizer.stop_ids, tokenizer.vocab_size,
        0.0 if options.greedy else options.temperature, seed=options.seed, purpose="sample",
        top_p=options.top_p, top_k=options.top_k,
    )  # fmt: skip
    # The sampler feeds a branch's last prompt token, so the last token is on the branch.
    tree = Tree(0, ids[:-1] or ids, (Branch(0, len(ids) - 1, ids[-1:]),))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # characters span tokens
    tokens, logprobs = [], []
    for _, token, logprob in stream(model, [tree], 1, sampling):
        tokens.append(token)
        logprobs.append(logprob)
        if token not in tokenizer.stop_ids:
            show(decoder.decode(tokenizer.bytes_of([token])))
        if nobody_reads():
            break
    show(decoder.decode(b"", final=True))  # the rest of a character
    return tokens, logprobs


@torch.no_grad()
def plain_prediction(model: Transformer, tokenizer: Tokenizer, text: str) -> str:
    """Describe the prediction without thinking: its entropy and the five likeliest next tokens."""
    ids = tokenizer.begin_ids + tokenizer.encode(text)
    forest = pack([Tree(0, ids)], next(model.parameters()).device)
    last = slice(len(ids) - 1, len(ids))  # the row may be padded

    def readout(hidden, head):
        _, tokens = linear_topk(hidden[last], head, 5, tokenizer.vocab_size)
        same = hidden[last].expand(tokens.shape[1], -1)
        return tokens[0], linear_entropy_logprob(same, head, tokens[0], 1.0, tokenizer.vocab_size)

    tokens, found = model(forest.tokens, forest.position, forest.attend, readout)
    likeliest = zip(found.logprob.exp().tolist(), tokens.tolist())
    lines = [f"  {p:6.1%}  {tokenizer.decode([token])!r}" for p, token in likeliest]
    return "\n".join([f"entropy {found.entropy[0].item():.2f} nats; without thinking:", *lines])


def run(options: Options) -> None:
    """Load the model, answer the prompt and print it."""
    text, world = read_prompt(options), dist.start()
    source = find_model(options.model, options.weights, world)
    tokenizer, shape = read_model_directory(source)
    ids = prompt_ids(options, tokenizer, text, source)
    limit = shape.max_position_embeddings
    if len(ids) + options.max_new_tokens > limit:
        raise ValueError(
            f"{len(ids)} prompt tokens + --max-new-tokens {options.max_new_tokens} exceed the "
            f"model's context of {limit}; shorten the prompt or lower --max-new-tokens"
        )
    compute = dist.compute_dtype(options.dtype, world)
    model = dist.load_model(source, world, compute, trainable=False)
    if options.json:
        tokens, logprobs = complete(model, tokenizer, ids, options, lambda piece: None)
        text = tokenizer.decode([token for token in tokens if token not in tokenizer.stop_ids])
        line = dict(prompt_tokens=len(ids), tokens=tokens, text=text, logprobs=logprobs)
        return print(json.dumps(line))  # ASCII: a terminal of another encoding loses nothing
    if options.think_next:
        print(plain_prediction(model, tokenizer, text) + "\n")
    show = lambda piece: print(piece, end="", flush=True)
    tokens, _ = complete(model, tokenizer, ids, options, show)
    print()
    if options.think_next:
        answer = parse_response(tokenizer, tokens)
        print(f"\nthought for {answer.thinking_length} tokens, predicts {answer.text!r}")


@safe_printing()
def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(read_options(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
    finally:
        dist.stop()


if __name__ == "__main__":
    main()
