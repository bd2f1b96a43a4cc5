"""Command-line flags from a dataclass: one per field, with its help line and default."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args, get_origin


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
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_fields(
    parser: argparse.ArgumentParser, record: type, only: Sequence[str] | None = None
) -> None:
    """One flag per field (or those of `only`) of a dataclass made of knobs; unset: absent."""
    for field in dataclasses.fields(record):
        if only is not None and field.name not in only:
            continue
        options = dict(help=f"{field.metadata['help']} (default: {_show(field.default)})")
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is tuple:
            options |= dict(nargs="+", type=get_args(field.type)[0])
        else:
            options |= dict(type=field.type, choices=field.metadata["choices"])
            options |= {} if field.metadata["choices"] else {"metavar": field.type.__name__.upper()}
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, **options)


def _show(default) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return shown or "none"


def parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """parse_args whose error about an unknown flag names the nearest one there is."""
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        sys.exit(f"error: unknown argument {unknown[0]}; {hint}")
    return values


def read_bytes(text: str) -> float:
    """80GB, 80GiB or 80 (GB) -> bytes."""
    units = {"gib": 2**30, "gb": 1e9, "": 1e9}
    number = text.lower().rstrip("gib ").strip()
    try:
        return float(number) * units[text.lower().strip()[len(number) :].strip()]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no amount of memory; write 80GB or 80GiB") from None
