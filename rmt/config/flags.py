"""Command-line flags from a dataclass: one per field, with its help line and default."""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn, get_args, get_origin

# Where "" would be the current directory, or as if the flag was left out.
PLACES = ("model", "data", "out", "resume", "eval_data", "json", "positions")


def knob(default, help: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


def make_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    return _Parser(
        usage="%(prog)s [--flag value ...]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_fields(
    parser: argparse.ArgumentParser,
    record: type,
    only: Sequence[str] | None = None,
    headings: Mapping[str, str] = MappingProxyType({}),
    shown: int = 99,
) -> None:
    """Add a flag per field (or those of `only`) of a dataclass made of knobs; unset: absent.

    headings: first field of a group -> its heading; --help lists the first `shown` groups.
    """
    group, groups = parser, 0
    for field in dataclasses.fields(record):
        if only is not None and field.name not in only:
            continue
        if field.name in headings:
            group, groups = parser.add_argument_group(headings[field.name]), groups + 1
        text = f"{field.metadata['help']} (default: {_show(field.default)})"
        options = dict(help=text if groups <= shown else argparse.SUPPRESS)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is tuple:
            options |= dict(nargs="+", type=get_args(field.type)[0])
        else:
            options |= dict(type=field.type, choices=field.metadata["choices"])
            options |= {} if field.metadata["choices"] else {"metavar": field.type.__name__.upper()}
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, **options)


def _show(default) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return shown or "none"


def parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """parse_args whose error about an unknown flag names the nearest one there is."""
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = {o: action for action in parser._actions for o in action.option_strings}
        near = difflib.get_close_matches(unknown[0].split("=")[0], options.keys() - {"--help"}, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        before = arguments[max(0, arguments.index(unknown[0]) - 1)]
        if isinstance(options.get(before), argparse.BooleanOptionalAction):
            hint = f"{' or '.join(options[before].option_strings)} takes no value"
        sys.exit(f"error: unknown argument {unknown[0]}; {hint}")
    for name in (name for name in PLACES if "" in _as_tuple(getattr(values, name, None))):
        sys.exit(f"error: {flag(name)} is empty; give a path, or leave the flag out")
    return values


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,)


def read_bytes(text: str) -> float:
    """80GB, 80GiB or 80 (GB) -> bytes."""
    units = {"gib": 2**30, "gb": 1e9, "": 1e9}
    number = text.lower().rstrip("gib ").strip()
    try:
        size = float(number) * units[text.lower().strip()[len(number) :].strip()]
    except (ValueError, KeyError):
        size = math.inf
    if not 0 <= size < math.inf:
        raise ValueError(f"{text!r} is no amount of memory; write 80GB or 80GiB")
    return size
