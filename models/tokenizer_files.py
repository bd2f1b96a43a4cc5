"""Read and check the files about a model's tokenizer, as transformers 5 reads them.

tokenizer.json counts. transformers takes it as it is, or builds a class of its own around its
vocabulary and merges. A directory is refused where that class would split text differently.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from models.config import DEFAULTS
from models.files import read_json

NAMES = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SPACES = ("lstrip", "rstrip", "single_word")  # make a token depend on the spaces around it
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "")
END = "<|endoftext|>"  # a class's default for names that are missing (null: none)
DEFAULT_NAMES = {
    "Qwen2Tokenizer": dict(eos_token=END, unk_token=END, pad_token=END),
    "GPT2Tokenizer": dict(bos_token=END, eos_token=END, unk_token=END),
}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
# class -> the steps of the normalizer and of the pre_tokenizer that it is built with
BUILT = {
    "Qwen2Tokenizer": ([{"type": "NFC"}], [_SPLIT, _BYTES | {"use_regex": False}]),
    "GPT2Tokenizer": ([], [_BYTES | {"use_regex": True}]),
}


def describe(directory: Path) -> dict:
    """Read tokenizer_config.json, and special_tokens_map.json where the former is an old one."""
    description = read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in description:
        typed = lambda v: v | {"__type": "AddedToken"} if isinstance(v, dict) else v
        for name, value in read_json(directory / "special_tokens_map.json").items():
            description[name] = [*map(typed, value)] if isinstance(value, list) else typed(value)
    return description


def class_of(directory: Path, description: dict) -> str:
    """Return the class that transformers builds; "" where it takes tokenizer.json as it is."""
    config = read_json(directory / "config.json")
    named = config.get("architectures")
    kind = config.get("model_type") or next(
        (d["model_type"] for name, d in DEFAULTS.items() if named == [name]), None
    )
    name = description.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if not isinstance(name, str):
        raise ValueError(f"{directory}: tokenizer_class is {name!r}, not a name; mend it")
    if kind in ("mistral", "olmo2"):  # tokenizer.json as it is, whatever is asked for
        return ""
    name = name.removesuffix("Fast")
    if kind == "qwen2" or (kind == "qwen3" and not name):  # qwen2: whatever is asked for
        return "Qwen2Tokenizer"
    return "" if name in AS_IT_IS else name


def special_tokens(directory: Path, description: dict, kind: str) -> tuple[dict[str, str], list]:
    """Return special tokens by name, as templates know them, and a list of those without one."""
    named = {}
    for name, value in (DEFAULT_NAMES.get(kind, {}) | description).items():
        other = name.endswith("_token") and isinstance(value, (str, dict))
        if other or (name in NAMES and value is not None):
            named[name] = _content(value, name, directory)
    extra = description.get("extra_special_tokens")
    extra = extra or description.get("additional_special_tokens") or []
    further = description.get("model_specific_special_tokens") or {}
    if isinstance(extra, dict) and isinstance(further, dict):
        further, extra = further | extra, []
    if not isinstance(extra, list) or not isinstance(further, dict):
        raise ValueError(
            f"{directory}: extra_special_tokens is {extra!r}, not a list, or "
            f"model_specific_special_tokens {further!r}, not an object; mend it"
        )
    named |= {name: _content(value, name, directory) for name, value in further.items()}
    return named, [_content(value, "extra_special_tokens", directory) for value in extra]


def _content(value, name: str, directory: Path) -> str:
    typed = isinstance(value, dict) and value.get("__type") == "AddedToken"
    content = value.get("content") if typed else value
    if not isinstance(content, str) or not content:
        raise ValueError(f"{directory}: {name} is {value!r}, not a token; mend tokenizer_config")
    if typed and any(value.get(k) for k in SPACES):
        raise ValueError(f"{directory}: {name} takes spaces around it (lstrip, rstrip); mend it")
    return content


def check_tokenizer(raw: dict, directory: Path, description: dict, kind: str) -> None:
    """Check that tokenizer.json (`raw`) splits text as it will in transformers.

    ValueError if it does not, or is no byte-level BPE. Of GPT2Tokenizer only a remark: there
    tokenizer.json splits text as the model was trained.
    """
    model, place = raw["model"], f"{directory}/tokenizer.json"
    parts = _steps(raw.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    decoders = [part["type"] for part in _steps(raw.get("decoder"))]
    if model.get("type") != "BPE" or kinds.count("ByteLevel") != 1 or decoders != ["ByteLevel"]:
        raise ValueError(f"{place} is not a byte-level BPE tokenizer; only those are supported")
    normalizers = {part["type"] for part in _steps(raw.get("normalizer"))}
    in_model = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    in_description = (
        "split_special_tokens",
        "auto_map",
        "fast_tokenizer_files",
        "fix_mistral_regex",
    )
    unsupported = {
        **{f"model.{field}": model.get(field) for field in in_model},
        **{field: description.get(field) for field in in_description},
        "pre_tokenizer Metaspace": "Metaspace" in kinds,
        "add_prefix_space": any(p.get("add_prefix_space") for p in [*parts, description]),
        "normalizer": normalizers - {"NFC", "NFD", "NFKC", "NFKD"},
        "lstrip, rstrip or single_word": any(t[k] for t in raw["added_tokens"] for k in SPACES),
    }
    if found := ", ".join(field for field, value in unsupported.items() if value):
        raise ValueError(
            f"{place} or tokenizer_config.json sets {found}, which is not supported: pieces of "
            "a prompt would not join into the whole; remove it or take another checkpoint"
        )
    _check_added(raw, directory, description, kind)
    _check_class(raw, directory, kind)


def _steps(part: dict | None) -> list[dict]:
    """Return the steps of a sequence of steps, or the one step there is."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for part in inner for step in _steps(part)]


