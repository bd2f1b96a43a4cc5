"""Make command-line flags from a dataclass: one per field, with its help line and default."""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NoReturn, get_args, get_origin

# Flags for which "" is refused: it would mean the current directory, or a flag that is left out.
PATHS = ("model", "data", "out", "resume", "eval_data", "json", "positions")

# Names in other trainers (TRL, verl, Hugging Face) and ours.
ELSEWHERE = {
    "--lr": "--learning-rate", "--num-generations": "--group-size", "--beta": "--kl-beta",
    "--max-completion-length": "--max-response", "--max-steps": "--steps",
    "--output-dir": "--out", "--dataset": "--data", "--model-name-or-path": "--model",
    "--lora-r": "--lora-rank",
}  # fmt: skip


def knob(default, help: str, choices: tuple[str, ...] | None = None):
    """Declare a field of a dataclass that becomes a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


@contextmanager
def as_flag(name: str, instead: str) -> Iterator[None]:
    """Let errors about one flag name another, whose value is read in the same way."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        said = re.sub(rf"{flag(name)}(?![\w-])", flag(instead), str(error))
        raise type(error)(said) from None


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors do not print the usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


def make_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser that keeps the line breaks of description and epilog."""
    return _Parser(
        usage="%(prog)s [--flag value ...]", description=description, epilog=epilog,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_fields(
    parser: argparse.ArgumentParser, record: type, only: Sequence[str] | None = None,
    headings: Mapping[str, str] = MappingProxyType({}), shown: int = 99,
) -> None:  # fmt: skip
    """Add a flag for each field (of those in `only`) of a dataclass of knobs; no default is set.

    headings: first field of a group -> its heading; --help lists the first `shown` groups.
    """
    group, groups = parser, 0
    for field in dataclasses.fields(record):
        if only is not None and field.name not in only:
            continue
        if field.name in headings:
            group, groups = parser.add_argument_group(headings[field.name]), groups + 1
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        text = f"{field.metadata['help']} (default: {' '.join(map(str, default)) or 'none'})"
        options = dict(help=text if groups <= shown else argparse.SUPPRESS)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is tuple:
            options |= dict(nargs="+", type=get_args(field.type)[0])
        elif field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        else:
            options |= dict(type=field.type, metavar=field.type.__name__.upper())
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, **options)


def parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Exit on an unknown flag, naming the nearest one, or an empty path."""
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = {o: action for action in parser._actions for o in action.option_strings}
        name = unknown[0].split("=")[0].replace("_", "-")
        near = [ELSEWHERE[name]] if ELSEWHERE.get(name) in options else []
        near += difflib.get_close_matches(name, options.keys() - {"--help"}, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        before = arguments[max(0, arguments.index(unknown[0]) - 1)]
        if isinstance(options.get(before), argparse.BooleanOptionalAction):
            hint = f"{' or '.join(options[before].option_strings)} takes no value"
        sys.exit(f"error: unknown argument {unknown[0]}; {hint}")
    for name, value in vars(values).items():
        if name in PATHS and "" in (value if isinstance(value, list) else [value]):
            sys.exit(f"error: {flag(name)} is empty; give a path, or leave the flag out")
    return values


def read_bytes(text: str) -> float:
    """Return the bytes in 80GB, 80GiB or 80 (GB). ValueError when it is none of these."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) *(gib|gb)?", text.strip().lower())
    if not found:
        raise ValueError(f"{text!r} is no amount of memory; write 80GB or 80GiB")
    return float(found[1]) * (2**30 if found[2] == "gib" else 1e9)
