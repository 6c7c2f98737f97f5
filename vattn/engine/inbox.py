"""What callers of any thread ask of an engine, until its own thread takes it in."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vattn.engine.outputs import OutputProcessor
from vattn.engine.scheduler import Scheduler
from vattn.request import Request


class Inbox:
    """New requests and aborts, in their order.

    ``add`` and ``abort`` may be called from any thread; everything else from the engine's.

    Args:
        scheduler: where requests go.
        outputs: reads their texts.
    """

    def __init__(self, scheduler: Scheduler, outputs: OutputProcessor) -> None:
        self._scheduler = scheduler
        self._outputs = outputs
        self._items: list[Request | str] = []
        self._lock = threading.Lock()
        self._samples: dict[str, list[Request]] = {}  # unfinished, by the prompt's name

    def __bool__(self) -> bool:
        """Whether something is to be taken in."""
        return bool(self._items)

    def add(self, request: Request) -> None:
        """A new request."""
        with self._lock:
            self._items.append(request)

    def abort(self, ids: Iterable[str]) -> None:
        """The end of requests, or of all samples of prompts; unknown ones are left as they are."""
        with self._lock:
            self._items.extend(ids)

    def take(self) -> None:
        """Takes in what has come. If that is interrupted, the rest comes first the next time."""
        with self._lock:
            items, self._items = self._items, []
        for number, item in enumerate(items):
            try:
                if isinstance(item, Request):
                    self._take_in(item)
                    continue
                for sample in self._samples.get(item, ()):
                    self._scheduler.abort(sample)
                self._scheduler.abort(item)
            except BaseException:
                # Who was not taken in yet is not among those that the interruption ends.
                mine = isinstance(item, str) or item.finished or self._scheduler.knows(item)
                with self._lock:
                    self._items[:0] = items[number + mine :]
                raise

    def _take_in(self, request: Request) -> None:
        try:
            self._outputs.add(request)
            self._scheduler.add(request)
        except Exception as error:  # of this request alone
            self._outputs.ended([request])
            self._scheduler.refuse(request, f"{type(error).__name__}: {error}")
        else:
            if request.params.n > 1:
                self._samples.setdefault(_prompt_of(request), []).append(request)

    def forget(self, request: Request) -> None:
        """A request has ended: it is no longer one of its prompt's samples."""
        name = _prompt_of(request)
        samples = self._samples.get(name, [])
        if request in samples:
            samples.remove(request)
            if not samples:
                del self._samples[name]


def _prompt_of(request: Request) -> str:
    """The name of the prompt of a sample; see :meth:`vattn.engine.engine.Engine.make_requests`."""
    return request.id.rpartition(".")[0]