def _check_added(raw: dict, directory: Path, description: dict, kind: str) -> None:
    """Check that all files agree on added tokens: transformers may go by another than ours."""
    own = {token["id"]: token for token in raw["added_tokens"]}
    vocabulary = raw["model"]["vocab"]
    listed = description.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(isinstance(t, dict) for t in listed.values()):
        raise ValueError(f"{directory}: added_tokens_decoder is no object of tokens; mend it")
    for index, token in listed.items():
        here = own.get(int(index)) if index.isdecimal() else None
        if here is None or any(here.get(field) != value for field, value in token.items()):
            raise ValueError(
                f"{directory}: token {index} of added_tokens_decoder in tokenizer_config.json is "
                "not that of tokenizer.json's added_tokens; make both equal, or remove the former"
            )
    ids = vocabulary | {token["content"]: index for index, token in own.items()}
    legacy = read_json(directory / "added_tokens.json") if not listed else {}
    for content, index in legacy.items():
        if ids.get(content) != index:
            raise ValueError(
                f"{directory}: added_tokens.json gives {content!r} the id {index}, tokenizer.json "
                "does not; make both equal"
            )
    new = sorted(index for index, token in own.items() if token["content"] not in vocabulary)
    partly = "added_tokens_decoder" in description and len(listed) != len(own)
    numbered = new == list(range(len(vocabulary), len(vocabulary) + len(new)))
    if kind in BUILT and (partly or not numbered):
        raise ValueError(
            f"{directory}: {kind}, which transformers builds, gives added tokens other ids "
            "than tokenizer.json, or none; set tokenizer_class to PreTrainedTokenizerFast"
        )


def _check_class(raw: dict, directory: Path, kind: str) -> None:
    """Check that the class that transformers builds has the steps of tokenizer.json."""
    place = f"{directory}/tokenizer_config.json"
    if kind and kind not in BUILT:
        raise ValueError(
            f"{place}: transformers builds a tokenizer_class {kind!r} in its own way; set it to "
            "PreTrainedTokenizerFast, which takes tokenizer.json as it is"
        )
    splits = [
        {field: value for field, value in step.items() if field != "trim_offsets"}
        for step in _steps(raw.get("pre_tokenizer"))
    ]
    steps = _steps(raw.get("normalizer")), splits
    if not kind or (steps == BUILT[kind] and not raw["model"].get("ignore_merges")):
        return
    if kind != "GPT2Tokenizer":
        raise ValueError(
            f"{directory}: transformers builds {kind} (by tokenizer_class, or model_type qwen2), "
            "which splits text otherwise than tokenizer.json; set tokenizer_class to "
            "PreTrainedTokenizerFast, or for qwen2 take Qwen2's own tokenizer.json"
        )
    print(  # SmolLM2: it was trained with tokenizer.json
        f"{place}: transformers 5 builds {kind} and splits text otherwise than tokenizer.json, "
        "which is used here and in what is saved",
        file=sys.stderr,
    )


def end_ids(directory: Path, id_of: Callable[[str], int | None]) -> tuple[int, ...]:
    """Return the ids that end a response: of generation_config.json, config.json, or eos_token.

    id_of: the id of a token, or None.
    """
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        if ids in (None, []):
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise ValueError(f"{directory / name}: eos_token_id is {ids!r}, not ids; mend it")
        return tuple(ids)
    description = describe(directory)
    named, _ = special_tokens(directory, description, class_of(directory, description))
    end = id_of(named["eos_token"]) if "eos_token" in named else None
    if end is None:
        raise ValueError(
            f"{directory} names no end-of-text token; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return (end,)
