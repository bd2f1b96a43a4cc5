"""Text to ids and back, with two guarantees that ordinary use of a tokenizer does not give.

1. Text is never read as control: `<|im_end|>` inside a document is nine ordinary characters.
2. A token is its exact bytes, so that a prediction can be compared without decoding.

Chat templates are rendered with jinja2 (which torch already needs) from the template that comes
with the checkpoint, around a placeholder for the user's text.
"""

import json
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
PLACEHOLDER = "\ue000"  # a private-use character: no template and no tokenizer has a use for it


class Tokenizer:
    """A byte-level BPE tokenizer of a Hugging Face directory (tokenizer.json)."""

    def __init__(self, directory: Path):
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; copy tokenizer.json of the model's Hugging Face "
                "repository there"
            )
        try:
            self._control = HFTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        self._control.no_truncation()  # some checkpoints store the limits of their last use
        self._control.no_padding()
        raw = json.loads(self._control.to_str())
        self._added = {entry["id"]: entry["content"] for entry in raw["added_tokens"]}
        # The same tokenizer without its added tokens cannot produce a control token from text.
        self._text = HFTokenizer.from_str(
            json.dumps(raw | {"added_tokens": [], "post_processor": None})
        )
        self.directory = directory
        self.vocab_size = 1 + max(self._control.get_vocab(with_added_tokens=True).values())
        self._config = _read_json(directory / "tokenizer_config.json")
        self.stop_ids = self._find_stop_ids()
        self.think_close_id = self._control.token_to_id(THINK_CLOSE)  # None: several text tokens
        if "ByteLevel" not in json.dumps([raw.get("decoder"), raw.get("pre_tokenizer")]):
            raise ValueError(f"{path} is not a byte-level BPE tokenizer; only those are supported")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens in it are spelled out as text."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of a piece of a template, in which `<|im_start|>` is one token. Trusted text only."""
        return self._control.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Readable text, control tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: list[int]) -> bytes:
        """The exact bytes that these tokens stand for."""
        return b"".join(self._token_bytes(index) for index in ids)

    def _token_bytes(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].encode("utf-8")
        piece = self._control.id_to_token(index)
        if piece is None:
            raise ValueError(f"token {index} is outside the vocabulary of {self.vocab_size}")
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)

    @cached_property
    def begin_ids(self) -> list[int]:
        """What this model puts before a raw document: R1 and Llama have a BOS, Qwen3 has none."""
        bos = self._special("bos_token")
        wanted = self._config.get("add_bos_token")
        if wanted is None:  # Llama 3 has no such field, its post-processor says it
            wanted = bos in self._control.encode("").tokens
        return self.encode_with_control(bos) if wanted and bos else []

    def chat_parts(self, system: str | None = None) -> tuple[list[int], list[int]]:
        """Ids before and after the text of a user's message, up to where the assistant starts.

        Equal to the checkpoint's chat_template with add_generation_prompt=True. ValueError when
        the checkpoint has no template.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": PLACEHOLDER})
        parts = self.render(messages).split(PLACEHOLDER)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template of {self.directory} prints the user's text {len(parts) - 1} "
                "times instead of once; take another instruct checkpoint"
            )
        return self.encode_with_control(parts[0]), self.encode_with_control(parts[1])

    def render(self, messages: list[dict], **options) -> str:
        """The chat template of this checkpoint, as transformers' apply_chat_template renders it."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse_messages
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: self._special(name) for name in names if self._special(name)}
        arguments = {"messages": messages, "add_generation_prompt": True} | special | options
        return environment.from_string(self._chat_template).render(**arguments)

    @cached_property
    def _chat_template(self) -> str:
        beside = self.directory / "chat_template.jinja"
        if beside.is_file():
            return beside.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if not isinstance(template, str):
            raise ValueError(
                f"{self.directory} has no chat template; reinforcement mid-training starts from "
                "an instruct model: add chat_template.jinja or take the instruct checkpoint"
            )
        return template

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        return value["content"] if isinstance(value, dict) else value

    def _find_stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: generation_config.json's list, else the eos token."""
        ids = _read_json(self.directory / "generation_config.json").get("eos_token_id")
        if ids is None and self._special("eos_token") is not None:
            ids = self._control.token_to_id(self._special("eos_token"))
        if ids is None:
            raise ValueError(
                f"{self.directory} names no end-of-text token; set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json"
            )
        return tuple(ids) if isinstance(ids, list) else (ids,)


def _refuse_messages(reason: str) -> None:
    raise ValueError(f"the chat template of this checkpoint refuses these messages: {reason}")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's map from bytes to printable characters (Radford et al. 2019)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()
