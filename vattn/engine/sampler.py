"""Next tokens from logits, for all rows at once; nothing here waits for the device.

The order is vLLM's: log probabilities of the logits as they are, logits processors, then for rows
that are not greedy temperature, min_p, top_k, top_p, and a draw. What depends only on who the rows
are is prepared once and kept while they stay the same, which between two decode steps they mostly
do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from vattn.attention.upload import Uploader
from vattn.engine.draw import derive_seed, pick, stream_keys, uniforms
from vattn.engine.filters import Filters
from vattn.engine.sampled import Logprobs, Sampled
from vattn.request import Request

__all__ = ["LogitsProcessor", "MinTokens", "Sampler", "derive_seed"]


class LogitsProcessor(Protocol):
    """A change of logits before sampling; it may change what a greedy row takes.

    Penalties, biases, masks of structured output and the like are processors; the sampler applies
    them in the order in which it was given them. With asynchronous scheduling a request's latest
    token may be missing in ``tokens``; ``length`` counts it.
    """

    def update(self, requests: Sequence[Request]) -> bool:
        """Learns the rows, whenever they change. Whether it has anything to do for them."""
        ...

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """Changes float32 ``[R, V]`` in place, without waiting for the device."""
        ...


class MinTokens:
    """No token that would end a request before it has ``min_tokens``."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._nothing = torch.tensor(-math.inf, device=device)
        self._waiting: list[tuple[int, Request, int]] = []  # row, request, length that it waits for
        self._masked: list[int] = []  # rows that `_at` masks
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None

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
            where = [
                (row, token)
                for row, request, _ in self._waiting
                for token in request.stop_ids
                if token < self._vocab_size
            ]
            at = torch.tensor(where, dtype=torch.int64).reshape(-1, 2).T.contiguous()
            at = at.to(logits.device, non_blocking=True)
            self._masked, self._at = rows, (at[0], at[1])
        assert self._at is not None
        logits.index_put_(self._at, self._nothing)


class _Batch:
    """What is the same as long as the rows are."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self.requests = list(requests)
        params = [request.params for request in requests]
        greedy = [i for i, p in enumerate(params) if p.greedy]
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.drawn = [requests[i] for i in drawn]
        self.logprob_rows = logprobs
        self.logprob_counts = [min(params[i].logprobs or 0, vocab_size) for i in logprobs]
        # Of some rows only, their indices on the device; None if there are no others.
        mixed = bool(greedy and drawn)
        self.greedy_at = torch.tensor(greedy).to(device, non_blocking=True) if mixed else None
        self.drawn_at = torch.tensor(drawn).to(device, non_blocking=True) if mixed else None
        self.logprobs_at = torch.tensor(logprobs, dtype=torch.int64).to(device, non_blocking=True)
        if drawn:
            self.keys = stream_keys([request.seed for request in self.drawn])
            self.prompts = np.array([len(request.prompt_ids) for request in self.drawn])
            inverse = [1 / request.params.temperature for request in self.drawn]
            self.scale = torch.tensor(inverse, dtype=torch.float32)[:, None].to(
                device, non_blocking=True
            )
            self.scaled = any(value != 1 for value in inverse)
            self.filters = Filters([r.params for r in self.drawn], vocab_size, device)

    def uniforms(self, upload: Uploader) -> torch.Tensor:
        """float64 ``[drawn]``: of each request's seed and the number of its tokens so far."""
        lengths = np.array([request.length for request in self.drawn])
        (values,) = upload(uniforms(self.keys, lengths - self.prompts))
        return values


class Sampler:
    """Takes or draws the next token of every row.

    Args:
        vocab_size: logits per row.
        device: where the logits are.
        processors: applied after those of the sampler's own.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.processors = [MinTokens(vocab_size, self.device), *processors]
        self._upload = Uploader(self.device)
        self._active: list[LogitsProcessor] = []
        self._batch = _Batch([], vocab_size, self.device)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, requests: list[Request]) -> Sampled:
        """The next token of each request.

        What is drawn depends on nothing but the row's logits and parameters, its request's seed,
        and how many tokens that has so far, those in flight included.

        Args:
            logits: float ``[R, V]``, of the requests in their order; overwritten.
            requests: R of them.

        Returns:
            Tokens, on the device; a row whose logits are NaN, infinite or all -inf is told as bad
            and has some token.

        Raises:
            ValueError: logits of another shape.
        """
        if logits.shape != (len(requests), self.vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(requests)} requests and a "
                f"vocabulary of {self.vocab_size}; give one row of logits for each request"
            )
        if requests != self._batch.requests:  # compares identities
            self._batch = _Batch(requests, self.vocab_size, self.device)
            self._active = [each for each in self.processors if each.update(requests)]
        batch = self._batch
        logits = logits.float()
        raw = logits.index_select(0, batch.logprobs_at) if batch.logprob_rows else None
        for processor in self._active:
            processor.apply(logits, requests)
        tokens, bad = self._choose(batch, logits)
        if raw is None:
            return Sampled(tokens, bad)
        return Sampled(tokens, bad, self._logprobs(batch, raw, tokens))

    def _choose(self, batch: _Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and bad rows, whatever the rows are."""
        if not batch.drawn:
            return _greedy(logits)
        if batch.greedy_at is None or batch.drawn_at is None:
            return self._draw(batch, logits)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self.device)
        bad = torch.empty(len(logits), dtype=torch.bool, device=self.device)
        for at, (some, wrong) in (
            (batch.greedy_at, _greedy(logits.index_select(0, batch.greedy_at))),
            (batch.drawn_at, self._draw(batch, logits.index_select(0, batch.drawn_at))),
        ):
            tokens.index_copy_(0, at, some)
            bad.index_copy_(0, at, wrong)
        return tokens, bad

    def _draw(self, batch: _Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and bad rows of those that are not greedy. The logits are overwritten."""
        if batch.scaled:
            logits.mul_(batch.scale)
        probs = logits.softmax(1)
        if batch.filters:
            lowest = batch.filters.lowest(logits, probs)
            probs.mul_(logits.ge_(lowest))
        tokens, total = pick(probs, batch.uniforms(self._upload))
        return tokens, ~(total.isfinite() & (total > 0))

    def _logprobs(self, batch: _Batch, raw: torch.Tensor, tokens: torch.Tensor) -> Logprobs:
        """Of the rows that asked for them, from their logits as the model gave them."""
        chosen = tokens.index_select(0, batch.logprobs_at)[:, None]
        norm = raw.logsumexp(1, keepdim=True)
        logit = raw.gather(1, chosen)
        top, top_ids = raw.topk(max(batch.logprob_counts), 1)
        above = raw.gt_(logit).sum(1)  # as floats, which are added faster, and exactly
        return Logprobs(
            rows=batch.logprob_rows,
            counts=batch.logprob_counts,
            logprob=(logit - norm).squeeze(1),
            rank=above.long() + 1,
            top_ids=top_ids,
            top_logprobs=top - norm,
        )


def _greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the likeliest tokens of each row. NaN and infinities end up in the maximum."""
    best, tokens = logits.max(1)
    return tokens, ~best.isfinite()
