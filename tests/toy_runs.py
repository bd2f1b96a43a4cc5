"""A random model that now and then thinks and answers, and runs of a few steps with it.

Tokens are bytes, control tokens and the two answers `\\boxed{a}` and `\\boxed{b}`. The first
coordinate of all embeddings is large, so that the first column of the head acts as a bias: it makes
</think>, the answers and the end likely enough that groups hold right and wrong responses.
"""

import json
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing
from toy_models import write_tokenizer

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import SINGLE
from rmt.config.config import Config
from rmt.engine.run import prepare
from rmt.forest import pack
from rmt.methods.dynamic_sampling import replace_zero_variance
from rmt.prompt import parse_response
from rmt.questions import (
    RolloutBatch,
    ask,
    budget_of_step,
    draw_positions,
    prompts_of,
    question_trees,
    reward_responses,
    sampling_at,
)
from rmt.rollout import generate
from rmt.system.dist import current
from rmt.update import global_objective, update
from train import train_step

CONTROL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
ANSWERS = (r"\boxed{a}", r"\boxed{b}")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LIKELY = {"</think>": 5.5, ANSWERS[0]: 5.2, ANSWERS[1]: 5.2, "<|im_end|>": 4.5, "a": 3, "b": 3}
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SETTINGS = dict(
    steps=3, batch_size=6, group_size=4, max_response=16, budget_start=8, budget_decay=0.5,
    document_tokens=128, tiers="quantile", tier_thresholds=(0.0, 0.33, 0.66), min_context=8,
    entropy_top_k=0, holdout=0, learning_rate=1e-3, warmup_steps=1, save_every=100,
)  # fmt: skip
WORLD = current(torch.device("cpu"))  # of a single process


def prefix_merges():
    """Merges that make each answer one token: \\b, \\bo, \\box, ..."""
    pairs = [(text[:end], text[end]) for text in ANSWERS for end in range(1, len(text))]
    return list(dict.fromkeys(pairs))


def write_thinker(directory, **changes):
    """The model as a Hugging Face directory."""
    directory.mkdir(parents=True)
    write_tokenizer(
        directory, prefix_merges(), CONTROL, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer = Tokenizer(directory)
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size + 5} | changes  # five rows of padding
    (directory / "config.json").write_text(json.dumps(shape))
    model, generator = Transformer(ModelConfig.from_dict(shape)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith("norm.weight") else noise)
        model.model.embed_tokens.weight[:, 0] = 2
        for text, odds in LIKELY.items():
            (token,) = tokenizer.encode_with_control(text)
            model.head[token, 0] += odds / 3  # by what the first hidden coordinate is about
    save_file({k: v.clone() for k, v in model.state_dict().items()}, directory / SINGLE)
    return directory


def begins_with(directory, token) -> None:
    """Texts begin with a token, as tokenizer and configuration say."""
    path = directory / "tokenizer_config.json"
    begin = dict(bos_token=token, add_bos_token=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | begin))
    tokenizer = HFTokenizer.from_file(str(directory / "tokenizer.json"))
    place = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = TemplateProcessing(f"{token} $A", special_tokens=place)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_corpus(path, documents=13):
    """Texts of a and b of unequal length."""
    rng = np.random.default_rng(0)
    texts = ("".join(rng.choice(["a", "b"], size=rng.integers(12, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_files(place, **shape):
    """Model and corpus of a run, unless they are there."""
    if not (place / "data.jsonl").exists():
        write_thinker(place / "thinker", **shape)
        write_corpus(place / "data.jsonl")


class Prepared:
    """A run and its setup under one name: run.model, run.world and run.documents alike."""

    def __init__(self, run, setup):
        self.__dict__.update(run=run, setup=setup)

    def having(self, **changes):
        """The same with another model or optimizer."""
        return Prepared(replace(self.run, **changes), self.setup)

    def _owner(self, name):
        owners = (self.run, self.setup, self.setup.data)
        return next((owner for owner in owners if hasattr(owner, name)), self.run)

    def __getattr__(self, name):
        return getattr(self._owner(name), name)

    def __setattr__(self, name, value):
        setattr(self._owner(name), name, value)

    def __iter__(self):
        return iter((self.run, self.setup))


def prepared(place, world=WORLD, shape=None, **changes):
    """A run in `place`, whose model and corpus are written when they are not there."""
    write_files(place, **(shape or {}))
    files = dict(model=str(place / "thinker"), data=(str(place / "data.jsonl"),))
    config = Config(**SETTINGS | files | {"out": str(place / "out")} | changes)
    return Prepared(*prepare(config, world))


def stepped(run, step=None):
    """train_step of a prepared run, at a step of its own if given."""
    if step is not None:
        run.step = step
    return train_step(*run)


def draw(run, step=0):
    """The questions of a step, as train_step draws them."""
    c, data = run.config, run.data
    budget = budget_of_step(c, step, data.total_steps)
    draws = {
        i: draw_positions(c, data, run.curriculum, step, i, c.positions_per_document)[0]
        for i in data.order[step].tolist()
    }
    return [ask(c, data, i, position, budget) for i, drawn in draws.items() for position in drawn]


def respond(run, questions, step=0, purpose="train", attempt=0):
    """G responses to each question, scored, as train_step gets them."""
    c, tokenizer = run.config, run.tokenizer
    trees = question_trees(questions, run.documents, prompts_of(c, tokenizer, questions))
    sampling = sampling_at(c, tokenizer, step, purpose, attempt)
    responses = generate(run.model, trees, c.group_size, sampling)
    return reward_responses(c, tokenizer, list(questions), responses)


def resampled(run, batch, step=0):
    """What dynamic sampling makes of a batch, and the tokens that it throws away."""
    return replace_zero_variance(
        run.config, run.data, run.curriculum, batch, run.model, generate, step, run.world,
        run.clock,
    )  # fmt: skip


def learn(run, trees, groups, advantage, match, metrics, pack=pack):
    """An update of a prepared run on trees of its own."""
    batch = RolloutBatch([], groups, [], {"match": match})
    objective = global_objective(
        run.config, trees, batch, advantage, run.tokenizer.vocab_size, run.world
    )
    return update(
        run.config, run.model, run.optimizer, run.reference, trees, objective, groups, pack,
        run.step, run.total_steps, run.world, run.clock, metrics,
    )  # fmt: skip


def parsed(run, groups):
    return [[parse_response(run.tokenizer, r.tokens) for r in group] for group in groups]
