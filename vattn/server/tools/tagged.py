"""Calls as JSON objects after a tag, as Hermes and Llama models write them."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from vattn.server.tools.base import CallBegins, CallEnds, CallGoesOn, Piece, Said
from vattn.server.tools.scan import CallScanner, Scan


@dataclass(frozen=True)
class Tags:
    """How calls are marked.

    Args:
        begin: what comes before a call.
        end: what comes after it; may be missing.
        keys: names of the member with the arguments.
        bare: at the start of the text, and after another call, ``begin`` may be missing.
    """

    begin: str
    end: str
    keys: tuple[str, ...]
    bare: bool = False


class _In(enum.Enum):
    TEXT = enum.auto()
    TAG = enum.auto()  # after begin, before the object
    CALL = enum.auto()
    BETWEEN = enum.auto()  # where end may come, and a bare call


class TaggedParser:
    """A :class:`~vattn.server.tools.base.ToolParser` of one kind of tags.

    White space around calls belongs to them.
    """

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        # White space that a tag may follow, and as much of the tag as there is.
        prefixes = "|".join(re.escape(tags.begin[:n]) for n in range(len(tags.begin) - 1, 0, -1))
        self._may_begin = re.compile(rf"(?:{prefixes})?\Z")
        self._end = re.compile(rf"\s*(?:{re.escape(tags.end)})?\s*")
        self._in = _In.BETWEEN if tags.bare else _In.TEXT
        self._text = ""  # that is not decided about
        self._raw = ""  # of a call, before its object
        self._after_call = False
        self._scanner = CallScanner(tags.keys)
        self._named = False  # the call's begin was told

    def feed(self, text: str) -> list[Piece]:
        """See :class:`~vattn.server.tools.base.ToolParser`."""
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """See :class:`~vattn.server.tools.base.ToolParser`."""
        pieces: list[Piece] = []
        if self._in is _In.CALL:
            self._break(pieces, is_cut=True)
        if self._in is _In.BETWEEN:
            self._leave_between()
        left, self._raw, self._text = self._raw + self._text, "", ""
        if left.strip() or not self._after_call:
            self._say(left, pieces)
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Decides about some of the text; False if that needs more of it."""
        match self._in:
            case _In.TEXT:
                return self._step_text(pieces)
            case _In.TAG:
                return self._step_tag(pieces)
            case _In.CALL:
                return self._step_call(pieces)
            case _In.BETWEEN:
                return self._step_between()

    def _step_text(self, pieces: list[Piece]) -> bool:
        begin = self._tags.begin
        at = self._text.find(begin)
        if at >= 0:
            keep = len(self._text[:at].rstrip())
            self._say(self._text[:keep], pieces)
            self._open(self._text[keep : at + len(begin)], _In.TAG, at + len(begin))
            return True
        found = self._may_begin.search(self._text)
        assert found is not None
        keep = len(self._text[: found.start()].rstrip())
        self._say(self._text[:keep], pieces)
        self._text = self._text[keep:]
        return False

    def _step_tag(self, pieces: list[Piece]) -> bool:
        blank = len(self._text) - len(self._text.lstrip())
        if blank == len(self._text):
            return False
        self._raw += self._text[:blank]
        self._text = self._text[blank:]
        if self._text[0] == "{":
            self._in = _In.CALL
        else:
            self._say(self._raw, pieces)
            self._raw, self._in = "", _In.TEXT
        return True

    def _step_call(self, pieces: list[Piece]) -> bool:
        scanner = self._scanner
        self._text = self._text[scanner.take(self._text) :]
        if scanner.begun:
            if not self._named:
                assert scanner.name is not None
                self._named = True
                pieces.append(CallBegins(scanner.name))
            if more := scanner.more():
                pieces.append(CallGoesOn(more))
        if scanner.state is Scan.BROKEN:
            self._break(pieces)
        elif scanner.state is Scan.DONE:
            pieces.append(CallEnds(complete=True))
            self._raw, self._after_call, self._in = "", True, _In.BETWEEN
        return scanner.state is not Scan.OPEN

    def _step_between(self) -> bool:
        """After a call, or at the start of a text that may be one."""
        found = self._end.match(self._text)
        assert found is not None
        rest = self._text[found.end() :]
        begin, end = self._tags.begin, self._tags.end
        if not rest or begin.startswith(rest) or end.startswith(rest):
            return False
        if self._tags.bare and rest[0] == "{":
            self._open(self._text[: found.end()], _In.CALL, found.end())
            return True
        if rest.startswith(begin):
            after = found.end() + len(begin)
            self._open(self._text[:after], _In.TAG, after)
            return True
        self._leave_between()
        return True

    def _leave_between(self) -> None:
        """No call follows: what ends one is no text, but what separates two is."""
        end = self._tags.end
        if not self._tags.bare and self._text.lstrip().startswith(end):
            self._text = self._text.lstrip()[len(end) :]
        self._in = _In.TEXT

    def _open(self, raw: str, state: _In, taken: int) -> None:
        self._raw, self._in, self._text = raw, state, self._text[taken:]
        self._scanner, self._named = CallScanner(self._tags.keys), False

    def _break(self, pieces: list[Piece], *, is_cut: bool = False) -> None:
        """The object is none: what was not told of it is text, unless only its end is missing."""
        raw = self._raw + self._scanner.raw
        if self._named and is_cut:
            pieces.append(CallEnds(complete=False, is_cut=True))
        elif self._named:
            pieces.append(CallEnds(complete=False, raw=raw, rest=self._scanner.rest))
            self._after_call = False
        else:
            self._say(raw, pieces)
        self._raw, self._in = "", _In.TEXT

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Said(text))
            self._after_call = False
