"""Tool calls in a model's text: what parsers give, and how the pieces become a message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Said:
    """Text that is part of no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a function; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallGoesOn:
    """More of the arguments of the call that began last, as JSON text."""

    arguments: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The call that began last is over.

    Args:
        complete: it is well-formed, its arguments are a JSON object.
        is_cut: it is not complete because the text ended within it; what there is of it counts.
        raw: all of its text, tags included; only of calls that are malformed.
        rest: the part of ``raw`` after the arguments; only of calls that are malformed.
    """

    complete: bool
    is_cut: bool = False
    raw: str = ""
    rest: str = ""


Piece: TypeAlias = "Said | CallBegins | CallGoesOn | CallEnds"


class ToolParser(Protocol):
    """Finds the calls in one text as it arrives; of one use.

    However the text is cut, the pieces are the same once neighbours of one kind are joined. A call
    that turns out malformed before its arguments begin, or that the end of the text cuts off there,
    is text; later, it cannot be taken back and ends incomplete.
    """

    def feed(self, text: str) -> list[Piece]:
        """What is certain now that ``text`` has arrived as well."""
        ...

    def finish(self) -> list[Piece]:
        """What is left, now that the text is over."""
        ...


@dataclass(frozen=True)
class FunctionCall:
    """A function and its arguments, a JSON object as text; the beginning of one if it was cut."""

    name: str
    arguments: str
    is_cut: bool = False


@dataclass
class ParsedText:
    """A whole text. ``content`` is all of it that is in no call."""

    content: str = ""
    calls: list[FunctionCall] = field(default_factory=list)


def parse_whole(parser: ToolParser, text: str) -> ParsedText:
    """A whole text by a fresh parser; malformed calls are content."""
    return gather([*parser.feed(text), *parser.finish()])


def gather(pieces: Iterable[Piece]) -> ParsedText:
    """Puts the pieces of a whole text together; malformed calls are content."""
    parsed, name, arguments = ParsedText(), "", ""
    for piece in pieces:
        match piece:
            case Said(text):
                parsed.content += text
            case CallBegins(name):
                arguments = ""
            case CallGoesOn(more):
                arguments += more
            case CallEnds(complete=complete, is_cut=is_cut) if complete or is_cut:
                parsed.calls.append(FunctionCall(name, arguments, is_cut))
            case CallEnds(raw=raw):
                parsed.content += raw
    return parsed
