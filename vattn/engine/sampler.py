"""Next tokens from logits, for all rows at once; nothing here waits for the device.

The order is vLLM's: log probabilities of the logits as they are; allowed tokens, bad words, minimum
length, biases, penalties; further processors, such as the masks of structured output, which come
last so that nothing opens again what they rule out; then, for rows that are not greedy,
temperature, min_p, top_k, top_p, and a draw. What depends only on who the rows are is prepared once
and kept while they stay the same, which between two decode steps they mostly do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vattn.attention.upload import Uploader
from vattn.engine.allowed_tokens import AllowedTokens
from vattn.engine.draw import derive_seed, pick, stream_keys, uniforms
from vattn.engine.filters import Filters
from vattn.engine.largest import Largest
from vattn.engine.logprobs import LogprobRows, Scores
from vattn.engine.penalties import Penalties
from vattn.engine.pieces import pieces
from vattn.engine.processors import BadWords, LogitBias, LogitsProcessor, MinTokens
from vattn.engine.sampled import Sampled
from vattn.request import Request

__all__ = ["LogitsProcessor", "Sampler", "derive_seed"]

_SMALLEST = np.finfo(np.float32).smallest_normal


class _Uploads(NamedTuple):
    """What brings a batch to the device.

    An uploader has eight buffers and waits for the first one when it needs a ninth. Two steps are
    under way at a time, so none of these may make more than four transfers in a step, nor may that
    of a processor.
    """

    rows: Uploader
    filters: Uploader
    logprobs: Uploader
    scores: Uploader


class _Batch:
    """What is the same as long as the rows are."""

    def __init__(
        self,
        requests: Sequence[Request],
        offsets: Sequence[int] | None,
        vocab_size: int,
        uploads: _Uploads,
    ) -> None:
        self.requests = list(requests)
        self.offsets = None if offsets is None else list(offsets)
        self._upload = upload = uploads.rows
        params = [request.params for request in requests]
        greedy = [i for i, p in enumerate(params) if p.greedy]
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        self.drawn = [requests[i] for i in drawn]
        wanted = [p.logprobs for p in params]
        self.logprobs = LogprobRows(wanted, vocab_size, uploads.logprobs)
        # Of some rows only, their indices on the device; None if there are no others.
        self.greedy_at = self.drawn_at = None
        if greedy and drawn:
            self.greedy_at, self.drawn_at = upload(
                np.array(greedy, np.int64), np.array(drawn, np.int64)
            )
        if drawn:
            self._keys = stream_keys([request.seed for request in self.drawn])
            # A request's tokens so far are its length less these.
            self._starts = np.array([len(request.prompt_ids) for request in self.drawn])
            if offsets is not None:
                self._starts -= np.array([offsets[i] for i in drawn])
            inverse = np.array([[1 / request.params.temperature] for request in self.drawn])
            # Not 0, nor what counts as 0 on a GPU: the -inf of what is ruled out would become NaN.
            (self.scale,) = upload(np.maximum(inverse, _SMALLEST).astype(np.float32))
            self.scaled = bool((inverse != 1).any())
            self.filters = Filters([r.params for r in self.drawn], vocab_size, uploads.filters)

    def is_of(self, requests: list[Request], offsets: list[int] | None) -> bool:
        """Whether these are the rows; compares identities."""
        return requests == self.requests and offsets == self.offsets

    def uniforms(self) -> torch.Tensor:
        """float64 ``[drawn]``: of each request's seed and the number of its tokens so far."""
        lengths = np.array([request.length for request in self.drawn])
        (values,) = self._upload(uniforms(self._keys, lengths - self._starts))
        return values


class Sampler:
    """Takes or draws the next token of every row, and tells how likely the model finds tokens.

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
        self._uploads = _Uploads(*(Uploader(self.device) for _ in _Uploads._fields))
        own = (AllowedTokens, BadWords, MinTokens, LogitBias, Penalties)
        self.processors: list[LogitsProcessor] = [
            *(kind(vocab_size, Uploader(self.device)) for kind in own),
            *processors,
        ]
        self._active: list[LogitsProcessor] = []
        self._batch = _Batch([], None, vocab_size, self._uploads)

    def forget(self) -> None:
        """Lets go of the rows of the last step, since nobody is left."""
        self._batch = _Batch([], None, self.vocab_size, self._uploads)
        self._active = [each for each in self.processors if each.update([])]

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, requests: list[Request], offsets: list[int] | None = None
    ) -> Sampled:
        """The next token of each row.

        What is drawn depends on nothing but the row's logits and parameters, its request's seed,
        and how many tokens that has at the row: those so far, those in flight included, and the
        drafts before it.

        Args:
            logits: float ``[R, V]``, of the requests in their order; overwritten.
            requests: R of them. One that verifies k drafts is there k + 1 times.
            offsets: how many drafts come before each row; None for none anywhere.

        Returns:
            Tokens, on the device; a row whose logits are NaN, infinite or all -inf is told as bad
            and has some token.

        Raises:
            ValueError: logits of another shape.
        """
        self._check_shape(logits, len(requests), "requests")
        if not self._batch.is_of(requests, offsets):
            self._batch = _Batch(requests, offsets, self.vocab_size, self._uploads)
            self._active = [each for each in self.processors if each.update(requests)]
        batch = self._batch
        logits = logits.float().contiguous()
        raw = None
        if batch.logprobs:
            raw = logits.clone() if self._active or batch.drawn else logits
        for processor in self._active:
            processor.apply(logits, requests)
        largest = Largest(logits)
        tokens, bad = self._choose(batch, logits, largest)
        if raw is None:
            return Sampled(tokens, bad)
        seen = largest if raw is logits else None
        return Sampled(tokens, bad, batch.logprobs.of(raw, tokens, seen))

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, targets: list[int], counts: list[int]) -> Scores:
        """How likely the model finds given tokens, as ``prompt_logprobs`` tells.

        Args:
            logits: float ``[P, V]``, of the rows before the tokens.
            targets: P tokens.
            counts: of the likeliest tokens that are told beside each; -1 for all.

        Returns:
            Log probabilities on the device, for :meth:`Sampled.with_scored`; P may be 0.

        Raises:
            ValueError: logits of another shape.
        """
        self._check_shape(logits, len(targets), "targets")
        upload = self._uploads.scores
        rows = LogprobRows(counts, self.vocab_size, upload)
        (chosen,) = upload(np.array(targets, np.int64))
        return Scores(rows.of(logits.float().contiguous(), chosen), targets)

    def _check_shape(self, logits: torch.Tensor, rows: int, what: str) -> None:
        if logits.shape != (rows, self.vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {rows} {what} and a vocabulary of "
                f"{self.vocab_size}; give one row of logits for each"
            )

    def _choose(
        self, batch: _Batch, logits: torch.Tensor, largest: Largest
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and bad rows, whatever the rows are."""
        if not batch.drawn:
            return _greedy(largest)
        if batch.greedy_at is None or batch.drawn_at is None:
            return self._draw(batch, logits)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self.device)
        bad = torch.empty(len(logits), dtype=torch.bool, device=self.device)
        for at, (some, wrong) in (
            (batch.greedy_at, _greedy(Largest(logits.index_select(0, batch.greedy_at)))),
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
            for piece in pieces(logits):
                probs[piece].mul_(logits[piece].ge_(lowest[piece]))
        tokens, total = pick(probs, batch.uniforms())
        return tokens, ~(total.isfinite() & (total > 0))


def _greedy(largest: Largest) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the likeliest tokens of each row. NaN and infinities end up in the maximum."""
    best, tokens = largest.first()
    return tokens, ~best.isfinite()
