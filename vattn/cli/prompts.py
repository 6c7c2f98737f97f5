"""The prompts of ``vattn generate``, from where the user has them."""

from __future__ import annotations

import sys
from pathlib import Path

from vattn.cli.console import BadInput


def read_prompts(text: str | None, prompt: str | None, file: Path | None) -> tuple[str, ...]:
    """The prompts that were given in one of the ways to give them; none if there are none.

    Raises:
        BadInput: given in two ways, empty or unreadable.
    """
    if sum(source is not None for source in (text, prompt, file)) > 1:
        raise BadInput("give one of PROMPT, --prompt and --prompts, not several")
    if file is not None:
        name = "standard input" if str(file) == "-" else f"--prompts {file}"
        lines = tuple(line for line in _read(file, name).splitlines() if line.strip())
        if not lines:
            raise BadInput(f"{name} holds no prompt; write one in each line")
        return lines
    if text is None and prompt is None:
        return ()
    given = prompt if text is None else text
    assert given is not None
    if text == "-":
        given = _read(Path("-"), "standard input").rstrip("\n")
    if not given.strip():
        raise BadInput(f"the prompt {given!r} is empty; give some text, or none at all for a demo")
    return (given,)


def _read(file: Path, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode()
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start}); convert it") from error
