"""Calls that the request asks for: structured outputs see to it that the text is one."""

from __future__ import annotations

from vattn.server.tools.base import CallBegins, CallEnds, CallGoesOn, Piece, Said
from vattn.server.tools.scan import CallScanner, Scan, is_object

KEY = "parameters"


class NamedParser:
    """The whole text is the arguments of one function: ``tool_choice`` names it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text = ""

    def feed(self, text: str) -> list[Piece]:
        """See :class:`~vattn.server.tools.base.ToolParser`."""
        if not text:
            return []
        pieces: list[Piece] = [] if self._text else [CallBegins(self._name)]
        self._text += text
        return [*pieces, CallGoesOn(text)]

    def finish(self) -> list[Piece]:
        """See there."""
        if not self._text:
            return []
        is_whole = is_object(self._text)
        return [CallEnds(complete=is_whole, is_cut=not is_whole)]


class ListParser:
    """The whole text is an array of ``{"name": ..., "parameters": {...}}``."""

    def __init__(self) -> None:
        self._scanner: CallScanner | None = None
        self._named = False
        self._between = ""  # not in an object, and text if it turns out that no object follows

    def feed(self, text: str) -> list[Piece]:
        """See :class:`~vattn.server.tools.base.ToolParser`."""
        pieces: list[Piece] = []
        while text:
            if self._scanner is None:
                before, brace, after = text.partition("{")
                self._between += before
                if not brace:
                    break
                text = brace + after
                self._scanner, self._named = CallScanner((KEY,)), False
            text = self._call(self._scanner, text, pieces)
        return pieces

    def _call(self, scanner: CallScanner, text: str, pieces: list[Piece]) -> str:
        """Reads on in an object; gives what is after it."""
        text = text[scanner.take(text) :]
        if scanner.begun and not self._named:
            assert scanner.name is not None
            self._named, self._between = True, ""
            pieces.append(CallBegins(scanner.name))
        if more := scanner.more():
            pieces.append(CallGoesOn(more))
        if scanner.state is Scan.DONE:
            self._scanner = None
            pieces.append(CallEnds(complete=True))
        elif scanner.state is Scan.BROKEN:
            self._break(scanner, pieces)
        return text

    def _break(self, scanner: CallScanner, pieces: list[Piece], *, is_cut: bool = False) -> None:
        self._scanner = None
        if self._named and is_cut:
            pieces.append(CallEnds(complete=False, is_cut=True))
        elif self._named:
            pieces.append(CallEnds(complete=False, raw=scanner.raw, rest=scanner.rest))
        else:
            pieces.append(Said(self._between + scanner.raw))
            self._between = ""

    def finish(self) -> list[Piece]:
        """See :class:`~vattn.server.tools.base.ToolParser`."""
        pieces: list[Piece] = []
        if self._scanner is not None:
            self._break(self._scanner, pieces, is_cut=True)
        elif self._between.strip("[], \t\r\n"):
            pieces.append(Said(self._between))
        return pieces
