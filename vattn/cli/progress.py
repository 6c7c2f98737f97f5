"""How far a run over many prompts is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 1.0


class Lines:
    """A line whenever prompts are done, not too often; nothing at all if ``is_silent``.

    Args:
        console: for the lines.
        prompts: of the run.
        is_silent: the text itself shows the progress.
    """

    def __init__(self, console: Console, prompts: int, *, is_silent: bool = False) -> None:
        self._console = console
        self._prompts = prompts
        self._is_silent = is_silent
        self._told, self._next_s = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, done: int, share: float, tokens_per_s: float) -> None:
        """Tells how far the run is.

        Args:
            done: prompts whose samples have all ended.
            share: of the work, between 0 and 1.
            tokens_per_s: so far.
        """
        now = time.monotonic()
        if self._is_silent or done == self._told or (now < self._next_s and done < self._prompts):
            return
        self._told, self._next_s = done, now + LINE_EVERY_S
        line = f"{done} of {self._prompts} prompts, {tokens_per_s:.0f} tokens/s"
        self._console.print(line, style="dim")

    def hide(self) -> None:
        """Makes room for text."""


class Bar:
    """A bar that is there while no text is printed, and leaves no trace.

    Args:
        console: a terminal.
        prompts: of the run.
    """

    def __init__(self, console: Console, prompts: int) -> None:
        self._progress = RichProgress(
            TextColumn("generating"),
            BarColumn(),
            TextColumn("{task.fields[done]} of {task.fields[prompts]} prompts"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=1.0, done=0, prompts=prompts, speed=0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, done: int, share: float, tokens_per_s: float) -> None:
        """As :meth:`Lines.update`; shows the bar if it was hidden."""
        self._progress.start()
        self._progress.update(self._task, completed=share, done=done, speed=tokens_per_s)

    def hide(self) -> None:
        """Makes room for text."""
        self._progress.stop()
