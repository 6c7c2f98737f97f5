"""Requests that wait: in order of a key, and for the prompt that another one computes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from vattn.request import Request, Status


class RequestQueue:
    """Requests in the order of a key. One that has finished elsewhere is skipped and forgotten."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Request]] = []
        self._finished = 0  # of those in the heap

    def __len__(self) -> int:
        return len(self._heap) - self._finished

    def __iter__(self) -> Iterator[Request]:
        """Those in it, in no order."""
        return (request for _, _, request in self._heap if not request.finished)

    def push(self, key: Any, request: Request) -> None:
        """Adds one; equal keys go by arrival."""
        heapq.heappush(self._heap, (key, request.order, request))

    def first(self) -> Request | None:
        """The one with the smallest key."""
        heap = self._heap
        while heap and heap[0][2].finished:
            heapq.heappop(heap)
            self._finished -= 1
        return heap[0][2] if heap else None

    def pop(self) -> Request:
        """Takes :meth:`first` out."""
        if self.first() is None:
            raise IndexError("no request is in this queue")
        return heapq.heappop(self._heap)[2]

    def forget(self) -> None:
        """Says that one in it has just finished. Half of it may be such, then it is cleaned."""
        self._finished += 1
        if 2 * self._finished > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapq.heapify(self._heap)
            self._finished = 0

    def check(self) -> None:
        """Verifies the count."""
        assert len(self) == len(list(self)), (len(self), list(self))


class WaitingRoom:
    """Requests without a slot, and who is next.

    Those that sample a prompt which another, their ``source``, has yet to compute are *held*: they
    queue when it has, or when it has ended, and then share its pages instead of computing it again.

    Args:
        order: of a request in the queue; the smallest is next.
    """

    def __init__(self, order: Callable[[Request], Any]) -> None:
        self._order = order
        self._queue = RequestQueue()
        self._held: dict[Request, list[Request]] = {}  # by source

    def __len__(self) -> int:
        return len(self._queue) + sum(map(len, self._held.values()))

    def __iter__(self) -> Iterator[Request]:
        """Those in it, in no order."""
        yield from self._queue
        for siblings in self._held.values():
            yield from siblings

    def add(self, request: Request) -> None:
        """Takes in a request: to the queue, or to be held for its source."""
        source = request.source
        if source is not None and source.finished and not has_scores(source):
            request.prompt_logprobs = source.prompt_logprobs  # for it to find the rest
        if source is None or source.finished or has_prompt(source):
            self.push(request)
        else:
            self._held.setdefault(source, []).append(request)

    def push(self, request: Request) -> None:
        """Queues a request at the place that its order gives it."""
        self._queue.push(self._order(request), request)

    def first(self) -> Request | None:
        """Who is next, if anybody."""
        return self._queue.first()

    def pop(self) -> Request:
        """Takes :meth:`first` out."""
        return self._queue.pop()

    def wake(self) -> None:
        """Queues those whose source has computed its prompt. Its step must have been launched."""
        for source in [source for source in self._held if has_prompt(source)]:
            self._release(source)

    def ended(self, request: Request) -> None:
        """Forgets a request that was here and has just been finished."""
        siblings = self._held.get(request.source, []) if request.source is not None else []
        if request not in siblings:
            self._queue.forget()
            return
        siblings.remove(request)
        if request.source is not None and not siblings:
            del self._held[request.source]

    def orphan(self, source: Request) -> None:
        """Queues those held for a source that has ended; they go on without it.

        If the log probabilities of the prompt are wanted, and are not known yet, it is for the
        first of them to find the rest. It adds them to the same list, and the others wait for it.
        """
        siblings = self._held.pop(source, [])
        for sibling in siblings:
            sibling.source = None
        if siblings and not has_scores(source):
            heir, *siblings = siblings
            heir.prompt_logprobs = source.prompt_logprobs
            self.push(heir)
            for sibling in siblings:
                sibling.source = heir
            if siblings:
                self._held[heir] = siblings
            return
        for sibling in siblings:
            self.push(sibling)

    def _release(self, source: Request) -> None:
        for request in self._held.pop(source):
            self.push(request)

    def check(self) -> None:
        """Verifies that nobody in it has a slot, and that nobody is held in vain."""
        self._queue.check()
        for request in self:
            assert request.status is Status.WAITING, request
            assert request.slot == -1, request
            assert request.computed == 0, request
        for source, siblings in self._held.items():
            assert not source.finished, source
            assert siblings, source
            assert all(request.source is source for request in siblings), source


def has_scores(request: Request) -> bool:
    """Whether the log probabilities of its prompt are known, as far as they are wanted of it."""
    return request.prompt_logprobs is None or len(request.prompt_logprobs) == len(
        request.prompt_ids
    )


def has_prompt(request: Request) -> bool:
    """Whether the K and V of its whole prompt are in its slot, or on their way."""
    return request.computed >= len(request.prompt_ids)
