"""Scaled frequencies are those of transformers; fields are read as it reads them, or refused."""

import random
from dataclasses import asdict

import pytest
import torch
from toy_models import CONFIG, assert_holds

from models.config import ModelConfig
from models.rope import Llama3, Yarn, frequencies
from models.shapes import SHAPES, as_hugging_face

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def drawn(rng):
    """A scaling with fields that are drawn, some of them left out."""
    factor = rng.choice((1, 1.5, 4.0, 7.3, 32))
    shared = {"factor": factor, "original_max_position_embeddings": rng.choice((7, 64, 8192))}
    shared["rope_theta"] = rng.choice((100.0, 1e4, 5e5, 1e6))
    if rng.random() < 0.3:
        low = rng.uniform(0.1, 3)
        bounds = {"low_freq_factor": low, "high_freq_factor": low + rng.uniform(0.01, 9)}
        return shared | bounds | {"rope_type": "llama3"}
    optional = {
        "attention_factor": rng.choice((None, 0.7, 1.3)), "mscale": rng.uniform(0.1, 2),
        "mscale_all_dim": rng.uniform(0.1, 2), "truncate": rng.choice((True, False, None)),
        "beta_fast": rng.choice((None, 32, 9.5)), "beta_slow": rng.choice((1, 0.3, 40)),
    }  # fmt: skip
    kept = {name: value for name, value in optional.items() if rng.random() < 0.5}
    return shared | kept | {"rope_type": "yarn"}


@pytest.mark.parametrize("seed", range(100))
def test_frequencies_are_those_of_transformers(seed):
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    rng = random.Random(seed)
    rope, size = drawn(rng), rng.choice((2, 6, 64, 128))
    config = transformers.LlamaConfig(head_dim=size, rope_parameters=dict(rope))
    wanted, amplitude = functions[rope["rope_type"]](config, "cpu")
    ours = ModelConfig.from_dict(CONFIG | {"head_dim": size, "rope_parameters": rope})
    found, factor = frequencies(ours.rope_theta, size, ours.rope_scaling, "cpu")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(amplitude, rel=1e-12)
    if rope["factor"] in (1, 4.0, 32):  # division by a power of 2 rounds nothing
        assert torch.equal(found, wanted), "at long positions the last bit counts"


SPELLINGS = {
    "transformers-5": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "transformers-4": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "before-rope-type": {
        "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()},
        "rope_theta": 500000,
    },
    "type-twice": {"rope_scaling": LLAMA3 | {"type": "llama3"}, "rope_theta": 5e5},
    "both": {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}, "rope_parameters": LLAMA3},
    "yarn": {"rope_scaling": YARN | {"attention_factor": None}, "rope_theta": 1e6},
    "context-outside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4},
        "original_max_position_embeddings": 64,
    },
    "default-theta": {"rope_parameters": YARN | {"truncate": False, "beta_slow": 2}},
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_spelling_is_read_as_transformers_reads_it(spelled):
    transformers = pytest.importorskip("transformers")
    ours = ModelConfig.from_dict(CONFIG | spelled)
    theirs = transformers.LlamaConfig(**CONFIG | spelled)
    theirs.standardize_rope_params()  # as its rotary embedding does
    theirs = theirs.rope_parameters
    kind = {"llama3": Llama3, "yarn": Yarn}[theirs["rope_type"]]
    assert type(ours.rope_scaling) is kind and ours.rope_theta == theirs["rope_theta"]
    read = {name: value for name, value in asdict(ours.rope_scaling).items() if name in theirs}
    assert read == {name: theirs[name] for name in read} and read.keys() >= {"factor"}


REFUSED = {
    "another-kind": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "linear": ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "'linear'", "only llama3"),
    "kinds-differ": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
        "type 'yarn' (rope_scaling) is not that of rope_parameters, 'default'",
    ),
    "scaling-undone": (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN},
        "type 'default' (rope_scaling) is not that of rope_parameters, 'yarn'",
    ),
    "two-types": ({"rope_scaling": YARN | {"type": "llama3"}}, "rope_type is 'yarn'", "'llama3'"),
    "factors-differ": (
        {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
        "rope_scaling.factor is not rope_parameters.factor",
    ),
    "one-has-more": (
        {"rope_scaling": YARN, "rope_parameters": YARN | {"beta_fast": 2.0}},
        "rope_scaling.beta_fast is not rope_parameters.beta_fast",
    ),
    "theta-1": ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1.0", "above 1"),
    "thetas-differ": (
        {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 5e5}},
        "rope_parameters.rope_theta is 500000.0",
    ),
    "contexts-differ": (
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        "rope_scaling.original_max_position_embeddings is 64, but", "32",
    ),
    "no-context": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "needs rope_scaling.original"),
    "no-factor": ({"rope_parameters": YARN | {"factor": None}}, "needs rope_parameters.factor"),
    "no-bound": ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
    "field-of-the-other": ({"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "beta_fast", "llama3"),
    "field-of-tomorrow": ({"rope_scaling": YARN | {"mscale_2": 1}}, "rope_scaling.mscale_2"),
    "lists": ({"rope_scaling": YARN | {"long_factor": [1.0]}}, "rope_scaling.long_factor"),
    "a-part": ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "factor-as-text": ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor is '4'"),
    "factor-0": ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is '0'"),
    "truncate-1": ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1, neither"),
    "no-blend": ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor must be"),
}  # fmt: skip


@pytest.mark.parametrize("changes, fragments", [(c, f) for c, *f in REFUSED.values()], ids=REFUSED)
def test_a_scaling_we_cannot_compute_is_refused(changes, fragments):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(CONFIG | changes, "there/config.json")
    assert_holds(error, "there/config.json", "; ", *fragments)


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_is_read_back_from_its_config(name):
    assert ModelConfig.from_dict(as_hugging_face(SHAPES[name])) == SHAPES[name]
