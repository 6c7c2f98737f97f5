"""Reads ``{"name": ..., "arguments": {...}}`` as it arrives."""

from __future__ import annotations

import enum
import json
from typing import Any

# Deeper objects are no arguments of anything, and would exhaust the stack of JSON readers.
MAX_DEPTH = 128

_SPACE = " \t\n\r"
_CLOSES = {"{": "}", "[": "]"}


class Scan(enum.Enum):
    """How far a call is."""

    OPEN = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()


class _At(enum.Enum):
    """What comes next at the object's own level."""

    START = enum.auto()
    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    SCALAR = enum.auto()  # the rest of a number, true, false or null
    COMMA = enum.auto()


class CallScanner:
    """One JSON object with a name and arguments, in any order, among other members.

    Args:
        keys: names that the member with the arguments may have.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self.raw = ""  # all that was taken
        self.state = Scan.OPEN
        self.name: str | None = None
        self._at = _At.START
        self._stack = ""  # brackets that are open
        self._in_string = self._escaped = False
        self._key = ""
        self._from = 0  # where a key or value of the object's own level begins in raw
        self._arguments: slice | None = None  # of raw; without an end as long as they are open
        self._said = 0  # characters of the arguments

    @property
    def begun(self) -> bool:
        """Whether the name is there, and the arguments, maybe in part."""
        return self.name is not None and self._arguments is not None

    @property
    def rest(self) -> str:
        """What was taken after the arguments that :meth:`more` has told."""
        assert self._arguments is not None
        return self.raw[self._arguments.start + self._said :]

    def more(self) -> str:
        """What is new of the arguments; none before the call has begun."""
        if not self.begun:
            return ""
        assert self._arguments is not None
        text = self.raw[self._arguments][self._said :]
        self._said += len(text)
        return text

    def take(self, text: str) -> int:
        """Reads on; gives how many characters belong to the object. What breaks it does not."""
        before = len(self.raw)
        self.raw += text
        for position in range(before, len(self.raw)):
            self.state = self._next(self.raw[position], position)
            if self.state is not Scan.OPEN:
                self.raw = self.raw[: position + (self.state is Scan.DONE)]
                break
        if self.state is Scan.DONE and not (self.begun and is_object(self.raw)):
            self.state = Scan.BROKEN
        return len(self.raw) - before

    def _next(self, char: str, position: int) -> Scan:
        if self._in_string:
            return self._string(char, position)
        if len(self._stack) > 1:
            return self._nested(char, position)
        if char in _SPACE and self._at is not _At.SCALAR:
            return Scan.OPEN
        return self._own_level(char, position)

    def _string(self, char: str, position: int) -> Scan:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char < " ":
            return Scan.BROKEN
        elif char == '"':
            self._in_string = False
            if len(self._stack) == 1:
                return self._string_ends(position)
        return Scan.OPEN

    def _string_ends(self, position: int) -> Scan:
        """Of a key or a value of the object's own level."""
        is_key = self._at is not _At.VALUE
        self._at = _At.COLON if is_key else _At.COMMA
        if not is_key and self._key != "name":
            return Scan.OPEN
        read = _read(self.raw[self._from : position + 1])
        if not isinstance(read, str):
            return Scan.BROKEN
        if not is_key:
            if not read or not _is_unicode(read):
                return Scan.BROKEN
            self.name = read
            return Scan.OPEN
        self._key = read
        twice = (read == "name" and self.name is not None) or (
            read in self._keys and self._arguments is not None
        )
        return Scan.BROKEN if twice else Scan.OPEN

    def _nested(self, char: str, position: int) -> Scan:
        if char == '"':
            self._in_string = True
        elif char in _CLOSES:
            self._stack += char
            return Scan.BROKEN if len(self._stack) > MAX_DEPTH else Scan.OPEN
        elif char in "}]":
            if char != _CLOSES[self._stack[-1]]:
                return Scan.BROKEN
            self._stack = self._stack[:-1]
            if len(self._stack) == 1:
                self._at = _At.COMMA
                if self._key in self._keys:
                    self._arguments = slice(self._from, position + 1)
        return Scan.OPEN

    def _own_level(self, char: str, position: int) -> Scan:
        match self._at, char:
            case (_At.START, "{"):
                self._stack, self._at = "{", _At.FIRST_KEY
            case (_At.FIRST_KEY | _At.KEY, '"'):
                self._in_string, self._from = True, position
            case (_At.COLON, ":"):
                self._at = _At.VALUE
            case (_At.VALUE, _):
                return self._value(char, position)
            case (_At.COMMA | _At.SCALAR, ","):
                self._at = _At.KEY
            case (_At.FIRST_KEY | _At.COMMA | _At.SCALAR, "}"):
                return Scan.DONE
            case (_At.SCALAR, _):  # whether it is one shows when all is there
                self._at = _At.COMMA if char in _SPACE else _At.SCALAR
            case _:
                return Scan.BROKEN
        return Scan.OPEN

    def _value(self, char: str, position: int) -> Scan:
        """The first character of one."""
        needed = '"' if self._key == "name" else "{" if self._key in self._keys else char
        if char != needed or char in ",:}]":
            return Scan.BROKEN
        self._from = position
        if char == '"':
            self._in_string = True
        elif char in _CLOSES:
            self._stack += char
            if self._key in self._keys:
                self._arguments = slice(position, None)
        else:
            self._at = _At.SCALAR
        return Scan.OPEN


def _read(text: str) -> Any:
    """The value of JSON text; None if it has none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def is_object(text: str) -> bool:
    """Whether text is a JSON object."""
    return isinstance(_read(text), dict)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no response can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
