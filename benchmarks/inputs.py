"""Inputs of the contenders: a model directory that all of them load, and prompts.

Our code and transformers read the same Hugging Face directory. If a model's weights are missing, or
fewer layers are wanted, a directory of that shape with random weights is written. Time and memory
do not depend on the weights, as long as all responses have the same length.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.config import ASSETS, TINY, ModelConfig
from models.export import export
from models.shapes import SHAPES, as_hugging_face, published
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import cache_directory, find
from rmt.trees import Branch, Tree

TEXT = ASSETS / "tiny_corpus" / "train.jsonl"  # fixed, with 77,000 words

FLAGS: dict[str, dict[str, Any]] = {
    "model": dict(default="smollm2-135m", help="name or Hugging Face directory"),
    "random": dict(choices=(*SHAPES, "tiny"), help="a model of this shape, with random weights"),
    "layers": dict(type=int, default=0, help="a model of so many layers; 0: all of them"),
    "documents": dict(type=int, default=4, help="different prefixes"),
    "group": dict(type=int, default=8, help="G: responses to each prefix"),
    "prefix": dict(type=int, default=256, help="tokens before the response"),
    "response": dict(type=int, default=64, help="tokens of each response, exactly"),
    "rounds": dict(type=int, default=5, help="turns that count, after a warm-up"),
    "threads": dict(type=int, default=None, help="default: as many as PyTorch takes"),
    "json": dict(type=Path, help="where to write all numbers; a plot is put beside it"),
}


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Build a parser of the shared flags; a default of None leaves a flag out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, settings in FLAGS.items():
        if name not in defaults:
            parser.add_argument(f"--{name}", **settings)
        elif defaults[name] is not None:
            parser.add_argument(f"--{name}", **settings | {"default": defaults[name]})
    return parser


def prepare(o: argparse.Namespace) -> None:
    """Set the number of threads, the same for all, and write the model's directory."""
    o.threads = o.threads or torch.get_num_threads()
    torch.set_num_threads(o.threads)
    directory(o)


def flags(options: argparse.Namespace, *without: str) -> list[str]:
    """Return the command line of these options, without --contender."""
    words = []
    for name, value in vars(options).items():
        if name in ("contender", *without) or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(v) for v in (value if isinstance(value, list) else [value])]
    return words


def directory(o: argparse.Namespace) -> Path:
    """Return the model's directory; one with random weights where asked for, or not to be had."""
    source, random = None, o.random
    try:
        source = None if random else find(o.model)
    except FileNotFoundError:
        if o.model not in SHAPES:
            raise
        random = o.random = o.model  # results say so
        print(f"{o.model} is not here: random weights of its shape", flush=True)
    if source and not o.layers:
        return source
    shape = published(random) if random else ModelConfig.from_directory(source)
    layers = min(o.layers or shape.num_hidden_layers, shape.num_hidden_layers)
    name = random or Path(o.model).name
    place = cache_directory() / "benchmarks" / f"{name}-random-{layers}-layers"
    if not (place / "config.json").is_file():
        _write(place, replace(shape, num_hidden_layers=layers), source or TINY)
    return place


def _write(place: Path, shape: ModelConfig, tokenizer: Path) -> None:
    """Write a model with random bf16 weights; the tokenizer may have a smaller vocabulary."""
    aside = place.with_name(f".{place.name}.source")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, aside / name)
    (aside / "config.json").write_text(json.dumps(as_hugging_face(shape)), encoding="utf-8")
    (aside / "generation_config.json").write_text("{}", encoding="utf-8")
    model = Transformer(shape)
    model.reset_parameters(seed=0)
    export(dict(model.state_dict()), aside, place, torch.bfloat16)
    shutil.rmtree(aside)


def prompts(place: Path, count: int, tokens: int) -> list[tuple[str, list[int]]]:
    """Return different texts of exactly `tokens` tokens that encode to the same ids again."""
    lines = TEXT.read_text(encoding="utf-8").strip().split("\n")
    tokenizer = Tokenizer(place)
    ids = tokenizer.encode("\n".join(json.loads(line)["text"] for line in lines[:300]))
    found, start = [], 0
    while len(found) < count:
        start = start % (len(ids) - tokens)
        window = ids[start : start + tokens]
        text = tokenizer.decode(window)
        start += 1
        if tokenizer.encode(text) == window:
            found.append((text, window))
            start += tokens
    return found


def trees(prefixes: list[list[int]], responses: list[list[list[int]]] | None = None) -> list[Tree]:
    """Make a tree of each prefix; its last token is the prompt, so branches see the whole prefix.

    Without responses a tree has one branch to be sampled; with responses, a branch for each.
    """
    made = []
    for number, ids in enumerate(prefixes):
        answers = [()] if responses is None else responses[number]
        branches = [
            Branch(number * len(answers) + i, len(ids) - 1, ids[-1:], answer)
            for i, answer in enumerate(answers)
        ]
        made.append(Tree(number, ids[:-1], tuple(branches)))
    return made


def dtype_of(o: argparse.Namespace) -> torch.dtype:
    return getattr(torch, o.dtype)
