"""The models known by name: known.csv has the repository and the published shape of each.

The shapes, from each model's config.json, let a run be planned without its files.
"""

import csv
from dataclasses import asdict, fields
from pathlib import Path

from models.config import ARCHITECTURES, TINY, ModelConfig
from models.rope import SCALINGS, Llama3

READ = {int: int, float: float, str: str, bool: "True".__eq__}


def _shape(row: dict[str, str]) -> ModelConfig:
    given = {f.name: READ[f.type](row[f.name]) for f in fields(ModelConfig) if f.name in row}
    scaling = None
    if factor := row["llama3_factor"]:
        scaling = Llama3(float(factor), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return ModelConfig(**given, **ARCHITECTURES[row["architecture"]], rope_scaling=scaling)


_ROWS = list(csv.DictReader((Path(__file__).parent / "known.csv").read_text().splitlines()))
REPOSITORIES = {row["name"]: row["repository"] for row in _ROWS}  # of Hugging Face
SHAPES = {row["name"]: _shape(row) for row in _ROWS}


def as_hugging_face(shape: ModelConfig) -> dict:
    """Return a config.json that `ModelConfig.from_dict` and transformers read as this shape."""
    raw = asdict(shape)
    architecture = raw.pop("architecture")
    for trait in ARCHITECTURES[architecture]:
        del raw[trait]
    if shape.rope_scaling:
        names = {scaling: name for name, scaling in SCALINGS.items()}
        raw["rope_scaling"]["rope_type"] = names[type(shape.rope_scaling)]
    kind = architecture.removesuffix("ForCausalLM").lower()
    return raw | dict(
        architectures=[architecture], model_type=kind, hidden_act="silu", attention_bias=False,
        use_sliding_window=False, sliding_window=None,
    )  # fmt: skip


def published(model: str) -> ModelConfig:
    """Return the shape of `--model`, from its name or its config.json; needs no weights."""
    if model in SHAPES:
        return SHAPES[model]
    return ModelConfig.from_directory(TINY if model == "tiny" else model)
