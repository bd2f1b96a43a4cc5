"""Frequencies of the rotary embedding, unscaled or scaled to a longer context.

Shapes: D head dim. Frequency i of D/2 turns a pair of dims by theta^(-2i/D) radians per position. A
scaling divides low frequencies by `factor` and keeps high ones; `kept` is the share of each that is
kept, from 0 to 1.
"""

import math
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from models.files import read_number, read_truth

BOTH = ("rope_scaling", "rope_parameters")  # given both, transformers reads the first
BESIDES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ORIGINAL = "original_max_position_embeddings"
REMEDY = "remove the scaling if the run stays within the unscaled context"


@dataclass(frozen=True)
class Llama3:
    """The scaling of Llama 3.1; names are Hugging Face's."""

    factor: float
    original_max_position_embeddings: int  # the context before scaling
    low_freq_factor: float  # with fewer turns in that context, a frequency is divided
    high_freq_factor: float  # with more, it is kept

    def kept(self, frequency: Tensor, theta: float) -> Tensor:
        turns = self.original_max_position_embeddings / (2 * math.pi / frequency)  # (D/2,)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return share.clamp(0, 1)

    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071); names are Hugging Face's."""

    factor: float
    original_max_position_embeddings: int  # the context before scaling
    beta_fast: float = 32.0  # with more turns in that context, a frequency is kept
    beta_slow: float = 1.0  # with fewer, it is divided
    attention_factor: float | None = None  # of cos and sin; None: by `factor` and mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the blend begins and ends at whole indices

    def kept(self, frequency: Tensor, theta: float) -> Tensor:
        size = 2 * len(frequency)
        turns = self.beta_fast, self.beta_slow
        first, last = (self._index(n, size, theta) for n in turns)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        index = torch.arange(size // 2, dtype=torch.float32, device=frequency.device)  # (D/2,)
        return 1 - ((index - first) / (last - first or 0.001)).clamp(0, 1)

    def _index(self, turns: float, size: int, theta: float) -> float:
        """Return the index, not rounded, of the frequency with so many turns in that context."""
        longest = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(longest) / (2 * math.log(theta))

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        grown = lambda scale: 0.1 * scale * math.log(max(self.factor, 1.0)) + 1.0
        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)


Scaling = Llama3 | Yarn
SCALINGS = {"llama3": Llama3, "yarn": Yarn}  # rope_type -> its fields


def frequencies(
    theta: float, size: int, scaling: Scaling | None, device: torch.device | str
) -> tuple[Tensor, float]:
    """Return the frequencies, fp32 (D/2,), and the factor of cos and sin. size: D."""
    exponent = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequency = 1.0 / theta**exponent  # (D/2,)
    if scaling is None:
        return frequency, 1.0
    kept = scaling.kept(frequency, theta)  # (D/2,)
    scaled = (1 - kept) * frequency / scaling.factor + kept * frequency
    return scaled, scaling.amplitude()


def read_rope(raw: dict, source: str) -> tuple[float, Scaling | None]:
    """Return theta and scaling of a config.json, as transformers reads them.

    transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling. ValueError
    where fields contradict each other, or ask for what is not implemented.
    """
    given = {name: rope for name in BOTH if (rope := _fields(raw, name, source))}
    kinds = {name: _kind(rope, name, source) for name, rope in given.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{source}: rope scaling of type {kinds[BOTH[0]]!r} (rope_scaling) is not that of "
            f"rope_parameters, {kinds[BOTH[1]]!r}; keep the right one of the two"
        )
    name = next(iter(given), BOTH[0])
    used = given.get(name, {})
    theta = read_number(used if "rope_theta" in used else raw, "rope_theta", 10000.0, float, source)
    thetas = {"rope_theta": raw.get("rope_theta")}
    thetas |= {f"{name}.rope_theta": rope.get("rope_theta") for name, rope in given.items()}
    if others := [name for name, value in thetas.items() if value not in (None, theta)]:
        raise ValueError(
            f"{source}: {others[0]} is {thetas[others[0]]!r}, but transformers uses {theta}; "
            "keep the right one"
        )
    if kinds.get(name, "default") == "default":
        return theta, None
    if theta <= 1:
        raise ValueError(f"{source}: rope_theta is {theta}, but must be above 1; fetch it again")
    first, last = next(iter(given.values())), list(given.values())[-1]
    for field in sorted((first.keys() | last.keys()) - BESIDES):
        if first.get(field) != last.get(field):
            raise ValueError(
                f"{source}: rope_scaling.{field} is not rope_parameters.{field}; keep the right "
                "one of the two objects"
            )
    return theta, _scaling(kinds[name], raw, used, name, source)


def _fields(raw: dict, name: str, source: str) -> dict:
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: {name} is not a JSON object; fetch it again")
    if nested := [key for key, value in rope.items() if isinstance(value, (dict, list))]:
        raise ValueError(f"{source}: {name}.{nested[0]} is not supported; only one theta is")
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        raise ValueError(f"{source}: {name}.partial_rotary_factor is not supported; only 1 is")
    return rope


def _kind(rope: dict, name: str, source: str) -> str:
    named = {rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(named) > 1:
        raise ValueError(
            f"{source}: {name}.rope_type is {rope['rope_type']!r}, but {name}.type "
            f"{rope['type']!r}; keep the right one"
        )
    kind = named.pop() if named else "default"
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(
            f"{source}: rope scaling of type {str(kind)!r} ({name}) is not supported, only "
            f"{' and '.join(SCALINGS)}; {REMEDY}"
        )
    return kind


def _scaling(kind: str, raw: dict, rope: dict, name: str, source: str) -> Scaling:
    """Read the fields of a scaling; refuse others, whatever transformers makes of them."""
    known = {field.name: field.default for field in fields(SCALINGS[kind])}
    values = {key: value for key, value in rope.items() if value is not None}
    outer = raw.get(ORIGINAL, values.get(ORIGINAL))  # transformers lets it win
    if values.setdefault(ORIGINAL, outer) != outer:
        raise ValueError(
            f"{source}: {name}.{ORIGINAL} is {values[ORIGINAL]!r}, but {ORIGINAL} {outer!r}; keep "
            "the right one"
        )
    if unknown := sorted(values.keys() - known.keys() - BESIDES):
        raise ValueError(
            f"{source}: {name}.{unknown[0]} is not supported with {kind}; remove it if it has no "
            "effect"
        )
    if missing := [k for k, default in known.items() if default is MISSING and not values.get(k)]:
        raise ValueError(
            f"{source}: rope scaling of type {kind!r} needs {name}.{missing[0]}; give it, or "
            f"{REMEDY}"
        )
    place = f"{source}: {name}"
    read = {
        key: read_number(values, key, None, int if key == ORIGINAL else float, place)
        for key in known.keys() & values.keys() - {"truncate"}
    }
    if "truncate" in rope:
        read["truncate"] = read_truth(rope, "truncate", place)  # null: false, as transformers
    scaling = SCALINGS[kind](**read)
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(f"{place}.high_freq_factor must be above low_freq_factor; fetch it again")
    return scaling


def check_frequencies(name: str, stored: Tensor, config, directory) -> None:
    """Refuse stored rotary frequencies (older Llama) that differ from those computed here."""
    theta, scaling = config.rope_theta, config.rope_scaling
    expected, _ = frequencies(theta, config.head_dim, scaling, "cpu")
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-2):
        raise ValueError(
            f"{directory}: {name} does not match config.json's rope_theta {theta} and scaling; "
            "correct config.json, or remove the tensor"
        )
