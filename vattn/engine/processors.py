"""What changes logits before sampling: the contract, and the simple ones.

Nearly everything is a list of places in the logits, row after row; only what is there is touched.
The lists are made when the rows change, and go to the device without anybody waiting for it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.request import Request

Ids = npt.NDArray[np.int64]
T = TypeVar("T")

_NONE = np.zeros(0, np.int64)


class LogitsProcessor(Protocol):
    """A change of logits before sampling; it may change what a greedy row takes.

    The sampler applies its own ones, then those that it was given, in their order. A request that
    verifies drafts has several rows, one after another. With asynchronous scheduling a request's
    latest token may be missing in ``tokens``, unless it ``needs_tokens``; ``length`` counts it.
    """

    def update(self, requests: Sequence[Request]) -> bool:
        """Learns the rows, whenever they change. Whether it has anything to do for them."""
        ...

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """Changes contiguous float32 ``[R, V]`` in place, without waiting for the device."""
        ...


class OwnProcessor:
    """What the sampler's own processors are made with.

    Args:
        vocab_size: logits per row.
        upload: to the device.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        self._vocab_size = vocab_size
        self._upload = upload


class PerRequest(Generic[T]):
    """Something made once for each request, and forgotten some time after the request has ended."""

    def __init__(self, make: Callable[[Request], T]) -> None:
        self._make = make
        self._made: dict[Request, T] = {}

    def __getitem__(self, request: Request) -> T:
        found = self._made.get(request)
        if found is None:
            found = self._made[request] = self._make(request)
        return found

    def __len__(self) -> int:
        return len(self._made)

    def forget(self, request: Request) -> None:
        """It is made again when it is asked for."""
        self._made.pop(request, None)

    def forget_ended(self) -> None:
        """Called when rows change."""
        for request in [each for each in self._made if each.finished]:
            del self._made[request]


class BadWords(OwnProcessor):
    """No token that would complete one of ``bad_words`` in the output."""

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        super().__init__(vocab_size, upload)
        self._words = PerRequest(_Words)
        self._always: torch.Tensor | None = None
        self._watched: list[tuple[int, Request, _Words]] = []  # that have words of several tokens

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`LogitsProcessor`."""
        self._words.forget_ended()
        always = []
        self._watched, self._always = [], None
        for row, request in enumerate(requests):
            if not request.bad_words_ids:
                continue
            words = self._words[request]
            if len(words.single):
                always.append((row, words.single))
            if words.longer:
                self._watched.append((row, request, words))
        if always:
            (self._always,) = self._upload(places(always, self._vocab_size))
        return bool(always or self._watched)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`LogitsProcessor`."""
        flat = logits.view(-1)
        if self._always is not None:
            flat.index_fill_(0, self._always, -math.inf)
        now = [
            row * self._vocab_size + token
            for row, request, words in self._watched
            for token in words.completed_by(request)
        ]
        if now:
            (at,) = self._upload(np.array(now, np.int64))
            flat.index_fill_(0, at, -math.inf)


class _Words:
    """The bad words of a request, by what must come before their last token."""

    def __init__(self, request: Request) -> None:
        words = request.bad_words_ids
        self.single = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self.longer: dict[int, list[tuple[list[int], int]]] = {}  # by the token before the last
        for word in words:
            if len(word) > 1:
                self.longer.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))

    def completed_by(self, request: Request) -> Iterable[int]:
        """The tokens that would complete a word now; words begin in the output."""
        tokens, first = request.tokens, len(request.prompt_ids)
        for prefix, last in self.longer.get(tokens[-1], ()):
            start = len(tokens) - len(prefix)
            if start >= first and tokens[start:] == prefix:
                yield last


class MinTokens(OwnProcessor):
    """No token that would end a request before it has ``min_tokens``."""

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        super().__init__(vocab_size, upload)
        self._waiting: list[tuple[int, Request, int]] = []  # row, request, length that it waits for
        self._masked: list[int] = []  # rows that `_at` masks
        self._at: torch.Tensor | None = None

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`LogitsProcessor`."""
        self._masked = []
        self._waiting = []
        for row, request in enumerate(requests):
            if request.params.min_tokens and request.stop_ids:
                length = len(request.prompt_ids) + request.params.min_tokens
                if request.length < length:
                    self._waiting.append((row, request, length))
        return bool(self._waiting)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`LogitsProcessor`."""
        self._waiting = [entry for entry in self._waiting if entry[1].length < entry[2]]
        rows = [row for row, _, _ in self._waiting]
        if not rows:
            return
        if rows != self._masked:
            at = [
                row * self._vocab_size + token
                for row, request, _ in self._waiting
                for token in request.stop_ids
                if token < self._vocab_size  # a model may name an end that it cannot write
            ]
            (self._at,) = self._upload(np.array(at, np.int64))
            self._masked = rows
        assert self._at is not None
        logits.view(-1).index_fill_(0, self._at, -math.inf)


class LogitBias(OwnProcessor):
    """Adds ``logit_bias``. What is ruled out stays so."""

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        super().__init__(vocab_size, upload)
        self._biases = PerRequest(_biases)
        self._at: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`LogitsProcessor`."""
        self._biases.forget_ended()
        rows, values = [], []
        for row, request in enumerate(requests):
            if request.params.logit_bias:
                ids, biases = self._biases[request]
                rows.append((row, ids))
                values.append(biases)
        if rows:
            at = places(rows, self._vocab_size)
            self._at, self._values = self._upload(at, np.concatenate(values))
        return bool(rows)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`LogitsProcessor`."""
        assert self._at is not None
        assert self._values is not None
        # Each place is there once: no order of additions to depend on.
        logits.view(-1).index_add_(0, self._at, self._values)


def _biases(request: Request) -> tuple[Ids, npt.NDArray[np.float32]]:
    biases = request.params.logit_bias
    assert biases is not None
    return np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)


def places(ids: Sequence[tuple[int, Ids | array[int]]], vocab_size: int) -> Ids:
    """int64: where tokens of rows are in the logits, flattened; for pairs of row and tokens."""
    if not ids:
        return _NONE
    rows = np.array([row * vocab_size for row, _ in ids], np.int64)
    found = np.repeat(rows, [len(each) for _, each in ids])
    found += np.concatenate([np.asarray(each) for _, each in ids])
    return found
