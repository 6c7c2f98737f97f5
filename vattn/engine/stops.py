"""Where a stop string ends a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for the first of some strings in text that comes in pieces.

    The first is the one that is complete first, and of those the longest, so it does not depend on
    how the text was cut. Text that may be the beginning of one is held back.
    """

    __slots__ = ("_beginnings", "_first", "_held", "_include", "_longest", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        self._longest = max(map(len, stops)) - 1
        self._first = {stop[0] for stop in stops}
        self._held = ""

    @property
    def held(self) -> str:
        """What is held back."""
        return self._held

    def push(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """Takes more text.

        Args:
            text: what comes next.
            may_stop: a stop string that ends in it counts.

        Returns:
            Text to let go, and the stop string that ends it, if one does.
        """
        held = len(self._held)
        if not held and self._first.isdisjoint(text):  # the usual case
            return text, None
        text = self._held + text
        if may_stop:
            matches = [
                (at + len(stop), at, stop)
                for stop in self._stops
                if (at := text.find(stop, max(0, held - len(stop) + 1))) >= 0
            ]
            if matches:
                end, at, stop = min(matches)
                self._held = ""
                return text[: end if self._include else at], stop
        keep = min(self._longest, len(text))
        while keep and text[-keep:] not in self._beginnings:
            keep -= 1
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, as no more text will come."""
        held, self._held = self._held, ""
        return held
