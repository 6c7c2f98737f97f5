"""Kinds of command-line options, and checks that name the option, the value and the remedy."""

from __future__ import annotations

from typing import Any

import typer

from vattn.cli.console import BadInput
from vattn.config import parse_bytes


def option(*names: str, panel: str, **how: Any) -> Any:
    """A typer option in a panel of the help; its text states the default."""
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **how)


def to_int(text: str) -> int:
    """The parser of whole numbers."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number") from error


def to_float(text: str) -> float:
    """The parser of numbers."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def whole(*names: str, panel: str, **how: Any) -> Any:
    """An option that is a whole number."""
    return option(*names, panel=panel, parser=to_int, metavar="N", **how)


def number(*names: str, panel: str, **how: Any) -> Any:
    """An option that is a number."""
    return option(*names, panel=panel, parser=to_float, metavar="X", **how)


def positive(name: str, value: int | None) -> int | None:
    """The value of an option, which must be positive if it is given."""
    if value is not None and value <= 0:
        raise BadInput(f"{name} {value} must be at least 1")
    return value


def size(name: str, value: str | None) -> int | None:
    """The value of an option in bytes, if it is given."""
    if value is None:
        return None
    try:
        return parse_bytes(value, name)
    except ValueError as error:
        raise BadInput(str(error)) from error
