"""Where a stop string ends a text that comes in pieces."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Looks for the first of some strings in text that comes in pieces.

    The first is the one that is complete first, and of those the longest, so it does not depend on
    how the text was cut. Text that may be the beginning of one is held back. Time and memory are
    linear in the text, however long the strings are.
    """

    __slots__ = ("_first", "_held", "_include", "_size", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._include = include
        self._first = {stop[0] for stop in stops}
        self._held: deque[str] = deque()  # not one string, which every piece would copy
        self._size = 0  # characters of it

    @property
    def held(self) -> str:
        """What is held back."""
        return "".join(self._held)

    def push(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """Takes more text.

        Args:
            text: what comes next.
            may_stop: a stop string that ends in it counts.

        Returns:
            Text to let go, and the stop string that ends it, if one does.
        """
        if not text or (not self._size and self._first.isdisjoint(text)):  # the usual case
            return text, None
        size = self._size
        self._held.append(text)
        self._size += len(text)
        matches = []
        for stop in self._stops:
            end = stop.push(text, may_stop)
            if end >= 0:
                end += size
                matches.append((end, end - len(stop.text), stop.text))
        if matches:
            end, begin, found = min(matches)
            new = self._let_go(end if self._include else begin)
            self.flush()
            return new, found
        return self._let_go(self._size - max(stop.matched for stop in self._stops)), None

    def flush(self) -> str:
        """What was held back, as no more text will come."""
        for stop in self._stops:
            stop.matched = 0
        return self._let_go(self._size)

    def _let_go(self, size: int) -> str:
        """Takes so many characters off the front of what is held."""
        self._size -= size
        parts = []
        while size:
            part = self._held.popleft()
            if len(part) > size:
                self._held.appendleft(part[size:])
                part = part[:size]
            parts.append(part)
            size -= len(part)
        return "".join(parts)


class _Stop:
    """How far one stop string has been seen: the search of Knuth, Morris and Pratt.

    Its table has an entry for each character that was ever matched, and not for all of the string,
    which would be time and memory for something that hardly any text comes near.
    """

    __slots__ = ("_shorter", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters of it that the text so far ends in, less than all
        # Of its first n characters: how many they both begin and end with, but for themselves.
        self._shorter = array("i", [0, 0])

    def push(self, text: str, may_stop: bool) -> int:
        """Where the stop string first ends in the next piece of text; -1 if it does not."""
        stop, shorter, matched = self.text, self._shorter, self.matched
        at, size = 0, len(text)
        while at < size:
            if not matched:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            character = text[at]
            at += 1
            while matched and stop[matched] != character:
                matched = shorter[matched]
            if stop[matched] != character:
                continue
            matched += 1
            if matched == len(shorter):
                self._extend()
            if matched == len(stop):
                matched = shorter[matched]
                if may_stop:
                    self.matched = matched
                    return at
        self.matched = matched
        return -1

    def _extend(self) -> None:
        """The entry of one character more."""
        stop, shorter = self.text, self._shorter
        last = len(shorter) - 1
        both = shorter[last]
        while both and stop[both] != stop[last]:
            both = shorter[both]
        shorter.append(both + (stop[both] == stop[last]))
