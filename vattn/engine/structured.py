"""Structured outputs: masks of the tokens that may follow, made while the model runs.

A mask has a bit for each token; see :mod:`vattn.engine.grammars` for where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.engine.grammars import Grammar
from vattn.engine.masks import Masks, advance, ask
from vattn.request import Request


def ended(requests: Sequence[Request]) -> list[tuple[Request, str | None]]:
    """Those whose output is complete and that no token can end, or that cannot go on.

    To be called when tokens have been appended. A request with stop tokens, the model's
    end-of-sequence tokens among them, is ended by one of these instead.

    Returns:
        Each with None if it ends well, else with what went wrong.
    """
    found: list[tuple[Request, str | None]] = []
    for request in requests:
        grammar: Grammar | None = request.grammar
        if grammar is None or request.stop_ids or request.finished:
            continue
        is_complete = advance(request) and ask(grammar, grammar.is_complete)
        if grammar.error is not None:
            found.append((request, _cannot_go_on(grammar)))
        elif is_complete:
            short = request.params.min_tokens - len(request.tokens) + len(request.prompt_ids)
            found.append((request, _too_short(request) if short > 0 else None))
    return found


def explain(request: Request) -> str | None:
    """Why no token could be sampled for a request; None if its structured output is no reason."""
    grammar: Grammar | None = request.grammar
    if grammar is None:
        return None
    if grammar.error is not None:
        return _cannot_go_on(grammar)
    params = request.params
    names = [name for name in ("allowed_token_ids", "bad_words") if getattr(params, name)]
    is_complete = ask(grammar, grammar.is_complete)
    is_allowed = is_complete or not params.allowed_token_ids
    is_allowed = is_allowed or ask(grammar, grammar.allows_any, params.allowed_token_ids)
    if grammar.error is not None:
        return _cannot_go_on(grammar)
    if is_complete:
        return _too_short(request) if len(request.output_ids) < params.min_tokens else None
    if is_allowed and not params.bad_words:
        return None
    return (
        f"no token can be sampled: {' and '.join(names)} exclude every token that structured_"
        f"outputs allow after {len(request.output_ids)} tokens; change one of them"
    )


def _cannot_go_on(grammar: Grammar) -> str:
    return f"its structured output cannot go on: {grammar.error}"


def _too_short(request: Request) -> str:
    return (
        f"its structured output is complete after {len(request.output_ids)} tokens, and "
        f"min_tokens={request.params.min_tokens} asks for more; lower it"
    )


class StructuredMasks:
    """Leaves each row the tokens that its structured output allows; a processor of the sampler.

    Where the output may end, the tokens that end the request are allowed, and the model's
    end-of-sequence tokens nowhere else. All tokens of a request have to be on the host.

    Args:
        vocab_size: logits per row.
        upload: to where the logits are.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        self._vocab_size = vocab_size
        self._upload = upload
        (self._limits,) = upload(_limits())
        self._masks = Masks(vocab_size)
        self._worker: ThreadPoolExecutor | None = None  # made with the first request
        self._begun: tuple[list[Request], Future[None]] | None = None
        self._requests: list[Request] = []  # those with a structured output
        self._at: torch.Tensor | None = None  # their rows; None for all

    def begin(self, requests: Sequence[Request]) -> None:
        """Starts to make masks in the background, for the rows of the next :meth:`apply`."""
        self._drop()
        some = [request for request in requests if request.grammar is not None]
        if some:
            rows = self._masks.advance(some)
            self._worker = self._worker or ThreadPoolExecutor(1, "vattn-masks")
            try:
                self._begun = some, self._worker.submit(self._masks.fill, rows)
            except RuntimeError:  # there is no thread to be had
                self._masks.fill(rows)

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        self._requests = [requests[row] for row in rows]
        self._at = None
        if rows and len(rows) < len(requests):
            (self._at,) = self._upload(np.array(rows, np.int64))
        return bool(rows)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        (words,) = self._upload(self._take())
        octets = words.view(torch.uint8)
        limits = self._limits.index_select(0, octets.flatten().int()).view(len(words), -1)
        limits = limits[:, : self._vocab_size]
        if self._at is None:
            torch.minimum(logits, limits, out=logits)
        else:
            rows = logits.index_select(0, self._at)
            logits.index_copy_(0, self._at, torch.minimum(rows, limits, out=rows))

    def check(self) -> None:
        """Verifies that there is a mask for each row, of no more than its request has."""
        self._masks.check()

    def close(self) -> None:
        """Ends the thread."""
        self._drop()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _take(self) -> npt.NDArray[np.int32]:
        """int32 ``[r, words]``: a bit for each token, for each of the requests."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun[1].result()
        if begun is None or begun[0] != self._requests:  # compares identities
            self._masks.fill(self._masks.advance(self._requests))
        return self._masks.of(len(self._requests)).view(np.int32)

    def _drop(self) -> None:
        """Waits for masks that nobody took, since their step went wrong; so may they have."""
        if self._begun is not None:
            self._begun[1].exception()
            self._begun = None


def _limits() -> npt.NDArray[np.float32]:
    """float32 ``[256, 8]``: what eight logits are cut to by eight bits of a mask, lowest first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(np.inf), np.float32(-np.inf))
