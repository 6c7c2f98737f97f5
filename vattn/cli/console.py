"""How commands talk: text on stdout, everything else on stderr, each failure in one line."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# A model's text must not steer the terminal: all control characters but newline and tab.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class CliError(Exception):
    """A failure that is told in one line."""

    exit_code = 1


class BadInput(CliError):
    """The user's input cannot be used; the message names the value and the remedy."""

    exit_code = 2


def one_line(error: object, limit: int = 400) -> str:
    """A message of another library without its line breaks, and not endless."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def notes() -> Console:
    """The console for all that is not generated text."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints ``error: message`` as one line on stderr and exits."""
    from rich.markup import escape

    line = escape(" ".join(message.splitlines()))
    notes().print(f"[bold red]error:[/] {line}", soft_wrap=True)
    raise SystemExit(exit_code)


class Page:
    """Writes prompts to stderr and text to stdout, so that where both show they read as one.

    Each stream that is a terminal is wrapped between words; others get the text as it is.

    Args:
        width: columns of the terminal.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = ""
        self._is_first = True
        self.is_joint = _same_place(sys.stdout, sys.stderr)

    def begin(self) -> None:
        """Begins an output; an empty line parts it from the one before where no title does."""
        if not self._is_first and not self.is_joint:
            _write(sys.stdout, "\n")
        self._is_first = False

    def prompt(self, text: str) -> None:
        """What the model was given, in bold; its continuation stands behind it."""
        bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        _write(sys.stderr, bold + self._wrap(text, sys.stderr) + plain)
        if not self.is_joint:
            self._space, self._column = "", 0
            _write(sys.stderr, "\n")

    def text(self, text: str) -> None:
        """What the model wrote, in whole words."""
        _write(sys.stdout, self._wrap(text, sys.stdout))

    def end(self) -> None:
        """Ends an output."""
        self._space, self._column = "", 0
        _write(sys.stdout, "\n")

    def _wrap(self, text: str, stream: TextIO) -> str:
        if not stream.isatty():
            return text
        out = []
        for part in re.findall(r"\n|[^\S\n]+|\S+", CONTROL.sub("", text)):
            if part == "\n":
                self._space, self._column = "", 0
                out.append(part)
            elif part.isspace():
                self._space += part
            else:
                if self._column and self._column + len(self._space) + len(part) > self._width:
                    out.append("\n" + part)
                    self._column = len(part)
                else:
                    out.append(self._space + part)
                    self._column += len(self._space) + len(part)
                self._space = ""
        return "".join(out)


class Words:
    """Holds text that comes in pieces back until a word is whole, so that lines break between them.

    Args:
        limit: characters that are held back at most, for scripts that write no spaces.
    """

    def __init__(self, limit: int = 40) -> None:
        self._limit = limit
        self._held = ""

    def add(self, text: str) -> str:
        """Takes a piece; the text that can be shown now."""
        self._held += text
        if len(self._held) > self._limit:
            return self.rest()
        end = max(self._held.rfind(space) for space in " \n\t") + 1
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def rest(self) -> str:
        """All that is held back."""
        shown, self._held = self._held, ""
        return shown


def _same_place(a: TextIO, b: TextIO) -> bool:
    """Whether both streams go to one terminal, pipe or file."""
    try:
        first, second = os.fstat(a.fileno()), os.fstat(b.fileno())
    except OSError:  # a stream of a test has no file
        return False
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _write(stream: TextIO, text: str) -> None:
    if text:
        stream.write(text)
        stream.flush()
