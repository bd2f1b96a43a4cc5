"""Turn text into ids and back, with two guarantees that a tokenizer alone does not give.

1. Text never becomes a control token: `<|im_end|>` inside a document is ordinary characters.
2. Each token has exact bytes, so that a prediction can be compared without decoding.

Prompts are the checkpoint's own chat template around a placeholder for the user's text.
"""

import json
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from models.chat_template import find_template, render_template
from models.tokenizer_files import check_tokenizer, class_of, describe, end_ids, special_tokens

THINK_CLOSE = "</think>"
PLACEHOLDER = "\ue000"  # a private-use character, which no template or tokenizer uses


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
        self.directory = directory
        self._description = describe(directory)
        kind = class_of(directory, self._description)
        with _readable(path):
            self._control = HFTokenizer.from_file(str(path))
            self._control.no_truncation()  # some checkpoints store the limits of their last use
            self._control.no_padding()
            raw = json.loads(self._control.to_str())
            pieces = self._control.get_vocab(with_added_tokens=False)
        if len(owner := {index: piece for piece, index in pieces.items()}) < len(pieces):
            both = next((piece, owner[i]) for piece, i in pieces.items() if owner[i] != piece)
            raise ValueError(
                f"{path} gives one id to two tokens, {both[0]!r} and {both[1]!r}: it is damaged; "
                "fetch it again"
            )
        check_tokenizer(raw, directory, self._description, kind)
        self._special, extra = special_tokens(directory, self._description, kind)
        with _readable(path):
            if unmarked := self._unmarked([*self._special.values(), *extra], raw, path):
                self._control.add_special_tokens(unmarked)
                raw = json.loads(self._control.to_str())
            self._text = HFTokenizer.from_str(json.dumps(_without_control(raw)))
            self.begin_ids = self._find_begin()
        self._added = {entry["id"]: entry["content"] for entry in raw["added_tokens"]}
        self.control_ids = {entry["id"] for entry in raw["added_tokens"] if _is_control(entry)}
        self._refuse_control_from_text(raw["added_tokens"], path)
        self.vocab_size = 1 + max(self._control.get_vocab(with_added_tokens=True).values())
        self.stop_ids = end_ids(directory, self._control.token_to_id)
        if max(self.stop_ids) >= self.vocab_size:
            raise ValueError(
                f"{directory}: eos_token_id {max(self.stop_ids)} is outside the vocabulary of "
                f"{self.vocab_size}; generation_config.json or config.json is of another model"
            )
        self.think_close_id = self._control.token_to_id(THINK_CLOSE)  # None: several text tokens

    def _unmarked(self, named: list[str], raw: dict, path: Path) -> list[AddedToken]:
        """Return tokens that other files name as special and tokenizer.json does not."""
        added, unmarked = {entry["content"]: entry for entry in raw["added_tokens"]}, []
        for content in dict.fromkeys(named):
            if self._control.token_to_id(content) is None:
                names = {k for k, v in self._special.items() if v == content}
                if names & self._description.keys() or not names:  # else: a class's default
                    raise ValueError(
                        f"{path} has no token {content!r}, which tokenizer_config.json or "
                        "special_tokens_map.json names; add it there or do not name it"
                    )
            elif not (entry := added.get(content, {})).get("special"):
                unmarked.append(AddedToken(content, normalized=entry.get("normalized", False)))
        return unmarked

    def _find_begin(self) -> list[int]:
        """Return the ids that go before a raw document: R1 and Llama have a BOS, Qwen3 none.

        transformers 5 takes them from the post-processor, not from add_bos_token.
        """
        plain = self._control.encode("a", add_special_tokens=False).ids
        whole = self._control.encode("a").ids
        starts = range(len(whole) - len(plain) + 1)
        return whole[: next((n for n in starts if whole[n : n + len(plain)] == plain), 0)]

    def _refuse_control_from_text(self, added: list[dict], path: Path) -> None:
        for entry in added:
            if _is_control(entry) and entry["id"] in self.encode(entry["content"]):
                raise ValueError(
                    f"{path} makes the control token {entry['content']!r} of plain text; take a "
                    "tokenizer whose merges do not"
                )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; what looks like a control token is spelled out.

        ValueError for half of a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is half of a pair or a byte that is not "
                "UTF-8; mend the text, or its encoding"
            ) from None
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_with_control(self, text: str) -> list[int]:
        """Return the ids of trusted text, such as a template: `<|im_start|>` is one token."""
        return self._control.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return readable text with control tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: list[int]) -> bytes:
        """Return the exact bytes of tokens. ValueError for an id outside the vocabulary."""
        return b"".join(self._token_bytes(index) for index in ids)

    def _token_bytes(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].encode("utf-8")
        piece = self._control.id_to_token(index)
        if piece is None and not 0 <= index < self.vocab_size:
            raise ValueError(f"token {index} is outside the vocabulary of {self.vocab_size}")
        try:
            return bytes(BYTE_OF_CHARACTER[c] for c in piece or "")  # an unused id has no bytes
        except KeyError:  # like the decoder of tokenizers: a piece outside the alphabet is itself
            return piece.encode("utf-8")

    def chat_parts(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after a user's text, up to where the assistant starts.

        They are those of the checkpoint's chat template with add_generation_prompt=True.
        ValueError if it has no template, or one that does not print the text once.
        """
        parts = self.render([{"role": "user", "content": PLACEHOLDER}]).split(PLACEHOLDER)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template of {self.directory} prints the user's text {len(parts) - 1} "
                "times instead of once; take another instruct checkpoint"
            )
        return self.encode_with_control(parts[0]), self.encode_with_control(parts[1])

    def chat(self, text: str) -> list[int]:
        """Return the ids of a chat about a text, as in transformers: a template may trim the text.

        A text that looks like control tokens to transformers is put between `chat_parts` instead.
        """
        before, after = self.chat_parts()
        ids = self.encode(text)
        if ids == self.encode_with_control(text):
            return self.encode_with_control(self.render([{"role": "user", "content": text}]))
        return before + ids + after

    def render(self, messages: list[dict], **options) -> str:
        """Render the chat template of this checkpoint, as transformers' apply_chat_template."""
        arguments = {"messages": messages, "add_generation_prompt": True}
        arguments |= {"tools": None, "documents": None} | self._special | options
        return render_template(self.directory, self._chat_template, **arguments)

    @cached_property
    def _chat_template(self) -> str:
        return find_template(self.directory, self._description)


@contextmanager
def _readable(path: Path):
    """Turn what the Rust side raises into ValueError: an Exception, or a panic, which is none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None


def _is_control(entry: dict) -> bool:
    """Tell control tokens, special or written like <think>, from added words of a text."""
    return entry["special"] or bool(re.fullmatch(r"<.*>|\[.*\]", entry["content"], re.DOTALL))


def _without_control(raw: dict) -> dict:
    """Return a tokenizer.json that cannot make a control token from text."""
    words = [entry for entry in raw["added_tokens"] if not _is_control(entry)]
    # A word keeps its id because it is in the vocabulary: others would be numbered anew.
    vocabulary = raw["model"]["vocab"] | {entry["content"]: entry["id"] for entry in words}
    model = raw["model"] | {"vocab": vocabulary}
    return raw | {"added_tokens": words, "model": model, "post_processor": None}


def _byte_of_character() -> dict[str, int]:
    """Invert GPT-2's map from bytes to printable characters (Radford et al. 2019)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()
